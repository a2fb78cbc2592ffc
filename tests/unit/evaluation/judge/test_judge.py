import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from uuid import uuid4

import numpy as np
import pytest

from mowe_ray.evaluation.chat_endpoint import ChatEndpoint, EndpointError
from mowe_ray.evaluation.judge.judge import Judge, judge_question, verdict
from mowe_ray.evaluation.metrics.registry import JUDGED_SCALES, JUDGED_TASKS, judged_metric
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.output.run_folder import RunFolder
from tests.chat_server import ChatServer, Reply, Request, chat_server

FILE = "judgements/clips.jsonl"
KEY = "sk-very-secret-0123456789"
KEY_NAME = "MOWE_RAY_TEST_JUDGE_KEY"


def answer(number: int, text: str | None = None) -> Answer:
    return Answer(f"s{number}", "aqa", f"What barks in clip {number}?", text or f"a dog {number}", ["a dog"])


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path) if request.param == "local" else f"memory://{uuid4()}", "evaluation")


@pytest.fixture
def local(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path), "evaluation")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def judge(local, said):
    """Makes a judge that asks a server."""

    def make(
        server: ChatServer | str, folder: RunFolder = local, log_every_s: float = 10.0, clock=time.monotonic, **settings
    ) -> Judge:
        url = server if isinstance(server, str) else server.url
        settings = {"api_key_env": KEY_NAME, "timeout_s": 5.0, "max_retries": 1, **settings}
        return Judge(ChatEndpoint(url, "judge-8b", **settings), folder, "clips", said.append, log_every_s, clock)

    return make


def failing_first(reply: Reply):
    """The first request gets `reply`, the others a rating of 4."""
    return lambda number, _request: reply if number == 0 else Reply()


# --- What is asked, and what becomes of the reply


def test_a_grade_is_asked_for_at_temperature_0_and_read(judge):
    replies = {"right": "Explanation: same.\nRating: 5", "half": "Explanation: partly.\nRating: 3", "odd": "No idea."}

    def script(_number: int, request: Request) -> Reply:
        return Reply(next(reply for text, reply in replies.items() if f"\n{text}\n" in request.question))

    answers = [answer(i, text) for i, text in enumerate(["half", "right", "odd", "half"])]
    with chat_server(script) as server:
        verdicts = judge(server).scores(answers, "graded")
    assert [v.score for v in verdicts] == [0.6, 1.0, 0.0, 0.6]
    assert [v.ok for v in verdicts] == [True, True, False, True]
    assert [v.reply for v in verdicts] == [replies[a.answer] for a in answers]
    assert len(server.requests) == 4
    for request in server.requests:
        assert request.path == "/v1/chat/completions"
        assert request.body["temperature"] == 0
        assert request.body["model"] == "judge-8b"
        assert [m["role"] for m in request.body["messages"]] == ["user"]


def test_the_question_shows_all_that_the_judge_needs():
    shown = Answer("x", "ac", "Describe {it}.", "a cat {0}", ["a dog barks", "barking"])
    graded, binary = judge_question(shown, "graded"), judge_question(shown, "binary")
    for text in (shown.instruction, shown.answer, *shown.references):
        assert f">\n{text}\n<" in graded
        assert f">\n{text}\n<" in binary
    assert re.findall(r"^(\d):", graded, re.MULTILINE) == ["0", "1", "2", "3", "4", "5"]
    assert re.findall(r"^(\d):", binary, re.MULTILINE) == ["0", "1"]


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Explanation: fine.\nRating: 4", 4),
        ("Explanation: fine. Rating: (3)", 3),
        ("**Explanation:** x\n\n**Rating:** **2**\n", 2),
        ("RATING: 4/5", 4),
        ("Rating (0-5): 1 out of 5.", 1),
        ("<think>maybe Rating: 1?</think>\nExplanation: better.\nRating: 5\n", 5),
        ("Explanation: 3 dogs instead of 2.\nRating: 0", 0),
        ("Rating:\n 4.5 ", 4.5),
        ("4", 4),
        ("It is close.\n(4).", 4),
        ("", None),
        ("Rating: 6", None),
        ("Rating: -1", None),
        ("Rating: 3-4", None),
        ("Rating: 10", None),
        ("Rating: four", None),
        ("Rating: (a whole number from 0 to 5)", None),
        ("The reference has 3 dogs, the answer 2.", None),
        ("I cannot help with that.", None),
    ],
)
def test_ratings_of_any_shape_are_read_and_no_other_number_is(reply, rating):
    found = verdict(reply, "graded")
    assert found.ok == (rating is not None)
    assert found.score == (rating or 0) / 5
    assert found.reply == reply


