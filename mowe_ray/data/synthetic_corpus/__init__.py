"""The built-in corpus: synthetic speech and sounds for five tasks, offline, seeded, any size.

Samples on the fly, or shards in a cache folder. The tasks are in `tasks.py`.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus.sounds import encode_flac
from mowe_ray.data.synthetic_corpus.speech import speaker
from mowe_ray.data.synthetic_corpus.tasks import TASKS, Studio
from mowe_ray.output.terminal import track

VERSION = 2  # raise it whenever a clip would sound or read differently: it retires old caches
DEFAULT_CLIPS: dict[str, int] = {"train": 1800, "validation": 150}

# Speakers are disjoint, so that validation asks for more than recognising a voice.
VOICES: dict[str, tuple[str, ...]] = {
    "train": tuple(
        f"{accent}+{variant}"
        for accent in ("en-us", "en")
        for variant in ("m1", "m2", "m4", "m5", "m7", "f1", "f2", "f4", "Annie", "Michael")
    ),
    "validation": tuple(f"{accent}+{variant}" for accent in ("en-us", "en") for variant in ("m3", "m6", "f3", "Alex")),
}


def builtin_samples(split: str, clips: int, seed: int = 0) -> Iterator[Sample]:
    """Render the built-in corpus, the five tasks in turn.

    The same arguments give the same bytes in every process, and a larger corpus begins with the
    smaller one. The splits share no speaker and no random number.

    Args:
        split: `train` or `validation`.
        clips: how many in all; every task gets a fifth.
        seed: another seed is another corpus.

    Yields:
        Samples with 16 kHz FLAC audio of about 0.5 to 3 s.
    """
    split_number = _split_number(split)
    with speaker() as voice:
        for index in range(clips):
            number, task_number = divmod(index, len(TASKS))
            task = list(TASKS)[task_number]
            seeds = (seed, split_number, task_number)
            rng = np.random.default_rng([*seeds, number, 1])
            clip = TASKS[task](Studio(number, seeds, rng, voice, VOICES[split]))
            yield Sample(
                id=f"{task}-{split}-{seed}-{number:05d}",
                audio=encode_flac(clip.wave),
                instruction=clip.instruction,
                answer=clip.answer,
                task=task,
                source="builtin",
                suffix="flac",
            )


def builtin_corpus(split: str, cache_dir: str | Path, clips: int | None = None, seed: int = 0) -> Path:
    """Folder with the shards of the built-in corpus, generated on first use.

    Several processes may ask at the same time: each generates in a folder of its own, and the first
    to finish gives it the final name.

    Args:
        split: `train` or `validation`.
        cache_dir: where such folders are kept; created if missing.
        clips: how many; None = 1,800 for training, 150 for validation.
        seed: another seed is another corpus.
    """
    _split_number(split)
    clips = DEFAULT_CLIPS[split] if clips is None else clips
    cache = Path(cache_dir)
    final = cache / f"builtin-v{VERSION}-{split}-{clips}-seed{seed}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=cache))
    try:
        samples = builtin_samples(split, clips, seed)
        label = f"generating the built-in corpus, {split}"
        write_webdataset(track(samples, label, total=clips), str(work / "shards"))
        _publish(work / "shards", final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _split_number(split: str) -> int:
    """Position of a split, for the seeds."""
    if split not in VOICES:
        raise ValueError(f"the built-in corpus has no split {split!r}, only {', '.join(VOICES)}")
    return list(VOICES).index(split)


def _publish(finished: Path, final: Path) -> None:
    """Rename `finished` to `final`, unless another process was first with the same bytes."""
    try:
        finished.rename(final)
    except OSError:
        if not final.is_dir():
            raise
