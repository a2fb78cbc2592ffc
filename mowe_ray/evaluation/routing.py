"""Routing statistics: sums over clips that ranks can all-reduce, and the router report as JSON and as a picture."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mowe_ray.evaluation.predictions import Answer, by_task
from mowe_ray.evaluation.results import Ablation
from mowe_ray.model import RoutingRecord
from mowe_ray.model.routing_loss import entropy
from mowe_ray.output.charts import PALETTE
from mowe_ray.output.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 15.0  # inches
_ROW = 0.34
_EVERY_CLIP = "every clip\n(data-independent)"


@dataclass(frozen=True)
class RoutingSums:
    """Decisions over some clips, with M pool members; a router that is off has all zeros.

    Attributes:
        dependent_chosen: (M,) clips for which the data-dependent router chose each member. Where it decides for each
            frame, a clip counts by the share of its frames, here and below.
        dependent_probability: (M,) sum of its probabilities over clips.
        dependent_entropy: sum over clips of the entropy of its distribution, in nats.
        independent_chosen: (M,) clips that got each member from the data-independent router.
        independent_probability: (M,) its probabilities, times the number of clips.
        independent_entropy: entropy of its distribution, times the number of clips.
        clips: number of clips.
    """

    dependent_chosen: torch.Tensor
    dependent_probability: torch.Tensor
    dependent_entropy: torch.Tensor
    independent_chosen: torch.Tensor
    independent_probability: torch.Tensor
    independent_entropy: torch.Tensor
    clips: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, record: RoutingRecord | None, before: RoutingSums | None = None) -> RoutingSums | None:
        """Sum `record`, on top of `before`; None when there are no routers."""
        if record is None or not record.routings:
            return before
        example = record.routings[0].probabilities
        nothing = torch.zeros(example.shape[-1], device=example.device)
        fields: dict[str, torch.Tensor] = {"clips": nothing.new_tensor([record.clips])}
        for name, router in (("independent", record.independent), ("dependent", record.dependent)):
            if router is None:
                chosen, probability, uncertainty = nothing, nothing, nothing.new_zeros(1)
            else:
                # One decision holds for every clip; sums over clips have to be comparable with the other router's.
                times = record.clips if router.chosen.dim() == 1 else 1
                chosen = router.per_clip(router.chosen.float()).reshape(-1, len(nothing)).sum(0) * times
                probability = router.per_clip(router.probabilities).reshape(-1, len(nothing)).sum(0) * times
                uncertainty = router.per_clip(entropy(router.probabilities)).sum().reshape(1) * times
            fields |= {
                f"{name}_chosen": chosen,
                f"{name}_probability": probability,
                f"{name}_entropy": uncertainty,
            }
        sums = cls(**fields)
        return sums if before is None else before + sums

    def __add__(self, other: RoutingSums) -> RoutingSums:
        """Join the sums over two sets of clips."""
        return RoutingSums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def reduced(self, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> RoutingSums:
        """Sum over ranks in one collective."""
        fields = vars(self)
        # One vector: a collective costs a round trip, whatever its size.
        flat = all_reduce(torch.cat(list(fields.values())))
        parts = flat.cpu().split([len(value) for value in fields.values()])
        return RoutingSums(**dict(zip(fields, parts, strict=True)))

    def summary(self, members: list[str]) -> dict[str, Any]:
        """Return shares of clips and mean probabilities by member name, and mean entropies in nats.

        `mutual_information` is that of clip and encoder: the entropy of the data-dependent router's mean probabilities
        less the mean of its entropies. 0 if it chooses alike for all clips, at most the logarithm of M.
        """
        clips = max(1.0, float(self.clips))
        result: dict[str, Any] = {}
        for name in ("dependent", "independent"):
            result[name] = {
                "load": _shares(members, getattr(self, f"{name}_chosen"), clips),
                "probability": _shares(members, getattr(self, f"{name}_probability"), clips),
                "entropy": float(getattr(self, f"{name}_entropy")) / clips,
            }
        of_mean = float(entropy(self.dependent_probability.double() / clips))
        # Rounding may leave less than nothing.
        result["dependent"]["mutual_information"] = max(0.0, of_mean - result["dependent"]["entropy"])
        return result


def routing_of(answers: Sequence[Answer]) -> dict[str, RoutingSums]:
    """Sum the routing of answered samples by task; samples without a clip, or of a model without routers, do not count.

    The entropy of a clip that was answered in chunks is that of its mean probabilities.
    """
    routed_answers = [answer for answer in answers if answer.dependent or answer.independent]
    return {task: _sums_of_answers(routed) for task, routed in by_task(routed_answers).items()}


def _sums_of_answers(answers: Sequence[Answer]) -> RoutingSums:
    choices = {
        name: [choice for answer in answers if (choice := getattr(answer, name))]
        for name in ("dependent", "independent")
    }
    members = next(len(choice.load) for made in choices.values() for choice in made)
    fields = {"clips": torch.tensor([len(answers)], dtype=torch.float64)}
    for name, made in choices.items():
        # `reshape` gives an empty list its second dimension.
        loads = torch.tensor([choice.load for choice in made], dtype=torch.float64).reshape(-1, members)
        probabilities = torch.tensor([choice.probabilities for choice in made], dtype=torch.float64)
        fields |= {
            f"{name}_chosen": loads.sum(0),
            f"{name}_probability": probabilities.reshape(-1, members).sum(0),
            f"{name}_entropy": entropy(probabilities).sum().reshape(1),
        }
    return RoutingSums(**fields)


def _shares(members: list[str], sums: torch.Tensor, clips: float) -> dict[str, float]:
    return {member: float(value) / clips for member, value in zip(members, sums.tolist(), strict=True)}


_MOST_RECORDS = 400  # of the course in a report: a long run has 100,000, more than a page or a picture shows


def router_report(
    members: Sequence[str],
    datasets: Mapping[str, Mapping[str, RoutingSums]],
    history: Sequence[Mapping[str, Any]],
    ablation: Sequence[Ablation] = (),
) -> dict[str, Any]:
    """Return loads, mean probabilities, entropies, overlap and alarms, and the course over training.

    Args:
        members: Names of the M pool members, in pool order.
        datasets: Routing sums by dataset and task.
        history: Records with `step` and `routing` (a `RoutingSums.summary`), oldest first; of many, every n-th.
        ablation: Effect of excluding each member, if that was measured.
    """
    names = list(members)
    tasks_by_dataset = {
        dataset: {task: _task_report(names, sums) for task, sums in sorted(tasks.items())}
        for dataset, tasks in datasets.items()
        if tasks
    }
    every = math.ceil(len(history) / _MOST_RECORDS) or 1
    report = {
        "members": names,
        "entropy_of_uniform_nats": math.log(len(names)),
        "datasets": tasks_by_dataset,
        "training": [{"step": record["step"], **record["routing"]} for record in history[::-1][::every][::-1]],
        "alarms": alarms(names, tasks_by_dataset),
    }
    return report | ({"ablation": [asdict(effect) for effect in ablation]} if ablation else {})


def _task_report(members: list[str], sums: RoutingSums) -> dict[str, Any]:
    summary = sums.summary(members)
    return {"clips": round(float(sums.clips)), **summary, "overlap": _overlap(summary)}


def _overlap(summary: Mapping[str, Any]) -> float | None:
    """Of the members the data-dependent router runs, the share that the data-independent one runs as well.

    For top-1 that is the share of clips on which both run the same member. The data-independent choice is the same for
    all clips, so the mean over clips is a sum over members. None where a router is off.
    """
    dependent, independent = summary["dependent"]["load"], summary["independent"]["load"]
    total = sum(dependent.values())
    if not total or not any(independent.values()):
        return None
    return float(sum(load * independent[member] for member, load in dependent.items()) / total)


def write_router_report(folder: RunFolder, report: Mapping[str, Any]) -> None:
    """Write `router_report` as JSON and as a picture: PNG, and SVG and PDF for papers."""
    folder.write_json("router_report.json", report)
    for kind in ("png", "svg", "pdf"):
        folder.write_bytes(f"router_report.{kind}", draw(report, kind))


def draw(report: Mapping[str, Any], kind: str = "png") -> bytes:
    """Return a router report as a picture: shares of clips by task, choices and entropy over training, alarms above.

    Args:
        kind: `png`, `svg` or `pdf`.
    """
    import matplotlib  # here, with its fonts: half a second of every worker's start
    from cycler import cycler
    from matplotlib.figure import Figure

    # The pages' colours, and text that stays text.
    with matplotlib.rc_context({"axes.prop_cycle": cycler(color=PALETTE), "svg.fonttype": "none", "pdf.fonttype": 42}):
        figure = Figure(layout="constrained")
        _draw_on(figure, report)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=110)
    return buffer.getvalue()


def _draw_on(figure: Figure, report: Mapping[str, Any]) -> None:
    rows = _load_rows(report)
    columns = 3 if report["training"] else 1
    alarms = "\n".join(line for alarm in report["alarms"] for line in textwrap.wrap(f"Warning: {alarm}", 130))
    height = max(4.5, 2.2 + _ROW * len(rows)) + 0.3 * (alarms.count("\n") + bool(alarms))
    # Without records of training there is only the first of the three plots.
    figure.set_size_inches(_WIDTH * columns / 3 + 3, height)
    axes = figure.subplots(1, columns)
    places = [axes] if columns == 1 else list(axes)
    _draw_loads(places[0], rows, report["members"])
    if columns == 3:
        _draw_history(places[1], report)
        _draw_entropies(places[2], report)
    if alarms:
        figure.suptitle(alarms, color="#b3261e", fontweight="bold", fontsize="medium", parse_math=False)


def _load_rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Shares of clips to draw, from the top: the data-independent choice, then each dataset and task."""
    summaries = [
        (dataset, task, summary) for dataset, tasks in report["datasets"].items() for task, summary in tasks.items()
    ]
    several = len(report["datasets"]) > 1
    rows = [
        (f"{dataset}  {task}" if several else task, summary["dependent"]["load"])
        for dataset, task, summary in summaries
    ]
    if summaries and any(summaries[0][2]["independent"]["load"].values()):
        rows.insert(0, (_EVERY_CLIP, summaries[0][2]["independent"]["load"]))
    return rows


