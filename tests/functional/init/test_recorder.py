"""Init code is recognised as a program, or left as it is; either way the values are in law those of the code itself.

The list of code that is only compared with itself (``ANY``) is of ways to be misunderstood: aliases, views, writes after a
copy, values looked at. Deterministic code gives exactly its values, random code its distributions: of the whole, of the
first row, of the rest, of the first column, and the correlation of tensors of one shape.
"""

from __future__ import annotations

import math
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import InitProgram, Made, Mesh, PlanError
from tests.helpers.init_programs import Coded, differences, near, plan_and_make, really, tensors

W = (64, 64)
ROWS = torch.arange(64.0)

pytestmark = pytest.mark.filterwarnings("ignore:mean is more than 2 std from:UserWarning")

RECOGNISED: list = []
OPAQUE: list = []
ANY: list = []


def recognised(text, **options):
    def note(code):
        RECOGNISED.append(pytest.param(code, text, options or {"w": W}, id=code.__name__))
        return code

    return note


def opaque(*causes, **options):
    def note(code):
        OPAQUE.append(pytest.param(code, causes, options or {"w": W}, id=code.__name__))
        return code

    return note


def either(**options):
    def note(code):
        ANY.append(pytest.param(code, options or {"w": W}, id=code.__name__))
        return code

    return note


# draws


@recognised("normal(2, 3)")
def draws_normal(m):
    m.w.normal_(2, 3)


@recognised("uniform(-1, 3)")
def draws_uniform(m):
    m.w.uniform_(-1, 3)


@recognised("exponential(2)")
def draws_exponential(m):
    m.w.exponential_(2)


@recognised("log_normal(0.5, 0.25)")
def draws_log_normal(m):
    m.w.log_normal_(0.5, 0.25)


@recognised("bernoulli(0.3)")
def draws_bernoulli(m):
    m.w.bernoulli_(0.3)


@recognised("geometric(0.3)")
def draws_geometric(m):
    m.w.geometric_(0.3)


@recognised("cauchy(1, 2); clamp(-20, 20)")
def draws_cauchy(m):
    m.w.cauchy_(1, 2).clamp_(-20, 20)


@recognised("truncated_normal(0, 1, -1, 2)")
def truncates_wide(m):
    nn.init.trunc_normal_(m.w, 0.0, 1.0, -1.0, 2.0)


@recognised("truncated_normal(0, 1, 3, 4)")
def truncates_narrow(m):
    nn.init.trunc_normal_(m.w, 0.0, 1.0, 3.0, 4.0)


@either()
def truncates_by_hand(m):
    m.w.normal_()
    while ((m.w < -2) | (m.w > 2)).any():
        outside = (m.w < -2) | (m.w > 2)
        m.w.copy_(torch.where(outside, torch.randn(64, 64), m.w))


@recognised("uniform(±0.954); erfinv(); mul(0.02828); add(0); clamp(-0.04, 0.04)")
def truncates_as_timm(m):
    low, high = (2 * (1 + math.erf(x / 2**0.5)) / 2 - 1 for x in (-2, 2))
    m.w.uniform_(low, high).erfinv_().mul_(0.02 * 2**0.5).add_(0).clamp_(min=-0.04, max=0.04)


@recognised("normal(0, 1); mul(2); add(1); exp(); clamp_max(3)")
def arithmetic(m):
    m.w.normal_().mul_(2).add_(1).exp_().clamp_max_(3)


@recognised("uniform(0, 1); mul(2); sub(1); mul(0.02)")
def drawn_on_the_side(m):
    m.w.copy_((torch.rand(64, 64) * 2 - 1) * 0.02)


@recognised("normal(0, 1); mul(0.02)")
def drawn_and_put_in_place(m):
    m.w.data = torch.randn(64, 64) * 0.02


@recognised("normal(0, 1); mul(2)")
def drawn_in_float64(m):
    m.w.copy_(torch.randn(64, 64, dtype=torch.float64) * 2)


@recognised("normal(0, 1); mul(2)")
def side_tensor_changed_after_it_was_copied(m):
    side = torch.randn(64, 64)
    m.w.copy_(side)
    side.zero_()
    m.w.mul_(2)


@recognised("normal(0, 1); add(3) row 0")
def side_tensor_changed_after_it_was_put_in_place(m):
    side = torch.randn(64, 64)
    m.w.data = side
    side[0].add_(3)