@pytest.mark.parametrize(("reply", "score"), [("Rating: 1", 1.0), ("Rating: 0", 0.0), ("Rating: 1/1", 1.0)])
def test_a_binary_rating_is_0_or_1(reply, score):
    assert verdict(reply, "binary").score == score
    assert verdict(reply, "binary").ok
    for outside in ("Rating: 0.5", "Rating: 2", "Rating: 5"):
        assert not verdict(outside, "binary").ok
        assert verdict(outside, "binary").score == 0.0


# --- The metrics


@pytest.mark.slow
def test_the_metrics_are_audiobenchs(judge):
    rng = random.Random(3)
    ratings = [rng.choice(["0", "1", "2", "3", "4", "5", "no"]) for _ in range(60)]
    answers = [answer(i) for i in range(60)]

    def script(_number: int, request: Request) -> Reply:
        clip = int(re.search(r"clip (\d+)", request.question)[1])
        return Reply(f"Rating: {ratings[clip]}")

    with chat_server(script) as server:
        graded = judged_metric("judge", judge(server))
        binary = judged_metric("judge_binary", judge(server))
        grades = [0 if r == "no" else int(r) for r in ratings]
        assert graded.of(answers) == pytest.approx(20 * sum(grades) / 60, abs=1e-9)
        assert binary.of(answers) == pytest.approx(100 * ratings.count("1") / 60, abs=1e-9)
        assert (graded.name, binary.name, graded.better) == ("judge", "judge_binary", "higher")
        failed = ratings.count("no")
        assert graded.note(answers) == f"judged by judge-8b; {failed} of 60 replies had no rating and count 0"
        asked = len(server.requests)
        rows = graded.statistics(answers)
        assert rows.shape == (60, 2)
        some = [rng.randrange(60) for _ in range(60)]
        resampled = graded.value(np.stack([rows, rows[some]]).sum(1))
        assert resampled == pytest.approx([20 * np.mean(grades), 20 * np.mean(np.array(grades)[some])])
        assert graded.statistics([]).shape == (0, 2)
    assert asked == len(server.requests) == 120, "every further use of a verdict is free"


def test_a_note_names_the_judge_even_if_all_is_well(judge):
    with chat_server() as server:
        assert judged_metric("judge", judge(server)).note([answer(0)]) == "judged by judge-8b; all replies had a rating"


def test_each_task_has_the_scale_audiobench_gives_it():
    scales = {task: JUDGED_SCALES[name] for task, name in JUDGED_TASKS.items()}
    assert scales == {"ac": "graded", "aqa": "graded", "sqa": "graded", "er": "binary"}


# --- A server that misbehaves


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=500, body="oops"),
        Reply(status=503, body='{"error": {"message": "loading"}}'),
        Reply(body="<html>gateway</html>", headers={"Content-Type": "text/html"}),
        Reply(body="{not json"),
        Reply(body='{"error": {"message": "busy"}}'),
        Reply(body='{"choices": []}'),
        Reply(body='{"choices": [{"message": {"content": 4}}]}'),
        Reply(delay_s=1.0),
    ],
    ids=["500", "503", "html", "no json", "error with 200", "no choices", "a number", "slow"],
)
def test_a_passing_failure_is_tried_again(judge, reply):
    with chat_server(failing_first(reply)) as server:
        (found,) = judge(server, timeout_s=0.3).scores([answer(0)], "graded")
    assert found.score == 0.8
    assert len(server.requests) == 2


