"""A user's own data, as they are, trained and answered by the real commands: tables, conversations, every layout."""

import json
from pathlib import Path

import pytest

from tests.end_to_end import run_command
from tests.layouts import ANSWERS, LAYOUTS, write_clips
from tests.read_source import write_lines
from tests.tiny_runs import TINY


def dialogs(folder: Path) -> Path:
    """Two clips and two questions a row."""
    names, rows = write_clips(folder), []
    for number in range(0, len(names), 2):
        turns = [
            {"role": "system", "content": "Answer with a word."},
            {"role": "user", "content": "<audio>Is it high or low?"},
            {"role": "assistant", "content": ANSWERS[number]},
            {"role": "user", "content": "And this? <audio>"},
            {"role": "assistant", "content": ANSWERS[number + 1]},
        ]
        rows.append({"messages": turns, "audios": names[number : number + 2]})
    return write_lines(folder / "dialogs.jsonl", rows)


@pytest.mark.soak  # readers and labels: test_layouts.py, test_conversation_labels.py
def test_a_table_and_conversations_are_trained_and_answered(tmp_path: Path) -> None:
    for name in ("table", "talk"):
        (tmp_path / name).mkdir()
    table = LAYOUTS["csv_with_semicolons_and_own_columns"](tmp_path / "table")
    talk = dialogs(tmp_path / "talk")
    train = [table | {"task": "aqa"}, {"path": str(talk), "task": "chat"}]
    held = [table | {"task": "aqa", "limit": 4}, {"path": str(talk), "task": "chat", "limit": 3}]
    data = [f"data.train={json.dumps(train)}", f"data.validation={json.dumps(held)}"]
    arguments = ["--config", "quickstart", *TINY, *data, f"storage={tmp_path}/runs", "name=own", "training.max_steps=2"]
    looked = run_command(*arguments, "--dry-run")
    assert looked.code == 0, looked.err
    assert "20 x 16000" in looked.err + looked.out
    cache = [f"data.feature_cache={tmp_path}/cache", "model.train_base=frozen"]
    trained = run_command(*arguments, "training.log_samples=true", *cache)
    assert trained.code == 0, trained.err
    assert trained.result["tasks"].keys() == {"aqa", "chat"}
    assert trained.result["samples"] == {"lost": 0, "repeated": 0}
    report = json.loads((tmp_path / "runs/own/data_report.json").read_text())
    assert report["sources"]["dialogs"]["profile"]["tried"] == 3
    assert "warning: tones: 4 samples have the id and length of a sample to train on" in trained.err
    limits = ["generation.max_new_tokens=3", "ablation_samples=0"]
    answered = run_command(tmp_path / "runs/own", *limits, module="mowe_ray.evaluate")
    assert answered.code == 0, answered.err
    predictions = tmp_path / "runs/own/evaluation/predictions/dialogs.jsonl"
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    found = [line for line in lines if "id" in line]
    assert [line["duration_s"] for line in found] == [1.0] * 3


@pytest.mark.soak
def test_every_layout_is_looked_at_trained_on_and_answered(tmp_path: Path) -> None:
    """Two samples of each: one run, of two steps, which is an epoch of all of them."""
    sources = []
    for name, write in LAYOUTS.items():
        (tmp_path / name).mkdir()
        sources.append(write(tmp_path / name) | {"task": "aqa", "limit": 2})
    held = [source | {"name": name} for name, source in zip(LAYOUTS, sources, strict=True)]
    samples = 2 * len(LAYOUTS)
    batches = ["training.epochs=1", f"data.max_batch_size={len(LAYOUTS)}", "data.batch_seconds=60"]
    data = [f"data.train={json.dumps(sources)}", f"data.validation={json.dumps(held)}", *batches]
    arguments = ["--config", "quickstart", *TINY, *data, f"storage={tmp_path}/runs", "name=all"]
    looked = run_command(*arguments, "--dry-run")
    assert looked.code == 0, looked.err
    trained = run_command(*arguments, "training.log_samples=true")
    assert trained.code == 0, trained.err
    assert (trained.result["steps"], trained.result["samples"]) == (2, {"lost": 0, "repeated": 0})
    report = json.loads((tmp_path / "runs/all/data_report.json").read_text())
    assert (report["samples"], report["bad"]) == (2 * samples, 0)
    answered = run_command(
        tmp_path / "runs/all", "generation.max_new_tokens=3", "ablation_samples=0", module="mowe_ray.evaluate"
    )
    assert answered.code == 0, answered.err
    for name in LAYOUTS:
        lines = (tmp_path / f"runs/all/evaluation/predictions/{name}.jsonl").read_text().splitlines()
        assert [line["duration_s"] for line in map(json.loads, lines) if "id" in line] == [0.5] * 2, name
