"""Compile functions for the CPU, and cache the machine code on disk where that is possible."""

from __future__ import annotations

from typing import Any

import numba


def compiled(function: Any) -> Any:
    """Return a function compiled by numba, which releases the GIL while it runs."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache: each process compiles anew
        return numba.njit(nogil=True)(function)