@recognised("normal(0, 1)")
def kept_and_given_back(m):
    m.w.normal_()
    kept = m.w.clone()
    m.w.zero_()
    m.w.copy_(kept)


# parts


@recognised("normal(0, 1); zero row 0; constant(numbers) [:, 1]; uniform(5, 6) [2:63:2, 3:5]")
def parts(m):
    m.w.normal_()
    m.w[0].zero_()
    m.w[:, 1] = 2
    m.w[2::2, 3:5].uniform_(5, 6)


@recognised("normal(0, 1) rows 0:32; normal(1, 1) rows 32:64; mul(2) [:, 0:16]")
def parts_of_fused_weights(m):
    for number, part in enumerate(m.w.chunk(2)):
        part.normal_(number, 1)
    m.w.t()[:16].mul_(2)


@recognised("normal(0, 1) rows 0:16; normal(1, 1) rows 16:32; normal(2, 1) rows 32:48; normal(3, 1) rows 48:64")
def parts_of_reshaped(m):
    for number, part in enumerate(m.w.view(4, 16, 64)):
        part.normal_(number, 1)


@recognised("normal(0, 1); mul([arange]); add([arange], alpha=3)")
def broadcast(m):
    m.w.normal_().mul_(torch.arange(64.0))
    m.w.t().add_(torch.arange(64.0), alpha=3)


@recognised("zero; constant(arange) [0:3:2, :, 1:3]", w=(4, 6, 5))
def a_constant_through_a_permutation(m):
    m.w.zero_()
    m.w.permute(2, 0, 1)[1:3, ::2].copy_(torch.arange(24.0).view(2, 2, 6))


@recognised("normal(0, 1); masked_fill([eye], 0)")
def constant_mask(m):
    m.w.normal_().masked_fill_(torch.eye(64, dtype=torch.bool), 0)


# constants


@recognised("constant(triu)", w=W, buffers=["w"])
def causal_mask(m):
    m.w.copy_(torch.full((64, 64), float("-inf")).triu_(1))


@either()
def put_in_place_from_its_own_shape(m):
    m.w.data = torch.ones_like(m.w) * 0.5


@either(w=W, v=W)
def put_in_place_then_read(m):
    m.w.data = torch.ones_like(m.w) * 2
    m.v.copy_(m.w * 3)


@either()
def numbers_put_in_place(m):
    m.w.data = torch.tensor([[float(i + j) for j in range(64)] for i in range(64)])


@either()
def side_tensor_of_other_memory(m):
    side = torch.zeros(64, 64)
    side.data = torch.arange(4096.0).view(64, 64)
    m.w.copy_(side)


@either()
def side_tensor_whose_view_stays_behind(m):
    side = torch.arange(4096.0)
    view = side.view(64, 64)
    side.data = torch.ones(64, 64)
    view.mul_(3)
    m.w.copy_(side)


@either(w=W, v=W)
def the_seed_of_most_people_twice(m):
    torch.manual_seed(0)
    m.w.normal_()
    torch.manual_seed(0)
    m.v.normal_()


@either(w=W, v=W)
def the_same_state_twice(m):
    state = torch.get_rng_state()
    m.w.normal_()
    torch.set_rng_state(state)
    m.v.normal_()


@either(w=W, v=W)
def in_two_forks(m):
    with torch.random.fork_rng(devices=[]):
        m.w.normal_()
    with torch.random.fork_rng(devices=[]):
        m.v.normal_()


@either(w=(4,), v=(4,))
def whole_numbers_that_wrap_and_floats_that_do_not(m):
    m.w.copy_(torch.arange(4, dtype=torch.uint8) * 200 / 1)
    m.v.copy_(torch.arange(4, dtype=torch.uint8) * 200.0 / 1)


@either()
def made_of_other_memory(m):
    m.w.set_(torch.full((64, 64), 3.0))


@opaque("more than 64 operations")
def element_by_element(m):
    m.w.zero_()
    for number in range(200):
        m.w[0, number % 64] = number


@opaque("more than 256 operators")
def side_tensor_element_by_element(m):
    side = torch.zeros(64, 64)
    for number in range(300):
        side[0, number % 64] = number / 7
    m.w.copy_(side)


@opaque("other numbers each time")
def unseeded_numbers(m):
    m.w.copy_(torch.from_numpy(np.random.default_rng().normal(size=(64, 64))))


