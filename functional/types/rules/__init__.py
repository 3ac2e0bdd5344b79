"""The table of operator rules."""
