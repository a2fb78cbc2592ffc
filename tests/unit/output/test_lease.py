"""One live owner of a folder: real processes that hold it, die, stand still, and meet.

Owners on other machines are files here, written as another machine would, with another clock.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest

from mowe_ray.output.lease import OWNER_FILE, Owner, held
from mowe_ray.output.run_folder import RunFolder
from tests import object_store

# A process that holds the lease of a folder, and says what it was told.
OWNER = """
import sys, time
from mowe_ray.output.lease import held
from mowe_ray.output.run_folder import RunFolder
from tests import object_store
folder = RunFolder(sys.argv[1], "run")
try:
    with held(folder, lambda line: print(line, flush=True), heartbeat_s=0.2, stale_s=3.0):
        print("holds", flush=True)
        while not folder.exists("stop"):
            time.sleep(0.05)
    print("ended", flush=True)
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture
def start(tmp_path):
    """Start an owner of `tmp_path`/run."""
    running: list[subprocess.Popen] = []

    def owner(*, url: str = "", wait: bool = True) -> subprocess.Popen:
        command = [sys.executable, "-c", OWNER, f"{url}{tmp_path}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        while wait and process.poll() is None and "holds" not in process.stdout.readline():
            pass
        return process

    yield owner
    for process in running:
        process.kill()
        process.communicate()


def folder_in(path: Path) -> RunFolder:
    return RunFolder(str(path), "run")


def owner_in(path: Path) -> Owner:
    return Owner.parse((path / "run" / OWNER_FILE).read_bytes())


def elsewhere(folder: RunFolder, **changed) -> Owner:
    """Write the file of an owner on a machine whose processes cannot be seen."""
    owner = Owner(**{"host": "node-7", "machine": "other", "pid": 4242, "process_start": "1", "since": "?", **changed})
    folder.write_json(OWNER_FILE, owner.__dict__)
    return owner


@pytest.mark.slow
def test_a_live_owner_is_named_and_a_dead_one_followed_at_once(start, tmp_path):
    first = start()
    began = time.monotonic()
    second = start(wait=False)
    assert second.wait(20) == 1
    assert time.monotonic() - began < 10, "the process is seen: no need to watch it"
    told = second.stderr.read()
    assert f"{tmp_path}/run is in use by process {first.pid} on {os.uname().nodename}" in told
    assert f"kill {first.pid} on" in told
    first.send_signal(signal.SIGSTOP)  # as a frozen or swapped-out one: silent, and alive
    assert start(wait=False).wait(20) == 1
    first.kill()
    first.wait()
    said: list[str] = []
    began = time.monotonic()
    with held(folder_in(tmp_path), said.append):
        assert time.monotonic() - began < 5
        assert owner_in(tmp_path).pid == os.getpid()
        folder_in(tmp_path).write_text("work", "")
    assert [f"taken over from process {first.pid} on" in line for line in said] == [True]
    assert owner_in(tmp_path).released


@pytest.mark.slow
def test_a_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path):
    folder = folder_in(tmp_path)
    with held(folder, [].append):
        mine = owner_in(tmp_path)
    folder.write_json(OWNER_FILE, {**mine.__dict__, "process_start": "1", "released": False})
    with held(folder, [].append, stale_s=1000):
        pass


@pytest.mark.slow
def test_containers_of_one_machine_do_not_see_each_others_processes(start, tmp_path):
    first = start()
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]  # others need a namespace of users as well
    command = ["unshare", *user, "--pid", "--fork", "--mount-proc", sys.executable, "-c", OWNER, str(tmp_path)]
    inside = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in inside.stderr:  # a sandbox may forbid namespaces to root, too
        pytest.skip(inside.stderr)
    assert inside.returncode == 1, "there is no such process in there, but it gives signs of life"
    assert f"in use by process {first.pid} " in inside.stderr


@pytest.fixture(params=["local", "memory", "objects"])
def folder(request, tmp_path):
    if request.param == "objects":
        return RunFolder(f"{object_store.URL}{tmp_path}", "run")
    return RunFolder(str(tmp_path) if request.param == "local" else f"memory://{uuid4()}", "run")


