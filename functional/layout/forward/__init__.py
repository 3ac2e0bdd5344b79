"""A split model tried on fake tensors: what is wrong, what is sent, what is kept."""
