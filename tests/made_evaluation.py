"""Made-up evaluations: what models would have scored and routed, without running any."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mowe_ray.evaluation.metrics.classification import confusion
from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.predictions import Answer, RouterChoice
from mowe_ray.evaluation.results import (
    Ablation,
    Confusion,
    Difference,
    EvaluatedModel,
    Evaluation,
    Interval,
    Shapley,
    TaskScores,
)
from mowe_ray.evaluation.routing import router_report, routing_of
from mowe_ray.evaluation.samples import encoded_clip, shown_samples
from mowe_ray.evaluation.shapley import utilization

MEMBERS = ("whisper", "hubert", "hubert-er")
TASKS = ("ac", "aqa", "asr", "er", "sqa")
# Title, which way is good, what the baseline scores, what the most frequent answer would; the first is the main one.
METRICS = {
    "asr": {"wer": ("WER (%)", "lower", 34.2, 97.1), "cer": ("CER (%)", "lower", 18.9, 81.0)},
    "er": {"accuracy": ("accuracy (%)", "higher", 58.3, 26.7), "macro_f1": ("macro F1 (%)", "higher", 55.1, 7.0)},
    "ac": {"cider": ("CIDEr-D (x 100)", "higher", 41.5, 3.2), "rouge_l": ("ROUGE-L (%)", "higher", 38.8, 21.4)},
    "aqa": {"exact_match": ("exact match (%)", "higher", 44.0, 31.5)},
    "sqa": {"token_f1": ("token F1 (%)", "higher", 52.7, 12.9)},
}
# Where a healthy router sends the clips of each task.
SHARES = {
    "asr": {"whisper": 0.9, "hubert": 0.1},
    "er": {"hubert-er": 0.95, "hubert": 0.05},
    "ac": {"hubert": 0.6, "whisper": 0.4},
    "aqa": {"hubert": 0.7, "whisper": 0.2, "hubert-er": 0.1},
    "sqa": {"whisper": 0.75, "hubert": 0.25},
}
GAINS = {"asr": 3.1, "er": 9.4, "ac": 2.2, "aqa": -3.5, "sqa": 0.4}
CLIPS = 40
Datasets = Mapping[str, Sequence[str]]
Shares = Mapping[str, float]


def choice(member: str, members: Sequence[str], sure: float) -> RouterChoice:
    """A top-1 router that gives `member` the probability `sure`."""
    rest = (1 - sure) / max(1, len(members) - 1)
    return RouterChoice(
        [float(name == member) for name in members], [sure if name == member else rest for name in members]
    )


def answers(
    task: str, shares: Shares, *, clips: int = CLIPS, always: str | None = "hubert", members: Sequence[str] = MEMBERS
) -> list[Answer]:
    """Answers whose data-dependent router sends these shares of the clips to members, the other one all to `always`."""
    draw = random.Random(task)
    sent = [member for member, share in shares.items() for _ in range(round(share * clips))]
    independent = None if always is None else choice(always, members, 0.92)
    return [
        Answer(
            f"{task}-{i}", task, "What?", "a", ["a"], 5.0, independent, choice(member, members, draw.uniform(0.6, 1.0))
        )
        for i, member in enumerate(sent)
    ]


def history(members: Sequence[str] = MEMBERS, steps: int = 60) -> list[dict[str, Any]]:
    """Routers that begin undecided and settle."""
    draw, even, records = random.Random(0), 1 / len(members), []
    for i in range(steps):
        done = i / max(1, steps - 1)
        dependent = {m: even + draw.uniform(-0.1, 0.1) * done for m in members}
        independent = {
            m: even * (1 - done) + done * (0.92 if m == members[1 % len(members)] else 0.04) for m in members
        }
        summaries = {"dependent": (dependent, 1.09 - 0.8 * done), "independent": (independent, 1.09 - 0.75 * done**2)}
        routing = {name: {"load": p, "probability": p, "entropy": nats} for name, (p, nats) in summaries.items()}
        records.append({"kind": "train", "step": 20 * (i + 1), "routing": routing})
    return records


def routed(
    datasets: Datasets, shares: Mapping[str, Shares] = SHARES, *, members: Sequence[str] = MEMBERS, **keys: Any
) -> dict[str, Any]:
    """The router report of a model that sends each task's clips as `shares` says."""
    sums = {
        name: routing_of([one for task in tasks for one in answers(task, shares[task], members=members, **keys)])
        for name, tasks in datasets.items()
    }
    return router_report(members, sums, history(members))


def around(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half)