def _draw_loads(axis: Axes, rows: list[tuple[str, Mapping[str, float]]], members: list[str]) -> None:
    places = [-i - (0.4 if i and rows[0][0] == _EVERY_CLIP else 0.0) for i in range(len(rows))]
    left = [0.0] * len(rows)
    for member in members:
        shares = [load[member] for _, load in rows]
        axis.barh(places, shares, left=left, label=member, height=0.76)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    axis.set_yticks(places, [label for label, _ in rows], parse_math=False)
    axis.set(title="Chosen for which share of clips (data-dependent)", xlim=(0, None))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    _legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, frameon=False)


def _draw_history(axis: Axes, report: Mapping[str, Any]) -> None:
    steps = [record["step"] for record in report["training"]]
    for i, member in enumerate(report["members"]):
        for router, style in (("dependent", "-"), ("independent", "--")):
            values = [record[router]["probability"][member] for record in report["training"]]
            axis.plot(steps, values, style, color=f"C{i}", label=member if style == "-" else None)
    axis.set(title="Mean probability (solid: dependent, dashed: independent)", xlabel="training step", ylim=(0, 1))
    _legend(axis)


def _draw_entropies(axis: Axes, report: Mapping[str, Any]) -> None:
    steps = [record["step"] for record in report["training"]]
    for router, style in (("dependent", "-"), ("independent", "--")):
        axis.plot(steps, [record[router]["entropy"] for record in report["training"]], style, color="k", label=router)
    axis.axhline(report["entropy_of_uniform_nats"], color="0.7", linestyle=":", label="undecided")
    axis.set(title="Router entropy (nats)", xlabel="training step", ylim=(0, None))
    _legend(axis)


