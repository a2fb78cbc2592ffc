"""The lease of a folder: one live driver at a time writes to it.

    FOLDER/owner.json   the process that holds it, or held it last

The owner replaces the file every few seconds. On the owner's own machine the table of processes tells whether it lives;
from another one, whether the file changes while one watches. No clock is compared with another's, so a wrong clock, or
one that jumps, makes nobody look dead or alive. A file system without an exclusive create lets two that begin in the
same moment both write: each reads the file again before it begins, and with every heartbeat, and the one that no longer
finds itself there ends.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mowe_ray.output.run_folder import RunFolder

OWNER_FILE = "owner.json"
HEARTBEAT_S = 10.0
# More than an NFS client may remember a directory (60 s), and than Ray needs to end the workers of a lost driver.
STALE_S = 90.0
# How long two that begin together may take from reading the file to writing it.
_SETTLE_S = 1.0
_POLL_S = 1.0


@dataclass(frozen=True)
class Owner:
    """A process that holds a lease.

    Attributes:
        host: Name of its machine, for people.
        machine: Identifies the machine since it was booted, and the process table; None if it cannot be known.
        pid: Number of the process; `process_start` tells it from a later one of the same number.
        since: When it began, by its own clock; for people.
        token: Identifies the lease.
        heartbeats: How often it has written the file.
        released: It has ended in good order, and holds the lease no longer.
    """

    host: str
    machine: str | None
    pid: int
    process_start: str | None
    since: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    heartbeats: int = 0
    released: bool = False

    @classmethod
    def this_process(cls) -> Owner:
        """Return a new owner: this process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), _machine(), os.getpid(), _process_start(os.getpid()), since)

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """Return the owner in a file; None if it is damaged."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None

    @property
    def alive(self) -> bool | None:
        """Whether the process exists; None if that cannot be seen from here."""
        if self.machine is None or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists, and is another user's
        start = _process_start(self.pid)
        return None if start is None else start == self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"  # containers of one machine count processes apart
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Return when a process began, in ticks since the boot; None if that is hidden, "" if it has ended."""
    try:
        # The name before the last parenthesis may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


