"""The user's module, read and copied; no plan in sight."""