def scores(datasets: Datasets, gains: Mapping[str, float], half: float = 2.4) -> list[TaskScores]:
    """Scores that are `gains` points better than the baseline's, by task."""
    return [
        TaskScores(
            dataset,
            task,
            samples=300,
            scores={
                name: around(value + (gains.get(task, 0.0) if better == "higher" else -gains.get(task, 0.0)), half)
                for name, (_, better, value, _) in METRICS[task].items()
            },
            titles={name: title for name, (title, _, _, _) in METRICS[task].items()},
            better={name: better for name, (_, better, _, _) in METRICS[task].items()},
            majority={name: majority for name, (_, _, _, majority) in METRICS[task].items()},
        )
        for dataset, tasks in datasets.items()
        for task in tasks
    ]


def ablations(datasets: Datasets, members: Sequence[str] = MEMBERS) -> list[Ablation]:
    """Each member is worth a lot for one task, nothing or little harm for the others."""
    made = []
    for dataset, tasks in datasets.items():
        for i, task in enumerate(tasks):
            metric, (_, better, value, _) = next(iter(METRICS[task].items()))
            for j, member in enumerate(members):
                lost = 8.0 if SHARES[task].get(member, 0.0) > 0.65 else -1.9 if (i + j) % 4 == 0 else 0.3 * j
                change = lost if better == "lower" else -lost
                rate = utilization(value + change, change, better)
                made.append(Ablation(member, dataset, task, metric, value + change, around(change, 1.3), 300, rate))
    return made


def shapley(made: Sequence[Ablation]) -> list[Shapley]:
    """Half of what is lost without a member: the others can do some of it."""
    return [
        Shapley(one.member, one.dataset, one.task, one.metric, around(-one.change.value / 2, 1.0), 300, 8, True)
        for one in made
    ]


def model(name: str, datasets: Datasets, gains: Mapping[str, float], **changes: Any) -> EvaluatedModel:
    """A model without a pool, unless `changes` say otherwise."""
    plain = EvaluatedModel(name, f"runs/{name}/export", [], 1.01e6, 1.01e6, 0.412, 0.051, scores(datasets, gains))
    return replace(plain, **changes)


def pooled(name: str, datasets: Datasets, gains: Mapping[str, float] = GAINS, **changes: Any) -> EvaluatedModel:
    """A model with a pool, routers and an ablation."""
    pool = {
        "members": list(MEMBERS),
        "stored": 1.64e6,
        "active": 1.25e6,
        "gflops": 0.538,
        "real_time_factor": 0.064,
        "ablation": ablations(datasets),
        "shapley": shapley(ablations(datasets)),
        "router_report": routed(datasets),
    }
    return model(name, datasets, gains, **{**pool, **changes})


def differences(models: Sequence[EvaluatedModel], baseline: str, half: float = 1.6) -> list[Difference]:
    """Differences to the baseline, on every metric both have."""
    base = next(one for one in models if one.name == baseline)
    by_set = {(task.dataset, task.task): task for task in base.scores}
    return [
        Difference(one.name, task.dataset, task.task, metric, around(value.value - before.value, half), task.samples)
        for one in models
        if one.name != baseline
        for task in one.scores
        if (task.dataset, task.task) in by_set
        for metric, value in task.scores.items()
        if (before := by_set[task.dataset, task.task].scores.get(metric)) is not None
    ]


def evaluation(models: Sequence[EvaluatedModel], baseline: str | None = None) -> Evaluation:
    name = baseline or models[0].name
    return Evaluation(list(models), name, differences(models, name), "2 CPU workers")


BUILTIN: Datasets = {"builtin": TASKS}
MANY: Datasets = {
    **{f"librispeech_test_{part}": ("asr",) for part in ("clean", "other")},
    **dict.fromkeys(("common_voice_15_en_test", "gigaspeech_test", "tedlium3_test"), ("asr",)),
    "audiocaps_test": ("ac", "aqa"),
    "clotho_aqa_test": ("aqa",),
    "iemocap_emotion_test": ("er",),
    "meld_emotion_test": ("er",),
    "slue_p2_sqa5_test": ("sqa",),
}


def one_model() -> Evaluation:
    return evaluation([pooled("pool", BUILTIN)])


def two_models() -> Evaluation:
    return evaluation([model("no-pool", BUILTIN, {}), pooled("pool", BUILTIN)])


def three_models() -> Evaluation:
    """The baseline, a diverse and a uniform pool, whose routers have no training history."""
    uniform = pooled("uniform", BUILTIN, {"asr": 1.9, "er": 2.2, "ac": -0.4}, active=1.18e6, gflops=0.49, ablation=[])
    assert uniform.router_report
    uniform = replace(uniform, router_report={**uniform.router_report, "training": []})
    return evaluation([model("no-pool", BUILTIN, {}), pooled("pool", BUILTIN), uniform])


def spoken(number: int, sure: str | None, said: str, task: str, reference: str) -> Answer:
    groups = {"difficulty": ("easy", "hard")[number % 2]} if task == "er" else {}
    made = Answer(f"{task}-{number}", task, "What is it?", said, [reference], 1.5, groups=groups)
    if sure is None:
        return made
    return replace(made, independent=choice("hubert", MEMBERS, 0.9), dependent=choice(sure, MEMBERS, 0.7 + number / 40))


