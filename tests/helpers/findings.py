"""For each finding a plan of which it is said, and one of which it is nearly so; with what the audit is told besides."""

from __future__ import annotations

from itertools import pairwise

import torch
from attrs import evolve
from torch import nn

from shardplan.functional import create_schedule, plan_build
from shardplan.specs import Mesh
from shardplan.specs.layout_steps import SumGradient
from shardplan.specs.steps import Allocate, EvaluateShard, MakeGroups, Place, SumTied, Wrap
from tests.helpers.families import family
from tests.helpers.models import llama, plain, schedule, split_plain


def linears(*widths):
    """Linear modules without biases, each as wide as the one before."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


def perceptron(mesh):
    with torch.device("meta"):
        return create_schedule(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), mesh)


def joined(mesh):
    return plan_build(perceptron(mesh).at["0"].colwise().at["2"].rowwise())


class Backwards(nn.Module):
    """Registers last what it calls first."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def backwards():
    with torch.device("meta"):
        return create_schedule(Backwards(), Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise()


def whole_bias():
    sch = perceptron(Mesh(tensor=2)).at["0"].colwise().at["2"].shard("weight", axis=1)
    return plan_build(sch.at[""].sync("forward_post", "all_reduce"))


def with_steps(plan, change):
    """The plan with other steps; ``change`` gives what takes the place of each."""
    return evolve(plan, steps=[new for step in plan.steps for new in change(step)])


def without(plan, kind):
    return with_steps(plan, lambda step: [] if isinstance(step, kind) else [step])


def unmade(plan):
    return with_steps(plan, lambda s: [Allocate(s.stage, s.paths)] if isinstance(s, EvaluateShard) else [s])


def tied_stages():
    """Two stages that hold one weight."""
    model = linears(8, 8, 8)
    model[1].weight = model[0].weight
    sch = create_schedule(model, Mesh(pipe=2)).at["0"].cut_pipeline_stage()
    return plan_build(sch, example_inputs={"input": torch.ones(2, 8)})


def elsewhere():
    plan = tied_stages()
    return evolve(plan, tree=plan.tree.replace({"0.weight": evolve(plan.tree["0.weight"], also_on=())}))


class Orthogonal(nn.Linear):
    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)


def orthogonal(mesh):
    with torch.device("meta"):
        return plan_build(create_schedule(nn.Sequential(*(Orthogonal(8, 8, bias=False) for _ in range(3))), mesh))


def vocabulary(num_rows, *, head, **split):
    """A Llama of which the embedding is split, and the head too if that is said."""
    sch = create_schedule(llama(hidden_size=1024, vocab_size=num_rows, num_hidden_layers=1), Mesh(tensor=2))
    sch = sch.at["model.embed_tokens"].vocab_parallel(**split)
    sch = sch.at["lm_head"].colwise(gather_output=True, **split) if head else sch
    return sch.at["model.layers.*.mlp.{gate,up}_proj"].colwise().at["model.layers.*.mlp.down_proj"].rowwise()


def cut_after(module):
    sch = create_schedule(linears(*[4096] * 13), Mesh(pipe=2)).at[module].cut_pipeline_stage()
    return plan_build(sch, example_inputs={"input": torch.ones(2, 4096, device="meta")})


def heads(num):
    """Heads of 128 entries over four ranks."""
    options = {"granule": 128, "uneven": True, "allow_empty": True}
    sch = create_schedule(linears(4096, num * 128, 4096), Mesh(tensor=4))
    return plan_build(sch.at["0"].colwise(**options).at["1"].rowwise(**options))


def mixed(dtype):
    """A model in bfloat16, its norm in another dtype, and buffers in float32."""
    with torch.device("meta"):
        linear, norm = nn.Linear(64, 64, dtype=torch.bfloat16), nn.LayerNorm(64, dtype=dtype)
        return plan_build(create_schedule(nn.Sequential(linear, norm, nn.BatchNorm1d(64, affine=False)), Mesh()))