@pytest.mark.slow
def test_the_pause_the_server_asks_for_is_kept(judge):
    limited = Reply(status=429, body='{"error": {"message": "slow down"}}', headers={"Retry-After": "1.2"})
    with chat_server(failing_first(limited)) as server:
        assert judge(server).scores([answer(0)], "graded")[0].ok
    first, second = server.requests
    assert second.at - first.at >= 1.2, "our own first pause is at most 0.5 s"


@pytest.mark.slow
def test_pauses_grow(judge):
    with chat_server(lambda n, _r: Reply(status=500, body="") if n < 3 else Reply()) as server:
        assert judge(server, max_retries=3).scores([answer(0)], "graded")[0].ok
    at = [request.at for request in server.requests]
    pauses = [b - a for a, b in itertools.pairwise(at)]
    assert 0.3 < pauses[0] < pauses[1] < pauses[2]


def test_a_text_without_rating_counts_0_and_is_not_asked_again(judge, local):
    replies = ["Woof, woof.", "Rating: 7", None]
    with chat_server(lambda n, _r: Reply(replies[n])) as server:
        found = judge(server).scores([answer(i) for i in range(3)], "graded")
        assert [(v.score, v.ok) for v in found] == [(0.0, False)] * 3
        assert judge(server).scores([answer(i) for i in range(3)], "graded") == found
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=500, body="broken"), r"^judge\.base_url: .* no reply in 2 tries \(judge\.max_retries\).*500"),
        (Reply(delay_s=1.0), r"^judge\.base_url: .* no reply in 2 tries .*timed out"),
        (Reply(status=429, body="later"), r"^judge\.base_url: .* no reply in 2 tries"),
        (Reply(body="<html>hello</html>"), r"^judge\.base_url: .* not with chat completions: <html>hello</html>"),
    ],
    ids=["500", "slow", "429", "html"],
)
def test_a_server_that_is_always_down_stops_the_evaluation(judge, reply, message):
    with chat_server(lambda _n, _r: reply) as server, pytest.raises(EndpointError, match=message):
        judge(server, timeout_s=0.2).scores([answer(0)], "graded")
    assert len(server.requests) == 2


def test_nobody_at_the_address(judge):
    with chat_server() as server:
        pass
    with pytest.raises(ValueError, match=r"^judge\.base_url: http://127.0.0.1:\d+/v1 gave no reply in 1 try .*onnect"):
        judge(server.url, max_retries=0).scores([answer(0)], "graded")
    for address in ("localhost:8000/v1", "ftp://host/v1", "http:///v1"):
        with pytest.raises(ValueError, match=r"^judge\.base_url: must be like http://localhost:8000/v1, got"):
            judge(address)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, r"^judge\.model: 'judge-8b' at http.* refuses the question: .*the reason"),
        (401, rf"^judge\.api_key_env: http.* refuses the key in {KEY_NAME}: .*the reason"),
        (403, rf"^judge\.api_key_env: http.* refuses the key in {KEY_NAME}: .*the reason"),
        (404, r"^judge\.model or judge\.base_url: http.* knows no chat model 'judge-8b': .*the reason"),
    ],
)
def test_what_no_retry_would_change_is_not_tried_again(judge, monkeypatch, status, message):
    monkeypatch.setenv(KEY_NAME, KEY)
    refusal = Reply(status=status, body='{"error": {"message": "the reason"}}')
    with chat_server(lambda _n, _r: refusal) as server, pytest.raises(EndpointError, match=message):
        judge(server, max_retries=5, concurrency=1).scores([answer(i) for i in range(9)], "graded")
    assert len(server.requests) == 1


# --- The key


