"""A source in which no audio was found trained as text alone: exit code 0, an export, and "0 audio-s/s".

Report: modelscope/ms-swift#4310.
"""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.config import load_config
from mowe_ray.config.data_section import DataSection
from mowe_ray.training.datasets import check_validation, index_sources, scan_validation
from mowe_ray.training.dry_run import dry_run
from tests.read_source import CLIP, QUESTION, note, write_lines, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def text_source(folder: Path, form: str) -> Path:
    fields = QUESTION | {"remark": "from a book"}
    if form == "jsonl":
        return write_lines(folder / "m.jsonl", [fields] * 3)
    if form == "tar":
        return write_tar(folder / "a.tar", *[(f"{n}.json", note(remark="from a book")) for n in range(3)])
    pq.write_table(pa.table({name: [value] * 3 for name, value in fields.items()}), folder / "a.parquet")
    return folder / "a.parquet"


def spoken_source(folder: Path) -> Path:
    return write_tar(folder / "spoken.tar", ("a.wav", CLIP), ("a.json", note()), ("b.json", note()))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "tar", "parquet"])
def test_a_source_without_audio_stops_and_names_its_fields(tmp_path: Path, form: str) -> None:
    source = str(text_source(tmp_path, form))
    spoken = {"path": str(spoken_source(tmp_path))}
    for sources, key in (([{"path": source}], "data.train.0"), ([spoken, {"path": source}], "data.train.1")):
        with pytest.raises(ValueError, match=rf"{key}\.path: none of the 3 samples .* remark.*{key}\.text_only=true"):
            index_sources(DataSection.model_validate({"train": sources}))
    said = DataSection.model_validate({"train": [spoken, {"path": source, "text_only": True}]})
    assert index_sources(said).report.text_only == {f"train0:{spoken['path']}": 1, f"train1:{source}": 3}


def test_a_validation_source_without_audio_stops(tmp_path: Path) -> None:
    source = {"path": str(text_source(tmp_path, "jsonl")), "name": "held"}
    data = DataSection.model_validate({"train": [{"path": str(spoken_source(tmp_path))}], "validation": [source]})
    with pytest.raises(ValueError, match=r"data\.validation\.0\.path: none of the 3"):
        index_sources(data)
    with pytest.raises(ValueError, match=r"data\.validation\.0\.text_only=true"):
        check_validation(data, scan_validation(data))
    said = DataSection.model_validate({"validation": [source | {"text_only": True}]})
    check_validation(said, scan_validation(said))


@pytest.mark.slow
def test_text_samples_are_counted_in_report_and_dry_run(tmp_path: Path) -> None:
    spoken = str(spoken_source(tmp_path))
    report = index_sources(DataSection.model_validate({"train": [{"path": spoken}]})).report.to_json()
    assert report["text_only"] == report["sources"][f"train0:{spoken}"]["text_only"] == 1
    out = io.StringIO()
    overrides = [f"data.train={json.dumps([{'path': spoken}])}", "data.validation=[]"]
    facts = dry_run(load_config("quickstart", overrides), out)
    assert facts["data"][f"train0:{spoken}"]["text_only"] == 1
    assert "text only" in out.getvalue()


@pytest.mark.slow
def test_the_dry_run_stops_after_its_tables(tmp_path: Path) -> None:
    out = io.StringIO()
    overrides = [f"data.train={json.dumps([{'path': str(text_source(tmp_path, 'jsonl'))}])}", "data.validation=[]"]
    with pytest.raises(ValueError, match="has audio"):
        dry_run(load_config("quickstart", overrides), out)
    assert "text only" in out.getvalue()


def test_a_source_that_is_all_unknown_audio_names_the_field(tmp_path: Path) -> None:
    rows = [QUESTION | {"my_recording_audio": f"{n}.xyz"} for n in range(3)]
    source = str(write_lines(tmp_path / "m.jsonl", rows))
    with pytest.raises(ValueError, match=r"3 unknown_audio, such as .*'my_recording_audio' looks like audio"):
        index_sources(DataSection.model_validate({"train": [{"path": source}]}))
