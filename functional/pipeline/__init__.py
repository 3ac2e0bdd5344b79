"""A model exported and cut into stages."""
