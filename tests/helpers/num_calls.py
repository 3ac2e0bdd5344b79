"""How much a function computes, counted so that it is the same on every machine."""

from __future__ import annotations

import sys
from collections import Counter


def num_calls(function, *args):
    """Return how many calls, of functions in Python and in C, a call of a function leads to, once its caches are filled."""
    function(*args)
    events = Counter()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, arg: events.update([event]))
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return events["call"] + events["c_call"]
