"""The answer in words on made-up studies whose answer is known."""

from dataclasses import replace

import pytest

from mowe_ray.sweeping.analysis.conclusions import answer
from mowe_ray.sweeping.schema import POOL_KEY
from mowe_ray.sweeping.trials import ModelCost
from tests.made_study import failed, grid, planted, planted_study, stopped, subsets, sweep, trials

TOP_K = {"model.router.top_k": {"grid": [1, 2, 3]}}
DESIGN = grid(model__router__top_k=[1, 2, 3])
POOLS = {POOL_KEY: {"subsets": {"sizes": [0, 1, 2, 3]}}}


def test_clear_winner() -> None:
    config = sweep(TOP_K, seeds=[0, 1, 2])
    made = trials(config, DESIGN, lambda values: 0.5 + 0.1 * values["model.router.top_k"])
    assert answer(config, made) == (
        "router.top_k = 3 is best: score 0.800 ± 0.006 (mean over 3 seeds), 0.100 ± 0.008 above the runner-up, "
        "router.top_k = 2 (0.700 ± 0.006)."
    )


def test_what_has_not_learned_is_not_compared_without_a_word() -> None:
    config = sweep(TOP_K, seeds=[0, 1])
    made = trials(config, DESIGN, lambda values: 0.09 * values["model.router.top_k"])
    assert answer(config, made).startswith(
        "No point does better than always giving the most frequent answer (score 0.300): train longer before points "
        "are compared. router.top_k = 3 "
    )
    made = trials(config, DESIGN, lambda values: 0.02 + 0.1 * values["model.router.top_k"])
    assert "most frequent" not in answer(config, made)


def test_tie_is_said_to_be_one_and_the_cheaper_value_named() -> None:
    config = sweep(TOP_K, seeds=[0, 1, 2])
    made = trials(config, DESIGN, lambda values: 0.5 + 0.001 * values["model.router.top_k"])
    made = [replace(one, cost=ModelCost(9e6, 1e6 * one.values["model.router.top_k"], 1.0)) for one in made]
    assert answer(config, made) == (
        "router.top_k = 3 came out best, with score 0.503 ± 0.006 (mean over 3 seeds), but cannot be told apart from "
        "the runner-up, router.top_k = 2 (0.502 ± 0.006): the difference is 0.001 ± 0.008. "
        "router.top_k = 1 is as good within the error (0.501 ± 0.006) and cheaper: "
        "1 M active parameters instead of 3 M."
    )


def test_one_seed_errs_by_the_validation_set() -> None:
    config = sweep(TOP_K)
    made = trials(config, DESIGN, lambda values: 0.5 + 0.02 * values["model.router.top_k"], samples=100)
    assert "score 0.560 ± 0.029 (one seed), but cannot be told apart" in answer(config, made)
    made = trials(config, DESIGN, lambda values: 0.5 + 0.02 * values["model.router.top_k"], samples=10_000)
    assert "0.020 ± 0.004 above the runner-up" in answer(config, made)


def test_loss_falls_and_one_seed_of_it_tells_no_error() -> None:
    config = sweep(TOP_K, objective={"metric": "loss"})
    made = trials(config, DESIGN, lambda values: 0.1 * values["model.router.top_k"])
    assert answer(config, made) == (
        "router.top_k = 3 came out best, with loss 1.700 (one seed), 0.100 below the runner-up, router.top_k = 2 "
        "(1.800); with one seed nothing says how much of that is chance."
    )
    config = sweep(TOP_K, objective={"metric": "loss"}, seeds=[0, 1, 2])
    made = trials(config, DESIGN, lambda values: 0.1 * values["model.router.top_k"])
    assert "is best: loss 1.700 ± 0.006 (mean over 3 seeds), 0.100 ± 0.008 below the runner-up" in answer(config, made)


@pytest.mark.parametrize("metric", ["score", "loss", "score.er"])
@pytest.mark.parametrize("sizes", [[0, 1, 2, 3], [1, 2], [1, 2, 3]])
def test_planted_encoder_is_named(metric: str, sizes: list[int]) -> None:
    config = sweep({POOL_KEY: {"subsets": {"sizes": sizes}}}, objective={"metric": metric}, seeds=[0, 1])
    text = answer(config, trials(config, grid(pool=subsets(sizes)), planted))
    assert "hubert matters most in a pool: " in text
    if metric != "score.er":
        assert "most of all on er (0.860 with, 0.380 without)" in text