@opaque("it is computed from constants of 112.0 MiB", w=(1024, 4096))
def many_large_constants(m):
    m.w.fill_(1)
    for number in range(1, 8):
        m.w.mul_(torch.full((1024, 4096), float(number)))


@recognised("constant(arange, pow, cat, stack)")
def cat_and_stack(m):
    m.w.copy_(torch.stack([torch.cat([torch.arange(32.0), torch.arange(32.0).pow(2)])] * 64))


@recognised("constant(arange, div, pow, reciprocal, mul, add, ...)", w=(32,), buffers=["w"])
def rotary(m):
    m.w.copy_(1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64)) * 2 + 1 - 1)


@recognised("constant(arange, mul, exp, sin, cos)")
def sinusoids(m):
    angle = torch.arange(64.0)[:, None] * torch.exp(torch.arange(0, 64, 2.0) * (-math.log(10000.0) / 64))
    table = torch.zeros(64, 64)
    table[:, 0::2] = torch.sin(angle)
    table[:, 1::2] = torch.cos(angle)
    m.w.copy_(table)
    table.zero_()


@recognised("fill(42)")
def one_value_of_a_constant(m):
    side = torch.arange(4.0) + 2
    m.w.fill_(side[1].item() * side.sum().item())


@recognised("constant(t, add, mul)")
def side_tensor_through_its_views(m):
    side = torch.zeros(64, 64)
    row, turned = side[1], side.t()
    side.add_(1)
    row.mul_(5)
    side[0, 3] = 9
    m.w.copy_(turned)


@recognised("constant(linspace); constant(numbers) [3, 5]; constant(new_ones) row 63")
def values_in_brackets(m):
    m.w[...] = torch.linspace(0, 1, 64)
    m.w[3, 5] = 2
    m.w[-1] = m.w.new_ones(64)


@recognised("fill(3)", w=())
def no_axes(m):
    m.w.fill_(3)


# opaque


@opaque("no box")
def a_diagonal(m):
    m.w.normal_().diagonal().zero_()


@opaque("a generator of its own")
def own_generator(m):
    m.w.normal_(generator=torch.Generator().manual_seed(3))


@opaque("shares its random numbers with v", "shares its random numbers with w", w=W, v=W)
def shared_numbers(m):
    side = torch.randn(64, 64)
    m.w.copy_(side)
    m.v.copy_(side * 2)


@opaque("shares its random numbers with v", "shares its random numbers with w", w=W, v=W)
def halves_of_one_draw(m):
    m.w.data, m.v.data = torch.randn(128, 64).chunk(2)


@opaque("v is computed from it", "computed from w", w=W, v=W)
def one_from_another(m):
    m.w.normal_()
    m.v.copy_(m.w * 3)


@opaque("looks at values")
def rescaled_by_what_it_drew(m):
    m.w.normal_()
    m.w.mul_(2 if m.w.mean() > 5 else 3)


@opaque("norm is not pointwise")
def normed(m):
    m.w.normal_()
    m.w.div_(m.w.norm())


@opaque("sort is not pointwise")
def sorted_values(m):
    m.w.normal_()
    m.w.copy_(m.w.flatten().sort().values.view(64, 64))


@opaque("flip is not pointwise")
def flipped(m):
    m.w.normal_()
    m.w[0] = 5
    m.w.copy_(m.w.flip(0))


@opaque("index_put is not pointwise")
def by_index(m):
    m.w.normal_()
    m.w[torch.tensor([0, 3])] = 0


@opaque("cannot be followed")
def through_numpy(m):
    m.w.copy_(torch.from_numpy(np.full_like(m.w.detach().numpy(), 2)))


@opaque("random is not pointwise")
def integers(m):
    m.w.random_(0, 10)


# ways to be misunderstood


@either()
def transposed_in_place_of_itself(m):
    m.w.copy_(torch.arange(4096.0).view(64, 64))
    m.w.data = m.w.data.t()


@either()
def a_new_parameter_on_the_old_memory(m):
    m.w.copy_(torch.arange(4096.0).view(64, 64))
    m.w = nn.Parameter(m.w.t(), requires_grad=False)


@either()
def a_transposed_constant_put_in_place(m):
    m.w.data = torch.arange(4096.0).view(64, 64).t()


