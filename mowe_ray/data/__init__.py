"""Shards of encoded audio in, decoded micro-batches out: functions without torch or Ray."""
