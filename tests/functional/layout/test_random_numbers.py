"""Random numbers along ``tensor``: of each rank in forked modules, the same in shared ones inside them, and after them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional.layout.apply import RankContext, apply_layout
from shardplan.specs import Mesh
from shardplan.specs.layout_steps import ForkRng, ShareRng


class Draw(nn.Module):
    """Draws three numbers."""

    def forward(self, seen):
        seen[self.name] = torch.rand(3)


class Nested(nn.Module):
    """Draws by modules inside modules; may raise an error inside the innermost."""

    def __init__(self):
        super().__init__()
        self.before, self.inside, self.shared, self.innermost, self.after = (Draw() for _ in range(5))
        self.outer, self.middle = nn.Module(), nn.Module()
        self.outer.forward, self.middle.forward = self.run_outer, self.run_middle
        for name, module in self.named_children():
            module.name = name

    def forward(self, *, fails=False):
        self.seen, self.fails = {}, fails
        self.before(self.seen)
        self.outer()
        self.after(self.seen)
        return self.seen

    def run_outer(self):
        self.inside(self.seen)
        self.shared(self.seen)
        self.middle()

    def run_middle(self):
        self.innermost(self.seen)
        if self.fails:
            raise ZeroDivisionError


def drawn(steps, place, *, fails=False):
    model = Nested()
    for step in steps:
        apply_layout(model, step, RankContext(Mesh(tensor=2).coordinate(place), {}, {}))
    torch.manual_seed(0)
    if fails:
        with pytest.raises(ZeroDivisionError):
            model(fails=True)
        model.after(model.seen)
        return model.seen
    return model()


def same(steps, **options):
    first, second = (drawn(steps, place, **options) for place in (0, 1))
    return {name for name, value in first.items() if torch.equal(value, second[name])}


def test_forked_and_shared_modules():
    everything = {"before", "inside", "shared", "innermost", "after"}
    assert same([]) == everything
    assert same([ForkRng("outer")]) == {"before", "after"}
    assert same([ForkRng("outer"), ShareRng("shared")]) == {"before", "shared", "after"}
    assert same([ForkRng("outer"), ShareRng("middle")]) == {"before", "innermost", "after"}
    assert same([ForkRng("outer"), ShareRng("middle"), ForkRng("innermost")]) == {"before", "after"}
    assert same([ShareRng("shared"), ShareRng("middle")]) == everything


def test_shared_from_a_module_on():
    assert same([ForkRng("outer"), ShareRng("shared", onwards=True)]) == {"before", "shared", "innermost", "after"}
    steps = [ForkRng("outer"), ShareRng("shared", onwards=True), ForkRng("innermost")]
    assert same(steps) == {"before", "shared", "after"}
    assert same([ShareRng("shared", onwards=True)]) == {"before", "inside", "shared", "innermost", "after"}
    steps = [ForkRng("outer"), ForkRng("middle"), ShareRng("innermost", onwards=True)]
    assert same(steps) == {"before", "innermost", "after"}


@pytest.mark.parametrize("onwards", [False, True])
def test_no_numbers_are_drawn_twice(onwards):
    steps = [ForkRng("outer"), ShareRng("shared", onwards=onwards), ShareRng("middle")]
    values = torch.cat(list(drawn(steps, 0).values()))
    assert len(values.unique()) == 15


def test_an_error_leaves_the_common_numbers_in_place():
    assert same([ForkRng("outer"), ShareRng("middle")], fails=True) == {"before", "innermost", "after"}
    assert same([ForkRng("outer")]) == {"before", "after"}