@pytest.mark.slow
def test_another_machines_owner_is_alive_while_its_file_changes_whatever_its_clock_says(folder):
    owner, ended = elsewhere(folder, since="2090-01-01 00:00:00 +0000"), threading.Event()

    def beat() -> None:
        for n in range(1000):
            if ended.wait(0.3):
                return
            elsewhere(folder, since=f"1970-01-01 00:00:{n % 60:02d} +0000", token=owner.token, heartbeats=n)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="in use by process 4242 on node-7"), held(folder, [].append, stale_s=1.5):
            pass
    finally:
        ended.set()
        thread.join()
    said: list[str] = []
    with held(folder, said.append, stale_s=1.5):
        assert Owner.parse(folder.read_bytes(OWNER_FILE)).pid == os.getpid()
    assert said[-1].endswith("no sign of life for 2 s")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", bytes(300), b'{"pid": 3'])
def test_a_damaged_file_counts_as_silent(tmp_path, content):
    folder = folder_in(tmp_path)
    folder.write_bytes(OWNER_FILE, content)
    began = time.monotonic()
    with held(folder, [].append, stale_s=0.5):
        assert time.monotonic() - began >= 0.5


@pytest.mark.slow
def test_what_was_released_is_free(folder):
    for _ in range(2):
        with held(folder, [].append):
            with pytest.raises(ValueError, match="in use"), held(folder, [].append):
                pass
            assert not Owner.parse(folder.read_bytes(OWNER_FILE)).released
            folder.write_text("work", "")
        assert Owner.parse(folder.read_bytes(OWNER_FILE)).released


@pytest.mark.slow
def test_patience_waits_for_a_live_owner_to_end(start, tmp_path):
    start()
    threading.Timer(1.5, (tmp_path / "run" / "stop").touch).start()
    with held(folder_in(tmp_path), [].append, patience_s=30):
        assert owner_in(tmp_path).pid == os.getpid()


def test_an_owner_that_was_taken_over_while_it_stood_still_ends_without_a_word(start, tmp_path):
    first = start()
    first.send_signal(signal.SIGSTOP)
    other = elsewhere(folder_in(tmp_path))  # from a machine that cannot see that the process is there
    first.send_signal(signal.SIGCONT)
    assert first.wait(20) == 1
    said = first.stdout.read()
    assert "was taken over by process 4242 on node-7" in said
    assert "ended" not in said
    assert owner_in(tmp_path) == other


@pytest.mark.slow
def test_an_owner_that_was_taken_over_ends_though_it_can_tell_nobody(start, tmp_path):
    first = start()
    first.stdout.close()  # to log raises from now on
    elsewhere(folder_in(tmp_path))
    assert first.wait(20) == 1


@pytest.mark.slow
@pytest.mark.parametrize("url", ["", object_store.URL])
@pytest.mark.parametrize("before", ["nobody", "a dead owner", "damage"])
def test_of_many_that_begin_together_one_wins(start, tmp_path, before, url):
    if before == "a dead owner":
        start().kill()
    elif before == "damage":
        folder_in(tmp_path).write_bytes(OWNER_FILE, b"{}")
    processes = [start(url=url, wait=False) for n in range(4)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    (winner,) = [process for process in processes if process.poll() is None]
    assert owner_in(tmp_path).pid == winner.pid
    assert all(process.returncode == 1 for process in processes if process is not winner)


@pytest.mark.slow
def test_a_folder_that_was_removed_or_out_of_reach_stays_with_its_owner(start, tmp_path):
    first = start()
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "run").touch()  # nothing can be written there
    time.sleep(1)
    (tmp_path / "run").unlink()
    assert "is gone, and is written again" in first.stdout.readline()
    deadline = time.monotonic() + 10
    while not (tmp_path / "run" / OWNER_FILE).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert owner_in(tmp_path).pid == first.pid
    (tmp_path / "run" / "stop").touch()
    assert first.wait(10) == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").touch()
    with (
        pytest.raises(ValueError, match=rf"storage: {tmp_path}/run cannot be written: "),
        held(folder_in(tmp_path), [].append),
    ):
        pass


def test_a_command_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), held(RunFolder(str(tmp_path), "run"), [].append):
        raise ValueError("refused")
    assert not (tmp_path / "run").exists()
    with held(RunFolder(str(tmp_path), "run"), [].append):
        (tmp_path / "run" / "kept").touch()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["kept", "owner.json"]
