"""Weights and optimizer states out of a running job, and back."""
