"""What is answered together, and what becomes of those who go away or fail."""

import asyncio
import threading

import httpx
import numpy as np
import pytest

from mowe_ray.serving.batching import Batcher
from mowe_ray.serving.question import Message, Piece, Question, Refused, Reply, Sampling, ask_about
from mowe_ray.serving.served_model import Listener, ServedModel
from tests.exported_models import steered_model, task_sound
from tests.serving import asked, serving


class Recorder(ServedModel):
    """A model that notes its batches, and fails for a question."""

    def __init__(self, made, fails_at: str = "never"):
        super().__init__(*made)
        self.batches: list[list[Question]] = []
        self._fails_at = fails_at

    def answer(self, listeners: list[Listener]) -> None:
        questions = [listener.question for listener in listeners]
        self.batches.append(questions)
        texts = [part for question in questions for part in question.messages[0].parts if isinstance(part, str)]
        if self._fails_at in texts:
            raise RuntimeError("a kernel failed")
        super().answer(listeners)


@pytest.fixture(scope="module")
def made():
    return steered_model(2)


def wave(seconds: float) -> np.ndarray:
    return np.sin(np.arange(round(16_000 * seconds)) / 9).astype(np.float32)


def answers(model: ServedModel, questions: list[Question], **options) -> list[Reply | Exception]:
    """What is heard by those who ask all these at once."""
    batcher = Batcher(model, wait_s=0.2, **options)

    async def ask(question: Question) -> Reply:
        return [heard async for heard in batcher.answer(question)][-1]

    async def ask_all() -> list:
        return await asyncio.gather(*map(ask, questions), return_exceptions=True)

    try:
        return asyncio.run(ask_all())
    finally:
        batcher.close()


@pytest.mark.slow
def test_those_that_go_together_are_answered_together_and_alike(made) -> None:
    short = [ask_about([task_sound(kind, 0, 2)], "What?", max_new_tokens=4 + kind) for kind in range(5)]
    text = [Question((Message("user", ("Hello",)),), 5)]
    long = [ask_about([wave(seconds)], "What?", max_new_tokens=4) for seconds in (20, 20.4, 24)]
    without = [ask_about([task_sound(0, 0, 2)], "What?", max_new_tokens=4, without=("frozen",))]
    drawn = [ask_about([wave(1)], "?", max_new_tokens=4, sampling=Sampling(0.9, 1.0, 5)) for _ in range(2)]
    questions = [*short, *text, *long, *without, *drawn]
    model = Recorder(made)
    together = answers(model, questions)
    assert sorted(len(batch) for batch in model.batches) == [1, 1, 1, 1, 2, 6]
    alone = Recorder(made)
    one_by_one = answers(alone, questions, max_batch_size=1)
    assert len(alone.batches) == len(questions)
    for found, wanted, question in zip(together, one_by_one, questions, strict=True):
        assert isinstance(found, Reply)
        assert (found.text, found.finish_reason) == (wanted.text, wanted.finish_reason)
        assert found.completion_tokens <= question.max_new_tokens
        assert [clip.ran for clip in found.clips] == [clip.ran for clip in wanted.clips]
    assert together[-1].text == together[-2].text


def test_what_a_clip_sounds_like_does_not_depend_on_its_company(made) -> None:
    model = ServedModel(*made)
    # Whisper hears 5 s of one, 7.5 s of the other.
    near, far = (ask_about([wave(seconds)], "?", max_new_tokens=4) for seconds in (2.0, 3.0))
    assert model.padding(near) == {80_000}
    assert model.padding(far) == {120_000}
    assert model.padding(Question((Message("user", ("Hello",)),))) == frozenset()
    recorder = Recorder(made)
    answers(recorder, [near, far, near])
    assert sorted(len(batch) for batch in recorder.batches) == [1, 2]


@pytest.mark.slow
def test_a_batch_holds_no_more_audio_than_allowed(made) -> None:
    model = Recorder(made)
    answers(model, [ask_about([wave(10)], "?", max_new_tokens=1)] * 6, batch_seconds=30)
    assert [len(batch) for batch in model.batches] == [3, 3]


@pytest.mark.slow
def test_what_fails_costs_its_question_alone(made) -> None:
    model = Recorder(made, fails_at="break")
    questions = [ask_about([wave(1)], text, max_new_tokens=3) for text in ("one", "break", "two")]
    found = answers(model, questions)
    assert [isinstance(one, Reply) for one in found] == [True, False, True]
    assert isinstance(found[1], Refused)
    assert (found[1].status, found[1].message) == (500, "the model failed: a kernel failed")


@pytest.mark.slow
def test_who_goes_away_while_waiting_is_not_answered(made) -> None:
    model = Recorder(made)
    batcher = Batcher(model, wait_s=0.3)

    async def ask() -> Reply:
        async def one(text: str) -> Reply:
            return [heard async for heard in batcher.answer(ask_about([wave(1)], text, max_new_tokens=3))][-1]

        gone = asyncio.create_task(one("gone"))
        stays = asyncio.create_task(one("stays"))
        await asyncio.sleep(0.1)
        gone.cancel()
        return await stays

    assert isinstance(asyncio.run(ask()), Reply)
    batcher.close()
    assert [[question.messages[0].parts[1] for question in batch] for batch in model.batches] == [["stays"]]


def test_who_goes_away_in_the_middle_frees_the_model(made) -> None:
    heard: list = []
    model = ServedModel(*made)
    question = ask_about([wave(1)], "What?", max_new_tokens=2000)
    listener = Listener(Question(question.messages, 1000, in_pieces=True), lambda event: hear(event))

    def hear(event) -> None:
        heard.append(event)
        listener.gone = len(heard) >= 3

    model.answer([listener])
    assert 3 <= len(heard) < 6
    assert all(isinstance(event, Piece) for event in heard)


@pytest.mark.slow
def test_a_client_that_hangs_up_frees_its_place(made) -> None:
    from mowe_ray.serving.app import Limits

    with serving({"tiny": made}, Limits(max_new_tokens=1500, max_in_flight=1)) as server:
        body = {"model": "tiny", "messages": asked("Why?"), "stream": True}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            next(stream.iter_lines())
        short = {**body, "stream": False, "max_tokens": 2}
        done = threading.Event()
        for _ in range(100):
            if httpx.post(url, json=short, timeout=60).status_code == 200:
                done.set()
                break
            threading.Event().wait(0.05)
        assert done.is_set()
