"""Change how modules compute once they are split."""
