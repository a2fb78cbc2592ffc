"""Checkpoints: their files, reading, writing."""
