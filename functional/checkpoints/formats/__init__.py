"""One file a format: what a folder of it holds, read from headers."""