@either()
def nothing_of_the_middle(m):
    m.w.fill_(1)
    m.w[2:2].fill_(5)


@either()
def nothing_of_the_columns(m):
    m.w.fill_(1)
    m.w[:, :0].fill_(5)


@either()
def nothing_past_the_end(m):
    m.w.fill_(1)
    m.w[64:].fill_(5)


@either()
def part_of_it_truncated(m):
    nn.init.normal_(m.w)
    nn.init.trunc_normal_(m.w[:8], a=-0.5, b=0.5)


@either()
def each_part_truncated(m):
    for number, part in enumerate(m.w.chunk(4), 1):
        nn.init.trunc_normal_(part, std=number, a=-2 * number, b=2 * number)


@either()
def part_of_it_truncated_by_rejection(m):
    nn.init.normal_(m.w)
    nn.init.trunc_normal_(m.w[:8], a=2.0, b=3.0)


@either()
def clamped_if_outside(m):
    m.w.normal_()
    if ((m.w < -1) | (m.w > 1)).any():
        m.w.clamp_(-1, 1)


@either()
def zeroed_if_outside(m):
    m.w.normal_()
    if ((m.w < -1) | (m.w > 1)).any():
        m.w.zero_()


@either()
def only_one_row_drawn_again(m):
    m.w.normal_()
    while ((m.w[0] < -1) | (m.w[0] > 1)).any():
        m.w[0] = torch.where(m.w[0].abs() > 1, torch.randn(64), m.w[0])


@either()
def asked_before_it_was_scaled(m):
    m.w.normal_()
    outside = (m.w < -2) | (m.w > 2)
    m.w.mul_(10)
    if outside.any():
        m.w[outside] = 0


@either()
def asked_the_other_way_round(m):
    m.w.normal_()
    if ((m.w > -1) | (m.w < 1)).any():
        m.w.mul_(2)


@either()
def drawn_again_as_a_whole_three_times(m):
    for _ in range(3):
        m.w.normal_()
        if not ((m.w < -1) | (m.w > 1)).any():
            break


@either()
def drawn_again_only_once(m):
    m.w.normal_()
    outside = (m.w < -1) | (m.w > 1)
    if outside.any():
        m.w.copy_(torch.where(outside, torch.randn(64, 64), m.w))


@either()
def drawn_again_from_another_distribution(m):
    m.w.normal_()
    while (outside := (m.w < -1) | (m.w > 1)).any():
        m.w.copy_(torch.where(outside, torch.rand(64, 64) * 0.1, m.w))


@either(w=(32, 128))
def boxes_of_another_shape(m):
    side = torch.randn(64, 64)
    side[0].zero_()
    m.w.copy_(side.view(32, 128))


@either(w=(32, 128))
def boxes_of_another_shape_put_in_place(m):
    side = torch.randn(64, 64)
    side[0].zero_()
    m.w.data = (side * 2).view(32, 128)


@either(w=(32, 128))
def a_grid_of_another_shape(m):
    side = torch.randn(64, 64)
    side.mul_(torch.arange(64.0))
    m.w.copy_(side.view(32, 128))


@either()
def draws_in_a_part_of_a_constant(m):
    side = torch.zeros(64, 64)
    side.add_(1)
    side[1:2].normal_()
    m.w.copy_(side)


@either()
def draws_in_a_part_of_a_range(m):
    side = torch.arange(4096.0).view(64, 64)
    side[:2].normal_()
    m.w.data = side


@either()
def draws_over_a_constant(m):
    side = torch.ones(64, 64).mul_(3)
    m.w.copy_(side.bernoulli_(0.5).mul_(2))


@either()
def bits_as_integers(m):
    m.w.view(torch.int32).fill_(0x3F800000)


@either(w=W, dtype=torch.complex64)
def parts_of_complex_numbers(m):
    torch.view_as_real(m.w).fill_(1)


@either(w=W, dtype=torch.complex64)
def complex_constants(m):
    m.w.copy_(torch.polar(torch.ones(64), torch.arange(64.0)))


@either()
def numpy_values_changed_in_place(m):
    side = torch.from_numpy(np.arange(4096, dtype=np.float32).reshape(64, 64).copy())
    side.mul_(2)
    side[0] = 7
    m.w.copy_(side)


