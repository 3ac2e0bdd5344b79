"""Weights in files: what lies where, under which names, read and written."""
