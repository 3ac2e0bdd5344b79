"""DeepSpeed: what it takes, how it wraps a module, and what it keeps and sends while it trains."""
