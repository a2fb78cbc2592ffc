"""The plan of a study is what the study then does."""

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mowe_ray.config import RunConfig
from mowe_ray.sweep import main
from mowe_ray.sweeping.dry_run import dry_run
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import ModelCost
from tests.planted_corpus import write_planted_corpus

WEIGHTS = "space={training.mowe_loss.weight: {grid: [0, 0.1]}, model.router.top_k: {int: [1, 3]}}"


def cost(config: RunConfig) -> ModelCost:
    """Return numbers that tell models apart."""
    return ModelCost(1e6, 1e5 * config.model.router.top_k, 10.0 * config.model.router.top_k)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A study of a small corpus, which no test below trains."""
    corpus = write_planted_corpus(tmp_path / "corpus", train=8, validation=2)
    path = tmp_path / "study.yaml"
    path.write_text(
        f"name: study\nquestion: What is best?\nstorage: {tmp_path / 'runs'}\n"
        f"set: {{data.train: [{{path: {corpus.train}}}], training.epochs: 30}}\n"
        "space: {model.router.top_k: {int: [1, 3]}}\n"
    )
    return path


def told(file: Path, *overrides: str, costs: Any = cost) -> tuple[dict[str, Any], str]:
    out = io.StringIO()
    facts = dry_run(load_sweep(file, overrides), costs, out)
    assert json.loads(json.dumps(facts)) == facts
    return facts, out.getvalue()


def trials_of(sweep: SweepConfig) -> list[tuple[int, int, dict[str, Any]]]:
    study = Study(sweep, cost)
    while study.next_trial():
        pass
    return [(trial.number, trial.seed, trial.values) for trial in study.trials.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [WEIGHTS, "seeds=[0, 1]"],
        [WEIGHTS, "constraints=[model.router.top_k <= 2]", "budget.points=3"],
        ["search.kind=random", "budget.points=5", "space={training.learning_rate: {loguniform: [1e-4, 1e-2]}}"],
    ],
)
def test_trials_are_those_of_the_study_and_nothing_is_written(file: Path, overrides: list[str]) -> None:
    before = fsspec.filesystem("memory").find("")
    facts, _ = told(file, *overrides)
    assert not (file.parent / "runs").exists()
    assert fsspec.filesystem("memory").find("") == before
    planned = [(trial["number"], trial["seed"], trial["values"]) for trial in facts["planned"]]
    assert planned == trials_of(load_sweep(file, overrides))
    assert facts["trials"] == len(planned)


@pytest.mark.slow
def test_everything_is_told_to_people(file: Path) -> None:
    facts, text = told(file, "seeds=[0, 7]", "constraints=[model.router.top_k <= pool_size]", "resources.concurrent=3")
    assert text.startswith("What is best?\n")
    for line in (
        "search     grid, 3 points",
        "seeds      0, 7",
        "a trial    1 worker, each 1 CPU to train, 1 to decode",
        "at a time  3",
        "model.router.top_k  1, 2, 3",
        "only where          model.router.top_k <= pool_size",
        "trial-0005  7     1 M     300 k   30",
        "data.train     8 clips",
        "12 GFLOP/s a core",
    ):
        assert f"  {line}" in text or line in text, line
    assert facts["data"]["clips"] == 8
    # Means of top_k 1, 2 and 3: 20 GFLOPs for 30 s of audio, forward and twice backward, at 12 GFLOP/s.
    seconds = 3600 * facts["cost"]["audio_h_per_trial"]
    assert seconds == pytest.approx(30 * 3600 * facts["data"]["hours"])
    assert facts["cost"]["pflop"] == pytest.approx(6 * 3 * 20e9 * seconds / 30 / 1e15)
    assert facts["time"]["device_h_left"] == pytest.approx(facts["cost"]["pflop"] * 1e15 / 12e9 / 3600)


@pytest.mark.slow
def test_of_many_trials_the_first_and_the_last_are_shown(file: Path) -> None:
    facts, text = told(file, f"space={{training.mowe_loss.weight: {{grid: {[n / 100 for n in range(50)]}}}}}")
    assert [number for number in range(50) if f"trial-{number:04d}" in text] == [*range(20), *range(30, 50)]
    assert "... 10 more ..." in text
    assert len(facts["planned"]) == 50


@pytest.mark.slow
def test_a_search_that_learns_is_told_by_its_space(file: Path) -> None:
    space = "space={model.router.top_k: {int: [1, 3]}, training.learning_rate: {loguniform: [1e-4, 1e-2]}}"
    facts, text = told(file, space, "search.kind=optuna", "budget.points=9", "seeds=[0, 1]")
    assert (facts["points"], facts["trials"], facts["planned"]) == (9, 18, [])
    assert "training.learning_rate  0.0001 to 0.01, uniform in the logarithm" in text
    assert 10.0 < facts["cost"]["pflop_per_trial"] / (3 * 3600 * facts["cost"]["audio_h_per_trial"] / 30 / 1e6) < 30.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "most"),
    [([], False), (["scheduler.kind=asha"], True), (["set={training.max_steps: 10}"], True)],
)
def test_what_may_end_early_is_an_upper_bound(file: Path, overrides: list[str], most: bool) -> None:
    facts, text = told(file, *overrides)
    assert facts["cost"]["at_most"] == most
    assert ("at most" in text) == most


def test_what_is_not_known_is_told_as_unknown(file: Path) -> None:
    facts, text = told(
        file, "base=paper", "set={}", "space={training.mowe_loss.weight: {grid: [0, 1]}}", costs=lambda _: None
    )
    assert facts["data"] is None
    assert set(facts["cost"].values()) == {None, False}
    assert facts["time"]["device_h_left"] is None
    for line in ("data.train  none given", "audio       unknown", "training    unknown", "H100 time   unknown"):
        assert line in text
    assert "1 GPU (any)" in text


@pytest.mark.slow
def test_a_study_under_way_tells_what_is_left_by_what_was_measured(file: Path) -> None:
    study = Study(load_sweep(file, ["set_for={quickstart: {compute.num_workers: 2}}"]), cost)
    first, second = study.next_trial(), study.next_trial()
    assert first is not None
    assert second is not None
    study.over(first.number, "finished", wall_s=100.0)
    study.over(second.number, "failed", wall_s=3.0, error="-")
    facts, text = told(file, "set_for={quickstart: {compute.num_workers: 2}}", "seeds=[0, 1]")
    assert facts["earlier"] == {"finished": 1, "failed": 1}
    # The two points that were begun get their second seed first, then comes the third point.
    assert [(t["number"], t["point"], t["seed"], t["status"]) for t in facts["planned"]] == [
        (0, 0, 0, "finished"),
        (1, 1, 0, "failed"),
        (2, 0, 1, "waiting"),
        (3, 1, 1, "waiting"),
        (4, 2, 0, "waiting"),
        (5, 2, 1, "waiting"),
    ]
    assert facts["time"]["trials_left"] == 4
    assert facts["time"]["device_h_left"] == pytest.approx(4 * 2 * 100 / 3600)
    assert "trials      6, of them 1 finished, 1 failed" in text
    assert "measured, 1 trial finished" in text


def test_the_folder_of_another_study_is_refused_as_by_the_study(file: Path) -> None:
    Study(load_sweep(file), cost)
    with pytest.raises(ValueError, match="another space"):
        told(file, "space={model.router.top_k: {grid: [1]}}")


@pytest.mark.slow
def test_the_command_ends_with_the_facts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--dry-run", "model.language_model=nobody/has-this"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out.splitlines()[-1])
    assert [trial["values"] for trial in facts["planned"]] == [{"model.router.top_k": k} for k in (1, 2, 3)]
    assert facts["planned"][0]["stored"] is None  # of that model, nothing is known here
    assert captured.err.startswith("What is best?\n")
    assert not (file.parent / "runs").exists()
    assert main([str(file), "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    gflops = [trial["gflops"] for trial in facts["planned"]]
    assert gflops == sorted(gflops)
    assert gflops[0] > 2


@pytest.mark.slow
def test_data_that_is_not_there_is_an_error(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--dry-run", "data.train.0.path=/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().err
