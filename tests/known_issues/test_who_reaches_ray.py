"""A local run wrote the token of Ray for all to read, and its servers listened to the whole network.

Report: CVE-2023-48022, on which who reaches the ports of a Ray runs code there.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mowe_ray.distributed.cluster import keep_token_private

_LISTENERS = """
import json, os, stat, psutil
from pathlib import Path
from mowe_ray.distributed import cluster
cluster.join(2, print)
import ray
assert ray.get(ray.remote(lambda: 1).remote()) == 1
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
listening = [
    (process.name(), connection.laddr.ip)
    for process in processes
    for connection in process.net_connections("tcp")
    if connection.status == psutil.CONN_LISTEN
]
print(json.dumps(listening))
ray.shutdown()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.slow
def test_a_local_ray_listens_on_loopback_alone_and_its_token_is_private(home: Path) -> None:
    command = [sys.executable, "-c", f"import os; os.umask(0o022){_LISTENERS}"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    listening = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert {address for _, address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
    token = home / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert mode(token) == 0o600
    assert mode(token.parent) == 0o700


def test_a_token_that_others_can_read_is_made_private_with_a_word(home: Path) -> None:
    token, said = home / ".ray" / "auth_token", list[str]()
    token.parent.mkdir()
    token.write_text("abc")
    token.chmod(0o644)
    keep_token_private(said.append, create=False)
    keep_token_private(said.append, create=True)
    assert (mode(token), token.read_text()) == (0o600, "abc")
    assert len(said) == 1
    assert str(token) in said[0]


@pytest.mark.parametrize("variable", ["RAY_AUTH_MODE=disabled", "RAY_AUTH_TOKEN=abc"])
def test_no_token_is_written_where_none_is_used(home: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(*variable.split("="))
    keep_token_private(pytest.fail, create=True)
    assert not (home / ".ray").exists()
