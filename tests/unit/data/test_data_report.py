import json

import pytest

from mowe_ray.data.data_report import DataReport
from mowe_ray.data.sample import BadSample


def bad(number: int, cause: str = "nan", source: str = "a") -> BadSample:
    return BadSample(f"{source}{number}", source, cause, "why")


def test_counts_by_source_and_cause():
    report = DataReport({"a": 10, "b": 5})
    report.add([bad(0), bad(1, "silent"), bad(0, source="b")])
    report.add_unindexed([bad(7, "no_answer", "b")])
    assert report.to_json() == {
        "samples": 16,
        "good": 12,
        "bad": 4,
        "sources": {
            "a": {"samples": 10, "good": 8, "bad": 2, "causes": {"nan": 1, "silent": 1}},
            "b": {"samples": 6, "good": 4, "bad": 2, "causes": {"nan": 1, "no_answer": 1}},
        },
        "bad_samples": [
            {"id": "a0", "source": "a", "cause": "nan", "detail": "why"},
            {"id": "a1", "source": "a", "cause": "silent", "detail": "why"},
            {"id": "b0", "source": "b", "cause": "nan", "detail": "why"},
            {"id": "b7", "source": "b", "cause": "no_answer", "detail": "why"},
        ],
    }
    json.dumps(report.to_json())


def test_the_same_sample_counts_once_over_epochs():
    report = DataReport({"a": 10})
    for _ in range(3):
        report.add([bad(0), bad(1)])
    assert (report.bad_count, report.good_count) == (2, 8)


def test_the_limit_names_key_counts_and_causes():
    report = DataReport({"a": 100})
    report.add(bad(n) for n in range(5))
    report.check(0.05)
    report.add([bad(5, "truncated")])
    with pytest.raises(ValueError, match=r"6 of 100 .*5 nan in a, 1 truncated in a.*max_bad_fraction"):
        report.check(0.05)


def test_all_bad_stops_whatever_the_limit():
    report = DataReport({"a": 2})
    report.add([bad(0), bad(1)])
    with pytest.raises(ValueError, match="2 of 2"):
        report.check(1.0)
    with pytest.raises(ValueError, match="no samples"):
        DataReport({}).check(1.0)


def test_only_the_list_is_bounded():
    report = DataReport({"a": 5000})
    report.add(bad(n) for n in range(1500))
    content = report.to_json()
    assert content["bad"] == 1500
    assert len(content["bad_samples"]) == 1000