def _legend(axis: Axes, **place: Any) -> None:
    for text in axis.legend(fontsize="small", **place).get_texts():
        text.set_parse_math(False)  # names may hold $


# From this share of the data-dependent router's choices on, it counts as collapsed.
_COLLAPSED = 0.95


def alarms(members: Sequence[str], datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the choices, a sentence each; usually nothing.

    Collapsed: with top-K, the K members chosen most get over 95 % of the data-dependent router's choices, unless these
    are all members. Every task counts alike, so that one with many clips does not hide the others.

    Args:
        datasets: As in the report.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for summaries in datasets.values():
        for task, summary in summaries.items():
            if summary["clips"]:
                tasks.setdefault(task, []).append(summary)
    if not tasks:
        return []
    load = {router: _mean_load(members, tasks, router) for router in ("dependent", "independent")}
    clips = sum(summary["clips"] for summaries in tasks.values() for summary in summaries)
    over = f"over {len(tasks)} task{'s' if len(tasks) > 1 else ''} ({clips} clips)"
    sentences = []
    total = sum(load["dependent"].values())
    # Loads sum to K, the members that a clip gets.
    favourites = sorted(members, key=lambda member: -load["dependent"][member])[: round(total)]
    share = sum(load["dependent"][member] for member in favourites) / total if total else 0.0
    # A share of exactly the limit is none, also after rounding.
    if len(favourites) < len(members) and share > _COLLAPSED + 1e-9:
        sentences.append(
            f"The data-dependent router has collapsed: {100 * share:.3g} % of its choices {over} are "
            f"{' and '.join(favourites)}."
        )
    idle = [member for member in members if not load["dependent"][member] and not load["independent"][member]]
    if idle:
        sentences.append(f"Never chosen by either router {over}: {', '.join(idle)}.")
    return sentences


def _mean_load(
    members: Sequence[str], tasks: Mapping[str, Sequence[Mapping[str, Any]]], router: str
) -> dict[str, float]:
    """Share of clips each member was chosen for: over the clips of a task, then over tasks."""
    mean = dict.fromkeys(members, 0.0)
    for summaries in tasks.values():
        clips = sum(summary["clips"] for summary in summaries)
        for member in members:
            chosen = sum(summary[router]["load"][member] * summary["clips"] for summary in summaries)
            mean[member] += chosen / clips / len(tasks)
    return mean
