"""Mutants: right schedules that are changed at random, planned, and judged by ``verify``.

Run ``python -m tests.mutants --num 3000 --seed 0``.
"""
