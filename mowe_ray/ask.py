"""Ask a trained model about recordings.

python -m mowe_ray.ask RUN_OR_EXPORT CLIP [MORE ...] ["QUESTION"] [--json]
python -m mowe_ray.ask --url http://localhost:8000/v1 CLIP [MORE ...] ["QUESTION"]

Prints the answer, one line. What names no file is the question; without one, each line of the input is. With --record
the clip comes from the microphone.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mowe_ray.command_line import FAILURE, SUCCESS, USAGE_ERROR, log, make_parser
from mowe_ray.data.sample import AUDIO_SUFFIXES
from mowe_ray.evaluation.targets import find_models
from mowe_ray.output.terminal import outlive_terminal

Answer = Callable[[str], dict[str, Any]]

# Names of microphones by FFmpeg's systems, which say whether there is one.
_ALSA = "/usr/share/alsa/alsa.conf"
_MICROPHONES = (("pulse", "default"), ("alsa", "default"), ("avfoundation", ":0"))


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where answers go, by default stdout.

    Returns:
        0 on success, 1 when a question got no answer, 2 when the request was wrong.
    """
    arguments = _parser().parse_intermixed_args(argv)
    out = out or sys.stdout
    try:
        words = list(arguments.words)
        model = words.pop(0) if arguments.url is None and words else None
        clips, question = _sorted(words)
        files = [*([_recorded(arguments.record)] if arguments.record else []), *(clip.read_bytes() for clip in clips)]
        answer = _server(arguments, files) if arguments.url is not None else _model(model, arguments, files)
    except (OSError, ValueError) as error:
        log(str(error))
        return USAGE_ERROR
    code = SUCCESS
    for text in [question] if question is not None else _typed():
        try:
            found = answer(text)
        except ValueError as error:
            log(f"error: {error}")
            code = FAILURE
            continue
        line = json.dumps({"question": text, **found}) if arguments.json else " ".join(found["answer"].split())
        print(line, file=out, flush=True)
    return code


def _sorted(words: Sequence[str]) -> tuple[list[Path], str | None]:
    """Return the recordings, and the question if there is one."""
    questions = [word for word in words if not Path(word).is_file()]
    for word in questions:
        if " " not in word and ("/" in word or Path(word).suffix.lstrip(".") in AUDIO_SUFFIXES):
            raise ValueError(f"there is no file {word!r}")
    if len(questions) > 1:
        raise ValueError(f"{questions[0]!r} and {questions[1]!r} are two questions: put one question in quotes")
    return [Path(word) for word in words if word not in questions], questions[0] if questions else None


def _typed() -> Iterator[str]:
    """Yield the lines of the input, with a prompt where somebody types them."""
    is_typed = sys.stdin.isatty()
    while True:
        if is_typed:
            print("? ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _model(model: str | None, arguments: argparse.Namespace, files: Sequence[bytes]) -> Answer:
    """Return what answers with a model in this process."""
    if model is None:
        raise ValueError("RUN_OR_EXPORT: name a run, an export, or a server with --url")
    (target,) = find_models([model])
    if "://" in target.export:
        raise ValueError(f"{model}: copy the export to this machine, or serve it there and ask with --url")
    import torch

    from mowe_ray.serving.decoding import Decoders
    from mowe_ray.serving.question import Reply, ask_about
    from mowe_ray.serving.schema import mowe_report
    from mowe_ray.serving.served_model import Listener, ServedModel

    decoders = Decoders(1)
    waves = [decoders.decode_now(data, arguments.max_audio_s, f"clip {n + 1}") for n, data in enumerate(files)]
    decoders.close()
    served = ServedModel.load(target.export, "cuda" if torch.cuda.is_available() else "cpu")

    def answer(text: str) -> dict[str, Any]:
        events: list[Any] = []
        asked = ask_about(waves, text, max_new_tokens=arguments.max_new_tokens, without=tuple(arguments.without))
        served.answer([Listener(served.check(asked), events.append)])
        (reply,) = (event for event in events if isinstance(event, Reply))
        return {"answer": reply.text, "mowe": mowe_report(reply, 0.0)}

    return answer


def _server(arguments: argparse.Namespace, files: Sequence[bytes]) -> Answer:
    """Return what asks a server."""
    import openai

    client = openai.OpenAI(base_url=arguments.url, api_key=arguments.api_key, max_retries=2)
    try:
        name = arguments.model or next(iter(client.models.list())).id
    except (openai.OpenAIError, StopIteration) as error:
        raise ValueError(f"--url: {arguments.url} does not answer: {error}") from error
    data = [base64.b64encode(file).decode() for file in files]
    clips = [{"type": "input_audio", "input_audio": {"data": text, "format": "wav"}} for text in data]

    def answer(text: str) -> dict[str, Any]:
        messages: Any = [{"role": "user", "content": [*clips, {"type": "text", "text": text}]}]
        more = {"mowe": {"without": arguments.without}} if arguments.without else {}
        try:
            found = client.chat.completions.create(
                model=name, messages=messages, max_tokens=arguments.max_new_tokens, extra_body=more
            )
        except openai.OpenAIError as error:
            raise ValueError(str(error)) from error
        return {"answer": found.choices[0].message.content or "", "mowe": (found.model_extra or {}).get("mowe")}

    return answer


def _recorded(seconds: float) -> bytes:
    """Record from the microphone; returns a WAV file."""
    import io

    import av

    if Path(_ALSA).exists():  # PyAV's own copy of the library looks for it elsewhere
        os.environ.setdefault("ALSA_CONFIG_PATH", _ALSA)
    for system, device in _MICROPHONES:
        if system not in av.formats_available:
            continue
        try:
            with _without_stderr():  # ALSA prints what it lacks
                microphone = av.open(device, format=system)
            with microphone, io.BytesIO() as file:
                log(f"recording {seconds:g} s")
                with av.open(file, "w", format="wav") as wav:
                    stream = wav.add_stream("pcm_s16le", rate=16_000, layout="mono")
                    for frame in microphone.decode(audio=0):
                        wav.mux(stream.encode(frame))
                        if frame.time is not None and frame.time >= seconds:
                            break
                    wav.mux(stream.encode(None))
                return file.getvalue()
        except av.FFmpegError:
            continue
    raise ValueError("--record: there is no microphone here; record a file elsewhere and name it")


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("ask", __doc__, "docs/serving.md has more examples.")
    add = parser.add_argument
    add("words", nargs="*", metavar="RUN_OR_EXPORT | CLIP | QUESTION", help="a model, recordings, and a question")
    add("--url", help="ask this server, such as http://localhost:8000/v1, in place of a model")
    add("--model", help="of the server; default: its first")
    add("--api-key", default="none", metavar="TOKEN", help="token of the server")
    add("--record", type=float, metavar="SECONDS", help="record so long from the microphone")
    add("--without", action="append", default=[], metavar="ENCODER", help="leave a pool member out; may be repeated")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="longest answer; default: 200")
    add("--max-audio-s", type=float, default=30, metavar="S", help="longest clip; default: 30")
    add("--json", action="store_true", help="print JSON, with the encoders that ran")
    return parser


if __name__ == "__main__":
    outlive_terminal()
    sys.exit(main())
