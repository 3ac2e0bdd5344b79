"""Read, copy and follow the user's module."""
