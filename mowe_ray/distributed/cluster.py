"""Join the cluster the command was submitted to, or start a local Ray."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from mowe_ray.distributed import ray_internals


def join(cpus: float, log: Callable[[str], None] = lambda line: None) -> None:
    """Connect to Ray unless that is done already.

    Under `ray job submit` (RAY_ADDRESS set) this is the cluster of the job. Elsewhere a local
    Ray starts with at least `cpus` logical CPUs, so that a laptop's tasks share its cores; only
    this machine reaches it, with a token that only this user can read.

    Args:
        log: Shows a line to the user.
    """
    if ray.is_initialized():
        return
    keep_token_private(log, create="RAY_ADDRESS" not in os.environ)
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        _settle_ray_data()
        return
    # Most of a run's processes only wait, and share a core; Ray would warn of their number every few seconds.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(os.cpu_count() or 1, 16)))
    with _on_loopback():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
            # Off, Ray would leak the CPUs of killed trials and controllers (its cleaner lives there).
            include_dashboard=True,
            log_to_driver=False,
            logging_level="ERROR",
        )


def keep_token_private(log: Callable[[str], None], *, create: bool) -> None:
    """Make sure that nobody else can read the token of this user's Ray: who has it runs any code on its machines.

    Ray itself writes it so that all users of the machine can read it, and `ray up` copies it like that.

    Args:
        create: Write one if there is none, before Ray does.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}.isdisjoint(os.environ):
        return
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        if stat.S_IMODE(token.stat().st_mode) & 0o077:
            try:
                token.chmod(0o600)
                log(f"others could read {token}, and now cannot; if one may have read it, remove it: Ray makes another")
            except OSError as error:
                log(f"warning: others can read {token}, and so run code in your Ray: {error}")
    elif create and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another command was faster
            descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that starts meanwhile listen on 127.0.0.1 alone, as it does by itself on macOS and Windows.

    On Linux its servers would listen to the whole network, though no other machine can join a local Ray.
    """
    constants = ray_internals.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _settle_ray_data() -> None:
    """Start Ray Data's own long-lived actors on this node: each stays for good on the node where it is first used.

    On a node of the autoscaler they would keep it from ever being idle.
    """
    ray_internals.get_or_create_stats_actor()
    ray_internals.get_or_create_autoscaling_coordinator()
    ray_internals.get_or_create_actor_location_tracker()