@either(w=(4, 4))
def a_list_changed_in_place(m):
    side = torch.tensor([[1.0, 2, 3, 4]] * 4)
    side[0] = 7
    side.mul_(2)
    m.w.copy_(side)


@either()
def closed_over_and_changed(m):
    ROWS.copy_(torch.arange(64.0))
    ROWS[:2].add_(1)
    m.w.copy_(ROWS)


@either(w=W, v=W)
def the_same_memory(m):
    m.w.normal_()
    m.v.data = m.w.data
    m.w.add_(5)


@either(w=W, v=W)
def exchanged(m):
    m.w.normal_()
    m.v.zero_()
    m.w.data, m.v.data = m.v.data, m.w.data


@either(w=W, v=W)
def the_same_side_tensor_twice(m):
    side = torch.randn(64, 64)
    m.v.data = side
    m.w.data = side
    side.add_(3)


@either(w=W, v=W)
def the_same_seed_twice(m):
    torch.manual_seed(5)
    m.w.normal_()
    torch.manual_seed(5)
    m.v.normal_()


@either(w=W, v=W)
def side_tensor_used_again(m):
    side = torch.zeros(64, 64)
    side[0].normal_()
    m.v.copy_(side)
    side.fill_(4)
    m.w.copy_(side)


@either(w=W, v=W)
def side_tensor_drawn_again(m):
    side = torch.randn(64, 64)
    m.v.copy_(side)
    m.w.copy_(side.normal_(3, 1))


@either(w=W, v=W)
def source_overwritten_after_the_copy(m):
    m.v.normal_(5, 1)
    m.w.copy_(m.v)
    m.v.normal_()


@either()
def added_to_itself(m):
    m.w.normal_()
    m.w.add_(m.w.clone())


@either()
def two_draws_added(m):
    m.w.normal_()
    m.w.add_(torch.randn(64, 64))


@either()
def squared_by_itself(m):
    m.w.normal_()
    m.w.mul_(m.w)


@either()
def turned_over(m):
    m.w.normal_()
    m.w[0] = 9
    m.w.copy_(m.w.t().clone())


@either()
def turned_in_place(m):
    m.w.normal_()
    m.w[0] = 9
    m.w.t_()


@either()
def masked_by_what_it_drew(m):
    m.w.normal_().masked_fill_(m.w > 1, 0)


@either()
def indexed_by_what_it_drew(m):
    m.w.normal_()
    m.w[m.w > 1] = 0


@either()
def chosen_by_what_it_drew(m):
    m.w.normal_()
    m.w.copy_(torch.where(m.w > 0, m.w, 0.1 * m.w))


@either()
def chosen_by_a_constant(m):
    m.w.normal_()
    m.w.copy_(torch.where(torch.eye(64) > 0, m.w, torch.zeros(())))


@either()
def the_other_operand(m):
    m.w.uniform_(1, 2)
    m.w.copy_(1 - m.w)
    m.w.copy_(3 / (m.w + 3))
    m.w.copy_(2**m.w)
    m.w.copy_(torch.ones(64, 64) - m.w)


@either()
def to_integers_and_back(m):
    m.w.normal_(0, 5)
    m.w.copy_(m.w.to(torch.int32).float())


@either()
def to_half_and_back(m):
    m.w.normal_(300.0, 0.01)
    m.w.copy_(m.w.half().float())


@either()
def drawn_on_the_side_in_bfloat16(m):
    m.w.copy_(torch.randn(64, 64, dtype=torch.bfloat16).mul_(0.001).add_(1))


@either()
def filled_on_the_side_in_half(m):
    side = torch.full((64, 64), 0.1, dtype=torch.half)
    side[0].normal_()
    side[0].zero_()
    m.w.copy_(side)


@either(w=W, dtype=torch.int64)
def integers_in_place(m):
    m.w.fill_(7).floor_divide_(2)
    m.w[::2] = 5
    m.w.mul_(2**40).add_(1)


@either(w=W, dtype=torch.int64)
def integers_of_numbers(m):
    m.w.copy_(torch.arange(64.0) * 1.7)
    m.w[1].fill_(2.7)


@either(w=W, dtype=torch.bool)
def booleans(m):
    m.w.fill_(2)
    m.w[1:4] = False
    m.w.logical_not_()


@either()
def resized(m):
    side = torch.empty(2, 2)
    side.resize_(64, 64).fill_(1.0)[0] = 2
    m.w.copy_(side)