class WithSpare(nn.Module):
    """Holds a module that it does not call."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.used(x)


def spare(target, *, trained=True, zero=0, mesh=None):
    with torch.device("meta"):
        model = WithSpare()
    model.spare.requires_grad_(trained)
    config = {"train_batch_size": 4, "gradient_clipping": 0.0, "zero_optimization": {"stage": zero}}
    return plan_build(
        create_schedule(model, mesh or Mesh(data=2)),
        target=target,
        config=config if target == "deepspeed" else None,
        example_inputs={"x": torch.ones(2, 8, device="meta")},
    )


def mixture(mesh, *, split):
    sch = create_schedule(family("mixtral"), mesh)
    return plan_build(sch.at["model.layers.*.mlp.experts"].expert_parallel() if split else sch, target="torch")


class TwoStreams(nn.Module):
    """Its first half gives hidden states, and beside them some features more."""

    def __init__(self, num_more):
        super().__init__()
        self.first, self.second = First(num_more), Second()

    def forward(self, x):
        return self.second(*self.first(x))


class First(nn.Module):
    def __init__(self, num_more):
        super().__init__()
        self.up, self.more = nn.Linear(8, 64), nn.Linear(8, num_more)

    def forward(self, x):
        return self.up(x), self.more(x)


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(64, 8)

    def forward(self, hidden, more):
        return self.down(hidden) + more.sum(-1, keepdim=True)


def streams(num_more):
    with torch.device("meta"):
        model = TwoStreams(num_more)
    sch = create_schedule(model, Mesh(pipe=2)).with_stages([model.first, model.second])
    return plan_build(sch, example_inputs={"x": torch.ones(4, 8, device="meta")})


def large(**config):
    """128 MiB of parameters over two ranks."""
    config = {"train_batch_size": 1, "gradient_clipping": 0.0, **config}
    sch = create_schedule(linears(4096, 4096, 4096), Mesh(tensor=2)).at["0"].colwise().at["1"].rowwise()
    return plan_build(sch, target="deepspeed", config=config)


def for_target(target):
    """A plan as it is saved by somebody who has this target."""
    plan = evolve(plan_build(schedule("plain"), target="torch"), target=target)
    return with_steps(plan, lambda step: [evolve(step, target=target) if isinstance(step, Wrap) else step])


ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
MIB = 2**20
TWO_BY_TWO = Mesh(data=2, tensor=2)
COPY = "generation reads it whole"

HURT = {
    "SP001": lambda: (without(plan_build(schedule("plain", Mesh(tensor=2))), Place), {}),
    "SP002": lambda: (unmade(plan_build(schedule("plain", Mesh(tensor=2)))), {}),
    "SP003": lambda: (without(tied_stages(), SumTied), {}),
    "SP004": lambda: (elsewhere(), {}),
    "SP005": lambda: (without(plan_build(schedule("plain", TWO_BY_TWO), strategy="scatter"), MakeGroups), {}),
    "SP006": lambda: (plan_build(schedule("plain", Mesh(tensor=2)), init_weights=False), {}),
    "SP007": lambda: (without(mixture(Mesh(data=2, expert=2), split=True), SumGradient), {}),
    "SP010": lambda: (plan_build(perceptron(Mesh(tensor=2)).at["0"].colwise()), {}),
    "SP012": lambda: (whole_bias(), {}),
    "SP013": lambda: (plan_build(perceptron(Mesh(tensor=2)).at["0"].sync("forward_post", "all_reduce")), {}),
    "SP014": lambda: (plan_build(perceptron(Mesh(data=2))), {}),
    "SP020": lambda: (orthogonal(Mesh(tensor=2)), {}),
    "SP021": lambda: (plan_build(vocabulary(32000, head=False)), {}),
    "SP022": lambda: (cut_after("7"), {}),
    "SP023": lambda: (heads(9), {}),
    "SP024": lambda: (plan_build(vocabulary(32001, head=False, pad_to_multiple=2)), {}),
    "SP025": lambda: (mixed(torch.float32), {}),
    "SP026": lambda: (spare("torch"), {}),
    "SP027": lambda: (joined(Mesh(data=2, tensor=16)), {"ranks_per_node": 8}),
    "SP028": lambda: (mixture(Mesh(data=2, expert=2), split=False), {}),
    "SP029": lambda: (streams(16), {}),
    "SP030": lambda: (large(**ADAMW), {"device_memory": 256 * MIB}),
    "SP031": lambda: (large(), {}),
    "SP032": lambda: (plan_build(vocabulary(32000, head=True).at["lm_head"].silence("SP021", reason=COPY)), {}),
    "SP033": lambda: (for_target("fsdp2"), {}),
    "SP034": lambda: (large(**ADAMW), {}),
}
"""What is said of: a plan, and what the audit is told."""

NEAR = {
    "SP001": lambda: (plan_build(schedule("plain", Mesh(tensor=2))), {}),
    "SP002": lambda: (plan_build(schedule("plain", Mesh(tensor=2))), {}),
    "SP003": lambda: (tied_stages(), {}),
    "SP004": lambda: (tied_stages(), {}),
    "SP005": lambda: (plan_build(schedule("plain", TWO_BY_TWO), strategy="scatter"), {}),
    "SP006": lambda: (plan_build(split_plain(plain(device="cpu"), Mesh(tensor=2))), {}),
    "SP007": lambda: (mixture(Mesh(data=2, expert=2), split=True), {}),
    "SP010": lambda: (plan_build(backwards()), {}),
    "SP012": lambda: (joined(Mesh(tensor=2)), {}),
    "SP013": lambda: (plan_build(perceptron(Mesh(tensor=2)).at["1"].sync("forward_post", "all_reduce")), {}),
    "SP014": lambda: (plan_build(perceptron(Mesh(data=2)), target="torch"), {}),
    "SP020": lambda: (orthogonal(Mesh()), {}),
    "SP021": lambda: (plan_build(vocabulary(4000, head=False)), {}),  # 15.6 MiB
    "SP022": lambda: (cut_after("6"), {}),  # 7 to 5: 1.17 times the mean
    "SP023": lambda: (heads(39), {}),  # 10, 10, 10 and 9
    "SP024": lambda: (plan_build(vocabulary(32001, head=True, pad_to_multiple=2)), {}),
    "SP025": lambda: (mixed(torch.bfloat16), {}),
    "SP026": lambda: (spare("torch", trained=False), {}),
    "SP027": lambda: (joined(Mesh(data=2, tensor=8)), {"ranks_per_node": 8}),
    "SP028": lambda: (mixture(Mesh(data=2, expert=2), split=True), {}),
    "SP029": lambda: (streams(6), {}),  # 9 % of 64 features
    "SP030": lambda: (large(**ADAMW), {"device_memory": 384 * MIB}),
    "SP031": lambda: (large(**ADAMW), {}),
    "SP032": lambda: (plan_build(vocabulary(32000, head=False).at["lm_head"].silence("SP021", reason=COPY)), {}),
    "SP033": lambda: (for_target("torch"), {}),
    "SP034": lambda: (large(**ADAMW), {}),
}
"""What is nearly so: a plan, and what the audit is told."""

INSTALLED = {"SP034": ("0.20.1", "0.19.9")}
"""The version of DeepSpeed on the machine where a finding is said, and where it is nearly so."""
