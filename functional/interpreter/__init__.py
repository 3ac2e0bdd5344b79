"""The steps of a plan for one rank: the work that each asks, the loop, and the effects, dry and real."""
