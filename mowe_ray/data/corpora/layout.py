"""Finding one's way in the folder of a corpus, as it lies there after unpacking."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio, BadSample, Sample, bad_audio, valid_text
from mowe_ray.data.shards.choices import answer_among, with_choices
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.manifest import read_clips
from mowe_ray.data.shards.record import DEFAULT_INSTRUCTIONS, UNKNOWN_TASK, check_record, parse_record


def find(folder: Path, name: str) -> Path | None:
    """Return the file or folder of this name (or `a/b`) in `folder` or up to two levels below, if there is one."""
    for pattern in (name, f"*/{name}", f"*/*/{name}"):
        if found := sorted(path for path in folder.glob(pattern) if path.is_file() or path.is_dir()):  # no pipes
            return found[0]
    return None


def need(folder: Path, name: str, corpus: str) -> Path:
    """Like `find`, but ValueError says that `folder` is not laid out as `corpus` is."""
    found = find(folder, name)
    if found is None:
        raise ValueError(f"{folder}: no {name} in it, so this is not {corpus}'s layout")
    return found


def audio_by_stem(folder: Path) -> dict[str, Path]:
    """Every audio file below `folder` by its name without suffix: corpora are converted, but names are kept."""
    return {path.stem: path for path in audio_files(folder)}


def read_csv(file: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV with a header line, where missing cells are empty; ValueError if it lacks one of `columns`."""
    # Some tables hold a few bytes of another encoding, which is no reason to refuse all of them.
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines, restval="")
        try:
            if missing := set(columns) - set(rows.fieldnames or ()):
                raise ValueError(f"{file}: there is no column {', '.join(sorted(missing))}")
            yield from rows
        except csv.Error as error:  # a quote that is not closed takes all that follows for one cell
            raise ValueError(f"{file}, line {rows.line_num}: {error}") from error


def read_json(file: Path) -> Any:
    """Read a JSON file; ValueError names it if it is none."""
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error


def each_row(
    rows: Iterable[Any], make: Callable[[Any], Iterator[Sample | BadSample]], table: Path, source: str
) -> Iterator[Sample | BadSample]:
    """Make the samples of each row of a table; a row of another structure is one bad sample."""
    for number, row in enumerate(rows):
        try:
            yield from make(row)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            yield BadSample(f"{table.stem}-{number}", source, "unreadable", f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for fields that rows lack.

    Attributes:
        source: name of the corpus.
        task: task of rows without one; None = every row must name it.
        instruction: instruction of rows without one; None = the usual one of the task.
        allow_paths: what rows may name outside of the folder of their table: folders, URLs, hosts.
        reading: names of the fields in the rows.
    """

    source: str
    task: str | None = None
    instruction: str | None = None
    allow_paths: tuple[str, ...] = ()
    reading: Reading = Reading()  # noqa: RUF009 - frozen

    def sample(self, row: Mapping[str, Any], id: str, source_file: Path) -> Sample | BadSample:
        """Make a sample of a row.

        Args:
            row: fields by any name that `parse_record` understands.
            id: used when the row has neither an id nor an audio path.
            source_file: file that holds the row; relative audio paths start at its folder.

        Raises:
            ValueError: the task is unknown, or the instruction of a task without a usual one.
        """
        try:
            record = parse_record(row, self.reading)
            id = valid_text(record.id or (record.audio if isinstance(record.audio, str) else id))
            # An instruction alone is not enough: prepare turns recordings into shards.
            if record.audio is None:
                check_record(record, has_audio=False)
                raise BadAudio("no_audio", f"row {id} names no audio")
            check_record(record, has_audio=True)
            suffix = suffix_of(record.audio) if isinstance(record.audio, str) else ""
            audio, *more = read_clips(str(source_file), record, self.allow_paths)
        except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
            cause = bad_audio(error)
            return BadSample(id, self.source, cause.cause, cause.detail)
        task = record.task or self.task
        if task is None:
            raise ValueError(f"{self.source}: nothing says the task of {id}; give --task")
        asked = record.instruction if record.asks else self._instruction_for(task)
        return Sample(
            id=id,
            audio=audio,
            instruction=with_choices(asked, record.choices, task),
            answer=answer_among(record.answer, record.choices, task),
            task=task,
            source=self.source,
            suffix=suffix,
            duration_s=None if more else record.duration_s,
            offset_s=record.offset_s,
            references=record.references,
            more_audio=tuple(more),
            history=record.history,
            choices=record.choices,
            groups=record.groups,
            others=record.others,
        )

    def asked(self, sample: Sample) -> Sample:
        """Return a sample that was read by the reader of shards, with its question.

        Raises:
            ValueError: its task is unknown, or its instruction.
        """
        if sample.task == UNKNOWN_TASK and self.task is None:
            raise ValueError(f"{self.source}: nothing says the task of {sample.id}; give --task")
        asks = sample.instruction or sample.history
        return sample if asks else replace(sample, instruction=self._instruction_for(sample.task))

    def file(self, path: Path, id: str, answer: str) -> Sample | BadSample:
        """Make a sample of an audio file and the answer that belongs to it."""
        return self.sample({"id": id, "audio": str(path.absolute()), "answer": answer}, id, path)

    def _instruction_for(self, task: str) -> str:
        instruction = self.instruction or DEFAULT_INSTRUCTIONS.get(task)
        if instruction is None:
            raise ValueError(
                f"{self.source}: nothing says what to ask about samples of task {task!r}; "
                f"give --instruction (only {', '.join(DEFAULT_INSTRUCTIONS)} have a usual one)"
            )
        return instruction


def choose_from(labels: Iterable[str], question: str = DEFAULT_INSTRUCTIONS["er"]) -> str:
    """Return a question that names the labels to choose from: corpora call the same emotion by different words."""
    return f"{question} Answer with one of: {', '.join(labels)}."


def suffix_of(name: str) -> str:
    """File suffix without the dot, lower case; "" for a name without one."""
    return Path(name).suffix[1:].lower()


def audio_files(folder: Path) -> Iterator[Path]:
    """List every audio file below `folder`, sorted: a corpus always comes in the same order."""
    return (path for path in files_below(folder, "*") if suffix_of(path.name) in AUDIO_SUFFIXES)


def files_below(folder: Path, pattern: str) -> Iterator[Path]:
    """List the files below `folder` that a pattern fits, sorted, without hidden ones such as macOS's `._a.wav`."""
    for path in sorted(folder.rglob(pattern)):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path
