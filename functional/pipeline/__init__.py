"""Export a model and cut it into pipeline stages."""
