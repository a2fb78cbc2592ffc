"""Metrics of the five tasks, and which task has which."""