def test_planted_encoder_is_named_in_a_study_with_gaps() -> None:
    text = answer(*planted_study())
    assert "hubert matters most in a pool: 0.653 ± 0.004 with it, 0.495 ± 0.005 without" in text
    assert "On average over all else, router.top_k 2 is best by 0.016 ± 0.007" in text
    assert text.endswith("Of 32 trials: 29 finished, 2 stopped early, 1 failed; 3 of 16 points not ranked for that.")


def test_encoder_that_matters_for_one_task_only_is_named_with_the_task() -> None:
    config = sweep(POOLS)
    bonus = {"whisper": 0.21, "wavlm": 0.0, "hubert": 0.0}

    def score(values: dict) -> dict[str, float]:  # whisper helps asr and harms aqa as much
        extra = sum(bonus[name] for name in values[POOL_KEY])
        return {"asr": 0.5 + extra, "er": 0.5, "aqa": 0.5 - extra}

    text = answer(config, trials(config, grid(pool=subsets()), score))
    helps, harms = "On asr, whisper matters most in a pool: ", "On aqa, whisper is best left out of a pool: "
    assert (helps in text) != (harms in text)  # equally large, so either will do


def test_encoder_with_the_larger_effect_is_named() -> None:
    config = sweep(POOLS, seeds=[0, 1])
    bonus = {"hubert": 0.05, "wavlm": -0.2, "whisper": 0.1}
    made = trials(config, grid(pool=subsets()), lambda values: 0.5 + sum(bonus[name] for name in values[POOL_KEY]))
    assert "wavlm is best left out of a pool: 0.375 ± 0.005 with it, 0.575 ± 0.005 without" in answer(config, made)


def test_encoder_that_does_harm_is_said_to_be_best_left_out() -> None:
    config = sweep(POOLS, seeds=[0, 1, 2])
    designed = grid(pool=subsets())
    made = trials(config, designed, lambda values: 0.7 - 0.2 * ("wavlm" in values[POOL_KEY]))
    told = answer(config, made)
    assert "wavlm is best left out of a pool: 0.500" in told
    assert "matters most" not in told
    loss = sweep(POOLS, seeds=[0, 1, 2], objective={"metric": "loss"})
    assert "wavlm is best left out of a pool: 1.5" in answer(loss, made)


def test_pools_without_any_effect_name_no_encoder() -> None:
    config = sweep(POOLS, seeds=[0, 1])
    text = answer(config, trials(config, grid(pool=subsets()), lambda _: 0.5))
    assert "matters most" not in text
    assert "No encoder's presence makes a difference beyond the error." in text


def test_trend_over_a_range() -> None:
    config = sweep({"training.weight_decay": {"uniform": [0, 1]}}, search={"kind": "random"}, budget={"points": 9})
    designed = grid(training__weight_decay=[0.1 * i for i in range(1, 10)])
    rising = trials(config, designed, lambda values: 0.4 + 0.3 * values["training.weight_decay"])
    assert "The score rises with weight_decay (rank correlation +1.00 over 9 points)." in answer(config, rising)
    bent = trials(config, designed, lambda values: 0.8 - (values["training.weight_decay"] - 0.5) ** 2)
    assert "The score shows no clear trend with weight_decay (rank correlation " in answer(config, bent)


def test_front_is_listed_cheapest_first() -> None:
    config = sweep(TOP_K, objective={"against": "gflops"}, seeds=[0, 1, 2])
    made = trials(config, DESIGN, lambda values: {1: 0.5, 2: 0.4, 3: 0.7}[values["model.router.top_k"]])
    made = [replace(one, cost=ModelCost(1.0, 1.0, 10.0 * one.values["model.router.top_k"])) for one in made]
    text = answer(config, made)
    assert text.startswith("router.top_k = 3 is best")
    assert (
        "Worth their GFLOPs (Pareto front, cheapest first): router.top_k = 1 (0.500, 10); router.top_k = 3 (0.700, 30)."
        in text
    )


def test_single_point() -> None:
    config = sweep(TOP_K)
    made = trials(config, DESIGN[:1], lambda _: 0.5)
    assert answer(config, made) == (
        "router.top_k = 1 has score 0.500 ± 0.014 (one seed); no other point has finished with all of its seeds."
    )


def test_nothing_finished() -> None:
    config = sweep(TOP_K)
    made = trials(config, DESIGN, lambda values: 0.1 * values["model.router.top_k"])
    assert answer(config, []) == "No answer yet: no point has finished with all of its seeds. There are no trials."
    assert answer(config, [failed(one) for one in made]) == (
        "No answer: no point has finished with all of its seeds. "
        "Of 3 trials: 3 failed; 3 of 3 points not ranked for that."
    )
    assert "The best score so far is 0.300, of router.top_k = 3 (trial 2, stopped at 25 %)." in answer(
        config, [stopped(one) for one in made]
    )
