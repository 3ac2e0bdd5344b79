"""Which modules are around a tensor, by its path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def module_of(path: str) -> str:
    """Return the module that holds a tensor.

    >>> module_of("layers.3.up.weight"), module_of("weight")
    ('layers.3.up', '')
    """
    return path.rpartition(".")[0]


def block_of(module: str) -> str:
    """Return the repeated layer that a module is in, ``""`` for none.

    >>> block_of("model.layers.3.mlp.up"), block_of("model.norm")
    ('model.layers.3', '')
    """
    names = module.split(".")
    numbered = [at for at, name in enumerate(names) if name.isdigit() and at < len(names) - 1]
    return ".".join(names[: numbered[-1] + 1]) if numbered else ""


def modules_around(path: str) -> Iterator[str]:
    """Iterate over the modules around a tensor, the model itself (``""``) among them.

    >>> list(modules_around("layers.3.weight"))
    ['', 'layers', 'layers.3']
    """
    names = path.split(".")
    return (".".join(names[:depth]) for depth in range(len(names)))


def spans_of(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the places of the first and the last tensor in every module.

    >>> spans_of(["a.weight", "b.weight", "b.bias"])["b"]
    (1, 2)
    """
    spans: dict[str, tuple[int, int]] = {}
    for place, path in enumerate(paths):
        for module in modules_around(path):
            spans[module] = (spans.get(module, (place, place))[0], place)
    return spans
