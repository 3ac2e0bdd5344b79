"""Draws follow their distributions, and those of the code that they stand for.

All is deterministic. Where a threshold on a Kolmogorov-Smirnov statistic is 2.5 over the root of n, a random generator
would miss it once in 130 000 times; where it is a number of standard errors, 5 of them, once in 1.7 million.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import InitProgram, Made, Mesh, Operation
from shardplan.specs.program import Bernoulli, Cauchy, Exponential, Geometric, LogNormal, Normal, TruncatedNormal, Uniform
from tests.helpers.init_programs import LIMIT, Coded, ks_two_samples, make, near, plan_and_make, really, tensors

NUM = 10**6


def phi(x):
    return torch.special.ndtr(x)


def between(low, high):
    """Distribution function of the standard normal within bounds; by the tail that is small, so that none is lost."""
    if low >= 0:
        tail = phi(torch.tensor([-low, -high], dtype=torch.float64))
        return lambda z: (tail[0] - phi(-z)) / (tail[0] - tail[1])
    ends = phi(torch.tensor([low, high], dtype=torch.float64))
    return lambda z: (phi(z) - ends[0]) / (ends[1] - ends[0])


CONTINUOUS = [
    (Normal(0, 1), phi),
    (Normal(-3, 0.02), lambda x: phi((x + 3) / 0.02)),
    (LogNormal(0.3, 0.7), lambda x: phi((x.log() - 0.3) / 0.7)),
    (Uniform(-0.1, 0.1), lambda x: (x + 0.1) / 0.2),
    (Uniform(2, 5), lambda x: (x - 2) / 3),
    (Exponential(4), lambda x: -torch.expm1(-4 * x)),
    (Cauchy(1, 3), lambda x: 0.5 + torch.atan((x - 1) / 3) / math.pi),
    (TruncatedNormal(0, 1, -2, 2), between(-2, 2)),
    (TruncatedNormal(0.5, 2, -3, 1), lambda x: between(-1.75, 0.25)((x - 0.5) / 2)),
    (TruncatedNormal(0, 1, 5, 9), between(5, 9)),
    (TruncatedNormal(0, 1, 1, 2), between(1, 2)),
    (TruncatedNormal(0, 1, -9, -5), lambda x: 1 - between(5, 9)(-x)),
    (TruncatedNormal(0, 1, -1, 30), between(-1, 30)),
    (TruncatedNormal(0, 0.02, -2, 2), lambda x: phi(x / 0.02)),
    (
        TruncatedNormal(0, 1, 12, 20),
        lambda x: -torch.expm1(torch.special.log_ndtr(-x) - math.log(math.erfc(12 / 2**0.5) / 2)),
    ),
    (
        TruncatedNormal(0, 1, 36, 37),  # from the asymptotic tail, exact to 2e-6
        lambda x: 1 - torch.exp(-(x**2 - 36**2) / 2) * 36 / x * (1 - x**-2) / (1 - 36**-2),
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("draw", "cdf"), CONTINUOUS, ids=lambda x: str(x) if not callable(x) else "")
def test_distance_to_the_distribution(draw, cdf, dtype):
    x = make(draw, (NUM,), dtype).double().sort().values
    steps = torch.arange(NUM + 1, dtype=torch.float64) / NUM
    expected = cdf(x)
    distance = torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max().item()
    # float32 next to its mean has steps of its own, of 2 ** -24 times that: of the density 1 / (std √(2π)), 1e-6
    assert distance < LIMIT / NUM**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.001, 0.3, 0.5, 1.0])
def test_frequencies_of_bernoulli(p, dtype):
    x = make(Bernoulli(p), (NUM,), dtype).double()
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    assert abs(x.mean().item() - p) <= 5 * (p * (1 - p) / NUM) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 1.0])
def test_frequencies_of_geometric(p, dtype):
    x = make(Geometric(p), (NUM,), dtype).double()
    for k in (1, 2, 3, 5, 40):
        chance = p * (1 - p) ** (k - 1)
        assert abs((x == k).double().mean().item() - chance) <= 5 * (chance * (1 - chance) / NUM) ** 0.5, k
    assert torch.equal(x, x.round())
    assert x.min() == 1


MOMENTS = [
    (Normal(2, 3), 2, 9, 3),
    (LogNormal(0, 0.25), math.exp(1 / 32), math.expm1(1 / 16) * math.exp(1 / 16), 5),
    (Uniform(-1, 1), 0, 1 / 3, 1.8),
    (Uniform(0, 1), 0.5, 1 / 12, 1.8),
    (Exponential(2), 0.5, 0.25, 9),
    (Geometric(0.25), 4, 12, 9.1),
    (TruncatedNormal(0, 1, -2, 2), 0, 0.7737412, 2.4),
]


@pytest.mark.parametrize(("draw", "mean", "variance", "kurtosis"), MOMENTS, ids=str)
def test_moments(draw, mean, variance, kurtosis):
    x = make(draw, (NUM,)).double()
    assert abs(x.mean().item() - mean) < 5 * (variance / NUM) ** 0.5
    assert abs(x.var().item() - variance) < 5 * variance * (kurtosis / NUM) ** 0.5


def ranks(draw, **key):
    """Draws, made normal by their ranks, so that a correlation has the standard error 1 over the root of n."""
    x = make(draw, (2**17,), **key).double()
    order = x.argsort(stable=True)
    scores = torch.empty_like(x)
    scores[order] = torch.special.ndtri((torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x))
    return scores


def uncorrelated(a, b):
    n = len(a)
    return all(abs((f(a) * f(b)).mean().item()) < 5 * s / n**0.5 for f, s in ((lambda t: t, 1), (lambda t: t**2 - 1, 2)))


@pytest.mark.parametrize("draw", [Normal(0, 1), Uniform(0, 1), TruncatedNormal(0, 1, -2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_tensors_seeds_and_operations_are_independent(draw, dtype):
    x = ranks(draw, dtype=dtype)
    for lag in (1, 2, 3, 4, 5, 8, 64, 4096):
        assert uncorrelated(x[:-lag], x[lag:]), lag
    assert uncorrelated(x, ranks(draw, dtype=dtype, path="w2"))
    assert uncorrelated(x, ranks(draw, dtype=dtype, seed=1))
    second = [Operation(Normal(0, 1)), Operation(Normal(0, 1), ((0, 2**17, 1),))]
    both = InitProgram(second), InitProgram(second[:1])
    assert uncorrelated(*(make(program, (2**17,), dtype).double() for program in both))


def test_a_square_of_differences_would_be_noticed():
    x = ranks(Normal(0, 1))
    assert not uncorrelated(x, x + torch.roll(x, 1))
    assert not uncorrelated(x, x * torch.randn(len(x), generator=torch.Generator().manual_seed(0)).sign())


SAMPLERS = [
    (Normal(1, 2), lambda x: x.normal_(1, 2)),
    (LogNormal(1, 0.5), lambda x: x.log_normal_(1, 0.5)),
    (Uniform(-3, 4), lambda x: x.uniform_(-3, 4)),
    (Exponential(0.1), lambda x: x.exponential_(0.1)),
    (Cauchy(0, 2), lambda x: x.cauchy_(0, 2)),
    (Bernoulli(0.2), lambda x: x.bernoulli_(0.2)),
    (Geometric(0.2), lambda x: x.geometric_(0.2)),
    (TruncatedNormal(0, 1, -1, 2), lambda x: nn.init.trunc_normal_(x, 0, 1, -1, 2)),
    (TruncatedNormal(0, 1, 1.5, 3), lambda x: nn.init.trunc_normal_(x, 0, 1, 1.5, 3)),
    (TruncatedNormal(0, 1, 3, 4), lambda x: nn.init.trunc_normal_(x, 0, 1, 3, 4)),
]


@pytest.mark.filterwarnings("ignore:mean is more than 2 std from:UserWarning")
@pytest.mark.parametrize(("draw", "sampler"), SAMPLERS, ids=lambda x: str(x) if not callable(x) else "")
def test_the_same_distribution_as_torchs_own_sampler(draw, sampler):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = sampler(torch.empty(100_000))
    assert ks_two_samples(make(draw, (100_000,)), theirs) < LIMIT


BUILT = {
    nn.Linear: (100, 80),
    nn.Bilinear: (10, 12, 30),
    nn.Embedding: (200, 40, 3),
    nn.EmbeddingBag: (200, 40),
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d], (12, 16, 5)),
    **dict.fromkeys([nn.Conv3d, nn.ConvTranspose3d], (8, 10, 3)),
    **dict.fromkeys([nn.LSTM, nn.GRU, nn.RNN], (20, 30, 2)),
    **dict.fromkeys([nn.LSTMCell, nn.GRUCell, nn.RNNCell], (20, 30)),
    nn.RNNBase: ("GRU", 20, 30),
    nn.RNNCellBase: (20, 30, True, 4),
    **dict.fromkeys([nn.LayerNorm, nn.RMSNorm], (50,)),
    nn.GroupNorm: (5, 50),
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm], (50,)),
    nn.MultiheadAttention: (40, 4),
    nn.PReLU: (7,),
    nn.AdaptiveLogSoftmaxWithLoss: (30, 200, [20, 80]),
}
VARIANTS = [
    (nn.Linear, (100, 80), {"bias": False}),
    (nn.Transformer, (24, 4, 1, 1, 48), {"batch_first": True}),
    (nn.MultiheadAttention, (40, 4), {"kdim": 20, "vdim": 30, "add_bias_kv": True}),
    (nn.LSTM, (20, 30), {"proj_size": 10, "bidirectional": True}),
    *((kind, (50,), {"affine": True, "track_running_stats": True}) for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d)),
    (nn.InstanceNorm3d, (50,), {"affine": True, "track_running_stats": True}),
    (nn.Linear, (100, 80), {"dtype": torch.float64}),
    (nn.Linear, (100, 80), {"dtype": torch.bfloat16}),
]


def test_every_module_with_init_code_is_in_the_list():
    found = {
        kind
        for name, kind in inspect.getmembers(nn, inspect.isclass)
        if issubclass(kind, nn.Module) and not name.startswith("Lazy")  # which has no shapes before its first input
        if hasattr(kind, "reset_parameters") or hasattr(kind, "_reset_parameters")
    }
    listed = {*BUILT, *(kind for kind, _, _ in VARIANTS)}
    assert found - listed == set()
    assert len(found) > 25


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [*((kind, args, {}) for kind, args in BUILT.items()), *VARIANTS],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_modules_of_torch(kind, args, options):
    sources, ours = plan_and_make(lambda: kind(*args, **options))
    torch.manual_seed(2)
    module = kind(*args, **options)
    if kind is nn.RNNCellBase:
        module.reset_parameters()
    theirs = tensors(module)
    assert ours.keys() == theirs.keys()
    assert theirs
    for path, tensor in ours.items():
        assert isinstance(sources[path], InitProgram), f"{path}: {sources[path]}"
        assert (tensor.dtype, tensor.shape) == (theirs[path].dtype, theirs[path].shape), path
        assert near(tensor, theirs[path]), path


SQUARE = {"w": (120, 100)}
INITIALISERS = {
    "uniform_": ((-1, 3), {}),
    "normal_": ((1, 3), {}),
    "trunc_normal_": ((0.5, 1, -1, 2), {}),
    "constant_": ((0.7,), {}),
    "ones_": ((), {}),
    "zeros_": ((), {}),
    "eye_": ((), {}),
    "dirac_": ((), {}),
    "xavier_uniform_": ((2.0,), {}),
    "xavier_normal_": ((2.0,), {}),
    "kaiming_uniform_": ((0.1,), {"mode": "fan_out"}),
    "kaiming_normal_": ((), {"nonlinearity": "relu"}),
    "orthogonal_": ((2.0,), {}),
    "sparse_": ((0.25, 0.5), {}),
}


def test_every_initialiser_is_in_the_list():
    assert {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")} == INITIALISERS.keys()


@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers_of_torch(name):
    args, options = INITIALISERS[name]
    shape = (30, 10, 3) if name == "dirac_" else (120, 100)

    def build():
        return Coded(lambda module: getattr(nn.init, name)(module.w, *args, **options), w=shape)

    sources, ours = plan_and_make(build)
    mine, own = ours["w"], really(build)["w"]
    match name:
        case "orthogonal_":
            assert isinstance(sources["w"], Made)
            torch.testing.assert_close(mine.T @ mine, 4 * torch.eye(100), rtol=1e-4, atol=1e-4)
        case "sparse_":
            assert isinstance(sources["w"], Made)
            assert (mine == 0).sum(dim=0).eq(30).all()
            assert near(mine[mine != 0], own[own != 0])
        case "eye_" | "dirac_" | "ones_" | "zeros_" | "constant_":
            assert torch.equal(mine, own)
        case _:
            assert isinstance(sources["w"], InitProgram)
            assert near(mine, own)


@pytest.mark.filterwarnings("ignore:mean is more than 2 std from:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bounds", [(-2, 2), (-0.3, 0.1), (1.5, 2.5), (3, 4), (-5, -3)])
def test_both_ways_of_torchs_truncated_normal(bounds, dtype):
    def build():
        return Coded(lambda module: nn.init.trunc_normal_(module.w, 0.0, 1.0, *bounds), dtype=dtype, w=(160, 160))

    sources, ours = plan_and_make(build)
    assert str(sources["w"]).startswith("truncated_normal(0, 1, ")
    mine, own = ours["w"], really(build)["w"]
    assert bounds[0] <= mine.min() <= mine.max() <= bounds[1]
    if (
        dtype == torch.bfloat16
    ):  # torch asks, and accepts, in bfloat16, which moves its own mean by a few hundredths of its std
        assert abs(mine.double().mean() - own.double().mean()) < 0.08 * own.double().std()
        assert mine.double().std() / own.double().std() == pytest.approx(1, abs=0.08)
    else:
        assert near(mine, own)


def test_a_wrong_scale_would_be_noticed():
    _, ours = plan_and_make(lambda: nn.Linear(100, 80))
    assert not near(ours["weight"] * 1.06, nn.Linear(100, 80).weight.detach())


def test_values_do_not_depend_on_the_model_around():
    with torch.device("meta"):
        alone, together = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    one = execute(plan_build(create_schedule(nn.ModuleDict({"2": alone}), Mesh())), device="cpu").module
    other = execute(plan_build(create_schedule(together, Mesh())), device="cpu").module
    assert torch.equal(one["2"].weight, other[2].weight)