@either()
def resized_and_drawn(m):
    m.w.copy_(torch.empty(2, 2).resize_(64, 64).normal_())


@either()
def set_to_another(m):
    m.w.set_(torch.arange(4096.0).view(64, 64))
    m.w.mul_(2)


@either()
def written_by_out(m):
    m.w.normal_()
    torch.add(m.w, 1.0, out=m.w)
    torch._foreach_mul_([m.w], 3.0)


@either()
def chances_of_their_own(m):
    m.w.bernoulli_(torch.full((64, 64), 0.3))


@either()
def dropped_out(m):
    m.w.normal_()
    nn.functional.dropout(m.w, 0.5, training=True, inplace=True)


@either()
def leaky_at_random(m):
    m.w.normal_()
    nn.functional.rrelu_(m.w, 0.1, 0.9, training=True)


@either()
def one_number_for_all(m):
    m.w.fill_(1)
    m.w.mul_(torch.rand(1).sign())


@either()
def a_loop_over_values(m):
    for row, value in enumerate(torch.arange(64.0).tolist()):
        m.w[row] = value**2
    if torch.arange(4.0).max() > 2:
        m.w.add_(1)


@either()
def in_triangles(m):
    m.w.normal_()
    m.w.copy_(torch.tril(m.w))
    m.w[3:5].triu_()


@either()
def running_sums(m):
    m.w.fill_(1)
    m.w.cumsum_(0)


@either()
def every_third(m):
    m.w.zero_()
    m.w.view(-1)[7:400].fill_(3)
    m.w.view(-1)[::3].add_(1)
    m.w.view(-1)[::64].add_(1)


@either(w=(1, 64, 1))
def axes_of_one(m):
    m.w.zero_()
    m.w.squeeze().copy_(torch.arange(64.0))
    m.w.transpose(0, 1).mul_(2)


@either()
def rates_without_end(m):
    m.w.exponential_(float("inf"))


@either()
def divided_by_its_largest(m):
    m.w.normal_()
    m.w.mul_(1 / m.w.max().item()).mul_(0).add_(1)


@either(w=W, v=(64,))
def a_row_of_another(m):
    nn.init.normal_(m.w)
    nn.init.uniform_(m.v)
    nn.init.ones_(m.w[3])
    m.w[0].copy_(m.v)


@pytest.mark.parametrize(("code", "text", "options"), RECOGNISED)
def test_recognised_code_is_printed_and_gives_its_values(code, text, options):
    def build():
        return Coded(code, **options)

    sources, made = plan_and_make(build)
    assert all(isinstance(source, InitProgram) for source in sources.values()), sources
    assert "; ".join(map(str, sources.values())) == text
    assert differences(build, made) == []


@pytest.mark.parametrize(("code", "causes", "options"), OPAQUE)
def test_opaque_code_says_why_and_gives_its_values(code, causes, options):
    def build():
        return Coded(code, **options)

    sources, made = plan_and_make(build)
    assert all(isinstance(source, Made) for source in sources.values()), sources
    for (path, source), cause in zip(sources.items(), causes, strict=True):
        assert cause in source.cause, path
    assert differences(build, made) == []


@pytest.mark.parametrize(("code", "options"), ANY)
def test_however_code_is_taken_its_values_are_its_own(code, options):
    def build():
        return Coded(code, **options)

    sources, made = plan_and_make(build)
    told = {path: str(source) if isinstance(source, InitProgram) else source.cause for path, source in sources.items()}
    assert all(told.values())
    assert differences(build, made) == [], told


def inner(fill):
    return Coded(lambda m: m.v.fill_(fill), v=W)


def by_item(m):
    m.w.fill_(m.child.v.mean().item())


def by_branch(m):
    m.w.fill_(1.0 if m.child.v.sum() < 0 else 2.0)


def by_equality(m):
    m.w.fill_(3.0 if torch.equal(m.child.v, torch.full(W, -1.0)) else 4.0)


def by_numpy(m):
    m.w.copy_(torch.from_numpy(m.child.v.detach().numpy() * 2))


def by_norm(m):
    m.w.copy_(m.child.v.norm(dim=1, keepdim=True).expand(64, 64))


def by_copy(m):
    m.w.copy_(m.child.v)
    m.child.v.fill_(7)


def by_scaling(m):
    m.w.zero_()
    m.child.v.mul_(2)


