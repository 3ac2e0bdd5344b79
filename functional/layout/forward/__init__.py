"""Try a split model on fake tensors: its problems, its traffic, its saved activations."""
