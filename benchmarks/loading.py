"""Measure the time and memory from a Hugging Face folder to local shards with values, several ways side by side.

``python benchmarks/loading.py --json loading.json`` takes some minutes on two cores. Ranks are processes on this machine
that talk over gloo on loopback, with one thread each; the files are in the page cache. What is measured begins when all
ranks are ready, with code loaded and ranks connected by a tiny model, and ends when the rank has its last value.

Bytes read are those that the kernel copied on calls to read, where a way reads so; of a way that maps files, the bytes of
the tensors or slices that it asks for. A way that leaves pages of the files mapped has not copied them: they are touched
when the model runs, and stay shared between ranks until they are written to. ``tp_plan="auto"`` needs accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen
from consolidate import ENVIRONMENT
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from shardplan.specs import Plan

SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256},
    "large": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 32000},
}
MIB = 2**20


@frozen(eq=False)
class Job:
    """What the ranks load.

    Args:
        folder: The Hugging Face folder.
        plan: Which parts each rank keeps, and how shardplan reads them.
        checked: The same plan for a folder with a manifest.
    """

    folder: Path
    plan: Plan
    checked: Plan


@frozen
class Sample:
    """What the ranks of one run saw, the worst of them.

    Args:
        way: How they loaded.
        num_ranks: How many they were.
        seconds: From the barrier to the last value.
        peak_bytes: Most anonymous memory, above that at the start.
        kept_bytes: Bytes of the shards.
        read_bytes: Bytes read.
    """

    way: str
    num_ranks: int
    seconds: float
    peak_bytes: int
    kept_bytes: int
    read_bytes: int


_opened: dict[Path, Any] = {}  # left open: what is unmapped again would count as anonymous memory in the peak

Loaded = tuple[dict[str, "Tensor"], int | None]
"""The shards, and the bytes that were asked for; None if they were read by calls."""


def shardplan(job: Job) -> Loaded:
    """Carry out the plan."""
    return _execute(job.plan)


def shardplan_checked(job: Job) -> Loaded:
    """Carry out the plan, and compare the sums of what was read with those of the manifest."""
    return _execute(job.checked)


def _execute(plan: Plan) -> Loaded:
    from shardplan.functional import execute

    built = execute(plan, device="cpu", progress=False)
    return dict(built.module.state_dict()), built.receipt.read_bytes


def reading_alone(job: Job) -> Loaded:
    """Read the same parts without a plan's other steps: no audit, no module, no agreement of ranks."""
    import torch
    import torch.distributed as dist

    from shardplan.functional.checkpoints.byte_ranges import select_all
    from shardplan.functional.checkpoints.reader import Files, ReadRequest, read_all

    here, found = job.plan.mesh.coordinate(dist.get_rank()), dict[str, Any]()
    assert job.plan.folder is not None, "it reads files"
    with Files(job.plan.folder) as files:
        for path, spec in _persistent(job.plan):
            found[path] = torch.empty(spec.local_shape(here), dtype=getattr(torch, spec.dtype))
            requests = [ReadRequest(found[path], one) for one in select_all(spec.source.parts, spec.index(here))]
            read_all(requests, files)
    return found, sum(files.num_read.values())


def slices(job: Job) -> Loaded:
    """Take a copy of each slice with ``safe_open().get_slice``."""
    found: dict[str, Tensor] = {}
    for file, key, index in _kept(job):
        found[key] = file.get_slice(key)[tuple(slice(*interval) for (interval,) in index)].clone()
    return found, sum(tensor.nbytes for tensor in found.values())


def whole(job: Job) -> Loaded:
    """Read each tensor whole with ``safe_open().get_tensor``, and take a copy of the slice."""
    found: dict[str, Tensor] = {}
    read = 0
    for file, key, index in _kept(job):
        tensor = file.get_tensor(key)
        read += tensor.nbytes
        # the copy is a new tensor: a view would keep the whole
        found[key] = tensor[tuple(slice(*interval) for (interval,) in index)].clone()
    return found, read