def with_samples() -> Evaluation:
    """Two models that transcribe and name emotions, some of them wrong; the first clips are there to hear."""
    emotions, words = ("happy", "sad", "angry"), ("the dog barks", "rain on a roof", "hello there", "a < b & c")
    said = {
        "no-pool": [spoken(i, None, "happy", "er", emotions[i % 3]) for i in range(9)]
        + [spoken(i, None, words[i % 3], "asr", words[i % 4]) for i in range(8)],
        "pool": [spoken(i, MEMBERS[i % 3], emotions[i % 3 if i else 1], "er", emotions[i % 3]) for i in range(9)]
        + [spoken(i, "whisper", words[i % 4], "asr", words[i % 4]) for i in range(8)],
    }
    datasets: Datasets = {"builtin": ("asr", "er")}
    metrics = {"builtin": DatasetMetrics()}
    samples = shown_samples(
        {name: {"builtin": made} for name, made in said.items()}, {"no-pool": [], "pool": MEMBERS}, metrics, None
    )
    tone = np.sin(np.arange(24_000) / 20).astype(np.float32) * np.linspace(0, 1, 24_000, dtype=np.float32)
    samples = [replace(s, clip=encoded_clip([tone], 30.0)) if i < 5 else s for i, s in enumerate(samples)]
    labels = sorted(emotions)
    models = [
        replace(made, confusions=[Confusion("builtin", "er", labels, confusion(said[made.name][:9], labels))])
        for made in (model("no-pool", datasets, {}), pooled("pool", datasets))
    ]
    return replace(evaluation(models), samples=samples)


def no_pool() -> Evaluation:
    return evaluation([model("one", BUILTIN, {}, gflops=None, real_time_factor=None), model("two", BUILTIN, GAINS)])


def collapsed() -> Evaluation:
    """Everything goes to whisper, and hubert-er is never used."""
    report = routed(BUILTIN, {task: {"whisper": 1.0} for task in TASKS})
    return evaluation([pooled("pool", BUILTIN, router_report=report)])


def unavailable() -> Evaluation:
    """No judge, no METEOR, one task without any score, and samples that could not be used."""
    why = {"meteor": "needs WordNet; install it with nltk.download('wordnet')", "judge": "judge.base_url is not set"}
    plain = scores(BUILTIN, {})
    missing = [
        replace(plain[0], unavailable={"meteor": why["meteor"]}),
        replace(plain[1], unavailable={"judge": why["judge"]}),
        *plain[2:4],
        replace(plain[4], scores={}, titles={}, better={}, majority={}, unavailable={"judge": why["judge"]}),
    ]
    bad = {"builtin": {"silent": 2, "missing file": 1}}
    first = model("no-pool", BUILTIN, {}, scores=missing, bad=bad)
    return evaluation([first, replace(first, name="pool"), model("third", BUILTIN, {"asr": 2.0})])


def many_datasets() -> Evaluation:
    return evaluation([model("no-pool", MANY, {}), pooled("pool", MANY), pooled("pool-top2", MANY, {"er": 4.0})])


def not_finite() -> Evaluation:
    """Scores and differences that are no numbers."""
    nan = Interval(float("nan"), float("nan"), float("nan"))
    broken = [replace(task, scores=dict.fromkeys(task.scores, nan), majority={}) for task in scores(BUILTIN, {})]
    changes = [replace(one, change=nan) for one in ablations(BUILTIN)]
    return evaluation([model("no-pool", BUILTIN, {}, scores=broken), pooled("pool", BUILTIN, ablation=changes)])


def routers_off() -> Evaluation:
    """One model with each router alone, and one with a pool of one."""
    dependent = routed(BUILTIN, always=None)
    alone = routed(BUILTIN, {task: {"hubert": 1.0} for task in TASKS}, members=["hubert"])
    both = json.loads(json.dumps(routed(BUILTIN)))
    for summary in both["datasets"]["builtin"].values():
        summary["dependent"]["load"] = dict.fromkeys(MEMBERS, 0.0)
    models = {"dependent": dependent, "independent": both, "alone": alone}
    return evaluation(
        [
            pooled(name, BUILTIN, members=made["members"], ablation=[], router_report=made)
            for name, made in models.items()
        ]
    )


def empty() -> Evaluation:
    """Nothing was scored."""
    return evaluation([model("no-pool", {}, {}), pooled("pool", {}, router_report=None, ablation=[])])


EVALUATIONS = {
    "one model": one_model(),
    "two models": two_models(),
    "three models": three_models(),
    "with samples": with_samples(),
    "no pool": no_pool(),
    "collapsed": collapsed(),
    "unavailable": unavailable(),
    "many datasets": many_datasets(),
    "not finite": not_finite(),
    "routers off": routers_off(),
    "empty": empty(),
}
