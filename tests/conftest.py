"""Settings of the processes that run tests."""

from __future__ import annotations

import gc

gc.set_threshold(20_000, 50, 100)  # each search for garbage looks at hundreds of thousands of imported objects
