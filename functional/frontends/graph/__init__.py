"""The parts of ``infer_schedule``: the exported graph of a model, and the axes of its tensors."""
