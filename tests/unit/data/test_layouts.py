"""Every layout that is read directly gives the same samples, and so the same batches."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.model import MoweProcessor
from mowe_ray.training.collate import collate
from mowe_ray.training.datasets import index_sources, validation_plan
from tests.layouts import ANSWERS, CLIPS, LAYOUTS, QUESTION, SECONDS, Source, encoded, labelled_folders
from tests.layouts import jsonl as plain
from tests.tiny_models import tiny_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def first_batch(source: Source) -> tuple[MicroBatch, dict]:
    data = DataSection.model_validate(
        {"train": [{"task": "aqa"} | source], "batch_seconds": 30, "max_batch_size": CLIPS}
    )
    sources = index_sources(data)
    (first, *_), *_ = validation_plan(sources.train, data)
    (facts,) = sources.report.to_json()["sources"].values()
    return load_micro_batch(sources.train.table.take(pa.array(first)), 0.1, 30.0), facts


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> MicroBatch:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return first_batch(plain(tmp_path_factory.mktemp("plain")))[0]


@pytest.fixture(scope="module")
def processor() -> MoweProcessor:
    return MoweProcessor(tiny_tokenizer(chat_template=True), [(400, 160, 0)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_first_batch(
    tmp_path: Path, expected: MicroBatch, processor: MoweProcessor, name: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    found, facts = first_batch(LAYOUTS[name](folder))
    assert not found.bad
    assert found.instructions == expected.instructions == [QUESTION] * CLIPS
    assert found.answers == expected.answers
    assert sorted(found.answers) == sorted(ANSWERS)
    assert found.lengths == expected.lengths
    np.testing.assert_array_equal(found.audio, expected.audio)
    tensors, wanted = (collate(batch, processor).inputs for batch in (found, expected))
    assert tensors.keys() == wanted.keys() >= {"input_ids", "labels", "input_values", "input_lengths"}
    assert [key for key in wanted if not torch.equal(tensors[key], wanted[key])] == []
    assert len(set(found.ids)) == CLIPS
    assert (facts["samples"], facts["profile"]["sample_rates"]) == (CLIPS, {"16000": CLIPS})
    assert facts["profile"]["duration_histogram"] == {"0 to 1 s": CLIPS}


def test_folders_named_by_their_answer(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    found, _ = first_batch(labelled_folders(folder))
    assert dict(zip(found.ids, found.answers, strict=True)) == {f"{a}/{n:02d}": a for n, a in enumerate(ANSWERS)}


def test_a_layout_that_is_damaged_costs_what_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source = LAYOUTS["nemo_tarred"](folder)
    manifest = folder / "tarred_audio_manifest.json"
    manifest.write_text(manifest.read_text().replace("clips_03.wav", "clips_99.wav") + "{broken\n")
    data = DataSection.model_validate({"train": [{"task": "aqa"} | source], "max_bad_fraction": 0.2})
    report = index_sources(data).report.to_json()
    assert (report["good"], report["bad"]) == (CLIPS - 1, 3)  # the broken line may be of either tar
    assert len(encoded(0)) > SECONDS


def test_the_table_of_the_documentation_is_of_layouts_that_are_tested() -> None:
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    tests = [row.rpartition("| `")[2] for row in text.splitlines() if row.startswith("| ") and row.endswith("` |")]
    named = {name for row in tests for name in re.findall(r"\w+", row)}
    assert named == {*LAYOUTS, test_folders_named_by_their_answer.__name__}