@pytest.mark.parametrize("code", [by_item, by_branch, by_equality, by_numpy, by_norm, by_copy, by_scaling])
def test_code_that_looks_at_what_other_code_made_finds_it(code):
    def build():
        return Coded(code, inner(-1.0), w=W)

    _, made = plan_and_make(build)
    assert differences(build, made) == []


def test_what_is_made_of_each_other_agrees():
    def code(m):
        m.w.normal_()
        m.v.copy_(m.w.flip(0) * 2)

    sources, made = plan_and_make(lambda: Coded(code, w=W, v=W))
    assert torch.equal(made["v"], made["w"].flip(0) * 2)
    assert sources["w"].cause == "v is computed from it"


def halved_by_copy(m):
    m.weight.copy_(m.weight * 0.5)


def halved_by_data(m):
    m.weight.data = m.weight.data * 0.5


def halved_in_place(m):
    m.weight.mul_(0.5)


@pytest.mark.parametrize("code", [halved_by_copy, halved_by_data, halved_in_place])
def test_code_that_starts_from_what_is_there_builds_on_the_code_before(code):
    sources, made = plan_and_make(lambda: nn.Linear(64, 64, bias=False), init_weights=code)
    assert str(sources["weight"]) == "uniform(±0.125); mul(0.5)"
    assert near(made["weight"], nn.Linear(64, 64).weight.detach() / 2)


def test_what_is_only_copied_to_itself_has_no_values():
    with pytest.raises(PlanError, match="w  f32"):
        plan_and_make(lambda: Coded(lambda m: m.w.copy_(m.w.clone()), w=W))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_a_program_of_several_operations_rounds_once(dtype):
    def code(m):
        m.w.fill_(0.1).mul_(3).add_(0.7).mul_(1.01).sub_(0.999)

    _, made = plan_and_make(lambda: Coded(code, dtype=dtype, w=W))
    exact = really(lambda: Coded(code, w=W))["w"]
    assert torch.equal(made["w"], exact.to(dtype))


def test_the_last_write_to_the_whole_wins():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(128, 128)

        def reset_parameters(self):
            for parameter in self.parameters():
                parameter.data.normal_(0, 0.02)
            for name, parameter in self.named_parameters():
                if name == "proj.weight":
                    parameter.data.normal_(mean=0.0, std=0.02 / math.sqrt(2 * 8))

    sources, made = plan_and_make(lambda: nn.Sequential(Block(), Block()))
    assert [str(source) for source in sources.values()] == ["normal(0, 0.005)", "normal(0, 0.02)"] * 2
    assert near(made["0.proj.weight"], torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) * 0.005)
    assert not torch.equal(made["0.proj.weight"], made["1.proj.weight"])