def transformers_mapped(job: Job) -> Loaded:
    """Let transformers do it: ``from_pretrained(tp_plan="auto")``, which leaves pages of the files mapped."""
    found = _from_pretrained(job)
    return found, sum(tensor.nbytes for tensor in found.values())


def transformers_copied(job: Job) -> Loaded:
    """The same, and take a copy of each tensor, so that no page of the files is needed any more."""
    found = _from_pretrained(job)
    for key in found:
        found[key] = found[key].clone()
    return found, sum(tensor.nbytes for tensor in found.values())


def _from_pretrained(job: Job) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.folder, tp_plan="auto")
    tensors = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    return {key: tensor.to_local() if isinstance(tensor, DTensor) else tensor for key, tensor in tensors.items()}


def distributed_checkpoint(job: Job) -> Loaded:
    """Let torch's distributed checkpoint fill DTensors."""
    import torch
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, here = init_device_mesh("cpu", (dist.get_world_size(),)), job.plan.mesh.coordinate(dist.get_rank())
    state: dict[str, Any] = {}
    for path, spec in _persistent(job.plan):
        local = torch.empty(spec.local_shape(here), dtype=getattr(torch, spec.dtype))
        placement = Shard(spec.shards[0].axis) if spec.shards else Replicate()
        state[path] = DTensor.from_local(local, mesh, [placement], run_check=False)
    checkpoint.load(state, checkpoint_id=job.folder / "dcp")
    return {path: tensor.to_local() for path, tensor in state.items()}, None


WAYS: Mapping[str, Callable[[Job], Loaded]] = {
    "shardplan": shardplan,
    "shardplan, sums checked": shardplan_checked,
    "shardplan, reading alone": reading_alone,
    "get_slice + clone": slices,
    "get_tensor + slice + clone": whole,
    'from_pretrained(tp_plan="auto"), pages left mapped': transformers_mapped,
    'from_pretrained(tp_plan="auto") + clone': transformers_copied,
    "DCP": distributed_checkpoint,
}


