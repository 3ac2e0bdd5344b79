"""Code that does the same to modules that are alike is followed twice, and then taken as known."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    xLSTMConfig,
    xLSTMModel,
)

from shardplan.functional import create_schedule, plan_build
from shardplan.functional.init.tracer import Tracer
from shardplan.functional.model.likeness import Likeness
from shardplan.functional.model.read import read_tensors
from shardplan.specs import Mesh


class Own(nn.Linear):
    """Its code is not torch's."""

    def reset_parameters(self):
        super().reset_parameters()


class Deep(nn.Linear):
    """Its code reads an attribute that differs from layer to layer."""

    def __init__(self, layer_index):
        self.layer_index = layer_index
        super().__init__(4, 4)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02 / (self.layer_index + 1))
        nn.init.zeros_(self.bias)


class Numbered(nn.Linear):
    """Its code counts how often it runs, on the class."""

    count = 0

    def reset_parameters(self):
        type(self).count += 1
        nn.init.constant_(self.weight, type(self).count)
        nn.init.zeros_(self.bias)


class Chosen(nn.Module):
    """Its code looks at what its child is set to."""

    def __init__(self, kind):
        super().__init__()
        self.inner = nn.Identity()
        self.inner.kind = {"of": [kind]}
        self.weight = nn.Parameter(torch.empty(3))

    def reset_parameters(self):
        nn.init.constant_(self.weight, self.inner.kind["of"][0])


def sources(model):
    return {path: str(spec.source) for path, spec in plan_build(create_schedule(model, Mesh())).tree.items()}


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


@pytest.mark.parametrize(("kind", "num"), [(nn.Linear, 2), (Own, 10)])
def test_equal_layers_of_torch_are_followed_twice(kind, num, monkeypatch):
    followed, run = [], Tracer._run
    monkeypatch.setattr(Tracer, "_run", lambda self, call, places: followed.append(call) or run(self, call, places))
    model = on_meta(lambda: nn.Sequential(*(kind(4, 4) for _ in range(10))))
    assert set(sources(model).values()) == {"uniform(±0.5)"}
    assert len(followed) == num


def test_what_is_noted_on_a_parameter_counts():
    def build():
        layers = [nn.LayerNorm(4) for _ in range(4)]
        for number, layer in enumerate(layers):
            layer.weight.number = number
        return nn.Sequential(*layers)

    likeness = Likeness()
    model = Tracer(model := on_meta(build), read_tensors(model)[0], {})._model
    assert len({likeness.number(layer) for layer in model}) == 4


class Looking(PreTrainedModel):
    """As if it were a model of transformers whose code looks around."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))
        self.seen = 0

    def _init_weights(self, module):
        names = {id(child): name for name, child in self.named_modules()}
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, int(names[id(module)][-1]))


class Counting(Looking):
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            self.seen += 1
            nn.init.constant_(module.weight, self.seen - 1)


@pytest.mark.parametrize("kind", [Looking, Counting])
def test_code_that_looks_around_is_followed_every_time(kind, monkeypatch):
    monkeypatch.setattr(kind, "__module__", "transformers.models.none")  # whose code is trusted to keep no count
    model = on_meta(kind, LlamaConfig())
    assert list(sources(model).values()) == ["zero", *(f"fill({number})" for number in range(1, 5))]


def test_layers_that_differ_in_what_code_reads_are_not_alike():
    model = on_meta(lambda: nn.Sequential(*(Deep(index % 3) for index in range(9))))
    found = sources(model)
    assert [found[f"{index}.weight"] for index in range(4)] == [
        "normal(0, 0.02)",
        "normal(0, 0.01)",
        "normal(0, 0.00667)",
        "normal(0, 0.02)",
    ]
    chosen = on_meta(lambda: nn.Sequential(*(Chosen(kind) for kind in (1, 2, 1, 2))))
    assert list(sources(chosen).values()) == ["fill(1)", "fill(2)", "fill(1)", "fill(2)"]


def test_code_that_counts_its_calls_is_followed_every_time():
    Numbered.count = 0
    model = on_meta(lambda: nn.Sequential(*(Numbered(2, 2) for _ in range(5))))
    Numbered.count = 0
    found = sources(model)
    assert [found[f"{index}.weight"] for index in range(5)] == [f"fill({count})" for count in range(1, 6)]


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=64, n_positions=16)),
        lambda: T5ForConditionalGeneration(T5Config(num_layers=3, d_model=32, d_ff=64, d_kv=8, num_heads=4, vocab_size=64)),
        lambda: MixtralForCausalLM(
            MixtralConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
                num_local_experts=4,
            )
        ),
        lambda: xLSTMModel(
            xLSTMConfig(hidden_size=64, num_hidden_layers=4, num_blocks=4, num_heads=4, vocab_size=128, weight_mode="single")
        ),
        lambda: nn.Transformer(16, 4, 3, 3, 32, batch_first=True),
        lambda: nn.LSTM(8, 8, num_layers=4),
    ],
    ids=["gpt2", "t5", "mixtral", "xlstm", "transformer", "lstm"],
)
def test_the_plan_is_that_of_following_all(build, monkeypatch):
    model = on_meta(build)
    short = plan_build(create_schedule(model, Mesh()))
    monkeypatch.setattr(Tracer, "_key", lambda self, call: None)
    assert plan_build(create_schedule(model, Mesh())) == short
