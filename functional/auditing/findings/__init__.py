"""Find whatever may hurt, read off a plan and its report; docs/findings.md says what each code means."""
