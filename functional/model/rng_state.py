"""The global random generators: seeds from (seed, path), and blocks after which the user's state is restored."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

RngState = tuple[Tensor, Tensor | None] | bool
"""States of torch's generators on the CPU, and on the GPU if it is used; on fake tensors, whether their numbers differ."""


class _Forks(threading.local):
    """The calls with random numbers of their own that are running in a thread, outermost first."""

    def __init__(self) -> None:
        self.outside: list[RngState | None] = []
        """States of the generators outside of each call; None where these run again."""
        self.differ = False
        """Whether numbers would differ along ``tensor``, on fake tensors, which draw none."""


FORKS = _Forks()
"""Of this thread."""


def derive_seed(seed: int, path: str) -> int:
    """Return 63 bits that depend on the plan's seed and a path alone: BLAKE2b of both.

    >>> derive_seed(0, "lm_head.weight") == derive_seed(0, "lm_head.weight") != derive_seed(1, "lm_head.weight")
    True
    """
    digest = blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def python_state() -> tuple[object, ...]:
    """Return the state of Python's and NumPy's global generators, for comparison."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


class Reseeding:
    """Notice code that seeds or sets torch's generator while it runs on fake tensors, which draw nothing from it."""

    def __init__(self) -> None:
        self.seen = False
        with _disable_current_modes():
            self._expected = torch.default_generator.get_state()

    def draw(self) -> None:
        """Draw a number for a random operator, so that the generator advances and a reset can be noticed."""
        with _disable_current_modes():
            self.seen |= not torch.equal(torch.default_generator.get_state(), self._expected)
            torch.empty(1, device="cpu").uniform_()
            self._expected = torch.default_generator.get_state()


@contextmanager
def own_generators(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python within the block; restore their state after it.

    All ranks draw alike where it begins. Calls with random numbers of their own that an error ends within it do not stay
    open: while torch compiles or exports, it calls no hooks after an error.

    Args:
        seed: 63 bits.
        device: CUDA device whose generator is seeded too.
    """
    cuda = torch.cuda.default_generators[device.index or 0] if device is not None and device.type == "cuda" else None
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    before = cuda.get_state() if cuda is not None else None
    differ, outside = FORKS.differ, FORKS.outside
    FORKS.differ, FORKS.outside = False, []
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  init code draws from the global generator
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.default_generator.set_state(cpu)
        if cuda is not None and before is not None:
            cuda.set_state(before)
        FORKS.differ, FORKS.outside = differ, outside
