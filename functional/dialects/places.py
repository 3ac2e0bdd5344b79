"""How many stages stand at each place along ``pipe``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...specs.errors import Problem

if TYPE_CHECKING:
    from ...specs.mesh import Mesh
    from ...specs.pipeline import Pipeline


def one_stage_a_place(mesh: Mesh, pipeline: Pipeline) -> list[Problem]:
    """Return what is wrong with the number of stages, where each place runs one."""
    num_stages = len(pipeline.stages)
    if num_stages == mesh.pipe:
        return []
    cause = f"the model is cut into {num_stages} stages, and the mesh has pipe={mesh.pipe}, with one stage each"
    cuts = mesh.pipe - 1
    fix = f"Mesh(pipe={num_stages}), or {f'{cuts} cut' + 's' * (cuts > 1) if cuts else 'no cut'}"
    return [Problem("", cause, fix)]