@contextmanager
def held(
    folder: RunFolder,
    log: Callable[[str], None],
    *,
    patience_s: float = 0.0,
    heartbeat_s: float = HEARTBEAT_S,
    stale_s: float = STALE_S,
    leaves_file: bool = True,
) -> Iterator[None]:
    """Hold the lease of `folder` inside; it is taken over from an owner that has ended or is silent.

    Another process can take it over from this one while this one, or its machine, stands still. It notices that at the
    next heartbeat, and ends at once, without a checkpoint: the folder is another's.

    Args:
        folder: Created if need be.
        log: Shows a line to the user.
        patience_s: How long to wait for a live owner to end.
        heartbeat_s: Seconds between two signs of life.
        stale_s: Seconds without one after which the owner counts as lost.
        leaves_file: Whether the folder keeps the file afterwards, marked as released.

    Raises:
        ValueError: Another process holds it, or the folder cannot be written.
    """
    lease = _Lease(folder, log, heartbeat_s, stale_s, leaves_file)
    try:
        lease.acquire(patience_s)
    except ValueError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"storage: {folder.url} cannot be written: {type(error).__name__}: {error}") from error
    thread = threading.Thread(target=lease.beat, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        lease.ended.set()
        thread.join(heartbeat_s)  # no longer: it may wait for a storage that does not answer
        lease.release()


class _Lease:
    def __init__(
        self, folder: RunFolder, log: Callable[[str], None], heartbeat_s: float, stale_s: float, leaves_file: bool
    ):
        self._folder, self._log, self._heartbeat_s, self._stale_s = folder, log, heartbeat_s, stale_s
        self._leaves_file = leaves_file
        self._me = Owner.this_process()
        self.ended = threading.Event()

    def acquire(self, patience_s: float) -> None:
        content = self._content()
        if content is None:
            created = self._folder.create_bytes(OWNER_FILE, _encoded(self._me))
            alone = created and self._folder.local_path(OWNER_FILE) is not None
        else:
            self._wait_until_free(content, patience_s)
            self._write()
            alone = False
        if not alone:
            time.sleep(_SETTLE_S)
        written = Owner.parse(self._content() or b"")
        if written is None or written.token != self._me.token:
            raise self._in_use(written)

    def beat(self) -> None:
        """Write a sign of life now and then, until the lease has ended or is another's."""
        while not self.ended.wait(self._heartbeat_s):
            try:
                content = self._content()
                other = self._other(content)
                if other is None:
                    self._write()
                    if content is None:
                        self._log(
                            f"warning: {self._folder.path(OWNER_FILE)} is gone, and is written again; if the folder "
                            "was removed, so is what it held till now"
                        )
            except Exception:  # noqa: BLE001 - each storage raises its own. While it is away nothing is known, and the
                continue  # next heartbeat finds whether another process has taken over meanwhile
            if other is not None:
                try:
                    self._log(f"error: {self._folder.url} was taken over by {other}: this process ends without saving")
                finally:
                    os._exit(1)  # not an exception: the main thread may be waiting for what never comes

    def release(self) -> None:
        try:
            if self._other(self._content()) is not None:
                return
            alone = self._folder.names("") == [OWNER_FILE]
            if alone or not self._leaves_file:
                self._folder.remove(OWNER_FILE)
                if alone and (local := self._folder.local_path("")):  # a command that was refused leaves nothing
                    local.rmdir()
            else:
                self._me = replace(self._me, released=True)
                self._write()
        except Exception:  # noqa: BLE001 - each storage raises its own, and must not hide what ended the command; the
            return  # next owner finds that this process has ended, or sees no sign of life

    def _wait_until_free(self, content: bytes, patience_s: float) -> None:
        """Wait until the owner has released the lease or is lost; raise ValueError if it lives, after `patience_s`."""
        began = seen = time.monotonic()
        seen_alive = has_logged = False
        while True:
            owner, now = Owner.parse(content), time.monotonic()
            if owner is not None and owner.released:
                return
            alive = None if owner is None else owner.alive
            if alive is False:
                self._log(f"{self._folder.url}: taken over from {owner}, which has ended")
                return
            if alive is None and now - seen >= self._stale_s:
                previous = f"{owner or 'an unknown owner'}: no sign of life for {self._stale_s:.0f} s"
                self._log(f"{self._folder.url}: taken over from {previous}")
                return
            if (alive or seen_alive) and now - began >= patience_s:
                raise self._in_use(owner)
            if not has_logged:
                has_logged = True
                self._log(
                    f"{self._folder.url} is held by {owner or 'an unknown owner'}: waiting up to "
                    f"{max(patience_s, self._stale_s):.0f} s for a sign that it lives, or has ended"
                )
            time.sleep(min(_POLL_S, self._stale_s / 4))
            if (newer := self._content()) is None:
                return
            if newer != content:
                content, seen, seen_alive = newer, time.monotonic(), True

    def _in_use(self, owner: Owner | None) -> ValueError:
        stop = "stop it" if owner is None else f"stop it (kill {owner.pid} on {owner.host}: it saves and ends)"
        return ValueError(
            f"{self._folder.url} is in use by {owner or 'an unknown owner'}: {stop} and repeat this command, or choose "
            f"another name. From a process that has ended it is taken over at once, from a lost machine after "
            f"{self._stale_s:.0f} s"
        )

    def _content(self) -> bytes | None:
        try:
            return self._folder.read_bytes(OWNER_FILE)
        except FileNotFoundError:
            return None

    def _other(self, content: bytes | None) -> Owner | None:
        owner = None if content is None else Owner.parse(content)
        return None if owner is None or owner.token == self._me.token else owner

    def _write(self) -> None:
        self._me = replace(self._me, heartbeats=self._me.heartbeats + 1)
        self._folder.write_bytes(OWNER_FILE, _encoded(self._me))


def _encoded(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=2) + "\n").encode()
