"""Rows chose what was opened: any URL or path in a table was fetched, and the report quoted the first bytes of it.

Reports: modelscope/ms-swift#9740, vllm-project/vllm#57157 (of servers, which fetch what a request names).
"""

import http.server
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.config import ConfigError, load_config
from mowe_ray.data.cached_shards import open_cached, write_audio
from mowe_ray.data.feature_cache import shard_rows
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import BadAudio, BadSample
from mowe_ray.data.shards.storage import file_of_row
from mowe_ray.prepare import main
from tests.read_source import CLIP, write_lines

SECRET = b"SECRET-KEY=abcdefgh\n"


@dataclass
class Server:
    """A web server in an internal network, with what was asked of it."""

    url: str = ""
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    seen = Server()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *parts: object) -> None:
            seen.asked.append(self.path)

    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "clip.wav").write_bytes(CLIP)
    (tmp_path / "www" / "secret").write_bytes(SECRET)
    handler = partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        seen.url = f"http://127.0.0.1:{running.server_port}"
        yield seen
        running.shutdown()


def table(path: Path, *names: str, timed: bool = False) -> Path:
    """Write rows of a question about an audio file each."""
    path.parent.mkdir(exist_ok=True)
    rows = [{"text": "hello", **({"duration": 1.0} if timed else {})} for _ in names]
    if path.suffix == ".parquet":
        cells = [{"audio": {"bytes": None, "path": name}} | row for name, row in zip(names, rows, strict=True)]
        pq.write_table(pa.Table.from_pylist(cells), path)
        return path
    return write_lines(path, [{"audio": name} | row for name, row in zip(names, rows, strict=True)])


def read(path: Path | str, cache: Path, *allow_paths: str) -> tuple[int, list[BadSample]]:
    """Scan and decode a source; returns how many samples are good, and the others."""
    index = build_index([SourceSpec("s", str(path), "asr")], cache, min_s=0.1, max_s=30.0, allow_paths=allow_paths)
    there = pickle.loads(pickle.dumps(index))  # as it travels to the machines that read
    batch = load_micro_batch(there.table.take(np.arange(len(there))), 0.1, 30.0)
    return len(batch.ids), [*index.bad, *batch.bad]


