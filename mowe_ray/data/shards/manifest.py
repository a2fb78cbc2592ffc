"""Manifests: JSON lines, a JSON list, or CSV and TSV with a header line; the audio lies in files of its own.

The index keeps the byte range of each entry, so a manifest of any size is never held in memory for
reading.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import BadAudio, BadSample, Sample, bad_audio
from mowe_ray.data.shards.byte_ranges import read_ranges
from mowe_ray.data.shards.compressed import plain, plain_name
from mowe_ray.data.shards.conversation import is_turn
from mowe_ray.data.shards.fields import Reading, is_no_row
from mowe_ray.data.shards.mix import Clip, Mix, pieces
from mowe_ray.data.shards.record import (
    Place,
    Record,
    Row,
    bad_row,
    bad_sample,
    broken_shard,
    check_record,
    make_sample,
    parse_record,
    raise_if_storage,
    row_of,
)
from mowe_ray.data.shards.storage import file_of_row, open_file


@dataclass(frozen=True, slots=True)
class TableHeader:
    """The first line of a CSV or TSV: names of its columns, and what is between them."""

    columns: list[str]
    delimiter: str


def first_entry(manifest: str) -> dict[str, Any]:
    """Return the fields of the first entry; none if there is no entry."""
    header = manifest_header(manifest)
    return next((parse_entry(entry, header) for _, entry in manifest_entries(manifest)), {})


def scan(manifest: str, reading: Reading, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each entry; a declared duration saves opening the audio file.

    Raises:
        ValueError: the manifest is in UTF-16.
    """
    header = manifest_header(manifest)
    try:
        for number, (at, entry) in enumerate(manifest_entries(manifest)):
            yield _row(manifest, number, at, entry, header, reading, allow_paths)
    except BadAudio as error:  # of the list as a whole: what came before is good
        yield broken_shard(manifest, error.detail)


def _row(
    manifest: str,
    number: int,
    at: int,
    entry: bytes,
    header: TableHeader | None,
    reading: Reading,
    allow_paths: Sequence[str],
) -> Row:
    name = f"{manifest.rsplit('/', 1)[-1]}:{number}"
    try:
        record = parse_record(parse_entry(entry, header), reading)
        name = record.id or next((clip for clip in record.clips if isinstance(clip, str)), name)
        check_record(record, record.audio is not None)
        duration = _duration_s(manifest, record, allow_paths)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_row(name, bad_audio(error))
    return row_of(record, name, duration, reading, meta_at=at, meta_size=len(entry))


def read(places: list[Place]) -> Iterator[Sample | BadSample]:
    """Read manifest entries by byte range, then the audio files they name."""
    headers: dict[str, TableHeader | OSError | None] = {}
    files = {shard: plain(shard) for shard in {place.shard for place in places}}
    for shard in files:
        try:
            headers[shard] = manifest_header(shard)
        except OSError as error:
            raise_if_storage(shard, error)
            headers[shard] = error
    entries = read_ranges([(files[p.shard], p.meta_at, p.meta_size) for p in places])
    for place, entry in zip(places, entries, strict=True):
        yield _sample(place, entry, headers[place.shard])


def _sample(place: Place, entry: bytes | OSError, header: TableHeader | OSError | None) -> Sample | BadSample:
    try:
        if isinstance(entry, OSError) or isinstance(header, OSError):
            raise BadAudio("unreadable", str(entry if isinstance(entry, OSError) else header))
        record = parse_record(parse_entry(entry, header), place.reading)
        return make_sample(place, record, read_clips(place.shard, record, place.allow_paths))
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_sample(place, bad_audio(error))


def read_clips(source_file: str, record: Record, allow_paths: Sequence[str]) -> list[bytes]:
    """Return the encoded clips of a row of the manifest or table `source_file`; it may name them or hold them."""
    return [read_audio(source_file, clip, allow_paths) for clip in record.clips]


def read_audio(source_file: str, clip: Clip, allow_paths: Sequence[str]) -> bytes:
    """Return an encoded clip of a row of the manifest or table `source_file`."""
    if isinstance(clip, bytes):
        return clip
    if isinstance(clip, Mix):
        return clip.encoded(lambda name: read_audio(source_file, name, allow_paths))
    with open_file(file_of_row(source_file, clip, allow_paths)) as file:
        return file.read()


def _duration_s(manifest: str, record: Record, allow_paths: Sequence[str]) -> float:
    """Return the length of all clips of an entry, in seconds; what is not allowed is found though none is opened."""
    found = pieces(record.clips)
    files = [piece if isinstance(piece, bytes) else file_of_row(manifest, piece, allow_paths) for piece in found]
    if record.duration_s and files:
        return record.duration_s
    duration = sum(map(_length_s, files)) - (record.offset_s or 0.0)
    if files and duration <= 0:
        raise BadAudio("zero_length", f"offset {record.offset_s} s is beyond the end")
    return duration


