"""Weights in files: formats, names, and reading the bytes of each rank's shards."""
