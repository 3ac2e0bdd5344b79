"""What the verbs of a schedule are made of: pure."""
