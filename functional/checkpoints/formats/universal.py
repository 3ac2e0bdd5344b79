"""A universal checkpoint that ``deepspeed.checkpoint.ds_to_universal`` wrote, read without unpickling.

``zero/<path>/fp32.pt`` has the weights of a parameter; ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt`` have its states in
Adam. All are whole, without padding. No file outside ``zero/`` is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import frozen
from frozendict import frozendict

from ....specs.errors import PlanError, Problem
from ....specs.stored import Contents, Folder, Part, StoredFile
from .inert_pickle import Entries, Record
from .torch_save import read_saved

ZERO = "zero"
"""The folder that marks a universal checkpoint."""

WEIGHTS = "fp32"

_NAMES = frozenset({"deepspeed.checkpoint.universal_checkpoint.SubparamShape"})  # how tensor parallelism cut it
_AGAIN = "Copy the folder again, or run ds_to_universal again"


@frozen
class UniversalStates:
    """Optimizer states of parameters, by the state's name and the parameter's path.

    Args:
        folder: The files.
        tensors: Parts of each state that is a tensor.
        numbers: States that are plain numbers, such as ``step``.
    """

    folder: Folder
    tensors: frozendict[str, frozendict[str, tuple[Part, ...]]]
    numbers: frozendict[str, frozendict[str, float]]


def read(folder: str) -> Contents:
    """List the float32 weights of a universal checkpoint, by the paths of the parameters.

    Raises:
        PlanError: If there are none, or a file is missing, cut off, damaged, or could run code.
    """
    states = _read(folder, {WEIGHTS})
    tensors = states.tensors.get(WEIGHTS, frozendict())
    lacking = [path for path, _ in _parameters(folder) if path not in tensors]
    if lacking or not tensors:
        path = lacking[0] if lacking else folder
        cause = f"it has no file zero/{path}/{WEIGHTS}.pt" if lacking else f"zero/ has no parameter with a {WEIGHTS}.pt"
        raise PlanError([Problem(path, cause, _AGAIN)])
    return Contents(states.folder, tensors)


def read_states(folder: str) -> UniversalStates:
    """List the optimizer states of a universal checkpoint: every file but the weights.

    Raises:
        PlanError: As ``read`` does.
    """
    return _read(folder, None)


def _read(folder: str, wanted: set[str] | None) -> UniversalStates:
    """Read the states named ``wanted``; None for all but the weights."""
    tensors: dict[str, dict[str, tuple[Part, ...]]] = {}
    numbers: dict[str, dict[str, float]] = {}
    files: list[StoredFile] = []
    problems: list[Problem] = []
    for path, names in _parameters(folder):
        for name in names:
            state = name.removesuffix(".pt")
            if (state == WEIGHTS) if wanted is None else state not in wanted:
                continue
            file = f"zero/{path}/{name}"
            try:
                found = _value(folder, file, path)
            except PlanError as error:
                problems += error.problems
                continue
            if isinstance(found, Part):
                tensors.setdefault(state, {})[path] = (found,)
                files.append(StoredFile(file, (Path(folder) / file).stat().st_size))
            else:
                numbers.setdefault(state, {})[path] = found
    if problems:
        raise PlanError(problems)
    return UniversalStates(
        Folder(folder, tuple(files)),
        frozendict({state: frozendict(some) for state, some in tensors.items()}),
        frozendict({state: frozendict(some) for state, some in numbers.items()}),
    )


def _value(folder: str, file: str, path: str) -> Part | float:
    """Read the tensor or the number in a file."""
    saved = read_saved(folder, file, _NAMES)
    value = saved.value.get("param") if isinstance(saved.value, Entries) else saved.value
    if type(value) in {int, float}:
        return value
    if not isinstance(value, Record):
        cause = f"{file} holds neither a tensor, nor a dict with one as 'param', nor a number"
        raise PlanError([Problem(path, cause, _AGAIN)])
    return Part.whole(saved.tensor(path, value))


def _parameters(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Iterate over the paths of parameters, each with the sorted names of its files."""
    zero = Path(folder) / ZERO
    try:
        for entry in sorted(path for path in zero.iterdir() if path.is_dir()):
            yield entry.name, sorted(path.name for path in entry.iterdir() if path.suffix == ".pt")
    except OSError as error:
        raise PlanError([Problem(folder, f"{error.strerror}: {zero}", _AGAIN)]) from None
