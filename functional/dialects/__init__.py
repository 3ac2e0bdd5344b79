"""Runtimes, a folder each: their checks, memory, messages, and the wrapping of modules."""

from .dialect import Dialect, dialect_of, find_dialect

__all__ = ["Dialect", "dialect_of", "find_dialect"]
