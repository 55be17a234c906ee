"""From the files that a run left to tables and charts. Knows no other wing and needs no TensorFlow."""
