"""results.csv, the terminal's table, the summary, and how values are written."""

import csv
import io
import json
from dataclasses import replace

import pytest

from mowe_ray.sweeping.analysis.conclusions import answer
from mowe_ray.sweeping.analysis.points import plus_minus
from mowe_ray.sweeping.report.results import results_csv, summary, table
from mowe_ray.sweeping.schema import POOL_KEY
from mowe_ray.sweeping.trials import entry_label, entry_name, point_label, pool_label
from tests.made_study import failed, grid, planted, planted_study, subsets, sweep, trials


@pytest.mark.parametrize(
    ("names", "label"),
    [
        ([], "no pool"),
        (["hubert"], "hubert"),
        (["hubert", "whisper"], "hubert + whisper"),
        (["whisper"] * 3, "3 x whisper"),
        (["whisper", "hubert", "whisper"], "2 x whisper + hubert"),
    ],
)
def test_pools(names: list[str], label: str) -> None:
    assert pool_label(names) == label


def test_values_entries_and_points() -> None:
    values = ["seqcnn", 2, 0.1, 1e-05, 0.0123456, True, None, {"r": 8}, ["hubert"]]
    assert [entry_label(value) for value in values] == [
        "seqcnn", "2", "0.1", "1e-05", "0.0123", "true", "null", '{"r": 8}', "hubert",
    ]  # fmt: skip
    assert [entry_name(name) for name in (POOL_KEY, "model.router.top_k", "recipe")] == [
        "pool",
        "router.top_k",
        "recipe",
    ]
    assert point_label({"recipe": "a", POOL_KEY: []}) == "no pool, recipe = a"
    assert point_label({}) == "the base configuration"


def test_numbers() -> None:
    assert plus_minus(0.5, 0.0123) == "0.500 ± 0.012"
    assert plus_minus(0.5, 0.00012) == "0.500 ± 0.0001"
    assert (plus_minus(0.5, None), plus_minus(None, None)) == ("0.500", "–")


def test_csv_has_a_row_a_trial() -> None:
    config, made = planted_study()
    made[13] = replace(made[13], error='Traceback:\n  "x", y\nOutOfMemory')
    rows = list(csv.DictReader(io.StringIO(results_csv(config, made))))
    assert len(rows) == 32
    assert list(rows[0]) == [
        "number", "point", "seed", "status", POOL_KEY, "model.router.top_k", "objective", "loss",
        "score.aqa", "score.asr", "score.er", "majority.aqa", "majority.asr", "majority.er",
        "stored_parameters", "active_parameters", "gflops", "steps", "percent", "attempts", "wall_s", "device_s",
        "error",
    ]  # fmt: skip
    for row, one in zip(rows, made, strict=True):
        assert int(row["number"]) == one.number
        assert row["status"] == one.status
        assert row[POOL_KEY] == pool_label(one.values[POOL_KEY])
        if one.status != "failed":
            assert float(row["objective"]) == one.objective("score")
            assert float(row["score.er"]) == one.tasks["er"]["score"]
    assert (rows[13]["objective"], rows[13]["score.er"], rows[13]["loss"]) == ("", "", "")
    assert rows[13]["error"] == 'Traceback: "x", y OutOfMemory'


def test_csv_keeps_all_digits_and_leaves_out_what_is_not_finite() -> None:
    config = sweep({"training.weight_decay": {"choice": [0.123456789]}})
    (one,) = trials(config, grid(training__weight_decay=[0.123456789]), lambda _: 0.5)
    (row,) = csv.DictReader(io.StringIO(results_csv(config, [replace(one, loss=float("nan"), cost=None)])))
    assert (row["training.weight_decay"], row["loss"], row["gflops"]) == ("0.123456789", "", "")


def test_table_lists_points_by_mean_and_fits_the_terminal() -> None:
    config, made = planted_study()
    header, *lines = table(config, made).splitlines()
    assert header.split() == ["point", "pool", "router.top_k", "score", "spread", "active", "trials"]
    assert lines[0].startswith("     15  hubert + whisper + wavlm  2 ")  # numbers to the right, texts to the left
    assert " ".join(lines[0].split()) == "15 hubert + whisper + wavlm 2 0.667 ± 0.012 0.017 1.42 M 2 finished"
    means = [float(line.split(" ± ")[0].rsplit(" ", 1)[1]) for line in lines]
    assert means[:13] == sorted(means[:13], reverse=True)
    assert [line.split()[0] for line in lines[13:]] == ["0", "4", "6"]  # not complete, so not ranked
    assert "1 finished, 1 stopped early" in lines[13]
    assert max(map(len, [header, *lines])) <= 120
    assert max(map(len, table(config, made, width=80).splitlines())) <= 80


def test_wide_tables_continue_below() -> None:
    names = [f"a_rather_long_name_of_an_encoder_{i}" for i in range(5)]
    config = sweep({POOL_KEY: {"pools": [names]}, "model.adapter.kind": {"choice": ["x" * 60]}})
    made = trials(config, grid(pool=[names], model__adapter__kind=["x" * 60]), lambda _: 0.5)
    lines = table(config, made, width=120).splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in "".join(lines)
    text = "".join(lines)
    assert text.count("_") == sum(name.count("_") for name in names), "nothing is cut"
    assert text.count("x") == 60
    assert lines[1].endswith("1 finished")


def test_table_without_trials_is_its_header() -> None:
    assert len(table(sweep({"model.router.top_k": {"grid": [1]}}), []).splitlines()) == 1


def test_summary_is_json() -> None:
    config, made = planted_study()
    result = json.loads(json.dumps(summary(config, made), allow_nan=False))
    assert result["best"]["values"] == {POOL_KEY: ["hubert", "whisper", "wavlm"], "model.router.top_k": 2}
    assert result["best"]["mean"] == pytest.approx(2 / 3)
    assert result["best"]["trials"] == ["trial-0030", "trial-0031"]
    assert (result["best"]["seeds"], result["best"]["stderr_from"]) == ([0, 1], "seeds")
    assert result["trials"] == {"finished": 29, "stopped": 2, "failed": 1, "running": 0, "waiting": 0}
    assert (result["metric"], result["points"], result["front"]) == ("score", 16, None)
    assert result["answer"] == answer(config, made)


def test_summary_lists_the_front_and_may_have_no_winner() -> None:
    config = sweep({POOL_KEY: {"subsets": {"sizes": [0, 1, 2, 3]}}}, objective={"against": "active_parameters"})
    made = trials(config, grid(pool=subsets()), planted)
    assert [point["values"][POOL_KEY] for point in summary(config, made)["front"]] == [
        [],
        ["hubert", "whisper", "wavlm"],
    ]
    nothing = summary(config, [failed(one) for one in made])
    assert (nothing["best"], nothing["front"]) == (None, [])