def _length_s(clip: bytes | str) -> float:
    if isinstance(clip, bytes):
        return header_duration_s(clip)
    with open_file(clip) as file:
        return header_duration_s(file)


def manifest_header(manifest: str) -> TableHeader | None:
    """Return the columns of a CSV or TSV; None for JSON."""
    name = plain_name(manifest).lower()
    if not name.endswith((".tsv", ".csv")):
        return None
    with open_file(plain(manifest)) as file:
        # A name with a wrong byte matches no known column.
        line = next(_lines(file, quoted=name.endswith(".csv")), b"").decode("utf-8-sig", errors="replace")
    delimiter = "\t" if name.endswith(".tsv") else _delimiter_of(line)
    return TableHeader(_cells(line.rstrip("\r\n"), delimiter, strict=False), delimiter)


def _delimiter_of(line: str) -> str:
    return max(_DELIMITERS, key=line.count)


def manifest_entries(manifest: str) -> Iterator[tuple[int, bytes]]:
    """Yield byte offset, in its `plain` content, and bytes of each entry.

    Raises:
        ValueError: the manifest is in UTF-16, or compressed in spite of its name.
        BadAudio: a JSON list ends early; what came before has been yielded.
    """
    with open_file(plain(manifest)) as file:
        head = file.read(4096)
        if head.startswith(b"\x1f\x8b"):
            raise ValueError(f"{manifest} is compressed by gzip: let its name end with .gz")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * head.count(0) > len(head):
            raise ValueError(f"{manifest} is in UTF-16: convert it, as by `iconv -f UTF-16 -t UTF-8`")
        at = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        name = plain_name(manifest).lower()
        has_header = name.endswith((".tsv", ".csv"))
        file.seek(at)
        if not has_header and (head[at:].lstrip().startswith(b"[") or _is_document(file)):
            # Split into entries, then read like lines. Wrong bytes cost the entry that has them.
            file.seek(at)
            yield from _entries_of(file.read().decode(errors="surrogateescape"), at)
            return
        file.seek(at)
        for number, line in enumerate(_lines(file, quoted=name.endswith(".csv"))):
            if line.strip() and not (number == 0 and has_header):
                yield at, line.rstrip(b"\r\n")
            at += len(line)


_LONGEST_ENTRY = 1 << 20  # bytes; a quote that is never closed does not take all that follows


_DELIMITERS = ",;\t|"
_OPENING = re.compile(rb' *"')
_CLOSING = re.compile(rb'[^"]*(?:""[^"]*)*"(?!")')


def _lines(file: BinaryIO, *, quoted: bool) -> Iterator[bytes]:
    """Yield lines; in CSV, a line break between quotes is no end."""
    held, inside, next_opening = b"", False, None
    for line in file:
        held += line
        if quoted:
            if next_opening is None:
                delimiter = _delimiter_of(line.decode(errors="replace")).encode()
                next_opening = re.compile(re.escape(delimiter) + _OPENING.pattern)
            inside = _ends_in_quotes(line, inside, next_opening)
            if inside and len(held) < _LONGEST_ENTRY:
                continue
        yield held
        held, inside = b"", False
    if held:
        yield held


def _ends_in_quotes(line: bytes, inside: bool, next_opening: re.Pattern[bytes]) -> bool:
    """Whether a cell in quotes goes on in the next line; a quote opens one only at its beginning."""
    opening = None if inside else _OPENING.match(line)
    at = 0 if opening is None else opening.end()
    inside = inside or opening is not None
    while True:
        if inside:
            closing = _CLOSING.match(line, at)
            if closing is None:
                return True
            at = closing.end()
        opening = next_opening.search(line, at)
        if opening is None:
            return False
        at, inside = opening.end(), True


_SEPARATOR = re.compile(r"[,\]]")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _is_document(file: BinaryIO) -> bool:
    """Whether JSON is no line an entry: an object over several lines, or a single one, in which a list has the rows."""
    first = next((line for line in file if line.strip()), b"")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return first.lstrip().startswith(b"{")
    return not file.read(_LONGEST_ENTRY).strip() and isinstance(value, dict) and len(_lists_of(value)) == 1


def _lists_of(value: dict[str, Any], depth: int = 0) -> list[tuple[str, ...]]:
    """Return the names that lead to each list of objects in an object that is no row itself."""
    if not is_no_row(value) or depth > 3:
        return []
    found: list[tuple[str, ...]] = []
    for name, part in value.items():
        if isinstance(part, list) and part and isinstance(part[0], dict) and not is_turn(part[0]):
            found.append((name,))
        elif isinstance(part, dict):
            found += [(name, *inner) for inner in _lists_of(part, depth + 1)]
    return found