def main() -> None:
    """Measure, print tables, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="numbers of processes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is compared")
    parser.add_argument("--repeat", type=int, default=7, help="samples of each")
    parser.add_argument("--json", type=Path, help="file for every sample")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # libraries read it when they are imported, which is why that comes after

    import torch
    from report import machine

    torch.set_num_threads(1)
    console, samples = Console(), list[Sample]()
    console.width = max(console.width, 150)  # a terminal that is narrower wraps lines, and loses no figure
    with tempfile.TemporaryDirectory(prefix="loading-") as root:
        folders = {name: _write(Path(root), name) for name in SIZES}
        for num_ranks in arguments.ranks:
            jobs = {name: _job(folder, num_ranks) for name, folder in folders.items()}
            for repetition in range(arguments.repeat):
                for way in arguments.ways:  # go round, so that what disturbs the machine disturbs them all
                    samples.append(_take(way, num_ranks, jobs))
                    Console(stderr=True).print(f"{repetition} {samples[-1]}", markup=False, highlight=False)
            console.print(_table([sample for sample in samples if sample.num_ranks == num_ranks], num_ranks))
    console.print(", ".join(f"{what}: {value}" for what, value in machine().items()))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(sample) for sample in samples], indent=1))


def _write(root: Path, name: str) -> Path:
    """Write a Llama in bfloat16 as transformers does, beside it as a DCP, and once more with a manifest."""
    import torch
    from torch.distributed import checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    from shardplan.functional import create_schedule, execute, plan_build, save_checkpoint
    from shardplan.specs import Checkpoint, Mesh

    torch.manual_seed(0)
    config = LlamaConfig(
        num_attention_heads=16, num_key_value_heads=8, head_dim=64, tie_word_embeddings=False, **SIZES[name]
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root / name, max_shard_size="200MB")
    with warnings.catch_warnings(action="ignore"):  # it says that there is one process
        checkpoint.save(dict(model.state_dict()), checkpoint_id=root / name / "dcp", no_dist=True)
    plan = plan_build(create_schedule(_empty(root / name), Mesh()), init_weights=Checkpoint(root / name))
    save_checkpoint(plan, execute(plan, device="cpu", progress=False).model, root / f"{name} checked")
    return root / name


def _empty(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def _job(folder: Path, num_ranks: int) -> Job:
    from shardplan.functional import plan_build
    from shardplan.functional.frontends import schedule_from_tp_plan
    from shardplan.specs import Checkpoint, Mesh

    schedule = schedule_from_tp_plan(_empty(folder), Mesh(tensor=num_ranks))
    places = (folder, folder.with_name(f"{folder.name} checked"))
    return Job(folder, *(plan_build(schedule, init_weights=Checkpoint(place)) for place in places))


def _persistent(plan: Plan) -> Iterator[tuple[str, Any]]:
    return ((path, spec) for path, spec in plan.tree.items() if spec.kind != "non_persistent_buffer")


def _kept(job: Job) -> Iterator[tuple[Any, str, Any]]:
    """Iterate over what this rank keeps: the open file, the key and the part."""
    import torch.distributed as dist
    from safetensors import safe_open

    here = job.plan.mesh.coordinate(dist.get_rank())
    for path, spec in _persistent(job.plan):
        (part,) = spec.source.parts
        name = job.folder / part.stored.file
        if name not in _opened:
            _opened[name] = safe_open(name, framework="pt")
        yield _opened[name], path, spec.index(here)


def _take(way: str, num_ranks: int, jobs: Mapping[str, Job]) -> Sample:
    from memory import touch
    from processes import run_ranks

    for file in Path(jobs["large"].folder).parent.glob("large*/**/*"):
        if file.is_file():
            file.read_bytes()  # into the page cache, and out of the host's swap
    touch(num_ranks * sum(spec.num_bytes for spec in jobs["large"].plan.tree.values()))
    seen = run_ranks(num_ranks, _measure, way, jobs)
    return Sample(way, num_ranks, *(max(column) for column in zip(*seen, strict=True)))


def _measure(way: str, jobs: Mapping[str, Job]) -> tuple[float, int, int, int]:
    import torch.distributed as dist
    from memory import peak, settle

    WAYS[way](jobs["tiny"])
    before = settle()
    dist.barrier()
    called, start = _called(), time.perf_counter()
    tensors, asked = WAYS[way](jobs["large"])
    seconds = time.perf_counter() - start
    taken, read = peak() - before, _called() - called
    here = jobs["large"].plan.mesh.coordinate(dist.get_rank())
    kept = {path: spec.local_shape(here) for path, spec in _persistent(jobs["large"].plan)}
    assert {path: tuple(tensor.shape) for path, tensor in tensors.items()} == kept, "all ways keep the same"
    return seconds, taken, sum(tensor.nbytes for tensor in tensors.values()), read if asked is None else asked


def _called() -> int:
    """Return the bytes that the kernel has copied for this process on calls to read."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")).split()[1])


def _table(samples: list[Sample], num_ranks: int) -> Table:
    """Return medians, and the ratio of the seconds to those of the first way in the same round."""
    table = Table(title=f"{num_ranks} ranks: medians of the slowest rank; MiB a rank")
    for column in ("way", "seconds", "least", "times the first", "peak", "kept", "peak - kept", "read"):
        table.add_column(column, justify="left" if column == "way" else "right")
    by_way: dict[str, list[Sample]] = {}
    for sample in samples:
        by_way.setdefault(sample.way, []).append(sample)
    first = next(iter(by_way.values()))
    for way, found in by_way.items():
        seconds = [sample.seconds for sample in found]
        ratio = median(own / other.seconds for own, other in zip(seconds, first, strict=True))
        peak, kept, read = (median(getattr(s, f"{what}_bytes") for s in found) / MIB for what in ("peak", "kept", "read"))
        figures = (f"{median(seconds):.3f}", f"{min(seconds):.3f}", f"{ratio:.2f}")
        table.add_row(way, *figures, *(f"{size:.1f}" for size in (peak, kept, peak - kept, read)))
    return table


if __name__ == "__main__":
    main()
