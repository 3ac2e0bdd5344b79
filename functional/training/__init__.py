"""What a runtime keeps and sends while it trains, on one rank, told from the plan alone; without torch."""

from .crossings import crossings
from .microbatches import num_microbatches
from .optimizer import optimizer_of
from .pipeline_buffers import boundary_bytes
from .records import Reduction, State
from .reductions import reductions
from .schedules import in_flight
from .state import state_of

__all__ = [
    "Reduction",
    "State",
    "boundary_bytes",
    "crossings",
    "in_flight",
    "num_microbatches",
    "optimizer_of",
    "reductions",
    "state_of",
]
