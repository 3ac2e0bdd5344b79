"""What is known of operators: one table that checking a schedule and inferring one share."""

from .table import RULES, rule_of

__all__ = ["RULES", "rule_of"]
