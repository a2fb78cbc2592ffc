"""How much of the data was unusable, per source and cause."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from mowe_ray.data.sample import BadSample

_LISTED = 1000  # bad samples named in the report, beside those that ended a process; all of them are counted


_LIMITS = {
    "too_long": "data.max_duration_s",
    "too_short": "data.min_duration_s",
    "too_many_tokens": "data.max_text_tokens",
}


class DataReport:
    """Counts each bad sample once, over all epochs.

    Args:
        usable: samples by source that the index calls usable; decoding may still find some bad.
        text_only: how many of them have no audio.
    """

    def __init__(self, usable: Mapping[str, int], text_only: Mapping[str, int] | None = None) -> None:
        self._total: Counter[str] = Counter(usable)
        self._text_only: Counter[str] = Counter(text_only or {})
        self._causes: dict[str, Counter[str]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._listed: list[BadSample] = []
        self._out_of_memory: dict[str, list[str]] = {}
        self._profiles: dict[str, Mapping[str, Any]] = {}
        self.warnings: list[str] = []

    def set_profile(self, source: str, facts: Mapping[str, Any]) -> None:
        """Keep what is known of the samples of a source, as JSON values."""
        self._profiles[source] = facts

    @property
    def profiles(self) -> dict[str, Mapping[str, Any]]:
        """What is known of the samples of each source."""
        return self._profiles

    def add_unindexed(self, bad: Iterable[BadSample]) -> None:
        """Count samples that the index already left out (`Index.bad`)."""
        for sample in bad:
            if self._add(sample):
                self._total[sample.source] += 1

    def add(self, bad: Iterable[BadSample]) -> None:
        """Count samples that failed while being read or decoded; repeats are ignored."""
        for sample in bad:
            self._add(sample)

    def set_out_of_memory(self, *, split: Sequence[str], left_out: Sequence[str]) -> None:
        """Name the samples that training met in smaller micro-batches, or not at all, for want of memory."""
        self._out_of_memory = {"split": list(split), "left_out": list(left_out)}

    def _add(self, sample: BadSample) -> bool:
        key = (sample.source, sample.id)
        if key in self._seen:
            return False
        self._seen.add(key)
        self._causes.setdefault(sample.source, Counter())[sample.cause] += 1
        if len(self._listed) < _LISTED or sample.file:
            self._listed.append(sample)
        return True

    @property
    def text_only(self) -> dict[str, int]:
        """Usable samples without audio, of the sources that have some."""
        return {source: count for source, count in self._text_only.items() if count}

    @property
    def killers(self) -> list[BadSample]:
        """Samples that ended the process that decoded them."""
        return [sample for sample in self._listed if sample.file]

    @property
    def bad_count(self) -> int:
        return len(self._seen)

    @property
    def good_count(self) -> int:
        return self._total.total() - self.bad_count

    def to_json(self) -> dict[str, Any]:
        """Return the content of `data_report.json`."""
        sources = {}
        for source in sorted(self._total | dict.fromkeys(self._causes, 1)):
            causes = self._causes.get(source, Counter())
            sources[source] = {
                "samples": self._total[source],
                "good": self._total[source] - causes.total(),
                "bad": causes.total(),
                "causes": dict(causes.most_common()),
            } | ({"text_only": self._text_only[source]} if self._text_only[source] else {})
            sources[source] |= {"profile": dict(self._profiles[source])} if source in self._profiles else {}
        report: dict[str, Any] = {
            "samples": self._total.total(),
            "good": self.good_count,
            "bad": self.bad_count,
            "sources": sources,
            "bad_samples": [
                {name: value for name, value in asdict(sample).items() if value or name != "file"}
                for sample in self._listed
            ],
        }
        if self.warnings:
            report["warnings"] = self.warnings
        if self._text_only.total():
            report["text_only"] = self._text_only.total()
        return report | ({"out_of_memory": self._out_of_memory} if self._out_of_memory else {})

    def check(self, max_bad_fraction: float) -> None:
        """Raise ValueError when more than `max_bad_fraction` of all samples are bad, or all."""
        total = self._total.total()
        if total and self.bad_count <= max_bad_fraction * total and self.good_count:
            return
        limits = [key for cause, key in _LIMITS.items() if any(cause in causes for causes in self._causes.values())]
        also = "".join(f"; {key} sets a limit" for key in limits)
        raise ValueError(f"{self._summary()} (data.max_bad_fraction is {max_bad_fraction:g}{also})")

    def _summary(self) -> str:
        total = self._total.total()
        if not total:
            return "data.train has no samples"
        worst = Counter(
            {(source, cause): count for source, causes in self._causes.items() for cause, count in causes.items()}
        )
        causes = ", ".join(f"{count} {cause} in {source}" for (source, cause), count in worst.most_common(5))
        (source, cause), _ = worst.most_common(1)[0]
        example = next((bad for bad in self._listed if (bad.source, bad.cause) == (source, cause)), None)
        such_as = f", such as {example.id}: {example.detail}" if example and example.detail else ""
        return f"{self.bad_count} of {total} samples ({self.bad_count / total:.0%}) are unusable: {causes}{such_as}"


def killers_in(report: Mapping[str, Any]) -> list[BadSample]:
    """Return the `killers` of an earlier report, from the content of its `data_report.json`."""
    names = [field.name for field in fields(BadSample)]
    return [
        BadSample(**{name: sample.get(name, "") for name in names})
        for sample in report["bad_samples"]
        if sample.get("file")
    ]
