"""Whether a layer that did not run has the types of the layer that stands for it."""

from __future__ import annotations

from .held import UNKNOWN, same
from .tape import Tape
from .typed_run import Types


def is_sound(local: Tape, whole: Tape, types: Types) -> bool:
    """Tell whether the skipped layers of a rank's run take what their representatives take, in both runs.

    A representative's results stand for those of the layers after it, so that the types hold for all by induction: what the
    next layer is given has the type of what the representative was given.

    Args:
        local: The rank's run.
        whole: The whole model's run.
        types: What ranks hold of the rank's values.
    """
    if [(skip.path, skip.representative) for skip in local.skipped] != [(s.path, s.representative) for s in whole.skipped]:
        return False
    return all(
        len(skip.inputs) == len(skip.representative_inputs)
        and all(
            same(types.held.get(mine, UNKNOWN), types.held.get(theirs, UNKNOWN))
            for mine, theirs in zip(skip.inputs, skip.representative_inputs, strict=True)
        )
        for skip in local.skipped
    )
