"""The parts of ``schedule_from_tp_plan``: the rules of a declared plan, and the calls of verbs that they stand for."""
