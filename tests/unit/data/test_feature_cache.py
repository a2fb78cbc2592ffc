import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from mowe_ray.data.cached_shards import (
    _checksum,
    is_complete,
    open_cached,
    prune,
    remove_parts,
    write_audio,
    write_features,
)
from mowe_ray.data.feature_cache import CachedEncoder, FeatureCache, shard_rows
from mowe_ray.data.index import Index, SourceSpec, build_index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch, read_cell
from mowe_ray.data.sample import BadAudio, Sample, Turn
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.write import write_webdataset

SHORTEST_S, LONGEST_S = 0.1, 30.0
ENCODERS = [CachedEncoder("one", "base_encoder", 0, 1, 4, 400.0), CachedEncoder("all", "member", 2, 3, 2, 600.0)]


@pytest.fixture
def corpus(tmp_path, make_samples, encode):
    """Several shards: good clips, one text, one truncated, one silent, one without an instruction."""
    cut = encode("flac", seconds=2.0)
    silent = encode("wav", np.zeros(16_000, np.float32))
    samples = [
        *make_samples(30),
        Sample("text", None, "Say hi", "hi", "chat", "x"),
        Sample("cut", cut[: len(cut) // 2], "i", "a", "asr", "x", "flac", 2.0),
        *make_samples(40, prefix="b", step_s=0.02),
        Sample("silent", silent, "i", "a", "asr", "x", "wav"),
        Sample("plain", encode("wav"), "", "a", "ac", "x", "wav"),
        Sample("choice", encode("wav"), "Which?", "b", "mcq", "x", "wav", choices=("a", "b"), groups={"level": "easy"}),
    ]
    write_webdataset(samples, str(tmp_path / "w"), shard_bytes=500_000)
    return tmp_path / "w"


def index_of(corpus: Path, task: str | None = None, max_s: float = LONGEST_S) -> Index:
    spec = SourceSpec("made", str(corpus), task)
    return build_index([spec], corpus.parent / "index", min_s=SHORTEST_S, max_s=max_s)


def features_of(encoder: CachedEncoder, row: int, length: int) -> np.ndarray:
    """Made-up features (L, frames, E) of a clip that tell whose they are."""
    frames = 1 + length // 320
    random = np.random.default_rng([encoder.encoder_index, row, length])
    return random.integers(0, 1 << 16, (encoder.layers, frames, encoder.width)).astype(np.uint16)


def filled(index: Index, folder: Path | str) -> FeatureCache:
    shards = shard_rows(index, SHORTEST_S, LONGEST_S)
    cache = FeatureCache(str(folder), {shard: key for shard, (key, _) in shards.items()}, ENCODERS)
    for shard, (_, rows) in shards.items():
        write_audio(cache.audio_path(shard), rows, SHORTEST_S, LONGEST_S)
        lengths = open_cached(cache.audio_path(shard)).lengths
        clips = np.flatnonzero(lengths)[::-1].tolist()  # any order
        for encoder in ENCODERS:
            pairs = [(row, features_of(encoder, row, int(lengths[row]))) for row in clips]
            batches = [pairs[start : start + 3] for start in range(0, len(pairs), 3)]
            write_features(
                cache.features_path(encoder, shard), (tuple(map(list, zip(*part, strict=True))) for part in batches)
            )
    return cache


@pytest.mark.slow
def test_cached_micro_batches_are_those_that_are_decoded(corpus, tmp_path):
    index = index_of(corpus)
    assert len(index.shard_names) > 2
    cache = filled(index, tmp_path / "cache")
    assert cache.missing() == {}
    random = np.random.default_rng(0)
    for size in (0, 1, 5, 40, len(index)):
        rows = index.table.take(pa.array(random.permutation(len(index))[:size]))
        found, expected = cache.load(rows), load_micro_batch(rows, SHORTEST_S, LONGEST_S)
        assert np.array_equal(found.audio, expected.audio)
        assert found.audio.dtype == np.int16
        plain = {name: value for name, value in vars(expected).items() if name not in ("audio", "features")}
        assert {name: getattr(found, name) for name in plain} == plain
        lengths = dict(zip(expected.ids, expected.lengths, strict=True))
        clips = [row for row in rows.to_pylist() if lengths.get(row["id"])]
        for encoder, features in zip(ENCODERS, found.features, strict=True):
            wanted = [features_of(encoder, row["row"], lengths[row["id"]]) for row in clips]
            assert features.frames == [values.shape[1] for values in wanted]
            assert np.array_equal(features.values, np.concatenate([*map(np.ravel, wanted), np.zeros(0, np.uint16)]))
            assert (features.encoder_index, features.layers, features.width) == (
                encoder.encoder_index,
                encoder.layers,
                encoder.width,
            )
    assert {bad.cause for bad in found.bad} == {"truncated", "silent"}


def test_turns_before_the_question_are_kept(tmp_path, make_samples):
    turns = (Turn("user", "Who speaks?"), Turn("assistant", "A woman.", learned=False))
    samples = [replace(sample, history=turns[: 2 * (number % 2)]) for number, sample in enumerate(make_samples(4))]
    write_webdataset(samples, str(tmp_path / "w"))
    index = index_of(tmp_path / "w")
    found = filled(index, tmp_path / "cache").load(index.table)
    expected = load_micro_batch(index.table, SHORTEST_S, LONGEST_S)
    assert found.histories == expected.histories
    assert [[turn.learned for turn in history] for history in found.histories] == [[], [True, False], [], [True, False]]
    assert found.instructions == expected.instructions


@pytest.mark.parametrize("place", ["folder", "url"])
def test_samples_of_several_clips_are_kept(tmp_path, make_samples, encode, url, place):
    """Two clips, one, none, a bad one of two, more samples than are decoded together, other rates and channels."""
    samples = [
        replace(sample, more_audio=tuple(one.audio for one in make_samples(number % 3)), suffix="flac", duration_s=None)
        for number, sample in enumerate(make_samples(70))
    ]
    silent = encode("wav", np.zeros(16_000, np.float32))
    samples[3] = replace(samples[3], more_audio=(silent,))
    samples[5] = Sample("text", None, "Say hi", "hi", "chat", "x")
    write_webdataset(samples, str(tmp_path / "w"))
    index = index_of(tmp_path / "w")
    cache = filled(index, tmp_path / "cache" if place == "folder" else url)
    for rows in (index.take(np.random.default_rng(0).permutation(len(index))), index.table.slice(0, 1)):
        found, expected = cache.load(rows), load_micro_batch(rows, SHORTEST_S, LONGEST_S)
        assert np.array_equal(found.audio, expected.audio)
        for name in ("ids", "lengths", "scales", "counts", "histories", "instructions", "answers", "bad"):
            assert getattr(found, name) == getattr(expected, name), name
        for features in found.features:
            assert features.frames == [1 + length // 320 for length in expected.lengths if length]
        one, two = found.without({0: BadAudio("crashed", "")}), expected.without({0: BadAudio("crashed", "")})
        assert (one.lengths, one.counts) == (two.lengths, two.counts)
        assert len(one.features[0].frames) == sum(map(bool, two.lengths))
    assert max(cache.load(index.table).counts) == 3
    assert [bad.id for bad in cache.load(index.table).bad] == [samples[3].id]


def test_sources_that_take_a_shard_in_their_own_ways_have_files_of_their_own(tmp_path, make_samples):
    """Those of the last source were read for all."""
    samples = [replace(sample, instruction="") for sample in make_samples(6)]
    write_webdataset(samples, str(tmp_path / "w"))
    ways = [{}, {"reading": Reading(instructions=("How?",))}, {"limit": 2}, {"reading": Reading(seed=1), "limit": 0.5}]
    specs = [SourceSpec(f"s{n}", str(tmp_path / "w"), "x", **way) for n, way in enumerate(ways)]
    index = build_index(specs, tmp_path / "index", min_s=SHORTEST_S, max_s=LONGEST_S)
    cache = filled(index, tmp_path / "cache")
    assert len(cache.shards) == len(ways)
    rows = index.take(np.random.default_rng(0).permutation(len(index)))
    found, expected = cache.load(rows), load_micro_batch(rows, SHORTEST_S, LONGEST_S)
    assert np.array_equal(found.audio, expected.audio)
    for name in ("ids", "sources", "instructions", "answers", "lengths"):
        assert getattr(found, name) == getattr(expected, name), name


def test_files_of_a_row_for_each_sample_are_read(corpus, tmp_path):
    """Those of before a sample could have several."""
    index = index_of(corpus)
    cache = filled(index, tmp_path / "cache")
    expected = cache.load(index.table)
    for file in (tmp_path / "cache" / "audio-3").iterdir():
        table = pa.ipc.open_file(file).read_all().drop_columns("sample")
        sums = [_checksum(table, row, read_cell(table["samples"], row)) for row in range(len(table))]
        table = table.set_column(table.schema.get_field_index("crc32"), "crc32", pa.array(sums, pa.uint32()))
        file.unlink()
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    found = FeatureCache(str(tmp_path / "cache"), cache.shards, ENCODERS).load(index.table)
    assert (found.ids, found.lengths, found.bad) == (expected.ids, expected.lengths, expected.bad)
    assert np.array_equal(found.audio, expected.audio)


@pytest.mark.slow
def test_features_travel_as_views(corpus, tmp_path):
    index = index_of(corpus)
    cache = filled(index, tmp_path / "cache")
    batches = [cache.load(index.table.slice(start, size)) for start, size in ((0, 3), (30, 1), (5, 0), (8, 4))]
    for batch in batches:
        row = batch.to_row()
        assert all(
            np.shares_memory(one.values, other.values) or not len(one.values)
            for one, other in zip(MicroBatch.from_row(row).features, batch.features, strict=True)
        )
    table = pa.concat_tables([batch.to_row() for batch in batches]).combine_chunks()
    for number, batch in enumerate(batches):
        found = MicroBatch.from_row(table, number)
        assert np.array_equal(found.audio, batch.audio)
        assert [f.frames for f in found.features] == [f.frames for f in batch.features]
        assert all(np.array_equal(f.values, g.values) for f, g in zip(found.features, batch.features, strict=True))


@pytest.mark.slow
def test_one_file_serves_every_task(corpus, tmp_path):
    """A shard without tasks of its own may be read with another default: its audio is the same."""
    cache = filled(index_of(corpus), tmp_path / "cache")
    other = index_of(corpus, task="er")
    assert {shard: key for shard, (key, _) in shard_rows(other, SHORTEST_S, LONGEST_S).items()} == cache.shards
    rows = other.table.filter(pa.compute.equal(other.table["id"], "plain"))
    renamed = rows.set_column(rows.schema.get_field_index("task"), "task", pa.array(["er"]))
    assert cache.load(renamed).instructions == load_micro_batch(renamed, SHORTEST_S, LONGEST_S).instructions
    assert cache.load(rows).instructions == ["Describe the audio."]


@pytest.mark.slow
def test_a_changed_shard_has_another_key(corpus):
    index = index_of(corpus)
    before = shard_rows(index, SHORTEST_S, LONGEST_S)
    changed = index.shard_names[1]
    os.utime(changed, ns=(1, 1))
    after = shard_rows(index_of(corpus), SHORTEST_S, LONGEST_S)
    assert {shard for shard in before if before[shard][0] != after[shard][0]} == {changed}
    Path(changed).write_bytes(Path(changed).read_bytes() + b"\0" * 512)
    os.utime(changed, ns=(1, 1))
    assert shard_rows(index_of(corpus), SHORTEST_S, LONGEST_S)[changed][0] != after[changed][0]
    limited = shard_rows(index, SHORTEST_S, 1.0)
    assert not {key for key, _ in limited.values()} & {key for key, _ in before.values()}


@pytest.mark.slow
def test_other_limits_of_the_index_give_other_keys(corpus):
    """Rows are numbered within the usable samples, so the key has to tell which these were."""
    full = shard_rows(index_of(corpus), SHORTEST_S, LONGEST_S)
    fewer = shard_rows(index_of(corpus, max_s=2.0), SHORTEST_S, LONGEST_S)
    assert (
        {shard for shard in fewer if len(fewer[shard][1]) < len(full[shard][1])}
        == {shard for shard in fewer if fewer[shard][0] != full[shard][0]}
        != set()
    )


@pytest.mark.slow
def test_half_a_file_is_computed_again(corpus, tmp_path):
    index = index_of(corpus)
    cache = filled(index, tmp_path / "cache")
    shard = index.shard_names[0]
    path = Path(cache.features_path(ENCODERS[1], shard))
    content = path.read_bytes()
    path.rename(path.with_suffix(".arrow.0.part"))  # as a killed writer leaves it
    assert cache.missing() == {shard: [ENCODERS[1]]}
    path.write_bytes(content[:-100])  # as a broken disk leaves it
    assert not is_complete(str(path))
    rows = index.table.filter(pa.compute.equal(index.table["shard"].cast(pa.string()), shard))
    with pytest.raises(ValueError, match=rf"data\.feature_cache: {path} is cut and was removed; run the same command"):
        cache.load(rows)
    assert cache.missing() == {shard: [ENCODERS[1]]}
    path.write_bytes(content)
    assert cache.missing() == {}
    Path(cache.audio_path(shard)).unlink()
    assert cache.missing() == {shard: []}


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def batches():
        yield [0], [np.zeros((1, 2, 3), np.uint16)]
        raise OSError("the disk is full")

    path = tmp_path / "key" / "shard.arrow"
    with pytest.raises(OSError, match="full"):
        write_features(str(path), batches())
    assert list(path.parent.iterdir()) == []


def test_a_file_that_has_gone_is_told_with_the_key_to_look_at(corpus, tmp_path):
    index = index_of(corpus)
    cache = filled(index, tmp_path / "cache")
    other = FeatureCache(str(tmp_path / "elsewhere"), cache.shards, cache.encoders)
    with pytest.raises(FileNotFoundError, match=r"data\.feature_cache.*run the same command again"):
        other.load(index.table.slice(0, 1))


def test_the_note_of_an_encoder_keeps_its_keys(tmp_path: Path) -> None:
    note = '{"key": "all", "label": "member", "place": 2, "layers": 3, "width": 2, "bytes_per_s": 600.0}'
    assert ENCODERS[1].to_json() == note
    (tmp_path / "note.json").write_text(note)
    assert CachedEncoder.read(str(tmp_path / "note.json")) == ENCODERS[1]
    for damaged in ("", note[:20], "[]", '{"place": 1, "other": 2}'):
        (tmp_path / "note.json").write_text(damaged)
        assert CachedEncoder.read(str(tmp_path / "note.json")) is None
    assert CachedEncoder.read(str(tmp_path / "absent.json")) is None


@pytest.mark.parametrize("kind", ["audio", "features"])
def test_a_damaged_row_is_found_and_its_file_computed_again(corpus, tmp_path, kind):
    index = index_of(corpus)
    cache = filled(index, tmp_path / "cache")
    shard = index.shard_names[0]
    path = Path(cache.audio_path(shard) if kind == "audio" else cache.features_path(ENCODERS[0], shard))
    with path.open("r+b") as file:  # in what was decoded: the file is still opened by its schema and its footer
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    assert cache.missing() == {}
    rows = index.table.filter(pa.compute.equal(index.table["shard"].cast(pa.string()), shard))
    with pytest.raises(ValueError, match=rf"data\.feature_cache: {path} does not match its checksums and was removed"):
        cache.load(rows)
    assert cache.missing() == {shard: [] if kind == "audio" else [ENCODERS[0]]}


def test_files_without_checksums_are_read(corpus, tmp_path):
    """Those of before there were any: to compute them again would cost hours."""
    index = index_of(corpus)
    cache = filled(index, tmp_path / "cache")
    expected = cache.load(index.table)
    for file in (tmp_path / "cache").rglob("*.arrow"):
        table = pa.ipc.open_file(file).read_all().drop_columns("crc32")
        file.unlink()
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    found = FeatureCache(str(tmp_path / "cache"), cache.shards, ENCODERS).load(index.table)
    assert np.array_equal(found.audio, expected.audio)
    assert all(np.array_equal(f.values, g.values) for f, g in zip(found.features, expected.features, strict=True))


def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_stays(tmp_path):
    abandoned, under_way = tmp_path / "key" / "a.arrow.1.part", tmp_path / "audio-3" / "b.arrow.2.part"
    for part in (abandoned, under_way, tmp_path / "key" / "a.arrow"):
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(b"half")
    two_hours_ago = time.time() - 7200
    for path in (abandoned, tmp_path / "key" / "a.arrow"):
        os.utime(path, (two_hours_ago, two_hours_ago))
    remove_parts(str(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.arrow", "b.arrow.2.part"]


def test_parts_of_a_pass_that_failed_are_removed_and_those_of_others_stay(tmp_path):
    for name in ("a.arrow.mine-1.part", "a.arrow.other-1.part"):
        (tmp_path / "key").mkdir(exist_ok=True)
        (tmp_path / "key" / name).touch()
    remove_parts(str(tmp_path), "mine-")
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["a.arrow.other-1.part"]


@pytest.fixture
def url():
    """A cache in an object store."""
    yield (url := f"memory://{uuid4().hex}/cache")
    with suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.mark.slow
def test_a_cache_at_a_url_is_that_of_a_folder(corpus, tmp_path, url):
    index = index_of(corpus)
    expected, cache = filled(index, tmp_path / "cache"), filled(index, url)
    assert cache.missing() == {}
    rows = index.table.take(pa.array(np.random.default_rng(0).permutation(len(index))[:50]))
    found, local = cache.load(rows), expected.load(rows)
    assert np.array_equal(found.audio, local.audio)
    assert (found.ids, found.bad, found.references) == (local.ids, local.bad, local.references)
    for one, other in zip(found.features, local.features, strict=True):
        assert np.array_equal(one.values, other.values)
    fs, shard = fsspec.filesystem("memory"), index.shard_names[0]
    damaged = cache.features_path(ENCODERS[0], shard)
    content = bytearray(fs.cat_file(damaged))
    content[len(content) // 2] ^= 1
    fs.pipe_file(damaged, bytes(content))
    with pytest.raises(ValueError, match=f"{damaged} does not match its checksums and was removed"):
        cache.load(index.table)
    assert cache.missing() == {shard: [ENCODERS[0]]}
    with pytest.raises(FileNotFoundError, match=r"data\.feature_cache.*run the same command again"):
        FeatureCache(f"{url}/elsewhere", cache.shards, []).load(rows)


@pytest.mark.parametrize("place", ["folder", "url"])
def test_what_was_written_longest_ago_goes_first(tmp_path, url, place):
    folder = str(tmp_path / "cache") if place == "folder" else url
    paths = [f"{folder}/{key}/{name}.arrow" for key in ("audio-3", "one") for name in "ab"]
    for path in paths:
        write_features(path, [([0], [np.zeros((1, 50, 10), np.uint16)])])
        time.sleep(0.01)
    fs = fsspec.filesystem("memory" if place == "url" else "file")
    fs.makedirs(f"{folder}/encoders")
    fs.pipe_file(f"{folder}/encoders/note.json", b"{}")
    size = sum(fs.size(path) for path in fs.find(folder) if not path.endswith(".json"))
    assert prune(folder, max_bytes=size, max_age_s=3600) == (0, 0)
    assert prune(folder, max_bytes=size * 0.6, max_age_s=None) == (2, size // 2)
    left = {path.rpartition("/")[2] for path in fs.find(folder)}
    assert left == {"note.json", "a.arrow", "b.arrow"} | ({"a.arrow.rows", "b.arrow.rows"} if place == "url" else set())
    assert not fs.exists(paths[0])
    assert prune(folder, max_bytes=None, max_age_s=0) == (2, size // 2)
    with pytest.raises(ValueError, match="is no feature cache"):
        prune(folder, max_bytes=0, max_age_s=None)
