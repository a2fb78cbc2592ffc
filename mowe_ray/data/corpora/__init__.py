"""Readers of corpora as they are published, each a generator of samples, used by `prepare`."""
