"""Points of a study on equal clips: scores, paired differences and their intervals."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.scoring import score, score_statistics
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.report import main as draw
from mowe_ray.sweeping.analysis.by_task import ALL_TASKS, ByTask, compared, scores_by_task
from mowe_ray.sweeping.analysis.points import Point, points, ranked
from mowe_ray.sweeping.clip_scores import FILE, ClipScores, TaskClips, ratio
from mowe_ray.sweeping.report.by_task import scores_csv, task_section
from mowe_ray.sweeping.report.results import ResultsWriter
from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import Trial, run_folder, save
from tests.made_study import subsets, sweep, trials

SEEDS = [0, 1, 2]


def study_of(pools: Sequence[list[str]], seeds: Sequence[int] = SEEDS) -> tuple[SweepConfig, list[Point]]:
    config = sweep({POOL_KEY: {"pools": list(pools)}}, seeds=list(seeds))
    made = trials(config, [{POOL_KEY: pool} for pool in pools], lambda values: 0.5)
    found = points(config, made)
    return config, compared(found, ranked(config, found))


def answers(task: str, right: Sequence[str], given: Sequence[str]) -> list[Answer]:
    pairs = enumerate(zip(right, given, strict=True))
    return [Answer(f"{task}-{i}", task, "?", answer, [wanted]) for i, (wanted, answer) in pairs]


WORDS = ["one two", "three", "four five six", "one"]
HEARD = {"asr": ["one two", "tree", "four nine six", "one one one one"], "aqa": ["one", "three", "", "one"]}


@pytest.mark.parametrize("task", ["asr", "aqa", "er", "ac", "mcq"])
def test_the_score_of_any_clips_is_a_ratio_of_sums(task: str) -> None:
    made = [
        Answer(**{**vars(one), "choices": ["one", "three"]})
        for one in answers(task, WORDS, HEARD.get(task, HEARD["aqa"]))
    ]
    statistics = score_statistics(task, made)
    assert statistics is not None
    for some in ([0, 1, 2, 3], [0, 2], [3], [1, 3]):
        if task == "asr" or len(some) == 4:  # labels and the like are of a whole set
            assert ratio(statistics[some].sum(0)) == pytest.approx(score(task, [made[i] for i in some]), abs=1e-12)


def test_tags_have_no_score_of_single_clips() -> None:
    assert score_statistics("tags", answers("tags", ["dog", "cat"], ["dog", "dog"])) is None


def made_scores(values: np.ndarray, task: str = "aqa", source: str = "test") -> ClipScores:
    """Scores (P, S, N) of trials that are numbered by point, then seed."""
    flat = values.reshape(-1, values.shape[-1])
    weights = np.ones_like(flat)
    held = {number: np.stack([row, one], 1) for number, (row, one) in enumerate(zip(flat, weights, strict=True))}
    ids = [f"{task}-{i}" for i in range(values.shape[-1])]
    return ClipScores({(source, task): TaskClips(ids, 0.25, held)})


def test_a_difference_holds_the_luck_of_clips_and_that_of_seeds() -> None:
    random = np.random.default_rng(0)
    values = (random.random((3, 3, 40)) < random.random((3, 3, 1))).astype(float)
    _, shown = study_of(subsets([0, 1])[:3])
    (row,) = scores_by_task(shown, made_scores(values)).rows
    means = values.mean((1, 2))
    for place, point in enumerate(shown):
        assert row.scores[point.number].mean == pytest.approx(means[place])
    assert row.scores[shown[0].number].difference is None
    # The two variances from their own formulas: of a mean over clips, and of the residuals of a two-way layout.
    for place in (1, 2):
        found = row.scores[shown[place].number].difference
        assert found is not None
        assert found.value == pytest.approx(means[place] - means[0])
        of_clips = (values[place].mean(0) - values[0].mean(0)).var() / 40
        cells = values.mean(2)
        left = [cells[p, s] - cells[p].mean() - cells[:, s].mean() + cells.mean() for p in range(3) for s in range(3)]
        of_seeds = 2 * sum(x * x for x in left) / 4 / 3
        # Student's t of 4 degrees of freedom has a variance of 2, and a quantile of 2.776.
        drawn = np.random.default_rng(1)
        luck = drawn.normal(0, of_clips**0.5, 200_000) + of_seeds**0.5 * drawn.standard_t(4, 200_000)
        low, high = np.percentile(luck, [2.5, 97.5])
        assert found.low - found.value == pytest.approx(low, rel=0.1)
        assert found.high - found.value == pytest.approx(high, rel=0.1)


def test_95_of_100_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(0)
    _, shown = study_of(subsets([0, 1])[:3])
    held = 0
    for repeat in range(200):
        ease = random.normal(0, 1, (1, 1, 60))  # of clips, shared by all models
        luck = random.normal(0, 0.3, (3, 3, 1))  # of each training
        chance = 1 / (1 + np.exp(-(ease + luck)))
        values = (random.random(chance.shape) < chance).astype(float)
        (row,) = scores_by_task(shown, made_scores(values), seed=repeat).rows
        found = row.scores[shown[2].number].difference
        assert found is not None
        held += found.low <= 0 <= found.high
    assert 186 <= held <= 200, held


def test_tasks_of_a_source_have_a_mean_and_clips_without_an_answer_are_left_out() -> None:
    values = np.stack([np.zeros((1, 4)), np.ones((1, 4))])
    values[1, 0, 3] = np.nan
    one, two = made_scores(values, "aqa"), made_scores(np.full((2, 1, 2), 0.5), "er")
    _, shown = study_of(subsets([0, 1])[:2], seeds=[0])
    first, second, both = scores_by_task(shown, ClipScores({**one.tasks, **two.tasks})).rows
    assert (first.task, first.clips, second.task, second.clips) == ("aqa", 3, "er", 2)
    assert (both.task, both.clips, both.seeds) == (ALL_TASKS, 5, 1)
    assert [both.scores[point.number].mean for point in shown] == [0.25, 0.75]
    gain = both.scores[shown[1].number].difference
    assert gain is not None
    assert (gain.low, gain.high) == (0.5, 0.5)


def test_the_baseline_costs_least_and_of_many_points_the_best_are_shown() -> None:
    pools = [*subsets([1, 2, 3]), []]
    config = sweep({POOL_KEY: {"pools": pools}}, seeds=[0])
    made = trials(config, [{POOL_KEY: pool} for pool in pools], lambda values: len(values[POOL_KEY]) / 10)
    found = points(config, made)
    shown = compared(found, ranked(config, found))
    assert shown[0].values == {POOL_KEY: []}
    assert [point.number for point in shown[1:]] == list(range(7))
    assert compared(found[:1], found[:1]) == []


def finished_study(folder: Path) -> tuple[Study, list[Trial]]:
    space = {POOL_KEY: {"pools": [[], ["hubert"]]}}
    config = sweep(space, storage=str(folder), seeds=[0, 1], base="quickstart", encoders={})
    made = trials(config, [{POOL_KEY: []}, {POOL_KEY: ["hubert"]}], lambda values: 0.4 + 0.2 * len(values[POOL_KEY]))
    found = RunFolder(str(folder), config.name)
    for trial in made:
        save(found, trial)
        given = [word if (i + trial.number) % 3 else "no" for i, word in enumerate(WORDS)]
        lines = [one.to_line() for task in ("asr", "aqa") for one in answers(task, WORDS, given)]
        run_folder(found, trial).write_lines("answers/val.jsonl", lines)
    return Study(config, cost=lambda config: None), made


def test_what_a_study_has_answered_is_kept_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, made = finished_study(tmp_path)
    ResultsWriter(study).write()
    folder = tmp_path / study.sweep.name
    rows = list(csv.DictReader(io.StringIO((folder / "scores.csv").read_text())))
    assert [(row["task"], row["point"]) for row in rows] == [(t, p) for t in ("aqa", "asr", "all") for p in "01"]
    for row in rows[:2]:
        mine = [trial.number for trial in made if trial.point == int(row["point"])]
        lines = [(folder / f"trial-{number:04d}/answers/val.jsonl").read_text().splitlines() for number in mine]
        of_task = [[a for line in some if (a := Answer.from_line(line)).task == "aqa"] for some in lines]
        assert float(row["score"]) == pytest.approx(fmean(score("aqa", some) for some in of_task), abs=1e-5)
    assert "By source and task" in (folder / "report.html").read_text()
    # Without the runs, somewhere else, from the small files.
    moved = tmp_path / "paper"
    for name in ("sweep.json", FILE, *(f"trial-{trial.number:04d}/trial.json" for trial in made)):
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        (moved / name).write_bytes((folder / name).read_bytes())
    assert draw([str(moved)]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(moved / "report.html")
    assert (moved / "scores.csv").read_bytes() == (folder / "scores.csv").read_bytes()


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b'{"tasks": 3}', b'{"tasks": [{"source": "val"}]}', None])
def test_a_damaged_file_is_made_again(damage: bytes | None, tmp_path: Path) -> None:
    study, made = finished_study(tmp_path)
    ResultsWriter(study).write()
    file = tmp_path / study.sweep.name / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    ResultsWriter(study).write()
    assert file.read_bytes() == whole
    scores = ClipScores.load(study.folder)
    scores.add(study.folder, made)
    assert scores.is_saved, "all are known"


def test_damaged_answers_cost_their_trial_and_not_the_study(tmp_path: Path) -> None:
    study, made = finished_study(tmp_path)
    file = tmp_path / study.sweep.name / made[0].name / "answers/val.jsonl"
    file.write_bytes(file.read_bytes()[:50])
    assert ResultsWriter(study).write()["best"] is not None
    scores = ClipScores.load(study.folder)
    assert {number for clips in scores.tasks.values() for number in clips.trials} == {1, 2, 3}


def test_the_section_writes_every_point_and_nothing_without_two() -> None:
    _, shown = study_of([[], ["hubert"], ["wavlm"]])
    found = scores_by_task(shown, made_scores(np.random.default_rng(0).random((3, 3, 30)), source="ood-<speaker>"))
    html = task_section(found)
    assert "ood-&lt;speaker&gt;" in html
    assert html.count("hubert") >= 2
    assert len(scores_csv(found).splitlines()) == 4
    assert task_section(ByTask([], [], {})) == ""


def test_a_task_that_a_trial_left_no_answers_to_is_named_instead_of_compared() -> None:
    _, shown = study_of(subsets([0, 1])[:3])
    both = made_scores(np.random.default_rng(0).random((3, 3, 30)))
    both.tasks.update(made_scores(np.random.default_rng(1).random((3, 3, 30)), task="asr<1>").tasks)
    del both.tasks["test", "asr<1>"].trials[4]
    found = scores_by_task(shown, both)
    assert found.unanswered == {("test", "asr<1>"): [4]}
    assert [row.task for row in found.rows] == ["aqa"]
    named = "asr&lt;1&gt; of test is left out: trial-0004 left no readable answers to it."
    assert named in task_section(found)
    assert named in task_section(ByTask(shown, [], found.unanswered))
