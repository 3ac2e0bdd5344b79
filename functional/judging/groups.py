"""Process groups whose ranks are threads: torch's collectives, carried out where all ranks of a group meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

from .threads import RankThreads

_c10d: Any = dist.distributed_c10d
_bindings: Any = import_module("torch._C._distributed_c10d")  # torch's own tests with threads use it


@contextmanager
def threads_as_ranks() -> Iterator[None]:
    """Let each thread have process groups of its own within the block."""
    before = _c10d._world  # noqa: SLF001
    _c10d._world = ThreadLocalWorld()  # noqa: SLF001
    _bindings._set_thread_isolation_mode(True)  # noqa: SLF001, FBT003
    try:
        yield
    finally:
        _bindings._set_thread_isolation_mode(False)  # noqa: SLF001, FBT003
        _c10d._world = before  # noqa: SLF001


@frozen
class Call:
    """A collective that a rank has issued.

    Args:
        module: Path of the module that ran.
        name: The operator and its tensors in words.
        ranks: The ranks of the group.
    """

    module: str
    name: str
    ranks: tuple[int, ...]


_ProcessGroup: Any = dist.ProcessGroup  # its stubs name arguments that torch passes by position


class ThreadGroup(_ProcessGroup):
    """The group of some ranks, as one of them has it.

    Args:
        threads: All ranks.
        ranks: The ranks of the group, in order.
        rank: This rank.
        name: The name of the group.
        where: Returns the path of the module that runs on this rank.
        issued: Takes the collectives that this rank issues.
    """

    def __init__(
        self,
        threads: RankThreads,
        ranks: Sequence[int],
        rank: int,
        name: str,
        where: Callable[[], str],
        issued: list[Call],
    ) -> None:
        super().__init__(list(ranks).index(rank), len(ranks))
        self._threads, self._ranks, self._name = threads, tuple(ranks), name
        self._where, self._issued = where, issued
        self._expected: dict[Any, deque[_Received]] = {}

    def join(self) -> None:
        """Make it the default group of this thread."""
        _register(self, self._name, self._ranks)
        _c10d._update_default_pg(self)  # noqa: SLF001

    def new_group(self, ranks: Sequence[int], group_name: str, **_: Any) -> ThreadGroup | None:
        """Return the group of some ranks; None for a rank that is not among them. ``dist.new_group`` calls it."""
        rank = self._threads.rank
        if rank not in ranks:
            return None
        return ThreadGroup(self._threads, ranks, rank, group_name, self._where, self._issued)

    @property
    def group_name(self) -> str:
        """The name of the group."""
        return self._name

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        """Return the name of the backend."""
        return "gloo"

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce a tensor of each rank."""
        reduced = _operator(opts)

        def together(brought: dict[int, list[Tensor]]) -> None:
            for given in zip(*brought.values(), strict=True):
                _put(reduced(given), *given)

        return self._meet("all_reduce", tensors, tensors, together, _named(opts))

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        """Send a rank's tensor to all ranks."""
        root = self._ranks[opts.rootRank]

        def together(brought: dict[int, list[Tensor]]) -> None:
            for rank, given in brought.items():
                for mine, sent in zip(given, brought[root], strict=True):
                    if rank != root:
                        _put(sent, mine)

        return self._meet("broadcast", tensors, tensors, together, f" from {root}")

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        """Reduce a tensor of each rank for one rank."""
        reduced, root = _operator(opts), self._ranks[opts.rootRank]

        def together(brought: dict[int, list[Tensor]]) -> None:
            _put(reduced([brought[rank][0] for rank in self._ranks]), brought[root][0])

        return self._meet("reduce", tensors, tensors, together, f"{_named(opts)} to {root}")

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], _: Any = None) -> Any:
        """Give each rank the tensors of all ranks."""

        def together(brought: dict[int, tuple[list[Tensor], Tensor]]) -> None:
            for outs, _ in brought.values():
                for out, rank in zip(outs, self._ranks, strict=True):
                    _put(brought[rank][1], out)

        return self._meet("all_gather", inputs, (outputs[0], inputs[0]), together)

    def all_gather_single(self, output: Tensor, given: Tensor, _: Any = None) -> Any:
        """Give each rank the tensors of all ranks, one after another."""
        return self.allgather([list(output.chunk(self.size()))], [given])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        """Reduce a list of tensors, and give each rank one of the results."""
        reduced = _operator(opts)

        def together(brought: dict[int, tuple[Tensor, list[Tensor]]]) -> None:
            results = [reduced(given) for given in zip(*(brought[rank][1] for rank in self._ranks), strict=True)]
            for rank, result in zip(self._ranks, results, strict=True):
                _put(result, brought[rank][0])

        return self._meet("reduce_scatter", inputs[0], (outputs[0], inputs[0]), together, _named(opts))

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        """Reduce a tensor, and give each rank a part of the result."""
        return self.reduce_scatter([output], [list(given.chunk(self.size()))], opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce several tensors of each rank."""
        return self.allreduce(tensors, opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> Any:
        """Give each rank several tensors of all ranks."""
        return [self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """Reduce several tensors, and give each rank a part of each result."""
        return [self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, inputs, strict=True)][-1]

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Any:
        """Give each rank one of a rank's tensors."""
        root = self._ranks[opts.rootRank]

        def together(brought: dict[int, tuple[Tensor, list[list[Tensor]]]]) -> None:
            for rank, sent in zip(self._ranks, brought[root][1][0], strict=True):
                _put(sent, brought[rank][0])

        return self._meet("scatter", outputs, (outputs[0], inputs), together, f" from {root}")

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Any:
        """Give a rank the tensors of all ranks."""
        root = self._ranks[opts.rootRank]

        def together(brought: dict[int, tuple[list[list[Tensor]], Tensor]]) -> None:
            for out, rank in zip(brought[root][0][0], self._ranks, strict=True):
                _put(brought[rank][1], out)

        return self._meet("gather", inputs, (outputs, inputs[0]), together, f" to {root}")

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> Any:
        """Give each rank one tensor of each rank."""

        def together(brought: dict[int, tuple[list[Tensor], list[Tensor]]]) -> None:
            for place, rank in enumerate(self._ranks):
                for out, other in zip(brought[rank][0], self._ranks, strict=True):
                    _put(brought[other][1][place], out)

        return self._meet("all_to_all", (), (outputs, inputs), together)

    def all_to_all_single(
        self, output: Tensor, given: Tensor, output_sizes: list[int] | None, input_sizes: list[int] | None, _: Any = None
    ) -> Any:
        """Give each rank a part of the tensor of each rank."""
        outs = output.split(output_sizes) if output_sizes else output.chunk(self.size())
        parts = given.split(input_sizes) if input_sizes else given.chunk(self.size())
        return self.alltoall(list(outs), list(parts))

    def barrier(self, opts: Any = None) -> Any:  # noqa: ARG002  torch names it
        """Wait for all ranks."""
        return self._meet("barrier", (), None, lambda _: None)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        """Send a tensor to a rank."""
        self._threads.give((self._name, self.rank(), to, tag), tensors[0].detach().clone())
        return _done()

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        """Receive a tensor from a rank, when it is waited for: a rank may send what that rank waits for in between."""
        key = (self._name, source, self.rank(), tag)
        return _Received(self._threads, key, tensors[0], self._expected.setdefault(key, deque()))

    def _meet(
        self, op: str, shown: Sequence[Tensor], brings: Any, together: Callable[[dict[int, Any]], None], how: str = ""
    ) -> Any:
        name = f"{op}{how}({', '.join(map(_typed, shown))})"
        self._issued.append(Call(self._where(), name, self._ranks))
        over = f"{name} over ranks {', '.join(map(str, self._ranks))}"
        self._threads.meet(self._name, self._ranks, over, brings, together)
        return _done()


class _Received(_bindings.Work):
    """A tensor that comes from another rank, after those that were asked for before."""

    def __init__(self, threads: RankThreads, key: Any, tensor: Tensor, expected: deque[_Received]) -> None:
        super().__init__()
        self._threads, self._key, self._tensor, self._expected = threads, key, tensor, expected
        expected.append(self)

    def wait(self, timeout: Any = None) -> bool:  # noqa: ARG002  torch names it
        """Wait until it has come."""
        while self in self._expected:
            value = self._threads.take(self._key)
            _put(value, self._expected.popleft()._tensor)  # noqa: SLF001
        return True


def world_group(threads: RankThreads, where: Callable[[], str], issued: list[Call]) -> ThreadGroup:
    """Return the group of all ranks, as the running thread has it."""
    return ThreadGroup(threads, range(threads.num_ranks), threads.rank, "world", where, issued)


def _register(group: ThreadGroup, name: str, ranks: Sequence[int]) -> None:
    places = {rank: place for place, rank in enumerate(ranks)}
    # under the name of the backend that ranks on CPUs have, which torch and the user's code know
    _c10d._register_pg_in_world(group, "gloo", _bindings.HashStore(), name, "gloo", places)  # noqa: SLF001


def _done() -> Any:
    """Return work that is done."""
    future: Any = torch.futures.Future()
    future.set_result(None)
    return _bindings._create_work_from_future(future)  # noqa: SLF001


def _put(value: Tensor, *into: Tensor) -> None:
    for tensor in into:
        tensor.detach().copy_(value)


def _typed(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "SUM": lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    "AVG": lambda stacked: stacked.mean(0),
    "MAX": lambda stacked: stacked.amax(0),
    "MIN": lambda stacked: stacked.amin(0),
    "PRODUCT": lambda stacked: stacked.prod(0, dtype=stacked.dtype),
}


def _name_of(opts: Any) -> str:
    return "SUM" if opts is None else opts.reduceOp.op.name


def _named(opts: Any) -> str:
    name = _name_of(opts)
    return "" if name == "SUM" else f" {name}"


def _operator(opts: Any) -> Callable[[Sequence[Tensor]], Tensor]:
    name = _name_of(opts)
    if name not in _REDUCED:
        msg = f"ranks that are threads reduce by {', '.join(_REDUCED)}, not by {name}"
        raise NotImplementedError(msg)
    return lambda given: _REDUCED[name](torch.stack([tensor.detach() for tensor in given]))
