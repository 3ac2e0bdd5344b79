"""torch alone: DDP and its pipeline schedules, and what they keep and send."""
