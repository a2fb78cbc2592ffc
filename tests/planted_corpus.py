"""A corpus whose one task only an encoder of the wave itself can learn: which way do the pulses of a clip point?

Turned upside down, a wave has other peaks but the same power at every time and frequency. So log-mel features, and
whatever is computed from them, are the same for both answers: the task cannot be learned from them at all.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus.sounds import encode_flac
from tests.tiny_runs import Corpus

RATE = 16_000
QUESTION = "Which way does it point?"
TASK = "pointing"


def pulses(number: int) -> np.ndarray:
    """Return a train of positive pulses in noise, (S,) float32: pitch, width, length and loudness drawn anew."""
    rng = np.random.default_rng(number)
    time = np.arange(int(rng.uniform(0.6, 1.0) * RATE)) / RATE
    pitch = rng.uniform(70, 200)
    since = (time * pitch + rng.uniform()) % 1 / pitch  # the last pulse
    wave = np.exp(-since / rng.uniform(0.0004, 0.0008))
    wave = (wave - wave.mean()) * 10 ** rng.uniform(-0.7, -0.3)
    return (wave + rng.standard_normal(time.size) * 0.1 * wave.std()).astype(np.float32)


def planted_samples(first: int, count: int) -> Iterator[Sample]:
    """Yield clips `first`, `first + 1`, ...; every other one is turned upside down."""
    for number in range(first, first + count):
        up = number % 2 == 0
        audio = encode_flac(pulses(number) if up else -pulses(number))
        answer = "up" if up else "down"
        yield Sample(f"pulses-{number:04d}", audio, QUESTION, answer, TASK, "planted", "flac")


def write_planted_corpus(folder: Path, train: int = 160, validation: int = 60) -> Corpus:
    """Write the shards of both parts below `folder`."""
    corpus = Corpus(folder / "train", folder / "validation")
    write_webdataset(planted_samples(0, train), str(corpus.train))
    write_webdataset(planted_samples(train, validation), str(corpus.validation))
    return corpus
