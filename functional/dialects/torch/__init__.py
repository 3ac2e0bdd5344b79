"""torch alone: DDP and torch's pipeline schedules, their checks, memory and messages."""
