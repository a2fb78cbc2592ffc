"""The server, asked by the official client: answers, streams, transcriptions, and refusals that say what to do."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from mowe_ray.data.decode import decode_audio
from mowe_ray.evaluation.generation import answer_micro_batch
from mowe_ray.serving.app import Limits
from tests.end_to_end import encoded
from tests.exported_models import steered_model, task_sound
from tests.ranks import micro_batch
from tests.serving import Served, asked, audio_part, serving

CLIPS = [encoded(task_sound(kind, 0, 2)) for kind in range(5)]
OPTIONS = {"max_new_tokens": 8, "num_beams": 1, "max_audio_s": 30.0, "chunked_tasks": ("asr",)}


@pytest.fixture(scope="module")
def made():
    return steered_model(2)


@pytest.fixture(scope="module")
def server(made) -> Iterator[Served]:
    with serving({"tiny": made}, Limits(max_new_tokens=8, max_transcription_s=100.0), wait_s=0.05) as server:
        yield server


def evaluated(made, waves, instruction: str, **options) -> list[str]:
    """What `evaluate` answers to these clips."""
    from dataclasses import replace

    batch = micro_batch([0] * len(waves), seed=0)
    audio = (np.concatenate(waves) * 2.0**15).round().astype(np.int16)
    batch = replace(
        batch,
        audio=audio,
        lengths=[len(wave) for wave in waves],
        scales=np.full(len(waves), 2.0**-15, np.float32),
        instructions=[instruction] * len(waves),
        tasks=["asr"] * len(waves),
    )
    found = answer_micro_batch(*made, batch, **{**OPTIONS, **options}, batch_seconds=60, max_batch_size=8)
    return [answer.answer for answer in found]


@pytest.mark.slow
def test_answers_are_those_of_an_evaluation(server: Served, made) -> None:
    waves = [decode_audio(clip, None, 0.02, 30.0) for clip in CLIPS]
    wanted = evaluated(made, waves, "What is it?")
    client = server.client()

    def ask(clip: bytes) -> str | None:
        return (
            client.chat.completions.create(model="tiny", messages=asked(clip, "What is it?")).choices[0].message.content
        )

    assert [ask(clip) for clip in CLIPS] == wanted
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(ask, CLIPS * 2)) == wanted * 2
    assert len(set(wanted)) > 1


@pytest.mark.slow
def test_an_answer_says_which_encoders_ran(server: Served) -> None:
    reply = server.client().chat.completions.create(model="tiny", messages=asked(CLIPS[1], CLIPS[2], "Alike?"))
    mowe = reply.model_dump()["mowe"]
    assert [clip["ran"] for clip in mowe["clips"]] == [["hubert_one", "wav2vec2"], ["hubert_two", "wav2vec2"]]
    first = mowe["clips"][0]
    assert set(first["chosen"]["independent"] + first["chosen"]["dependent"]) == set(first["ran"])
    assert first["chosen"]["dependent"] == ["hubert_one"]
    assert first["dependent"]["hubert_one"] > 0.9
    assert sum(first["independent"].values()) == pytest.approx(1, abs=1e-3)
    # 1 a second always, and n + 1 for member n.
    assert first["gflops"] == pytest.approx(first["seconds"] * (1 + 2 + 4), rel=1e-3)
    assert first["gflops_dense"] == pytest.approx(first["seconds"] * 16, rel=1e-3)
    assert set(mowe["milliseconds"]) == {"decode", "queue", "encoders", "generation"}
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 8


@pytest.mark.slow
def test_an_encoder_can_be_left_out(server: Served) -> None:
    without = {"mowe": {"without": ["hubert_one"]}}
    reply = server.client().chat.completions.create(model="tiny", messages=asked(CLIPS[1], "?"), extra_body=without)
    (clip,) = reply.model_dump()["mowe"]["clips"]
    assert "hubert_one" not in clip["ran"]
    assert clip["dependent"]["hubert_one"] == 0
    again = server.client().chat.completions.create(model="tiny", messages=asked(CLIPS[1], "?")).model_dump()
    assert "hubert_one" in again["mowe"]["clips"][0]["ran"]


@pytest.mark.slow
def test_a_stream_is_the_answer_in_pieces(server: Served) -> None:
    client, messages = server.client(), asked(CLIPS[0], "What is it?")
    whole = client.chat.completions.create(model="tiny", messages=messages)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].model_dump()["mowe"]["clips"] == whole.model_dump()["mowe"]["clips"]
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 4


@pytest.mark.slow
def test_stop_texts_end_an_answer(server: Served) -> None:
    client, messages = server.client(), asked(CLIPS[0], "What is it?")
    whole = client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
    assert whole
    stop = whole[2:4]
    stopped = client.chat.completions.create(model="tiny", messages=messages, stop=stop)
    assert stopped.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert stopped.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(model="tiny", messages=messages, stop=[stop], stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == stopped.choices[0].message.content


def test_conversations_with_clips_in_several_turns(server: Served) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *asked(CLIPS[0], "One?")]
    messages += [{"role": "assistant", "content": "yes"}, *asked("And", CLIPS[3], "?")]
    reply = server.client().chat.completions.create(model="tiny", messages=messages, temperature=0.7, seed=3)
    assert len(reply.model_dump()["mowe"]["clips"]) == 2
    again = server.client().chat.completions.create(model="tiny", messages=messages, temperature=0.7, seed=3)
    assert again.choices[0].message.content == reply.choices[0].message.content


@pytest.mark.slow
@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3", "OGG", "OPUS"])
def test_transcriptions_of_every_format(server: Served, made, container: str) -> None:
    subtype = "OPUS" if container == "OPUS" else None
    data = encoded(task_sound(1, 0, 2), "OGG" if container == "OPUS" else container, subtype=subtype)
    wanted = evaluated(made, [decode_audio(data, None, 0.02, 30.0)], "Write down what is said.")
    client = server.client()
    found = client.audio.transcriptions.create(model="tiny", file=(f"clip.{container.lower()}", data))
    assert [found.text] == wanted
    text = client.audio.transcriptions.create(model="tiny", file=("clip", data), response_format="text")
    assert text == wanted[0] + "\n"


@pytest.mark.slow
def test_a_long_recording_is_transcribed_in_pieces(server: Served, made) -> None:
    wave = np.concatenate([task_sound(kind % 5, 0, 2) for kind in range(110)])
    data = encoded(wave)
    assert len(wave) > 60 * 16_000
    wanted = evaluated(made, [decode_audio(data, None, 0.02, 100.0)], "Write down what is said.")
    found = server.client().audio.transcriptions.create(
        model="tiny", file=("clip.flac", data), response_format="verbose_json"
    )
    assert [found.text] == wanted
    assert found.segments is not None
    assert [segment.start for segment in found.segments] == [0.0, 30.0, 60.0]
    assert found.duration == pytest.approx(len(wave) / 16_000, abs=1e-3)


def test_models_health_and_metrics(server: Served) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").model_dump()["mowe"]["encoders"][1] == "hubert_one"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "models": ["tiny"]}
    server.client().chat.completions.create(model="tiny", messages=asked(CLIPS[1], "?"))
    httpx.get(f"{server.url}/made/up/by/a/stranger")
    figures = httpx.get(f"{server.url}/metrics").text
    assert 'mowe_requests_total{path="/v1/chat/completions",status="200"}' in figures
    assert 'mowe_encoder_clips_total{encoder="hubert_one",model="tiny"}' in figures
    assert "stranger" not in figures


LONG = np.sin(np.arange(16_000 * 31) / 9).astype(np.float32) / 2
TURN = {"role": "user"}
VOICE = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
NO_BASE64 = [TURN | {"content": [{"type": "input_audio", "input_audio": {"data": "!"}}]}]
ADDRESS = [TURN | {"content": [{"type": "input_audio", "input_audio": {"data": "https://example.com/a.wav"}}]}]
IMAGE = [TURN | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
WHALE = {"extra_body": {"mowe": {"without": ["whale"]}}}
# Messages, options, the error's code, and a part of what it says.
REFUSED = {
    "text renamed .wav": (asked(b"hello " * 99, "?"), {}, "audio_wrong_type", "send wav, mp3"),
    "no samples": (asked(encoded(np.zeros(0, np.float32), "WAV"), "?"), {}, "audio_zero_length", "with samples"),
    "silence": (asked(encoded(np.zeros(16_000, np.float32), "WAV"), "?"), {}, "audio_silent", "nothing can be heard"),
    "an address": (ADDRESS, {}, "invalid_value", "an address is not fetched"),
    "too long": (asked(encoded(LONG), "?"), {}, "audio_too_long", "transcriptions, which takes longer"),
    "cut off": (asked(encoded(LONG[:99_999], "WAV")[:9999], "?"), {}, "audio_truncated", "whole file"),
    "no base64": (NO_BASE64, {}, "invalid_value", "not base64"),
    "unknown format": ([TURN | {"content": [audio_part(b"x", "exe")]}], {}, "unsupported_format", "none of wav"),
    "unknown voice": (asked("?"), VOICE, "unsupported_parameter", "writes one text"),
    "tools": (asked("?"), TOOLS, "unsupported_parameter", "tools"),
    "no messages": ([], {}, "invalid_value", "messages"),
    "unknown role": ([{"role": "robot", "content": "?"}], {}, "invalid_value", "messages.0.role"),
    "an image": (IMAGE, {}, "invalid_value", "messages.0.content.0: Input tag 'image_url'"),
    "unknown encoder": (asked("?"), WHALE, "invalid_value", "only whisper, hubert_one"),
    "too many clips": (asked(*CLIPS[:1] * 17), {}, "invalid_value", "more than 16 clips"),
    "endless text": (asked("why " * 9000), {}, "context_length_exceeded", "shorten the conversation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(server: Served, case: str) -> None:
    messages, options, code, message = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="tiny", messages=messages, **options)
    assert caught.value.code == code
    assert message in caught.value.message
    with pytest.raises(openai.BadRequestError) as streamed:
        server.client().chat.completions.create(model="tiny", messages=messages, stream=True, **options)
    assert streamed.value.code == code


def test_unknown_models_and_paths_are_not_found(server: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt', only tiny"):
        server.client().chat.completions.create(model="gpt", messages=asked("?"))
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt")
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/chat/completions", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"model": "tiny"}', b"[" * 100_000, b'{"model": 1, "messages": 2}'],
)
def test_a_body_that_is_no_request(server: Served, body: bytes) -> None:
    json_type = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=json_type)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    plain = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415  # what a page elsewhere may send without asking


@pytest.mark.slow
def test_forms_that_are_none(server: Served) -> None:
    url = f"{server.url}/v1/audio/transcriptions"
    file = {"file": ("clip.flac", CLIPS[0])}
    cases = [
        (httpx.post(url, json={}), 415, None),
        (httpx.post(url, data={"model": "tiny"}, files={"other": b"x"}), 400, "file"),
        (httpx.post(url, files=file), 400, "model"),
        (httpx.post(url, files=file, data={"model": "tiny", "response_format": "srt"}), 400, "response_format"),
        (httpx.post(url, files=file, data={"model": "tiny", "stream": "true"}), 400, "stream"),
        (httpx.post(url, files={"file": ("clip.wav", b"")}, data={"model": "tiny"}), 400, "file"),
        (httpx.post(url, content=b"--x", headers={"Content-Type": "multipart/form-data; boundary=y"}), 400, None),
        (httpx.post(url, content=b"--x", headers={"Content-Type": "multipart/form-data"}), 400, None),
    ]
    for answer, status, param in cases:
        assert answer.status_code == status, answer.text
        assert param is None or answer.json()["error"]["param"] == param


@pytest.mark.slow
def test_only_who_has_the_token_may_ask(made) -> None:
    with serving({"tiny": made}, token="secret") as server:
        assert server.client("secret").chat.completions.create(model="tiny", messages=asked("?")).choices
        for key in ("x", "Secret", "secrets"):
            answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 401
            assert "Bearer TOKEN" in json.loads(answer.text)["error"]["message"]
        for path, status in (("/", 200), ("/health", 200), ("/metrics", 401), ("/examples", 401), ("/v1/models", 401)):
            assert httpx.get(server.url + path).status_code == status


@pytest.mark.slow
def test_a_large_request_is_refused_before_it_is_read(made) -> None:
    with serving({"tiny": made}, Limits(max_upload_bytes=10_000)) as server:
        with pytest.raises(openai.APIStatusError) as caught:
            server.client().chat.completions.create(model="tiny", messages=asked(encoded(LONG), "?"))
        assert caught.value.status_code == 413
        in_parts = httpx.post(
            f"{server.url}/v1/chat/completions", content=iter([b"x" * 9_000] * 3),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        assert in_parts.status_code == 413


@pytest.mark.slow
def test_too_many_requests_are_told_when_to_come_back(made) -> None:
    with serving({"tiny": made}, Limits(max_in_flight=1, max_new_tokens=8), wait_s=1.5) as server:
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(
                    lambda _: httpx.post(
                        f"{server.url}/v1/chat/completions", json={"model": "tiny", "messages": asked("?")}, timeout=60
                    ),
                    range(4),
                )
            )
        assert sorted(answer.status_code for answer in answers) == [200, 503, 503, 503]
        assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"2"}


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_given_up(made) -> None:
    with serving({"tiny": made}, Limits(timeout_s=0.3), wait_s=60) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().chat.completions.create(model="tiny", messages=asked("?"))
        assert caught.value.status_code == 504
