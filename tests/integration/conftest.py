"""What integration tests share: a local Ray, a corpus that is trained on in seconds, and an undisturbed run of it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mowe_ray.distributed  # noqa: F401 - sets what Ray reads while it is imported, so before any test imports it
from tests.end_to_end import Finished, quickstart_arguments, run_command
from tests.tiny_runs import REFERENCE, Corpus, tiny_config, write_corpus

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


@pytest.fixture(scope="session")
def reference(ray_cluster: None, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run with the settings `REFERENCE`, on two workers that nobody disturbs.

    A run that is stopped, killed, resized or continued has to end as this one did. Its folder is never changed: a test
    that continues it takes a copy.
    """
    from mowe_ray.distributed.ray_train.driver import train
    from tests import ray_reports

    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (*ray_reports.CALLBACK.items(), (ray_reports.FILE, str(folder / "reports.jsonl"))):
            environment.setenv(name, value)
        return train(tiny_config(tiny_corpus, folder, "reference", *REFERENCE), [].append)


@pytest.fixture(scope="session")
def quickstart_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="session")
def quickstart(quickstart_storage: Path) -> Finished:
    """What the command of a newcomer left, which trained for 12 steps."""
    return run_command(*quickstart_arguments(quickstart_storage))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system to fill."""
    size = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(tmp_path)]
    if subprocess.run(size, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