def test_equal_modules_have_equal_programs_and_different_values():
    sources, made = plan_and_make(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert sources["0.weight"] == sources["1.weight"]
    a, b = made["0.weight"], made["1.weight"]
    assert abs(torch.stack([a.flatten(), b.flatten()]).corrcoef()[0, 1]) < 5 / 64


@pytest.mark.parametrize("seed", [0, 1])
def test_programs_do_not_depend_on_the_seed_but_values_do(seed):
    def code(m):
        m.w.normal_()
        m.v.fill_(random.random())
        m.u.copy_(torch.from_numpy(np.random.randn(64, 64)))  # noqa: NPY002

    (one, made), (other, again) = (plan_and_make(lambda: Coded(code, w=W, v=W, u=W), seed=s) for s in (seed, seed + 1))
    assert one == other
    for path, tensor in made.items():
        assert not (tensor == again[path]).any(), path


def test_code_that_reads_a_file_is_run_with_what_is_in_it(tmp_path):
    np.save(tmp_path / "table.npy", np.arange(16, dtype=np.float32).reshape(4, 4))

    def code(m):
        m.w.copy_(torch.from_numpy(np.load(tmp_path / "table.npy")))

    _, made = plan_and_make(lambda: Coded(code, w=(4, 4)))
    assert torch.equal(made["w"], torch.arange(16.0).view(4, 4))


def test_a_file_that_is_missing_is_named():
    def code(m):
        m.w.copy_(torch.from_numpy(np.load(Path("missing.npy"))))

    with pytest.raises(PlanError, match=r"raises FileNotFoundError: .*missing.npy"):
        plan_and_make(lambda: Coded(code, w=(4, 4)))


def test_a_constant_too_large_for_every_rank_is_left_to_one():
    def code(m):
        m.w.copy_(torch.arange(2.0**24).view(2**12, 2**12).remainder(7))

    sources, made = plan_and_make(lambda: Coded(code, w=(2**12, 2**12)))
    assert isinstance(sources["w"], Made)
    assert "MiB" in sources["w"].cause
    assert torch.equal(made["w"][0], torch.arange(4096.0).remainder(7))


def test_code_of_very_many_operations_is_left_as_it_is():
    def code(m):
        for row in range(64):
            m.w[row].normal_(row, 1)
            m.w[row].add_(0.5)

    sources, made = plan_and_make(lambda: Coded(code, w=W))
    assert isinstance(sources["w"], Made)
    assert "more than 64 operations" in sources["w"].cause
    assert (made["w"].mean(dim=1) - torch.arange(64) - 0.5).abs().max() < 5 / 8


@pytest.mark.parametrize("code", [draws_normal, shared_numbers, through_numpy, divided_by_its_largest])
def test_planning_leaves_all_generators_as_they_were(code):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    with torch.device("meta"):
        model = Coded(code, w=W, v=W) if code is shared_numbers else Coded(code, w=W)
    before = state()
    with suppress(PlanError):
        plan_build(create_schedule(model, Mesh()))
    assert state() == before


def test_what_is_closed_over_is_not_changed_by_planning():
    table = torch.zeros(64)

    def code(m):
        table.add_(1)
        m.w.copy_(table)

    with torch.device("meta"):
        model = Coded(code, w=W)
    plan_build(create_schedule(model, Mesh()))
    assert torch.equal(table, torch.zeros(64))


def test_values_do_not_depend_on_threads():
    def code(m):
        m.w.copy_((torch.arange(128.0 * 511).view(128, 511) / 7).pow(0.37).sin())
        m.v.normal_().sigmoid_()
        m.u.copy_(torch.randn(300, 511).softmax(1))

    def build():
        return Coded(code, w=(128, 511), v=(300, 511), u=(300, 511))

    before, made = torch.get_num_threads(), []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            made.append(plan_and_make(build)[1])
    finally:
        torch.set_num_threads(before)
    for path, tensor in made[0].items():
        assert torch.equal(tensor, made[1][path]), path


def test_a_plan_made_once_is_executed_the_same_each_time():
    def code(m):
        m.w.copy_(torch.arange(64.0).log1p())
        m.v.normal_()

    with torch.device("meta"):
        model = Coded(code, w=W, v=W)
    plan = plan_build(create_schedule(model, Mesh()))
    one, other = (tensors(execute(plan, device="cpu").module) for _ in range(2))
    assert all(torch.equal(one[path], other[path]) for path in one)
    assert torch.equal(one["w"], really(lambda: Coded(code, w=W, v=W))["w"])


def test_code_that_looks_at_one_kept_value_finds_it():
    def code(m):
        m.w.fill_(m.scale.item())

    class Scaled(Coded):
        def __init__(self):
            super().__init__(code, w=W)
            self.register_buffer("scale", torch.tensor(3.0, device="cpu"))

    _, made = plan_and_make(Scaled)
    assert torch.equal(made["w"], torch.full(W, 3.0))


def test_constants_do_not_follow_the_defaults_of_the_day():
    def code(m):
        m.w.copy_(1.0 / 10000 ** (torch.arange(4096) / 4096))
        m.v.copy_(torch.tensor([2.0]) * torch.arange(8).float() / 3)

    with torch.device("meta"):
        model = Coded(code, w=(4096,), v=(8,))
        plan = plan_build(create_schedule(model, Mesh()))
    expected = execute(plan, device="cpu").module
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            built = execute(plan, device="cpu").module
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(built.w, expected.w)
    assert torch.equal(built.v, expected.v)
    assert plan == plan_build(create_schedule(model, Mesh()))


def test_memory_that_nobody_wrote_is_no_constant():
    def code(m):
        side = torch.empty(64, 64)
        side[:32] = 1
        m.w.fill_(0)
        m.w.copy_(side)

    with torch.device("meta"):
        model = Coded(code, w=W)
    source = plan_build(create_schedule(model, Mesh())).tree["w"].source
    assert source.cause == "it holds memory that no code has written"
