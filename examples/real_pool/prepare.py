"""Make the recordings of a few Debian packages into shards: five and more tasks, splits by recording, shifted tests.

    python examples/real_pool/prepare.py OUT [--tasks letter,language,...] [--kinds 8] [--most 300] [--packages FOLDER]

Needs fluidsynth. Packages are downloaded with apt-get into OUT/packages unless they lie unpacked in FOLDER, each in a
folder of its name. Writes OUT/train, OUT/validation, OUT/test and OUT/ood-*, which a run reads as `data.train.0.path`
and the like, and OUT/data_card.md. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from music import FONTS, played
from recordings import PACKAGES, RATE, Recording, events, fetch, games, prompts
from tasks import WORDINGS, Question, levelled, noisy, questions, telephone, varied

from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus.sounds import encode_flac

_SHARD_BYTES = 2**24  # small: each shard of a feature cache is computed on one CPU
_SHORTEST_S, _LONGEST_S = 0.2, 8.0
# Takes of a recording, and the most clips, of a task in training: tasks are of about the same size.
_TAKES, _MOST, _LEAST = 3, 900, 400
_MOST_HELD_OUT, _MOST_SHIFTED = 90, 40
_NOISE_DB = (20, 10, 0)
_OPEN = ("asr", "ac")  # tasks with an answer of its own for each clip


def main() -> None:
    """Read the packages, ask about what is in them, and write all splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="folder of unpacked packages")
    parser.add_argument("--tasks", help="names of some of the tasks, with commas; all by default")
    parser.add_argument(
        "--kinds", type=int, help="ask only for the most frequent answers of a task: fewer learn faster"
    )
    parser.add_argument("--most", type=int, default=_MOST, help="clips of a task in training, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tasks = options.tasks.split(",") if options.tasks else list(WORDINGS)
    if unknown := sorted({*tasks} - {*WORDINGS}):
        parser.error(f"--tasks: {', '.join(unknown)} is none of {', '.join(WORDINGS)}")
    folder = options.packages or options.out / "packages"
    fetch([*PACKAGES, *FONTS], folder)
    splits = made_splits(recordings(folder, options.seed), tasks, options.seed, options.kinds, options.most)
    counts: dict[str, dict[str, list[float]]] = {}
    for name, asked in splits.items():
        counts[name] = defaultdict(list)
        asked_samples = _samples(name, asked, counts[name], options.seed)
        written = write_webdataset(asked_samples, str(options.out / name), _SHARD_BYTES)
        sys.stderr.write(f"{name}: {written.samples} clips, {written.seconds:.0f} s\n")
    (options.out / "data_card.md").write_text(data_card(counts, folder), encoding="utf-8")


def recordings(folder: Path, seed: int) -> list[Recording]:
    """Return all usable recordings; of those that hold the same samples, the first."""
    found: dict[bytes, Recording] = {}
    for recording in chain(prompts(folder), games(folder), events(folder), played(folder, seed)):
        if _SHORTEST_S * RATE <= len(recording.wave) <= _LONGEST_S * RATE and np.abs(recording.wave).max() > 1e-3:
            content = hashlib.blake2b(np.round(recording.wave * 2**15).astype(np.int16).tobytes()).digest()
            found.setdefault(content, replace(recording, wave=levelled(recording.wave)))
    return list(found.values())


def made_splits(
    everything: Sequence[Recording], tasks: Collection[str], seed: int, kinds: int | None = None, most: int = _MOST
) -> dict[str, list[Question]]:
    """Return the questions of each split: a recording is in one of train, validation and test, or shifted."""
    by_split: dict[str, list[Recording]] = defaultdict(list)
    for recording in everything:
        by_split[f"ood-{recording.unseen}" if recording.unseen else _split(recording.key)].append(recording)
    splits = {
        name: asked
        for name, some in sorted(by_split.items())
        if (asked := [question for question in questions(some, seed) if question.task in tasks])
    }
    if kinds:
        splits = _of_frequent_answers(splits, kinds)
    splits = {
        name: _balanced(asked, most if name == "train" else _MOST_HELD_OUT, seed) for name, asked in splits.items()
    }
    splits["train"] += list(_more_takes(splits["train"], most, seed))
    rng = np.random.default_rng(seed)
    shifted = _balanced(splits["test"], _MOST_SHIFTED, seed)
    splits["ood-telephone"] = [replace(question, wave=telephone(question.wave)) for question in shifted]
    for decibels in _NOISE_DB:
        splits[f"ood-noise-{decibels}dB"] = [replace(q, wave=noisy(q.wave, decibels, rng)) for q in shifted]
    return splits


def _split(key: str) -> str:
    """Draw the split of a recording by its name: of ten, one for validation and one for testing."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 10
    return {0: "validation", 1: "test"}.get(number, "train")


def _of_frequent_answers(splits: dict[str, list[Question]], kinds: int) -> dict[str, list[Question]]:
    """Keep questions whose answer is one of the most frequent of its task in training; of captions and words, all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in splits["train"]:
        counts[question.task][question.answers[0]] += 1
    kept: set[tuple[str, str]] = set()
    for task, some in counts.items():
        most_frequent = sorted(some, key=lambda answer: (-some[answer], answer))[:kinds]
        kept.update((task, answer) for answer in most_frequent)
    return {
        name: some
        for name, asked in splits.items()
        if (some := [q for q in asked if q.task in _OPEN or (q.task, q.answers[0]) in kept])
    }


def _balanced(asked: Iterable[Question], most: int, seed: int) -> list[Question]:
    tasks: dict[str, list[Question]] = defaultdict(list)
    for question in asked:
        tasks[question.task].append(question)
    rng = random.Random(seed)
    return [q for _, some in sorted(tasks.items()) for q in (rng.sample(some, most) if len(some) > most else some)]


def _more_takes(asked: Sequence[Question], most: int, seed: int) -> Iterator[Question]:
    """Add takes with soft noise to the tasks that have few recordings."""
    rng, sizes = np.random.default_rng(seed), Counter(question.task for question in asked)
    for question in asked:
        takes = max(0, min(_TAKES, round(min(_LEAST, most) / sizes[question.task]) - 1))
        yield from (replace(question, wave=varied(question.wave, rng)) for _ in range(takes))


def _samples(split: str, asked: Sequence[Question], counts: dict[str, list[float]], seed: int) -> Iterator[Sample]:
    for number, question in enumerate(asked):
        first, seconds = question.of[0], round(len(question.wave) / RATE, 4)
        counts[question.task].append(seconds)
        groups = {"package": first.package, "language": first.language}
        yield Sample(
            id=f"{split}-{number:05d}",
            audio=encode_flac(question.wave),
            instruction=question.wording(seed) + "<audio>",  # so that its tokens attend to the question
            answer=question.answers[0],
            task=question.task,
            source="real_pool",
            suffix="flac",
            duration_s=seconds,
            references=question.answers if len(question.answers) > 1 else (),
            groups={name: value for name, value in groups.items() if value},
        )


def data_card(counts: dict[str, dict[str, list[float]]], folder: Path) -> str:
    """Return the card: clips and seconds by split and task, and the packages with the licenses they name."""
    tasks = sorted({task for some in counts.values() for task in some})
    rows = [["split", *tasks, "clips", "seconds"]]
    for split, some in counts.items():
        clips = [len(some.get(task, [])) for task in tasks]
        rows.append([split, *map(str, clips), str(sum(clips)), f"{sum(map(sum, some.values())):.0f}"])
    packages = [["package", "version", "licenses that its copyright file names"]]
    for package in (*PACKAGES, *FONTS):
        packages.append([package, _version(folder / package), _licenses(folder / package)])
    return "\n".join(["# Data card", "", "Clips by split and task:", "", *_table(rows), "", *_table(packages), ""])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _version(folder: Path) -> str:
    found = sorted(folder.glob("*.deb"))
    return found[0].name.split("_")[1].replace("%3a", ":") if found else "as found"


def _licenses(folder: Path) -> str:
    texts = [file.read_text(errors="replace") for file in folder.glob("usr/share/doc/*/copyright")]
    named = {name for text in texts for name in re.findall(r"^License: *(\S.*)$", text, re.MULTILINE)}
    common = {name for text in texts for name in re.findall(r"/usr/share/common-licenses/([A-Z][\w.-]*\w)", text)}
    return ", ".join(sorted(named or common)) or "see its copyright file"


if __name__ == "__main__":
    main()
