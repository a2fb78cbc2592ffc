"""URLs that need a package, or a server that is down, ended in a traceback that named neither key nor fix.

gs:// without gcsfs: https://github.com/ray-project/ray/issues/24184. And once a run is going, a server that fails must
not turn its samples into bad ones.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import Sample, StorageError
from mowe_ray.data.shards import scan_shard
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.storage import storage_timeout
from mowe_ray.data.shards.write import write_parquet, write_webdataset
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.prepare import main
from mowe_ray.training.datasets import scan_sources, scan_validation
from tests.audio_files import by_sndfile

WAV = by_sndfile("WAV", "PCM_16", seconds=1.0)
URLS = [
    ("gs://bucket/shards", r"pip install gcsfs"),
    ("abfs://container/shards", r"pip install adlfs"),
    ("nonsense://bucket/shards", r"Protocol not known: nonsense"),
    ("http://127.0.0.1:9/shards.tar", r"cannot be reached: .*(Connect|connect)"),
    ("http://127.0.0.1:9/shards/", r"cannot be reached: .*(Connect|connect)"),
    ("http://no-such-host.invalid/shards.tar", r"no-such-host.* cannot be reached: "),
]


@pytest.mark.parametrize(("url", "fix"), URLS)
@pytest.mark.parametrize(("section", "scan"), [("train", scan_sources), ("validation", scan_validation)])
def test_a_data_path_names_its_key_and_what_to_do(url, fix, section, scan):
    with pytest.raises(ValueError, match=fix) as error:
        scan(DataSection.model_validate({section: [{"path": url}]}))
    assert str(error.value).startswith(f"data.{section}.0.path: {url!r}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("url", "fix"), URLS[:3])
def test_storage_and_out_name_theirs(url, fix, capsys, tmp_path):
    with pytest.raises(ValueError, match=rf"storage: '{url}.*{fix}"):
        RunFolder(url, "run")
    (tmp_path / "a.wav").write_bytes(WAV)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "hello"}))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "m.jsonl"), "--out", url, "--task", "asr"])
    assert fix.split(": ")[-1] in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null/x", "gs://bucket/x"])
def test_out_that_cannot_be_written_is_one_line(out, capsys, tmp_path):
    (tmp_path / "a.wav").write_bytes(WAV)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "hello"}))
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "m.jsonl"), "--out", out, "--task", "asr"])
    assert stopped.value.code == 2
    assert out in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "tar", "parquet", "arrow", "tsv"])
def test_a_pipe_named_as_shard_and_a_shard_that_goes_are_told_by_name(tmp_path, suffix):
    os.mkfifo(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=rf"a.{suffix}' is neither a file nor a folder"):
        build_index([SourceSpec("made", str(tmp_path / f"a.{suffix}"))], tmp_path / "cache", min_s=0.1, max_s=30.0)
    assert scan_shard(str(tmp_path / f"gone.{suffix}"), Reading(task="asr"))["cause"].to_pylist() == ["broken_shard"]


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with ranges, until it is `down`; refuses the next `refused` requests."""

    down, refused = False, 0

    def do_GET(self) -> None:
        _Server.refused -= 1
        if _Server.down or _Server.refused >= 0:
            self.send_error(503)
            return
        try:
            with open(self.translate_path(self.path), "rb") as file:  # noqa: PTH123 - as the base class
                content = file.read()
        except OSError:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start, _, end = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else None]
        if asked and not part:
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def do_HEAD(self) -> None:
        if _Server.down:
            self.send_error(503)
        else:
            super().do_HEAD()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    _Server.down, _Server.refused = False, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(tmp_path))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_a_server_that_fails_later_is_no_fault_of_the_samples(tmp_path, server, kind):
    samples = [Sample(f"s{n}", WAV, "Write.", "hello", "asr", "made") for n in range(3)]
    if kind == "tar":
        write_webdataset(iter(samples), str(tmp_path))
    elif kind == "parquet":
        write_parquet(iter(samples), str(tmp_path))
    else:
        for n in range(3):
            (tmp_path / f"{n}.wav").write_bytes(WAV)
        rows = [{"audio": f"{n}.wav", "text": "hello"} for n in (0, 1, 2, 3)]
        (tmp_path / "00000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url = f"{server}/00000.{kind}"
    index = build_index([SourceSpec("made", url, "asr")], tmp_path / "cache", min_s=0.1, max_s=30.0)
    assert len(load_micro_batch(index.table, 0.1, 30.0).ids) == 3
    assert [bad.cause for bad in index.bad] == (["no_audio"] if kind == "jsonl" else [])
    _Server.down = True
    if kind != "parquet":  # whose footer and row group are in memory
        with storage_timeout(0.0), pytest.raises(StorageError, match=f"{url}.*503.*data.storage_timeout_s"):
            scan_shard(url, Reading(task="asr"))
        with storage_timeout(0.0), pytest.raises(StorageError, match="503"):
            load_micro_batch(index.table, 0.1, 30.0)
    _Server.down = False
    assert len(load_micro_batch(index.table, 0.1, 30.0).ids) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_reads_that_fail_for_a_while_lose_no_sample(tmp_path, server, kind):
    """Each was a bad sample, and counted as trained."""
    samples = [Sample(f"s{n}", WAV, "Write.", "hello", "asr", "made") for n in range(12)]
    write_webdataset(iter(samples), str(tmp_path))
    if kind == "jsonl":
        for n in range(12):
            (tmp_path / f"{n}.wav").write_bytes(WAV)
        rows = [{"id": f"s{n}", "audio": f"{n}.wav", "text": "hello"} for n in range(12)]
        (tmp_path / "00000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url, began = f"{server}/00000.{kind}", time.monotonic()
    index = build_index([SourceSpec("made", url, "asr")], tmp_path / "cache", min_s=0.1, max_s=30.0)
    _Server.refused = 3
    assert scan_shard(url)["cause"].null_count == 12
    _Server.refused = 3
    batch = load_micro_batch(index.table, 0.1, 30.0)
    assert (batch.ids, batch.bad) == ([f"s{n}" for n in range(12)], [])
    assert time.monotonic() - began > 0.5, "there is a pause before a server that refuses is asked again"


@pytest.mark.slow
def test_a_shard_that_is_gone_stops_the_run(tmp_path, server):
    write_webdataset(iter([Sample("s", WAV, "Write.", "hello", "asr", "made")]), str(tmp_path))
    url = f"{server}/00000.tar"
    index = build_index([SourceSpec("made", url)], tmp_path / "cache", min_s=0.1, max_s=30.0)
    (tmp_path / "00000.tar").unlink()
    with storage_timeout(0.0), pytest.raises(StorageError, match=f"{url}: .*data.storage_timeout_s"):
        load_micro_batch(index.table, 0.1, 30.0)


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "fix"), [URLS[0], ("/proc/nowhere", "cannot be written: ")])
def test_the_storage_of_a_run(storage, fix):
    command = [sys.executable, "-m", "mowe_ray.train", "--config", "quickstart", f"storage={storage}"]
    run = subprocess.run([*command, "data.train.0.path=builtin:train"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert re.search(rf"storage: .*{fix}", json.loads(run.stdout.splitlines()[-1])["error"])
