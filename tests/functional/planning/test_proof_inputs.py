"""Inputs made for the proof alone: the whole model runs with them, ranks can share them out, and what has none says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from shardplan.functional import create_schedule
from shardplan.functional.frontends import shrink_config
from shardplan.functional.frontends.transformers_models import model_classes
from shardplan.functional.layout.local_model import LocalModel
from shardplan.functional.planning.proof_inputs import proof_inputs
from shardplan.functional.types.record import record_whole
from shardplan.functional.types.tape import Tape
from shardplan.specs import Mesh, Unfollowed

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers has to say of default configurations


def subject(model, tensor=2):
    sch = create_schedule(model, Mesh(tensor=tensor))
    return LocalModel(model, sch.mesh, sch.tree)


def small(model_type, dtype=torch.float32):
    config = shrink_config(CONFIG_MAPPING[model_type](), Mesh(tensor=2))
    with torch.device("meta"):
        return next(iter(model_classes(config)))(config).to(dtype)


def shapes(inputs):
    return {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"input_ids": [2, 16]}),
        ("bert", {"input_ids": [2, 16]}),
        ("t5", {"input_ids": [2, 16], "decoder_input_ids": [2, 32]}),
        ("vit", {"pixel_values": [2, 3, 16, 16]}),
        ("llava", {"input_ids": [2, 32], "pixel_values": [2, 3, 16, 16]}),  # sixteen tokens stand for the image
    ],
)
def test_the_whole_model_runs_with_them(model_type, expected):
    model = small(model_type)
    inputs = proof_inputs(subject(model))
    assert shapes(inputs) == expected


@pytest.mark.parametrize(("tensor", "length"), [(2, 16), (3, 18), (64, 64)])
def test_ranks_can_share_out_the_tokens(tensor, length):
    assert shapes(proof_inputs(subject(small("llama"), tensor))) == {"input_ids": [2, length]}


def test_images_have_the_dtype_of_the_model():
    assert proof_inputs(subject(small("vit", torch.bfloat16)))["pixel_values"].dtype == torch.bfloat16


class Model(nn.Module):
    """Takes tokens, and something that nobody can guess."""

    def __init__(self, config, *, needs=False):
        super().__init__()
        self.config = config
        self.body = nn.Linear(4, 4, device="meta")
        self.needs = needs

    def forward(self, input_ids, key=None):
        assert key is not None or not self.needs, "no key\nwas given"
        return self.body(input_ids[..., None].float().expand(-1, -1, 4))


def test_a_model_without_a_configuration_has_none():
    assert proof_inputs(subject(Model(None))) == Unfollowed("", "", "no example inputs")


def test_why_a_model_does_not_run_is_told():
    config = SimpleNamespace(vocab_size=8)
    assert shapes(proof_inputs(subject(Model(config)))) == {"input_ids": [2, 16]}
    said = proof_inputs(subject(Model(config, needs=True)))
    assert said.path == ""
    assert said.cause == (
        "no example inputs, and none could be made from the configuration: with input_ids it stops: AssertionError: no key"
    )


def test_the_example_inputs_of_a_user_are_left_aside():
    model = small("llama")
    sch = create_schedule(model, Mesh(tensor=2))
    given = LocalModel(model, sch.mesh, sch.tree, example_inputs={"input_ids": torch.zeros(7, 9, dtype=torch.long)})
    made = proof_inputs(given)
    assert shapes(made) == {"input_ids": [2, 16]}
    assert isinstance(record_whole(given), Tape)
