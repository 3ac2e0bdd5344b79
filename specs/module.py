"""A module of the user's model."""

from __future__ import annotations

from attrs import frozen


@frozen
class ModuleSpec:
    """A module of a model.

    Args:
        path: The first path under which ``named_modules`` meets it; ``""`` for the model itself.
        type: ``module:qualname`` of its class.
        aliases: Its other paths.
    """

    path: str
    type: str
    aliases: tuple[str, ...] = ()
