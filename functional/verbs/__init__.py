"""The bodies of a schedule's verbs: each takes a schedule and returns a new schedule."""
