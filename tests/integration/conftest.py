"""One local Ray for all integration tests, and a corpus small enough to train on in seconds."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import mowe_ray.distributed  # noqa: F401 - sets what Ray reads while it is imported, so before any test imports it
from tests.tiny_runs import Corpus, write_corpus

# Two workers with a decoding CPU each, and room for a test that decodes on its own.
_LOGICAL_CPUS = 6


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray that ends with the tests; it shares the real cores, however many CPUs it counts."""
    os.environ.pop("RAY_ADDRESS", None)  # a developer's cluster is no place for tests
    from mowe_ray.distributed import cluster

    cluster.join(_LOGICAL_CPUS)
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty training clips and ten for validation, as WebDataset shards."""
    folder: Path = tmp_path_factory.mktemp("tiny_corpus")
    return write_corpus(folder)
