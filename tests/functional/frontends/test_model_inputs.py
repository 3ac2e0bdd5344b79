"""Inputs that are made for a model fit it: their names, shapes and values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from shardplan.functional.frontends import made_inputs, shrink_config
from shardplan.functional.frontends.transformers_models import model_classes
from shardplan.functional.model.rng_state import python_state
from shardplan.specs import Mesh

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers has to say of default configurations


def small(model_type, device="meta", **changes):
    config = shrink_config(CONFIG_MAPPING[model_type](**changes), Mesh(tensor=2))
    with torch.device(device):
        return next(iter(model_classes(config)))(config)


def shapes(inputs):
    return {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"input_ids": [3, 11]}),
        ("gpt2", {"input_ids": [3, 11]}),
        ("bert", {"input_ids": [3, 11]}),
        ("deepseek_v3", {"input_ids": [3, 11]}),
        ("bamba", {"input_ids": [3, 11]}),  # whose code asks for values, which fake tensors have not
        ("t5", {"input_ids": [3, 11], "decoder_input_ids": [3, 13]}),
        ("vit", {"pixel_values": [3, 3, 16, 16]}),
        ("clip", {"input_ids": [3, 11], "pixel_values": [3, 3, 12, 12]}),
        ("speech_to_text", {"input_features": [3, 128, 16], "decoder_input_ids": [3, 13]}),
        ("wav2vec2", {"input_values": [3, 4000]}),
        (
            "glm4v",  # four patches make a token
            {"input_ids": [3, 15], "pixel_values": [48, 96], "image_grid_thw": [3, 3], "mm_token_type_ids": [3, 15]},
        ),
        ("gemma4_vision", {"pixel_values": [3, 16, 48], "pixel_position_ids": [3, 16, 2]}),
        ("voxtral_realtime", {"input_ids": [3, 8], "input_features": [3, 128, 64]}),
        ("llava", {"input_ids": [3, 27], "pixel_values": [3, 3, 16, 16]}),  # sixteen tokens stand for the image
    ],
)
def test_names_and_shapes(model_type, expected):
    inputs = made_inputs(small(model_type))
    assert shapes(inputs) == expected
    assert all(value is False for name, value in inputs.items() if name not in expected)


def test_the_model_runs_with_them():
    model = small("qwen2_moe", device="cpu")
    assert model(**made_inputs(model, batch=6, length=8)).logits.shape[:2] == (6, 8)


def test_tokens_are_random_and_stand_for_nothing_special():
    model = small("qwen2_vl")
    ids = made_inputs(model, batch=8, length=64)["input_ids"]
    config = model.config
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    assert len(ids.unique()) > 50
    assert ids.max() < config.text_config.vocab_size
    assert not special & set(ids.flatten().tolist())


def test_the_seed_decides_and_no_global_generator_moves():
    model = small("gpt2")
    before = torch.get_rng_state(), python_state()
    first, again, other = (made_inputs(model, seed=seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == python_state()


def test_a_large_model_is_tried_on_fake_tensors():
    with torch.device("meta"):
        model = next(iter(model_classes(config := CONFIG_MAPPING["llama"]())))(config)
    assert shapes(made_inputs(model)) == {"input_ids": [3, 11]}


def test_a_model_without_configuration():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def forward(self, input_ids):
            return self.embed(input_ids)

    assert shapes(made_inputs(Words())) == {"input_ids": [3, 11]}


def test_none_where_nothing_fits():
    assert made_inputs(nn.Bilinear(4, 4, 4)) is None


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), [3, 11, 4]),
        (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), [3, 11]),
        (nn.Sequential(nn.Conv1d(5, 2, 3), nn.ReLU()), [3, 5, 11]),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), [3, 3, 32, 32]),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), [3, 6]),
    ],
)
def test_a_model_that_takes_one_tensor_gets_one_that_fits(model, shape):
    assert shapes(made_inputs(model)) == {"input": shape}
    assert made_inputs(small("lxmert")) is None
