"""How values are made: from init code to init programs to numbers."""