def _entries_of(text: str, byte_at: int) -> Iterator[tuple[int, bytes]]:
    """Yield byte offset and bytes of each entry of a JSON list, of objects one after the other, or of a list in one."""
    at = 0
    for start, end in _list_spans(text, text.index("[") + 1) if text.lstrip().startswith("[") else _object_spans(text):
        byte_at += len(text[at:start].encode(errors="surrogateescape"))
        entry = text[start:end].encode(errors="surrogateescape")
        yield byte_at, entry
        at, byte_at = end, byte_at + len(entry)


_BETWEEN = re.compile(r"[\s,:]*")


def _object_spans(text: str) -> Iterator[tuple[int, int]]:
    at = _after(text, 0)
    while at < len(text):
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, (text.find("\n", at) + 1 or len(text))  # a wrong line costs that line
        lists = _lists_of(value) if isinstance(value, dict) else []
        if len(lists) == 1:
            yield from _list_spans(text, _start_of(text, at, lists[0]) + 1)
        else:
            yield at, end
        at = _after(text, end)


def _start_of(text: str, at: int, names: Sequence[str]) -> int:
    """Return where the value under these names starts in the object at `at`."""
    for name in names:
        key, at = _DECODER.raw_decode(text, _after(text, at + 1))
        while key != name:
            _, end = _DECODER.raw_decode(text, _after(text, at))
            key, at = _DECODER.raw_decode(text, _after(text, end))
        at = _after(text, at)
    return at


def _after(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    assert match is not None, "an empty match is one"
    return match.end()


def _list_spans(text: str, at: int) -> Iterator[tuple[int, int]]:
    while True:
        start = at
        while text[start : start + 1] in (" ", "\n", "\r", "\t", ","):
            start += 1
        if text[start : start + 1] == "]":
            return
        end = _entry_end(text, start)
        if end is None:
            raise BadAudio("broken_shard", f"the JSON list ends early, at character {start} of {len(text)}")
        yield start, end
        at = end


def _entry_end(text: str, start: int) -> int | None:
    """Return the end of the list entry at `start`, None if it has none; the entry itself may be wrong."""
    try:
        # The fast way; after an error, brackets are counted, so that one bad entry does not cost those after it.
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        if text[start : start + 1] not in ("[", "{"):
            following = _SEPARATOR.search(text, start)
            return following.start() if following else None
        depth = 0
        for token in _TOKEN.finditer(text, start):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if depth == 0 and token[0] in "]}":
                return token.end()
        return None


_DECODER = json.JSONDecoder()


def parse_entry(entry: bytes, header: TableHeader | None) -> dict[str, Any]:
    """Return the fields of an entry; BadAudio if it has none."""
    try:
        text = entry.decode()
    except UnicodeDecodeError as error:
        fix = "convert the file, as by `iconv -f LATIN1 -t UTF-8`"
        raise BadAudio("unreadable", f"manifest entry: not UTF-8 at byte {error.start}: {fix}") from error
    if header is not None:
        return _row_of(text, header)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadAudio("unreadable", f"manifest entry: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadAudio("unreadable", "manifest entry is not a JSON object")
    return fields


def _row_of(text: str, header: TableHeader) -> dict[str, Any]:
    try:
        cells = _cells(text, header.delimiter)
    except csv.Error as error:
        quote = "a quote at the beginning of a text that is not closed, or one within it that is not doubled"
        raise BadAudio("unreadable", f"manifest entry: {quote}: {error}") from error
    if any(cells[len(header.columns) :]):
        mark = (
            "no tab in a text" if header.delimiter == "\t" else f"quotes around a text with {header.delimiter!r} in it"
        )
        numbers = f"{len(cells)} cells for {len(header.columns)} columns"
        raise BadAudio("unreadable", f"manifest entry: {numbers}; there must be {mark}")
    return dict(zip(header.columns, cells, strict=False))


# A text with quotes in it, as spreadsheets and pandas write it; plain TSV has quotes as they are.
_QUOTED_CELL = re.compile(r'"[^"]*(?:""[^"]*)+"')


def _cells(text: str, delimiter: str, *, strict: bool = True) -> list[str]:
    if delimiter == "\t":
        cells = text.split("\t")
        cells = [cell[1:-1].replace('""', '"') if _QUOTED_CELL.fullmatch(cell) else cell for cell in cells]
    else:
        cells = next(csv.reader([text], delimiter=delimiter, strict=strict, skipinitialspace=True), [])
    return [cell.strip() for cell in cells]
