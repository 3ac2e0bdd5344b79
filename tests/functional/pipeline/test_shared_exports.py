"""Launches of ranks share the exports of a model: a plan from a shared export is the plan from an export of its own."""

from __future__ import annotations

import torch

from shardplan.functional import plan_build
from shardplan.functional.pipeline import partition
from shardplan.specs import Mesh, dumps
from tests.helpers.exports import share_exports
from tests.helpers.models import plain, split_plain


def plans():
    """Plan a cut model on several meshes: split over ``tensor`` it has other local tensors, and another export."""
    ids = {"ids": torch.zeros(2, 4, dtype=torch.long)}
    schedules = [split_plain(plain(), mesh) for mesh in (Mesh(pipe=2), Mesh(pipe=2, data=2), Mesh(pipe=2, tensor=2))]
    return [dumps(plan_build(sch.at["blocks.0"].cut_pipeline_stage(), example_inputs=ids)) for sch in schedules]


def test_a_plan_from_a_shared_export_is_that_from_an_export_of_its_own(monkeypatch):
    capture, calls = partition.capture, []

    def counted(subject, *, training):
        calls.append(training)
        return capture(subject, training=training)

    monkeypatch.setattr(partition, "capture", counted)
    alone = plans()
    num_alone = len(calls)
    share_exports()  # undone with the patch
    assert plans() == alone
    assert plans() == alone
    assert num_alone >= len(alone)
    assert len(calls) == 2 * num_alone  # the second time none is made