@pytest.mark.slow
@pytest.mark.parametrize("timed", [False, True], ids=["", "timed"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_urls_are_fetched_only_where_that_is_allowed(tmp_path, server, suffix, timed):
    path = table(tmp_path / "d" / f"t.{suffix}", f"{server.url}/clip.wav", timed=timed)
    good, [bad] = read(path, tmp_path / "cache")
    assert (good, bad.cause, server.asked) == (0, "not_allowed", [])
    assert bad.detail.startswith(f"data.allow_paths does not cover '{server.url}")
    for place in ("127.0.0.1", server.url, f"{server.url}/clip.wav"):
        assert read(path, tmp_path / "cache", place) == (1, [])


@pytest.mark.slow
@pytest.mark.parametrize("timed", [False, True], ids=["", "timed"])
def test_a_table_opens_files_below_its_folder_and_a_manifest_those_of_this_machine(tmp_path, timed):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for file in ("d/inside.wav", "d/sub/deep.wav", "outside.wav"):
        (tmp_path / file).write_bytes(CLIP)
    names = ["inside.wav", "sub/deep.wav", f"{tmp_path}/d/inside.wav", "../outside.wav", f"{tmp_path}/outside.wav"]
    names.append("sub/../../outside.wav")
    good, bad = read(table(tmp_path / "d" / "t.parquet", *names, timed=timed), tmp_path / "cache")
    assert (good, [sample.cause for sample in bad]) == (3, ["not_allowed"] * 3)
    assert read(tmp_path / "d" / "t.parquet", tmp_path / "cache", str(tmp_path)) == (6, [])
    assert read(table(tmp_path / "d" / "m.jsonl", *names, timed=timed), tmp_path / "cache") == (6, [])


def test_a_manifest_from_elsewhere_opens_no_file_of_this_machine(tmp_path):
    elsewhere = fsspec.filesystem("memory")  # stands for a bucket
    elsewhere.pipe("/corpus/d/clip.wav", CLIP)
    elsewhere.pipe("/corpus/clip.wav", CLIP)
    (tmp_path / "here.wav").write_bytes(CLIP)
    here = f"{tmp_path}/here.wav"
    table(
        tmp_path / "m.jsonl", "clip.wav", "../clip.wav", "memory://corpus/clip.wav", here, f"file://{here}", "~/a.wav"
    )
    elsewhere.pipe("/corpus/d/m.jsonl", (tmp_path / "m.jsonl").read_bytes())
    good, bad = read("memory://corpus/d/m.jsonl", tmp_path / "cache")
    assert (good, [sample.cause for sample in bad]) == (1, ["not_allowed"] * 5)
    assert read("memory://corpus/d/m.jsonl", tmp_path / "cache", str(tmp_path), "memory://corpus/")[0] == 4


@pytest.mark.parametrize(
    "name",
    [
        *("http://example.org@evil.net/x", "http://evil.net\\@example.org/x", "https://example.org.evil.net/x"),
        *("simplecache::http://example.org/x", "https://example.org/a/../b", "https://host/ok/%2e%2E/x"),
        *("https://host/okay/x", "https://host/ok/..", "s3://example.org/x", "//host/ok/x::https://evil.net"),
    ],
)
def test_names_that_seem_to_be_allowed(name):
    with pytest.raises(BadAudio, match="not_allowed"):
        file_of_row("https://data.net/m.jsonl", name, ["example.org", "https://host/ok"])
    assert file_of_row("/d/m.jsonl", "https://host/ok/x", ["https://host/ok"]) == "https://host/ok/x"


@pytest.mark.slow
def test_no_message_quotes_what_a_row_names(tmp_path, capsys):
    (tmp_path / "secret").write_bytes(SECRET)
    manifest = table(tmp_path / "d" / "m.jsonl", f"{tmp_path}/secret", f"{tmp_path}/d/m.jsonl")
    _, bad = read(manifest, tmp_path / "cache")
    assert [sample.cause for sample in bad] == ["wrong_type"] * 2
    assert main([str(manifest), "--out", str(tmp_path / "out"), "--task", "asr"]) == 1
    said = [
        *(sample.detail for sample in bad),
        (tmp_path / "out" / "data_report.json").read_text(),
        *capsys.readouterr(),
    ]
    assert all("SECRET" not in text and "not an audio file, but text" in text for text in said[:3])
    assert all("SECRET" not in text for text in said)


@pytest.mark.slow
def test_prepare_and_cached_audio_keep_to_it(tmp_path, server):
    (tmp_path / "outside.wav").write_bytes(CLIP)
    path = table(tmp_path / "d" / "t.parquet", f"{tmp_path}/outside.wav", f"{server.url}/clip.wav", timed=True)
    out, allow = ["--out", str(tmp_path / "out"), "--task", "asr"], ["--allow-path", str(tmp_path)]
    assert main([str(path), *out]) == 1
    assert not server.asked
    assert main([str(path), *out, *allow, "--allow-path", "127.0.0.1", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["good"] == 2
    spec = [SourceSpec("s", str(path), "asr")]
    index = build_index(spec, tmp_path / "cache", min_s=0.1, max_s=30.0, allow_paths=[str(tmp_path), server.url])
    [(_, rows)] = shard_rows(index, 0.1, 30.0).values()
    write_audio(str(tmp_path / "a.arrow"), rows, 0.1, 30.0)
    assert all(open_cached(str(tmp_path / "a.arrow")).lengths == 16_000)


def test_the_key_takes_folders_urls_and_hosts():
    places = ["/data", "s3://bucket/clips", "audio.example.org", "~/clips"]
    config = load_config("quickstart", [f"data.allow_paths={json.dumps(places)}"])
    assert config.data.allow_paths == [*places[:3], str(Path("~/clips").expanduser())]
    for wrong in ("clips/here", "", "exa mple.org", "*.example.org"):
        with pytest.raises(ConfigError, match=r"data\.allow_paths\.0: must be a folder"):
            load_config("quickstart", [f"data.allow_paths=[{json.dumps(wrong)}]"])
