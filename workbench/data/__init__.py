"""Radiographs on disk to batches: tables, splits, shards and the input pipeline. Knows no other wing."""
