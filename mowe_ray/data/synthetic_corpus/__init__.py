"""The built-in corpus: synthetic speech and sounds for five tasks, offline, seeded, any size."""

from mowe_ray.data.synthetic_corpus.builtin import DEFAULT_CLIPS, builtin_corpus, builtin_samples

__all__ = ["DEFAULT_CLIPS", "builtin_corpus", "builtin_samples"]
