"""What a declared plan means for the modules that it names: what ``schedule_from_tp_plan`` is made of."""
