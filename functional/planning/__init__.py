"""From a declared tree to the list of steps: pure."""
