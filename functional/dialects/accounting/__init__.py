"""What a runtime keeps and sends while it trains, on one rank, told from the plan alone; without torch."""

from .boundary_memory import boundary_bytes
from .boundary_traffic import crossings
from .gradient_traffic import reductions
from .microbatches import num_microbatches
from .optimizer import optimizer_of
from .pipeline_schedules import in_flight
from .records import Reduction, State
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