@pytest.mark.slow
def test_the_key_is_sent_and_appears_nowhere_else(judge, local, said, monkeypatch, caplog):
    monkeypatch.setenv(KEY_NAME, f"{KEY}\n")
    echo = json.dumps({"error": {"message": f"wrong key: {KEY}"}})
    with chat_server(lambda n, _r: Reply() if n < 2 else Reply(status=401, body=echo)) as server, caplog.at_level(0):
        asking = judge(server, concurrency=1, log_every_s=0)
        with pytest.raises(EndpointError) as refused:
            asking.scores([answer(i) for i in range(3)], "graded")
        server.script = lambda _n, _r: Reply(body=echo)
        with pytest.raises(EndpointError) as rubbish:
            asking.scores([answer(i) for i in range(3)], "graded")
    assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in server.requests)
    assert "(the key)" in str(refused.value)
    assert "(the key)" in str(rubbish.value)
    assert refused.value.__cause__ is rubbish.value.__cause__ is None
    assert said
    assert caplog.text, "the client library does log"
    for text in (str(refused.value), str(rubbish.value), caplog.text, *said, local.read_text(FILE), repr(vars(asking))):
        assert KEY not in text


def test_local_servers_need_no_key(judge, monkeypatch):
    monkeypatch.delenv(KEY_NAME, raising=False)
    with chat_server() as server:
        assert judge(server).scores([answer(0)], "graded")[0].ok
        server.script = lambda _n, _r: Reply(status=401, body="who are you")
        with pytest.raises(EndpointError, match=rf"without a key, and there is none in {KEY_NAME}: .*who are you"):
            judge(server).scores([answer(1)], "graded")


def test_a_key_that_cannot_be_sent(judge, monkeypatch):
    for value in ("schlüssel", "two\nlines"):
        monkeypatch.setenv(KEY_NAME, value)
        with pytest.raises(EndpointError, match=rf"^judge\.api_key_env: {KEY_NAME} holds") as error:
            judge("http://localhost:1/v1").scores([answer(0)], "graded")
        assert value not in str(error.value)


# --- How much is asked


@pytest.mark.slow
def test_some_questions_are_on_their_way_at_a_time_and_never_more(judge):
    with chat_server(lambda _n, _r: Reply(delay_s=0.1)) as server:
        judge(server, concurrency=3).scores([answer(i) for i in range(12)], "graded")
    assert server.most_in_flight == 3
    assert len(server.requests) == 12


@pytest.mark.slow
def test_equal_questions_are_asked_once(judge, local):
    answers = [answer(0), answer(1), answer(0)]
    with chat_server() as server:
        assert [v.score for v in judge(server).scores(answers, "graded")] == [0.8] * 3
        assert len(server.requests) == 2
        judge(server).scores([answer(0, "another answer")], "graded")
        judge(server).scores([answer(0)], "binary")
        other = Answer(**{**vars(answer(0)), "references": ["a cat"]})
        judge(server).scores([other], "graded")
        Judge(ChatEndpoint(server.url, "another judge"), local, "clips", print).scores([answer(0)], "graded")
        assert len(server.requests) == 6, "another answer, scale, reference and judge: another question"


@pytest.mark.slow
def test_a_second_run_asks_nothing(judge, folder):
    answers = [answer(i) for i in range(10)]
    with chat_server(lambda n, _r: Reply(f"Ünïcode\u2028 and\n lines. Rating: {n % 6}")) as server:
        first = judge(server, folder).scores(answers, "graded")
        assert len(server.requests) == 10
    assert judge(server, folder).scores(answers, "graded") == first, "nobody is there to ask"
    lines = folder.read_text(FILE).splitlines(keepends=True)
    assert sorted(json.loads(line)["id"] for line in lines) == [f"s{i}" for i in range(10)]
    random.Random(1).shuffle(lines)
    folder.write_text(FILE, "".join(lines))
    assert judge(server, folder).scores(answers[::-1], "graded") == first[::-1]


def test_every_judgement_is_saved_at_once_where_files_can_grow(judge, folder):
    seen = []

    def script(_number: int, _request: Request) -> Reply:
        seen.append(len(folder.read_lines(FILE)))
        return Reply()

    with chat_server(script) as server:
        judge(server, folder, concurrency=1).scores([answer(i) for i in range(4)], "graded")
    assert seen == ([0, 1, 2, 3] if folder.local_path(FILE) else [0, 0, 0, 0])
    assert len(folder.read_lines(FILE)) == 4


