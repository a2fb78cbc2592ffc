"""Metrics of the five tasks."""
