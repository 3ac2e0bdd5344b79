"""What may hurt, read off a plan and what is known of it; without torch. docs/findings.md says what each code means."""

from .all_findings import find

__all__ = ["find"]
