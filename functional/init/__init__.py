"""Initial values: from init code to init programs to numbers."""
