"""All ranks of a plan in one process: the interpreter with the real effects of each, over a network of dictionaries."""

from __future__ import annotations

from collections import Counter

import torch
from attrs import Factory, define

from shardplan.functional import execute
from shardplan.functional.init.evaluate import Job, evaluate
from shardplan.functional.interpreter.interpret import interpret
from shardplan.functional.interpreter.torch_effects import TorchEffects, _bytes
from shardplan.functional.layout.apply import RankContext
from shardplan.functional.layout.collectives import SyncGroup
from shardplan.functional.layout.hooks import group_name
from shardplan.functional.model.copy import copy_module, get_tensor
from shardplan.specs import InitProgram, ModuleValues
from shardplan.specs.index import whole_index
from shardplan.specs.receipt import AGREEMENT_BYTES


@define
class Network:
    """Messages on their way, by step, group and receiver.

    The first rank of each group sends, so that ranks can run one after another: what one waits for is there already, or
    would never come.
    """

    messages: dict = Factory(dict)
    agreed: Counter = Factory(Counter)

    def send(self, step, group, receiver, message):
        assert (step, group, receiver) not in self.messages, "it is sent twice"
        self.messages[step, group, receiver] = _bytes(message).clone()

    def receive(self, step, group, receiver, message):
        assert (step, group, receiver) in self.messages, f"rank {receiver} waits in step {step} for what is never sent"
        sent = self.messages.pop((step, group, receiver))
        assert sent.numel() == message.nbytes, f"rank {receiver} expects another number of bytes in step {step}"
        _bytes(message).copy_(sent)


@define
class SimulatedEffects(TorchEffects):
    """Real tensors, and messages that go over a network of dictionaries."""

    network: Network = Factory(Network)
    installed: dict = Factory(dict)
    step: int = 0

    def next_step(self, _):
        self.step += 1

    def agree(self, plan, error):
        if error is not None:
            raise error
        self.network.agreed[self.step] += 1
        if plan.mesh.num_ranks > 1:
            self.ledger.call("all_gather", (), range(plan.mesh.num_ranks), AGREEMENT_BYTES)

    def make_groups(self, task):
        mesh = self.coordinate.mesh
        for mesh_axes in task.over:
            for ranks in mesh.groups(*mesh_axes):
                self.ledger.num_groups += 1
                if self.rank in ranks:
                    self.groups[mesh_axes] = ranks
        for mesh_axis, num in task.sharing:
            self.ledger.num_groups += len(mesh.neighbours(mesh_axis, num))
            name = group_name(mesh_axis, num)
            self.neighbour_groups[name] = SyncGroup(name, num, self.coordinate.index(mesh_axis) % num)

    def make_tie_groups(self, task):
        for between, groups in zip(task.between, task.groups, strict=True):
            self.ledger.num_groups += len(groups)
            self.tie_groups.update((between, ranks) for ranks in groups if self.rank in ranks)

    def broadcast(self, buffer, message):
        self._meet(message)
        for other in message.group if message.is_root else ():
            if other != self.rank:
                self.network.send(self.step, message.group, other, buffer)
        if not message.is_root:
            self.network.receive(self.step, message.group, self.rank, buffer)
        self._note(buffer, message)

    def scatter(self, buffer, parts, message):
        self._meet(message)
        if message.is_root:
            assert {part.nbytes for part in parts} == {buffer.nbytes}, "members of a scatter get equally many bytes"
            for other, part in zip(message.group, parts, strict=True):
                self.network.send(self.step, message.group, other, part)
        self.network.receive(self.step, message.group, self.rank, buffer)
        self._note(buffer, message)

    def place(self, spec, tensor):
        super().place(spec, tensor)
        assert spec.path not in self.installed, "it is placed twice"
        self.installed[spec.path] = tensor

    def take_stages(self, plan, task):
        """The module stays whole here."""

    def wrap(self, plan):
        """Nothing runs it here."""

    @property
    def _local(self):
        mesh = self.coordinate.mesh
        groups = {m[0]: SyncGroup(m[0], mesh.num(m[0]), self.coordinate.index(m[0])) for m in self.groups if len(m) == 1}
        return RankContext(self.coordinate, groups | self.neighbour_groups, self.callables)

    def _meet(self, message):
        """A group is there before it is used, and is the one that the message is for."""
        group = self.tie_groups[message.between] if message.between else self.groups[message.mesh_axes]
        assert sorted(group) == sorted(message.group)
        assert message.is_root == (self.rank == message.group.start)


def simulate(plan):
    """Return what each rank ends with, in order; check that every message was meant for somebody and all agreed."""
    network, ended = Network(), []
    for rank in range(plan.mesh.num_ranks):
        model = plan.runtime.model
        copied = copy_module(model, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), for_planning=False)
        effects = SimulatedEffects(
            plan.mesh.coordinate(rank), torch.device("cpu"), model, copied, plan.runtime.callables, network=network
        )
        interpret(plan, effects.coordinate, effects, on_step=effects.next_step)
        ended.append(effects)
    assert not network.messages, "a message is sent to a rank that does not take it"
    assert set(network.agreed.values()) == {plan.mesh.num_ranks}
    return ended


def whole_tensors(plan, alone):
    """Return the logical tensors: programs evaluated at once, kept values as they are, others from a plan for one rank."""
    made = execute(alone, device="cpu", progress=False).module
    whole = {}
    for path, spec in plan.tree.items():
        if isinstance(spec.source, InitProgram):
            whole[path] = torch.empty(spec.orig_shape, dtype=getattr(torch, spec.dtype))
            evaluate([Job(whole[path], spec.source, path, spec.orig_shape, whole_index(spec.orig_shape))], plan.seed)
        else:
            home = plan.runtime.model if isinstance(spec.source, ModuleValues) else made
            whole[path] = get_tensor(home, path).detach()
    return whole
