"""Checks of stages that several runtimes share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...specs.errors import Problem

if TYPE_CHECKING:
    from ...specs.mesh import Mesh
    from ...specs.pipeline import Pipeline
    from ...specs.tree import SpecTree


def untrained_places(mesh: Mesh, tree: SpecTree) -> list[Problem]:
    """Return a problem for each place along ``pipe`` without trained parameters: an optimizer needs some."""
    trained = {at for spec in tree.values() if spec.kind == "parameter" and spec.requires_grad for at in spec.places(mesh)}
    cause = "it has no trained parameter, and an optimizer needs one"
    return [
        Problem(f"stage {at}", cause, "Cut elsewhere, so that each place trains something")
        for at in range(mesh.pipe)
        if at not in trained
    ]


def one_stage_per_place(mesh: Mesh, pipeline: Pipeline) -> list[Problem]:
    """Return a problem if there is not exactly one stage for each place along ``pipe``."""
    num_stages = len(pipeline.stages)
    if num_stages == mesh.pipe:
        return []
    plural = "s" if num_stages > 1 else ""
    cause = f"the model is cut into {num_stages} stage{plural}, and the mesh has pipe={mesh.pipe}, with one stage each"
    fix = f"Mesh(pipe={num_stages}, data={mesh.data}, tensor={mesh.tensor}), or cut it into {mesh.pipe}"
    return [Problem("", cause, fix)]
