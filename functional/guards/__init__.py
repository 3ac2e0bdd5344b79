"""What watches an executed module while it is trained: misuse by ordinary code around it raises, and says what to use.

Ranks along ``tensor`` hold parts of one model. Code that was written for whole models wraps them as if they held copies,
gives each its own batch, clips by each rank's own norm, or adds parameters that nobody keeps alike, and nothing stops.
"""
