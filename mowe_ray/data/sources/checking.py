"""What happens to samples between a reader and a writer: names, held-out split, and the check."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from mowe_ray.data.corpus.recording import encode_flac
from mowe_ray.data.decode import SAMPLE_RATE, decode_audio
from mowe_ray.data.sample import BadAudio, BadSample, Sample

Item = TypeVar("Item")
Result = TypeVar("Result")


def with_unique_ids(samples: Iterable[Sample | BadSample]) -> Iterator[Sample | BadSample]:
    """Append -2, -3, ... to ids seen before, as when one recording has several questions."""
    seen: Counter[str] = Counter()
    for sample in samples:
        seen[sample.id] += 1
        number = seen[sample.id]
        yield replace(sample, id=f"{sample.id}-{number}") if number > 1 else sample


def is_held_out(sample: Sample | BadSample, fraction: float, seed: int) -> bool:
    """Decide by a hash whether a sample belongs to the held-out split.

    The hash is over the audio, so two questions about one recording are never on both sides, and a
    corpus that grows or is read in another order keeps its split.
    """
    content = (sample.audio if isinstance(sample, Sample) else None) or sample.id.encode()
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def check_sample(sample: Sample, min_s: float, max_s: float) -> Sample | BadSample:
    """Decode a sample once, to find what no header tells.

    Returns:
        The sample with its length, its bytes untouched, except that a segment of a longer
        recording is cut out and becomes 16 kHz FLAC; or why it cannot be used.
    """
    if sample.audio is None:
        return sample
    try:
        wave = decode_audio(sample.audio, sample.duration_s, min_s, max_s, sample.offset_s)
    except BadAudio as error:
        return BadSample(sample.id, sample.source, error.cause, error.detail)
    seconds = len(wave) / SAMPLE_RATE
    if sample.offset_s is None:
        return replace(sample, duration_s=seconds)
    audio = encode_flac(wave)
    return replace(sample, audio=audio, suffix="flac", duration_s=seconds, offset_s=None)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Map in order with some threads (decoders release the lock) and few items in memory."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
