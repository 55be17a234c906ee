"""What the workers run, and the cluster they run on. Knows `workbench.data`."""
