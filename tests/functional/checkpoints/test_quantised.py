"""Checkpoints of quantised weights are refused by what lies in the files, whatever a configuration or a pattern says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import Checkpoint, Mesh, PlanError

FP8 = torch.ones(8, 8).to(torch.float8_e4m3fn)
STORED = {
    "fp8 and a scale": {"0.weight": FP8, "0.weight_scale": torch.ones(())},
    "fp8 and scales of blocks": {"0.weight": FP8, "0.weight_scale_inv": torch.ones(1, 1)},
    "fp8 without a scale": {"0.weight": FP8},
    "integers": {"0.weight": torch.ones(8, 8, dtype=torch.int8), "0.SCB": torch.ones(8)},
    "integers and zero points": {"0.weight": torch.ones(8, 8, dtype=torch.int8), "0.weight_zero_point": torch.ones(8)},
    "packed integers": {"0.weight": torch.ones(32, 1, dtype=torch.uint8), "0.weight.absmax": torch.ones(1)},
    "floats and a scale": {"0.weight": torch.ones(8, 8), "0.weight_scale": torch.ones(8, 1)},
}
CONFIGS = {
    "": None,
    "config.json": {"quantization_config": {"quant_method": "fp8"}},
    "text": {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    "hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}},
}


def linear(**given):
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 8, bias=False, **given))


def plan(folder, model=None, **given):
    return plan_build(create_schedule(model or linear(), Mesh()), init_weights=Checkpoint(str(folder), **given))


def refused(folder, **given):
    with pytest.raises(PlanError) as caught:
        plan(folder, **given)
    return str(caught.value)


def saved(folder, tensors, name="", config=None):
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / ("config.json" if name == "text" else name)).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stored", STORED)
def test_quantised_weights_are_refused_and_no_pattern_lets_them_pass(tmp_path, stored, name):
    folder = saved(tmp_path, STORED[stored], name, CONFIGS[name])
    message = refused(folder)
    assert message.startswith("1 problem\n  0.weight  f32[8, 8]: it is stored ")
    assert "it would be loaded as other numbers" in message
    assert all(key in message for key in STORED[stored] if key.startswith("0.weight_"))
    extra = tuple(key for key in STORED[stored] if key != "0.weight")
    assert refused(folder, ignore=extra) == message
    assert refused(folder, ignore=("0.*",), init=("0.weight",)) == message


@pytest.mark.parametrize("key", ["0.qweight", "0.weight_packed"])
def test_packed_weights_are_refused_and_not_made_anew(tmp_path, key):
    folder = saved(tmp_path, {key: torch.ones(1, 8, dtype=torch.int32), "0.scales": torch.ones(1, 8)})
    assert f"{key}: it is a weight in packed form" in refused(folder, ignore=("0.*",), init=("0.weight",))


def test_what_is_no_scale_is_left_to_the_user(tmp_path):
    folder = saved(tmp_path, {"0.weight": torch.full((8, 8), 2.0), "logit_scale": torch.ones(())})
    assert "logit_scale: the checkpoint has it" in refused(folder)
    module = execute(plan(folder, ignore=("logit_scale",)), device="cpu").module
    assert torch.equal(module[0].weight, torch.full((8, 8), 2.0))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(()))


def test_a_model_that_has_the_scales_is_loaded(tmp_path):
    folder = saved(tmp_path, STORED["fp8 and a scale"])
    with torch.device("meta"):
        model = nn.Sequential(Scaled())
    module = execute(plan(folder, model), device="cpu").module
    assert module[0].weight.dtype == torch.float8_e4m3fn
