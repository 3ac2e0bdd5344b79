"""A slow reference of the random scheme, models that carry their init code, and comparisons of values with distributions."""

from __future__ import annotations

import struct
from itertools import combinations

import torch
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.functional.init.evaluate import Job, evaluate
from shardplan.specs import InitProgram, Mesh, Operation
from shardplan.specs.index import index_shape, whole_index

MASK = 0xFFFFFFFF
LIMIT = 2.5
"""Of a Kolmogorov-Smirnov statistic, over its scale: passed by chance once in 130 000 times."""


def philox_reference(counter, key):
    """Philox 4x32-10 as the paper writes it, on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def number_reference(element, operation, key, *, double, unit):
    """The random number of one element, by the documented scheme, in Python's double precision (all are exact)."""
    lanes = 2 if double else 4
    block, lane = divmod(element, lanes)
    words = philox_reference((block & MASK, block >> 32, operation, 0), key)
    if double:
        (signed,) = struct.unpack("<q", struct.pack("<II", words[2 * lane], words[2 * lane + 1]))
        return ((signed >> (12 if unit else 11)) + 0.5) * 2.0**-52 + (0.5 if unit else 0)
    (signed,) = struct.unpack("<i", struct.pack("<I", words[lane]))
    return ((signed >> (9 if unit else 8)) + 0.5) * 2.0**-23 + (0.5 if unit else 0)


def whole(shape):
    """The index of a part that is all of a tensor."""
    return whole_index(tuple(shape))


def make(program, shape, dtype=torch.float32, path="w", seed=0, index=None):
    """Evaluate a program, or operations, for a part of a tensor."""
    if not isinstance(program, InitProgram):
        program = InitProgram([Operation(what) for what in ([program] if not isinstance(program, list) else program)])
    index = index or whole(shape)
    out = torch.empty(index_shape(index), dtype=dtype)
    evaluate([Job(out, program, path, tuple(shape), tuple(index))], seed)
    return out


def same(a, b):
    """Whether two tensors have the same bits; nan is nan."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().reshape(-1).view(kind) == b.contiguous().reshape(-1).view(kind)
    if a.dtype.is_floating_point:
        equal |= a.reshape(-1).isnan() & b.reshape(-1).isnan()
    return bool(equal.all())


class Coded(nn.Module):
    """Tensors of some shapes, given values by some code: ``code(module)``, perhaps around another module ``child``."""

    def __init__(self, code, child=None, dtype=torch.float32, buffers=(), **shapes):
        super().__init__()
        self.code = code
        if child is not None:
            self.child = child
        for name, shape in shapes.items():
            if name in buffers:
                self.register_buffer(name, torch.empty(shape, dtype=dtype))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def reset_parameters(self):
        with torch.no_grad():
            self.code(self)


def tensors(module):
    """Parameters and buffers by path, detached."""
    return {path: tensor.detach() for path, tensor in (*module.named_parameters(), *module.named_buffers())}


def plan_and_make(build, seed=0, edit=lambda sch: sch, **options):
    """Plan a model on meta; return the source of each tensor, and the values that it gets."""
    with torch.device("meta"):
        model = build()
    plan = plan_build(edit(create_schedule(model, Mesh())), seed=seed, **options)
    return {path: spec.source for path, spec in plan.tree.items()}, tensors(execute(plan, device="cpu").module)


def really(build, seed=0):
    """Run the code of ``Coded`` modules for real, children first; return the values."""
    model = build()
    torch.manual_seed(seed)
    for module in reversed(list(model.modules())):
        if isinstance(module, Coded):
            module.reset_parameters()
    return tensors(model)


def ks_two_samples(a, b):
    """Kolmogorov-Smirnov statistic of two samples over its scale."""
    a, b = a.double().flatten().sort().values, b.double().flatten().sort().values
    both = torch.cat([a, b])
    below = [torch.searchsorted(x, both, right=True).double() / x.numel() for x in (a, b)]
    return (below[0] - below[1]).abs().max().item() / (1 / a.numel() + 1 / b.numel()) ** 0.5


def near(a, b):
    """The same distribution, with the same moments; or for what has no spread, the same values."""
    if a.numel() < 2 or b.double().std() == 0:
        return torch.equal(a, b)
    x, y, both = a.double(), b.double(), 1 / a.numel() + 1 / b.numel()
    kurtosis = ((y - y.mean()) ** 4).mean() / y.var() ** 2
    means = abs(x.mean() - y.mean()) < 5 * y.std() * both**0.5
    scales = abs(x.std() / y.std() - 1) < 5 * ((kurtosis - 1).clamp(min=0) / 4 * both) ** 0.5 + 25 * both
    return bool(means and scales and ks_two_samples(a, b) < LIMIT)


def parts_of(tensor):
    """A tensor, and parts of it that init code may treat apart."""
    yield "all", tensor
    if tensor.dim():
        yield "row 0", tensor[0]
        yield "rest", tensor[1:]
        yield "column 0", tensor[..., 0]


def differences(build, made):
    """What is not in law as it is when the code runs: values where these do not depend on the seed, else distributions."""
    one, other = really(build, 0), really(build, 1)
    if one.keys() != made.keys():
        return [f"{sorted(one)} and {sorted(made)}"]
    found = [
        text for path in made for text in _different(path, made[path], one[path], random=not same(one[path], other[path]))
    ]
    paths = [path for path, tensor in made.items() if tensor.numel() > 1000 and not same(one[path], other[path])]
    for a, b in combinations(paths, 2):
        if made[a].shape == made[b].shape:
            mine, own = (
                torch.stack([t[a].double().flatten(), t[b].double().flatten()]).corrcoef()[0, 1] for t in (made, one)
            )
            if abs(mine - own) > 0.2:
                found.append(f"{a} and {b} have the correlation {mine:.2f}, not {own:.2f}")
    return found


def _different(path, mine, own, *, random):
    if (mine.dtype, mine.shape) != (own.dtype, own.shape):
        yield f"{path}: {mine.dtype} {tuple(mine.shape)}, not {own.dtype} {tuple(own.shape)}"
    elif not random:
        if not torch.equal(mine.nan_to_num(1234.5), own.nan_to_num(1234.5)):
            yield f"{path}: {mine.flatten()[:6].tolist()}, not {own.flatten()[:6].tolist()}"
    else:
        theirs = dict(parts_of(own))
        for name, part in parts_of(mine):
            if part.numel() > 1 and not near(part, theirs[name]):
                yield f"{path}, {name}: std {part.double().std():.3g}, not {theirs[name].double().std():.3g}"
