"""Example inputs for the proof that a split model computes what the whole one does, where the user gives none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from ...specs.equality import Unfollowed
from ..layout.local_model import LocalModel
from ..layout.trial_run import TrialRun
from ..model.input_candidates import Candidates, with_no_cache
from ..types.record import record_whole
from ..types.tape import Tape

_BATCH = 2
_LENGTH = 16
_MOST_TRIALS = 24


def proof_inputs(subject: LocalModel) -> dict[str, Any] | Unfollowed:
    """Return inputs with which the whole model runs on fake tensors, or why there are none.

    They are told from the model's configuration, as those of transformers have, with two short rows. They are for the proof
    alone: nobody has said that batches look like them.

    Args:
        subject: The model; example inputs that it has are left aside.

    >>> from transformers import GPT2Config, GPT2Model
    >>> from shardplan.functional import create_schedule
    >>> from shardplan.specs import Mesh
    >>> with torch.device("meta"):
    ...     model = GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=70))
    >>> sch = create_schedule(model, Mesh(tensor=2))
    >>> {name: getattr(value, "shape", value) for name, value in proof_inputs(LocalModel(model, sch.mesh, sch.tree)).items()}
    {'use_cache': False, 'input_ids': torch.Size([2, 16])}
    """
    if getattr(subject.model, "config", None) is None:
        return Unfollowed("", "", "no example inputs")
    first: Unfollowed | None = None
    for inputs in islice(_candidates(subject), _MOST_TRIALS):
        found = record_whole(evolve(subject, example_inputs=inputs))
        if isinstance(found, Tape):
            return inputs
        if first is None:
            text = str(found.error).strip().splitlines()
            cause = f"with {', '.join(inputs)} it stops: {type(found.error).__name__}: {text[0] if text else ''}"
            first = Unfollowed(found.path, "", f"no example inputs, and none could be made from the configuration: {cause}")
    return first or Unfollowed("", "", "no example inputs, and none could be made from the configuration")


def _candidates(subject: LocalModel) -> Iterator[dict[str, Any]]:
    """Iterate over inputs with random values: images and sounds in the dtype of the model, then in float32."""
    model, num = subject.model, subject.mesh.tensor
    length = num * -(-_LENGTH // num)  # so that ranks can share out a sequence
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    trial = _LazyTrial(model)
    for of in dict.fromkeys([dtype, torch.float32]):
        for inputs in Candidates(model, _BATCH, length, torch.Generator().manual_seed(0), of).all(trial):
            if of == dtype or any(isinstance(value, Tensor) and value.is_floating_point() for value in inputs.values()):
                yield with_no_cache(model, inputs)


class _LazyTrial:
    """Calls methods of a model on fake tensors; the copy that can run is made when it is first needed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._run: TrialRun | None = None

    def __call__(self, inputs: Mapping[str, Any], method: str = "forward") -> Any:
        self._run = self._run or TrialRun(self._model, with_values=False)
        return self._run(inputs, method)
