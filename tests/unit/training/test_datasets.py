from io import BytesIO

import numpy as np
import pytest
import soundfile

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.compressed import cache_folder
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.training.datasets import index_sources, scan_sources, validation_plan
from mowe_ray.training.sampler import EpochSampler


def flac(seconds: float) -> bytes:
    out = BytesIO()
    tone = 0.3 * np.sin(np.arange(round(seconds * 16_000)) / 8)
    soundfile.write(out, tone.astype(np.float32), 16_000, format="flac")
    return out.getvalue()


def write(folder, prefix: str, lengths, task: str = "asr") -> str:
    samples = [
        Sample(f"{prefix}{n}", flac(length), f"What is {n}?", f"answer {n}", task, prefix, "flac")
        for n, length in enumerate(lengths)
    ]
    write_webdataset(samples, str(folder / prefix))
    return str(folder / prefix)


@pytest.fixture
def data(tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {
        "train": [
            {"path": write(tmp_path, "long", [1.0, 1.2, 1.4, 9.0]), "weight": 1.0},
            {"path": write(tmp_path, "short", [0.5] * 6, "er"), "weight": 2.5},
        ],
        "validation": [{"path": write(tmp_path, "held", [0.6] * 5), "name": "held"}],
        "max_duration_s": 5,
        "batch_seconds": 6,
        "max_batch_size": 3,
        "max_bad_fraction": 0.2,
    }


@pytest.mark.slow
def test_all_sources_are_indexed_and_reported(data, tmp_path):
    assert cache_folder() == tmp_path / "cache" / "mowe_ray"
    sources = index_sources(DataSection(**data))
    names = [f"train{i}:{source['path']}" for i, source in enumerate(data["train"])]
    assert sources.train.samples_per_source == dict(zip(names, (3, 6), strict=True))
    assert sources.validation["held"].samples_per_source == {"held": 5}
    report = sources.report.to_json()["sources"]
    assert report[names[0]]["causes"] == {"too_long": 1}
    assert report["held"]["bad"] == 0


@pytest.mark.slow
def test_a_source_comes_as_often_as_its_weight(data):
    section = DataSection(**data)
    index = scan_sources(section).train
    order = list(EpochSampler(index, section, seed=0, micro_batches_per_step=2, epochs=2))
    for epoch in (0, 1):
        rows = np.concatenate([rows for planned in order if planned.epoch == epoch for rows in planned.micro_batches])
        counts = np.bincount(rows, minlength=9)
        assert counts[:3].tolist() == [1, 1, 1]
        assert counts[3:].sum() == 15
        assert set(counts[3:]) == {2, 3}
    assert all(len(planned.micro_batches) == 2 for planned in order)


def test_validation_is_one_pass_the_same_every_time(data):
    section = DataSection(**data)
    index = scan_sources(section).validation["held"]
    passes = [
        [rows.tolist() for step in validation_plan(index, section, micro_batches_per_step=2) for rows in step]
        for _ in range(2)
    ]
    assert passes[0] == passes[1]
    assert sorted(row for rows in passes[0] for row in rows) == [0, 1, 2, 3, 4]
    assert max(map(len, passes[0])) <= 3


@pytest.mark.slow
def test_data_that_is_not_worth_training_on_is_refused(data):
    with pytest.raises(ValueError, match=r"3 of 15 samples .* too_long"):
        index_sources(DataSection(**data | {"max_duration_s": 1.1, "max_bad_fraction": 0.1}))
    with pytest.raises(ValueError, match=r"no usable sample in .*long"):
        index_sources(DataSection(**data | {"train": data["train"][:1], "max_duration_s": 0.9, "max_bad_fraction": 1}))
    hardly = [data["train"][1] | {"weight": 0.01}]
    with pytest.raises(ValueError, match=r"no usable sample in .*short.*weight"):
        index_sources(DataSection(**data | {"train": hardly}))
