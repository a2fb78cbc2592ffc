"""Score the pools of a one-shot search: the weights of each seed's supernet answer with subsets of its encoders.

LogME of the encoders before any training is written beside that, as what the search has to beat.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa

from mowe_ray.config import RunConfig, load_evaluation
from mowe_ray.data.feature_cache import FeatureCache
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import Features
from mowe_ray.data.profile import sample_rows
from mowe_ray.distributed.ray_data.evaluator import answer_datasets, device
from mowe_ray.distributed.ray_data.feature_extraction import fill_cache
from mowe_ray.distributed.ray_data.parallel_map import parallel_map
from mowe_ray.evaluation.compare import compare, write_results
from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.targets import find_models
from mowe_ray.sweeping.analysis.logme import Array, MeanFeatures, pool_logme
from mowe_ray.sweeping.one_shot import LOGME_FILE, SCORES_FOLDER, supernet_trials
from mowe_ray.sweeping.schema import POOL_KEY
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import run_folder

_EVERY_SAMPLE = 10**9
_MOST_CLIPS, _ROWS = 2000, 32  # for LogME: of a source, and of a Ray task

# Of each sample with audio: its task, the right answer, and by number of the encoder (D,).
_Rows = list[tuple[str, str, dict[int, Array]]]


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
    answered, indexes = answer_datasets(targets, config, log, shapley=True)
    named = zip(config.data.validation_names, config.data.validation, strict=True)
    metrics = {name: DatasetMetrics(one.metrics, one.labels, {}, one.language) for name, one in named}
    evaluation = compare(answered, metrics=metrics, baseline=None, seed=config.seed, device=device(config.compute))
    try:  # first: pools count as scored with the last file
        write_logme(study, study.config(supernets[0]), indexes, log)
    except ValueError as error:  # a baseline must not cost the search
        log(f"warning: LogME, a baseline of the ranking, is left out: {error}")
    write_results(evaluation, targets, out)


def write_logme(study: Study, supernet: RunConfig, indexes: Mapping[str, Index], log: Callable[[str], None]) -> None:
    """Write LogME of all pools on the validation data, with all encoders as they are before training."""
    weak = [member.model_copy(update={"train": "frozen"}) for member in supernet.model.weak_encoders]
    frozen = {"weak_encoders": weak, "train_base": "frozen", "spec_augment": None}
    place = supernet.data.feature_cache or study.folder.path("features")
    config = supernet.model_copy(
        update={
            "model": supernet.model.model_copy(update=frozen),
            "data": supernet.data.model_copy(update={"feature_cache": place}),
        }
    )
    cache = fill_cache(config, indexes.values(), log)
    parts = [part for index in indexes.values() for part in _parts(index)]
    by_task: dict[str, _Rows] = defaultdict(list)
    for row in (row for rows in parallel_map(partial(_mean_features, cache), parts) for row in rows):
        by_task[row[0]].append(row)
    names = [member.name for member in weak]
    pools = [[], *(point[POOL_KEY] for point in study.space.points())]
    found = pool_logme([_task(rows, names) for _, rows in sorted(by_task.items())], pools)
    if found is None:
        log("LogME, a baseline of the ranking, is left out: it takes a task whose answers are of few kinds")
        return
    rows = [{"members": pool, "logme": value} for pool, value in zip(pools, found, strict=True)]
    study.folder.write_json(LOGME_FILE, {"pools": rows})


def _parts(index: Index) -> list[pa.Table]:
    rows = index.table.take(sample_rows(len(index), _MOST_CLIPS))
    return [rows.slice(start, _ROWS) for start in range(0, len(rows), _ROWS)]


def _mean_features(cache: FeatureCache, part: pa.Table, *, in_child: bool = False) -> _Rows:
    """Returns the rows with audio; nothing is decoded here, so that `in_child` makes no difference."""
    batch = cache.load(part)
    means = {features.encoder_index: _means(features) for features in batch.features}
    found, first = [], 0
    for task, answer, clips in zip(batch.tasks, batch.answers, batch.clips(), strict=True):
        last = first + len(clips)
        if clips:
            own = {number: np.mean(values[first:last], 0) for number, values in means.items()}
            found.append((task, answer, own))
        first = last
    return found


def _means(features: Features) -> list[Array]:
    """Returns (D,) of each clip: the mean over frames and layers, where a weighted sum of layers starts."""
    values = (features.values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)  # bfloat16
    ends = np.cumsum([0, *(features.layers * frames * features.width for frames in features.frames)])
    return [values[a:b].reshape(-1, features.width).mean(0) for a, b in pairwise(ends)]


def _task(rows: _Rows, names: list[str]) -> MeanFeatures:
    base, *weak = (np.stack([own[number] for _, _, own in rows]) for number in range(len(names) + 1))
    return MeanFeatures([answer for _, answer, _ in rows], base, dict(zip(names, weak, strict=True)))
