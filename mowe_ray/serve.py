"""Serve trained models: OpenAI's interface for audio chats and transcriptions, and a page to try them.

python -m mowe_ray.serve RUN_OR_EXPORT [MORE ...] [--port 8000] [--replicas 1-4] [--token-file FILE]

Joins the Ray cluster it was submitted to, else starts a local one, and answers until it is interrupted. Listens on
127.0.0.1 unless told otherwise, and then only with a token. Needs the extra `serve`: pip install 'mowe-ray[serve]'.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mowe_ray.command_line import INTERRUPTED, SUCCESS, log, make_parser, reject, run_and_print
from mowe_ray.evaluation.targets import find_models
from mowe_ray.output.terminal import duration, outlive_terminal

if TYPE_CHECKING:
    from mowe_ray.distributed.ray_serve.deployment import ServerPlan

_LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
_POLL_S = 1.0


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 when it was asked to end, 1 when the server failed, 2 when the request was wrong, 130 when it was interrupted
        before it answered.
    """
    arguments = _parser().parse_args(argv)
    try:
        plan = _plan(arguments)
    except ValueError as error:
        return reject(error)
    subject = {"models": [target.name for target in plan.models], "url": _url(plan)}
    try:
        return run_and_print(lambda: (_serve(plan), SUCCESS), subject, out)
    except KeyboardInterrupt:  # before it answered
        log("interrupted")
        return INTERRUPTED


def _plan(arguments: argparse.Namespace) -> ServerPlan:
    # What is wrong is said at once: the imports below take ten seconds.
    if not 1 <= arguments.port <= 65_535:
        raise ValueError(f"--port: {arguments.port} is none; take one from 1 to 65535")
    is_local = arguments.host in _LOOPBACK
    if not is_local and arguments.token_file is None:
        raise ValueError("--token-file: is needed to listen on other addresses than this machine's own, 127.0.0.1")
    fewest, most = _range(arguments.replicas)
    token, models = _token(arguments.token_file), find_models(arguments.models)
    try:
        from mowe_ray.distributed.ray_serve.deployment import Door, Replicas, ServerPlan
        from mowe_ray.serving.app import Limits
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install 'mowe-ray[serve]'") from error
    return ServerPlan(
        models,
        Replicas(fewest, most, arguments.cpus, arguments.gpus, arguments.max_batch_size, arguments.batch_seconds),
        Limits(
            arguments.max_audio_s,
            arguments.max_transcription_s,
            round(arguments.max_upload_mb * 1e6),
            arguments.max_new_tokens,
            max_in_flight=arguments.max_requests,
            timeout_s=arguments.timeout,
        ),
        Door(arguments.host, arguments.port, token, _LOOPBACK if is_local else None),
    )


def _serve(plan: ServerPlan) -> dict[str, Any]:
    from mowe_ray.distributed.ray_serve import deployment

    ended, began = threading.Event(), time.monotonic()
    log(f"loading {', '.join(target.name for target in plan.models)}")
    deployment.start(plan, log)
    # After Ray has started, which sets handlers of its own.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    log(
        f"answering at {_url(plan)}/v1, the page is at {_url(plan)}/ (ready after {duration(time.monotonic() - began)})"
    )
    while not ended.wait(_POLL_S):
        if not deployment.is_running():
            raise ValueError("the server has failed; its logs are in /tmp/ray/session_latest/logs/serve")
    log("ending")
    deployment.stop()
    return {"models": [target.name for target in plan.models], "url": _url(plan)}


def _url(plan: ServerPlan) -> str:
    host = plan.door.host
    return f"http://{f'[{host}]' if ':' in host else host}:{plan.door.port}"


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise ValueError(f"--replicas: {text!r} is neither a number such as 2 nor a range such as 1-4")
    return int(found[1]), int(found[2] or found[1])


def _token(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file: {error}") from error
    if not token:
        raise ValueError(f"--token-file: {file} is empty; write a long random word to it")
    return token


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("serve", __doc__, "docs/serving.md describes requests, answers and limits.")
    add = parser.add_argument
    add("models", nargs="+", metavar="RUN_OR_EXPORT", help="their names in the interface are those of their folders")
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    add("--port", type=int, default=8000, help="default: 8000")
    add("--token-file", metavar="FILE", help="file with the token that clients send as their API key")
    add("--replicas", default="1", metavar="N|N-M", help="replicas of each model; a range scales with the requests")
    add("--cpus", type=int, default=1, metavar="N", help="cores of a replica; default: 1")
    add("--gpus", type=float, default=0, metavar="N", help="GPUs of a replica; default: 0")
    add("--max-batch-size", type=int, default=16, metavar="N", help="requests answered together; default: 16")
    add("--batch-seconds", type=float, default=240, metavar="S", help="audio answered together; default: 240")
    add("--max-requests", type=int, default=64, metavar="N", help="requests at a time, more get 503; default: 64")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="longest answer; default: 200")
    add("--max-audio-s", type=float, default=30, metavar="S", help="longest clip of a chat; default: 30")
    add("--max-transcription-s", type=float, default=3600, metavar="S", help="longest recording; default: 3600")
    add("--max-upload-mb", type=float, default=100, metavar="MB", help="longest request; default: 100")
    add("--timeout", type=float, default=120, metavar="S", help="longest time for an answer; default: 120")
    return parser


if __name__ == "__main__":
    outlive_terminal()
    sys.stdout, stdout = sys.stderr, sys.stdout  # Ray's own threads print too, and the result is to be the last line
    sys.exit(main(out=stdout))
