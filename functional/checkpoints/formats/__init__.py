"""Readers of checkpoint formats, one file each; ``detect.py`` has the table of them."""
