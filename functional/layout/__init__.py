"""How modules compute once they are split."""
