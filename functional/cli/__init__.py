"""The command line: ``shardplan plan``, ``show``, ``audit``, ``diff``, ``search``, ``explain``, ``completion``."""

from .group import main as main

__all__ = ["main"]
