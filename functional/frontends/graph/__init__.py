"""What the exported graph of a model says of its axes: what ``infer_schedule`` is made of."""
