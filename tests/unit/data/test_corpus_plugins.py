"""Corpora and metrics of one's own, by a file that the command names."""

import json
from pathlib import Path

import pytest

from mowe_ray.config.plugins import import_plugins
from mowe_ray.data.corpora.registry import KINDS, detect_kind
from mowe_ray.evaluation.metrics.registry import check_names, metrics_of
from mowe_ray.prepare import main
from tests.end_to_end import encoded, tone

CORPUS = """
from mowe_ray.data.corpora.registry import register_corpus
from mowe_ray.data.corpora.manifest_and_folders import read_manifest


@register_corpus("my-lines", "lines.mine: JSON lines", lambda path: (path / "lines.mine").is_file(), splits=None)
def read_mine(path, defaults, *_):
    (path / "lines.jsonl").write_text((path / "lines.mine").read_text())
    return read_manifest(path / "lines.jsonl", defaults)
"""
METRIC = """
from dataclasses import replace
from mowe_ray.evaluation.metrics.registry import register_metric
from mowe_ray.evaluation.metrics.text_overlap import EXACT_MATCH


@register_metric("{name}")
def mine(answers, labels, language):
    return replace(EXACT_MATCH, name="mine")
"""


@pytest.mark.slow
def test_prepare_reads_a_layout_that_a_plugin_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin, source = tmp_path / "reads_mine.py", tmp_path / "corpus"
    plugin.write_text(CORPUS)
    source.mkdir()
    (source / "a.flac").write_bytes(encoded(tone(220, 0.5)))
    (source / "lines.mine").write_text(json.dumps({"audio": "a.flac", "text": "a tone", "task": "asr"}) + "\n")
    try:
        assert main([str(source), "--out", str(tmp_path / "out"), "--plugin", str(plugin)]) == 0
        assert detect_kind(source) == "my-lines"
    finally:
        KINDS.pop("my-lines", None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 1
    assert main([str(source), "--out", str(tmp_path / "out"), "--plugin", "nowhere.py"]) == 2


def test_a_metric_of_a_plugin_is_chosen_by_its_name(tmp_path: Path) -> None:
    plugin = tmp_path / "adds_a_metric.py"
    plugin.write_text(METRIC.format(name="mine_of_a_test"))
    import_plugins([str(plugin)])
    check_names(["mine_of_a_test"])
    metrics, unavailable = metrics_of("asr", [], [], ["mine_of_a_test"])
    assert ([metric.name for metric in metrics], unavailable) == (["mine"], {})
    taken = tmp_path / "takes_a_name.py"
    taken.write_text(METRIC.format(name="wer"))
    with pytest.raises(ValueError, match=r"takes_a_name\.py:7: ValueError: 'wer' is a metric already"):
        import_plugins([str(taken)])
