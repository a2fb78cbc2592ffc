"""Watchdog, supervisor, out-of-memory records."""
