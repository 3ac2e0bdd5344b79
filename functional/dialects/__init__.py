"""Runtimes, a folder each: what they take, how they wrap a module, and what they keep and send while they train."""

from .dialect import Dialect, dialect_of, find_dialect

__all__ = ["Dialect", "dialect_of", "find_dialect"]
