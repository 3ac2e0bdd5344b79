"""The steps of a plan for one rank: what each asks, the loop, and the effects, dry and real."""
