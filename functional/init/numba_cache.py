"""Functions compiled for the CPU, kept on disk where that is possible."""

from __future__ import annotations

from typing import Any

import numba


def compiled(function: Any) -> Any:
    """Return a function compiled by numba, that lets other threads run meanwhile."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep what is compiled: each process does it anew
        return numba.njit(nogil=True)(function)
