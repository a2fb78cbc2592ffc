"""Score the pools of a one-shot search: the weights of each seed's supernet answer with subsets of its encoders."""

from __future__ import annotations

from collections.abc import Callable

from mowe_ray.config import load_evaluation
from mowe_ray.distributed.ray_data.evaluator import answer_datasets, device
from mowe_ray.evaluation.compare import compare, write_results
from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.targets import find_models
from mowe_ray.sweeping.one_shot import SCORES_FOLDER, supernet_trials
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import run_folder

_EVERY_SAMPLE = 10**9


def score_pools(study: Study, log: Callable[[str], None]) -> None:
    """Evaluate the supernets of a study on its validation data, into its folder `pools`.

    Answers are stored as they come: repeated after an interruption, it goes on.

    Raises:
        ValueError: The data or the resources do not allow it.
    """
    supernets = supernet_trials(study.sweep, study.trials.values())
    targets = find_models([run_folder(study.folder, trial).url for trial in supernets])
    out = study.folder.path(SCORES_FOLDER)
    config = load_evaluation(targets[0].config, [f"out={out}", f"ablation_samples={_EVERY_SAMPLE}"])
    log(f"{out}: every pool answers the validation data, with the weights of each of {len(targets)} supernets")
    answered, _ = answer_datasets(targets, config, log, shapley=True)
    named = zip(config.data.validation_names, config.data.validation, strict=True)
    metrics = {name: DatasetMetrics(one.metrics, one.labels, {}, one.language) for name, one in named}
    evaluation = compare(answered, metrics=metrics, baseline=None, seed=config.seed, device=device(config.compute))
    write_results(evaluation, targets, out)
