"""DeepSpeed: its checks, memory, messages, and the wrapping of modules."""
