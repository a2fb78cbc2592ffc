"""`python -m mowe_ray.prepare` that is killed, copied in part or tampered with: nothing trains on what is not whole."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.corpora.prepare import Packing, pack
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.shards import list_shards
from mowe_ray.data.shards.write import write_parquet, write_webdataset
from mowe_ray.prepare import main
from mowe_ray.training.datasets import index_sources
from tests.end_to_end import ROOT, tone_samples

CLIPS = ["builtin", "--clips", "60", "--shard-size-mb", "0.3"]


def contents(folder: Path) -> dict[str, bytes]:
    """What each file holds; of the scans of shards, which name the times of these, only how many there are."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    scans = [name for name in files if Path(name).parent.name == "_index"]
    held = {name: path.read_bytes() for name, path in files.items() if name not in scans}
    return held | {"scans": str(len(scans)).encode()}


def train_on(path: Path) -> int:
    data = DataSection.model_validate({"train": [{"path": str(path)}]})
    return len(index_sources(data).train)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("extra", [[], ["--format", "parquet", "--validation-fraction", "0.3"]])
def test_a_killed_one_leaves_nothing_to_train_on_and_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    side, suffix = ("train", "parquet") if extra else ("", "tar")
    command = [sys.executable, "-m", "mowe_ray.prepare", *CLIPS, *extra, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = out / side / f"00001.{suffix}"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    named = list(out.rglob(f"*.{suffix}"))
    written = {path: path.stat().st_mtime_ns for path in named}
    with pytest.raises(ValueError, match=r"data.train.0.path: data path .* is not complete: mowe_ray.prepare was"):
        train_on(out / side)
    with pytest.raises(ValueError, match="is not complete"):
        train_on(out / side / f"*.{suffix}")

    assert main([*CLIPS, *extra, "--out", str(whole)]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main([*CLIPS, *extra, "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "continuing what was begun" in told.err
    assert json.loads(told.out) == expected | {"out": str(out)}
    assert contents(out) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in named} == written, "whole shards are not written again"
    assert train_on(out / side) == json.loads((out / side / "prepared.json").read_text())["samples"]


def samples_with_bad_ones() -> Iterator[Sample | BadSample]:
    for number, sample in enumerate(tone_samples(30, seconds=0.3)):
        if number % 4 == 1:
            yield BadSample(f"gone-{number}", "tones", "no_audio")
        yield Sample(**{name: getattr(sample, name) for name in Sample.__slots__} | {"source": "tones"})
        if number % 7 == 3:
            yield Sample(f"silent-{number}", b"no audio", "?", "!", "asr", "tones")


def prepare(out: Path | str, stop: int | None = None, **changes: object) -> dict:
    def read() -> Iterator[Sample | BadSample]:
        yield from islice(samples_with_bad_ones(), stop)
        if stop is not None:
            raise OSError(28, "No space left on device")

    packing = Packing("webdataset", 40_000, 0.0, 0, 0.0, 30.0, threads=3)
    request = {"source": "tones"} | changes
    return pack(
        read, str(out), packing, source="tones", total=None, overwrite=False, request=request, log=lambda _: None
    )


@pytest.mark.parametrize("stop", range(1, 44, 6))
def test_wherever_it_stops_the_second_run_ends_as_an_undisturbed_one(tmp_path: Path, stop: int) -> None:
    expected = prepare(tmp_path / "whole")
    with pytest.raises(OSError, match="No space"):
        prepare(tmp_path / "out", stop)
    with pytest.raises(ValueError, match="not complete"):
        list_shards(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="was begun with another source"):
        prepare(tmp_path / "out", source="others")
    assert prepare(tmp_path / "out") == expected | {"out": str(tmp_path / "out")}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="is not empty"):
        prepare(tmp_path / "out")


def test_two_that_prepare_one_folder_at_once(tmp_path: Path) -> None:
    """The second removed, or mixed with its own, what the first had written so far."""
    out, begun = tmp_path / "out", []

    def read() -> Iterator[Sample | BadSample]:
        begun.append(True)
        if len(begun) == 2:  # the first look at the source is before anything is written
            with pytest.raises(ValueError, match=r"out is in use by process"):
                prepare(out)
        yield from samples_with_bad_ones()

    packing = Packing("webdataset", 40_000, 0.0, 0, 0.0, 30.0, threads=1)
    keys = {"total": None, "overwrite": False, "request": {"source": "tones"}, "log": lambda _: None}
    pack(read, str(out), packing, source="tones", **keys)
    prepare(tmp_path / "whole")
    assert len(begun) == 2
    assert contents(out) == contents(tmp_path / "whole")


def test_a_source_that_has_changed_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        prepare(tmp_path / "out", 40)
    shard = tmp_path / "out" / "00000.tar"
    write_webdataset(tone_samples(3, first=90), str(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "00000.tar", shard)
    with pytest.raises(ValueError, match=r"holds the sample tone-090, which the source has no longer.*--overwrite"):
        prepare(tmp_path / "out")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("write", [write_webdataset, write_parquet])
def test_shards_that_are_not_those_that_were_written_are_refused(tmp_path: Path, write) -> None:
    options = ["--format", "webdataset" if write is write_webdataset else "parquet"]
    out = tmp_path / "out"
    assert main(["builtin", "--clips", "20", "--shard-size-mb", "0.3", *options, "--out", str(out)]) == 0
    last = sorted(path for path in out.glob("0*"))[-1]
    whole = last.read_bytes()
    assert train_on(out) == 20

    last.unlink()
    with pytest.raises(ValueError, match=rf"lacks {last.name}, which its prepared.json names: copy it again"):
        train_on(out)
    assert train_on(out / f"*{last.suffix}") < 20, "a pattern may leave some out"

    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{last.name} has {len(whole) // 2} bytes, and not the {len(whole)}"):
        train_on(out)

    last.write_bytes(whole.replace(b"-train-0-", b"-train-7-"))
    with pytest.raises(ValueError, match=rf"{last.name} does not hold the .* samples.*or prepare the corpus again"):
        train_on(out)
    last.write_bytes(whole)
    assert train_on(out) == 20


def test_an_object_store_has_no_half_shard_either() -> None:
    folder = f"memory://{uuid4().hex}"
    with pytest.raises(OSError, match="No space"):
        prepare(folder, 20)
    with pytest.raises(ValueError, match="not complete"):
        list_shards(folder)
    assert prepare(folder)["samples"] == 30
    memory, inner = fsspec.core.url_to_fs(folder)
    assert len(list_shards(folder)) + 3 == len(memory.find(inner))
