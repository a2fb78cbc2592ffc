"""Join the cluster the command was submitted to, or start a local Ray."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from mowe_ray.distributed import ray_internals
from mowe_ray.distributed.errors import cause_of


def join(cpus: float, log: Callable[[str], None] = lambda line: None) -> str | None:
    """Connect to Ray unless that is done already; returns the address of its dashboard, None if it is not known.

    Under `ray job submit` (RAY_ADDRESS set) this is the cluster of the job. Elsewhere a local
    Ray starts with at least `cpus` logical CPUs, so that a laptop's tasks share its cores; only
    this machine reaches it, with a token that only this user can read.

    Args:
        log: Shows a line to the user.

    Raises:
        ValueError: Ray cannot be reached or started; says why.
    """
    if ray.is_initialized():
        return None
    keep_token_private(log, create="RAY_ADDRESS" not in os.environ)
    if "RAY_ADDRESS" in os.environ:
        dashboard = _init(log_to_driver=False)
        _settle_ray_data()
        return dashboard
    # Most of a run's processes only wait, and share a core; Ray would warn of their number every few seconds.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(os.cpu_count() or 1, 16)))
    with _on_loopback():
        return _init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
            # Off, Ray would leak the CPUs of killed trials and controllers (its cleaner lives there).
            include_dashboard=True,
            log_to_driver=False,
            logging_level="ERROR",
        )


def _init(**options: Any) -> str | None:
    """Call `ray.init`; returns the address of the dashboard."""
    try:
        address: str | None = ray.init(**options).dashboard_url
    except Exception as error:  # Ray's own, of the operating system, of the network
        why = next((line.strip() for line in cause_of(error).splitlines() if line.strip()), type(error).__name__)
        place = os.environ.get("RAY_ADDRESS")
        what = "Ray does not start on this machine" if place is None else f"no Ray answers at RAY_ADDRESS={place}"
        raise ValueError(f"{what}: {why}") from error
    return f"http://{address}" if address else None


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
