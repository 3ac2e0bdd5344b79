"""Ranks as threads: torch's collectives give what real ranks get, in the same order every time; nobody waits for ever."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from shardplan.functional.judging.groups import threads_as_ranks, world_group
from shardplan.functional.judging.threads import MismatchError, RankThreads, seed_generators
from tests.helpers.ranks import results, run_ranks


def ended(num_ranks, job, seed=lambda _: 0, **options):
    threads = RankThreads(num_ranks, **options)

    def live(rank):
        world_group(threads, str, []).join()
        seed_generators(seed(rank))
        return job(rank)

    with threads_as_ranks():
        return threads.run(live)


def collectives(rank):
    """Every collective that user code may call, with what each leaves."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    own = torch.arange(4.0) + 10 * rank
    found = {}
    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX), ("min", dist.ReduceOp.MIN)):
        found[name] = own.clone()
        dist.all_reduce(found[name], op, group=pair)
    found["product"] = own.clone()
    dist.all_reduce(found["product"], dist.ReduceOp.PRODUCT)
    found["broadcast"] = own.clone()
    dist.broadcast(found["broadcast"], src=2)
    found["reduce"] = own.clone()
    dist.reduce(found["reduce"], dst=1)
    if rank != 1:
        found["reduce"] = torch.zeros(4)  # gloo leaves a part of the sum elsewhere
    found["gathered"] = [torch.empty(4) for _ in range(4)]
    dist.all_gather(found["gathered"], own)
    found["scattered"] = torch.empty(2)
    dist.reduce_scatter(found["scattered"], [own[:2] + place for place in range(4)])
    found["sent"] = torch.empty(1)
    dist.scatter(found["sent"], [torch.full((1,), float(place)) for place in range(4)] if rank == 3 else None, src=3)
    found["collected"] = [torch.empty(4) for _ in range(4)] if rank == 0 else []
    dist.gather(own, found["collected"] or None, dst=0)
    found["exchanged"] = torch.empty(4)
    dist.all_to_all_single(found["exchanged"], own)
    found["received"] = torch.zeros(3)
    if rank == 0:
        dist.send(torch.full((3,), 7.0), dst=3)
    if rank == 3:
        dist.recv(found["received"], src=0)
    dist.barrier()
    return found, dist.get_rank(), dist.get_world_size(), dist.get_rank(pair), dist.get_process_group_ranks(pair)


def test_collectives_give_what_real_ranks_get():
    threads = [one.result for one in ended(4, collectives)]
    for ours, theirs in zip(threads, results(run_ranks(collectives, 4)), strict=True):
        assert ours[1:] == theirs[1:]
        assert ours[0].keys() == theirs[0].keys()
        for name, value in ours[0].items():
            pairs = zip(value, theirs[0][name], strict=True) if isinstance(value, list) else [(value, theirs[0][name])]
            assert all(torch.equal(a, b) for a, b in pairs), name


def test_each_rank_has_random_numbers_of_its_own():
    def draw(rank):
        first = torch.rand(2)
        dist.barrier()
        return torch.cat([first, torch.rand(2)]).tolist()

    before = torch.get_rng_state()
    one, other = (one.result for one in ended(2, draw, seed=lambda _: 5))
    assert one == other
    torch.manual_seed(5)
    assert one == torch.rand(4).tolist()
    torch.set_rng_state(before)
    first, second = (one.result for one in ended(2, draw, seed=lambda rank: rank))
    assert first != second


def test_a_rank_that_never_comes_is_not_waited_for():
    found = ended(3, lambda rank: dist.barrier() if rank else rank)
    assert found[0].result == 0
    assert [one.waiting for one in found[1:]] == ["barrier() over ranks 0, 1, 2"] * 2


def test_an_error_ends_those_that_wait():
    def job(rank):
        if rank == 1:
            raise KeyError(rank)
        dist.all_reduce(torch.ones(2))

    first, second = ended(2, job)
    assert first.waiting == "all_reduce(float32[2]) over ranks 0, 1"
    assert isinstance(second.error, KeyError)


def test_code_that_catches_errors_does_not_hide_an_end():
    def job(_):
        try:
            dist.all_reduce(torch.ones(2))
        except Exception:
            return "caught"

    assert ended(2, lambda rank: job(rank) if rank else None)[1].waiting


def test_different_collectives_are_an_error():
    found = ended(2, lambda rank: dist.all_reduce(torch.ones(2 + rank)))
    assert isinstance(found[1].error, MismatchError)
    assert "rank 1 comes to all_reduce(float32[3]) over ranks 0, 1, and rank 0 to all_reduce(float32[2])" in str(
        found[1].error
    )


@pytest.mark.parametrize("seconds", [0.05])
def test_a_rank_that_takes_too_long_is_given_up(seconds):
    found = ended(2, lambda rank: time.sleep(20 * seconds) if rank else None, limit=seconds)
    assert [one.is_late for one in found] == [False, True]
    assert not dist.is_initialized()


def test_a_reduction_that_is_not_known_is_refused():
    found = ended(2, lambda _: dist.all_reduce(torch.ones(2, dtype=torch.long), dist.ReduceOp.BXOR))
    assert "reduce by SUM, AVG, MAX, MIN, PRODUCT, not by BXOR" in str(found[0].error)