@pytest.mark.slow
def test_a_half_written_line_is_dropped_and_asked_again(judge, folder):
    answers = [answer(i) for i in range(4)]
    with chat_server() as server:
        judge(server, folder).scores(answers, "graded")
        whole = "".join(folder.read_lines(FILE))
        folder.write_lines(FILE, [whole[:-20]])
        assert all(v.ok for v in judge(server, folder).scores(answers, "graded"))
        assert len(server.requests) == 5
    assert len([json.loads(line) for line in folder.read_lines(FILE)]) == 4


def test_a_failure_keeps_what_was_judged(judge, folder):
    answers = [answer(i) for i in range(8)]
    with chat_server(lambda n, _r: Reply() if n < 5 else Reply(status=500, body="")) as server:
        kept = (
            rf"\n5 of 8 answers of clips were judged and are kept in {re.escape(folder.path(FILE))}: the same command"
        )
        with pytest.raises(EndpointError, match=kept):
            judge(server, folder, concurrency=1, max_retries=0).scores(answers, "graded")
        server.script = lambda _n, _r: Reply()
        before = len(server.requests)
        judge(server, folder).scores(answers, "graded")
        assert len(server.requests) - before == 3


def test_one_failure_gives_up_what_is_on_its_way(judge):
    with chat_server(lambda n, _r: Reply(status=400, body="no") if n == 1 else Reply(delay_s=3)) as server:
        begin = time.monotonic()
        with pytest.raises(EndpointError, match=r"^judge\.model"):
            judge(server, concurrency=2).scores([answer(i) for i in range(9)], "graded")
        assert time.monotonic() - begin < 2.5, "the slow reply is not waited for"
    assert len(server.requests) == 2


KILLED = """
import signal
import sys
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.chat_endpoint import ChatEndpoint
from mowe_ray.evaluation.judge.judge import Judge
from mowe_ray.output.run_folder import RunFolder
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
answers = [Answer(f"s{i}", "aqa", f"What barks in clip {i}?", f"a dog {i}", ["a dog"]) for i in range(12)]
endpoint = ChatEndpoint(sys.argv[1], "judge-8b", concurrency=2)
Judge(endpoint, RunFolder(sys.argv[2], "evaluation"), "clips", print).scores(answers, "graded")
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(judge, local, by):
    stuck = threading.Event()

    def script(number: int, _request: Request) -> Reply:
        if number < 6:
            return Reply()
        stuck.set()
        return Reply(delay_s=30)

    with chat_server(script) as server:
        child = subprocess.Popen([sys.executable, "-c", KILLED, server.url, local.storage], stderr=subprocess.DEVNULL)
        try:
            assert stuck.wait(30)
            while len(local.read_text(FILE).splitlines()) < 6 or len(server.requests) < 8:
                time.sleep(0.01)
            os.kill(child.pid, by)
            assert child.wait(10) != 0
        finally:
            child.kill()
        server.script = lambda _n, _r: Reply()
        before = len(server.requests)
        assert before == 8, "six replies, and two on their way"
        assert len(judge(server).scores([answer(i) for i in range(12)], "graded")) == 12
        assert len(server.requests) - before == 6
    assert len(local.read_text(FILE).splitlines()) == 12


@pytest.mark.slow
def test_progress_has_a_rate_and_the_time_left(judge, said):
    answers = [answer(i) for i in range(8)]
    with chat_server(lambda _n, _r: Reply()) as server:

        def clock() -> float:  # a question takes 5 s
            return 5.0 * len(server.requests)

        judge(server, concurrency=1, log_every_s=12, clock=clock).scores(answers, "graded")
        assert said == [
            "judging clips: 3 of 8 answers, 0.2/s, 25s left",
            "judging clips: 6 of 8 answers, 0.2/s, 10s left",
            "judging clips: 8 answers, 0.2/s, 40s",
        ]
        said.clear()
        judge(server).scores(answers, "graded")
        assert said == [], "nothing was asked"
        judge(server, clock=lambda: 0.0).scores(answers, "binary")
        assert said == ["judging clips: 8 answers, 0s"], "the end is always said"
