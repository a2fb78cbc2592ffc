"""Samples put to a server: what is sent, what a refusal costs, and the same answers as in this process."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import CLIP, Turn
from mowe_ray.evaluation.chat_endpoint import ChatEndpoint, EndpointError
from mowe_ray.evaluation.generation import answer_micro_batch
from mowe_ray.evaluation.served_answers import ask_server, conversation
from tests.chat_server import Reply, Request, chat_server
from tests.exported_models import steered_model
from tests.ranks import micro_batch
from tests.serving import serving

LIMITS = {"max_audio_s": 30.0, "chunked_tasks": ["sound"]}


def endpoint(url: str, **settings) -> ChatEndpoint:
    return ChatEndpoint(url, "one", **{"max_retries": 0, "timeout_s": 20.0, "section": "server", **settings})


def wave_of(part: dict) -> np.ndarray:
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])), dtype="float32")
    assert (part["type"], part["input_audio"]["format"], rate) == ("input_audio", "wav", 16_000)
    return wave


def question_of(request: Request) -> str:
    content = request.body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_a_recording_of_16_bits_is_sent_as_it_is():
    samples = np.random.default_rng(0).integers(-20_000, 20_000, 4_000)
    wave = (samples / 32_768).astype(np.float32)
    (message,) = conversation([Turn("user", "What?")], [wave])
    audio, text = message["content"]
    assert text == {"type": "text", "text": "What?"}
    assert np.array_equal(wave_of(audio) * 32_768, samples)


def test_clips_stay_where_the_turns_have_them():
    one, two = np.full(160, 0.25, np.float32), np.full(320, 0.5, np.float32)
    placed = [
        Turn("system", "Be short."),
        Turn("user", f"{CLIP}\nFirst?"),
        Turn("assistant", "a"),
        Turn("user", f"And {CLIP} now?"),
    ]
    system, first, said, second = conversation(placed, [one, two])
    assert (system["content"], said) == ("Be short.", {"role": "assistant", "content": "a"})
    assert [part["type"] for part in first["content"]] == ["input_audio", "text"]
    assert [part.get("text") for part in second["content"]] == ["And ", None, " now?"]
    assert len(wave_of(first["content"][0])) == 160
    assert len(wave_of(second["content"][1])) == 320
    (_, before, _, after) = conversation(
        [turn._replace(text=turn.text.replace(CLIP, "")) for turn in placed], [one, two]
    )
    assert [part["type"] for part in before["content"]] == ["input_audio", "input_audio", "text"]
    assert after["content"] == "And  now?"
    assert conversation([Turn("user", "What?")], []) == [{"role": "user", "content": "What?"}]


def joined(*batches: MicroBatch) -> MicroBatch:
    batch = MicroBatch.joined(batches)
    return replace(
        batch, ids=[f"s{n}" for n in range(len(batch.ids))], instructions=[f"Q{n}" for n in range(len(batch.ids))]
    )


def test_a_refused_sample_is_bad_and_the_others_are_answered():
    batch = joined(micro_batch([0], seed=0), micro_batch([1], seed=1), micro_batch([2], seed=2))

    def script(_number: int, request: Request) -> Reply:
        question = question_of(request)
        return (
            Reply(status=400, body='{"error": {"message": "too loud"}}')
            if question == "Q1"
            else Reply(f" {question}! ")
        )

    with chat_server(script) as server:
        answers, used = ask_server(endpoint(server.url), batch, **LIMITS)
    assert [(answer.id, answer.answer, answer.instruction) for answer in answers] == [
        ("s0", "Q0!", "Q0"),
        ("s2", "Q2!", "Q2"),
    ]
    assert [(bad.id, bad.cause, "too loud" in bad.detail) for bad in used.bad] == [("s1", "refused", True)]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=400, body='{"error": {"message": "no audio here"}}'), r"refuses the question: .*no audio here"),
        (Reply(status=404, body="nobody"), r"^RUN_OR_EXPORT: .* knows no chat model 'one'"),
        (Reply(status=500, body="broken"), r"no reply in 1 try \(server\.max_retries\)"),
        (Reply(status=401, body="who"), r"^server\.api_key_env: "),
    ],
)
def test_a_server_that_answers_nothing_ends_the_evaluation(reply, message):
    batch = joined(micro_batch([0], seed=0), micro_batch([1], seed=1))
    with chat_server(lambda _n, _r: reply) as server, pytest.raises(ValueError, match=message):
        ask_server(endpoint(server.url), batch, **LIMITS)


@pytest.mark.slow
def test_the_first_model_of_a_server_is_found_and_no_server_is_said():
    with serving({"one": steered_model(2)}) as served:
        assert endpoint(f"{served.url}/v1").first_model() == "one"
    with pytest.raises(EndpointError, match=r"^RUN_OR_EXPORT: .* gave no reply"):
        endpoint(f"{served.url}/v1").first_model()


@pytest.mark.slow
def test_answers_of_a_server_are_those_of_the_model_in_this_process():
    model, processor = steered_model(2)
    batch = joined(*(micro_batch([kind], seed=kind or 0) for kind in (0, None, 3, 1)))
    options = {"max_new_tokens": 6, "num_beams": 1, "batch_seconds": 120.0, "max_batch_size": 4}
    long = {"max_audio_s": 0.6, "chunked_tasks": batch.tasks[:1]}
    for limits in (LIMITS, long):
        wanted = answer_micro_batch(model.eval(), processor, batch, **options, **limits)
        with serving({"one": (model, processor)}) as server:
            found, used = ask_server(endpoint(f"{server.url}/v1", max_tokens=6), batch, **limits)
        assert [answer.answer for answer in found] == [answer.answer for answer in wanted]
        assert [answer.duration_s for answer in found] == [answer.duration_s for answer in wanted]
        assert used.bad == []
