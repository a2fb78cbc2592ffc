"""The server's page in a real browser: asked by mouse and by keys, in light and dark, as wide as a telephone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mowe_ray.serving.app import Limits
from mowe_ray.serving.examples import Example
from tests.browser import Tab, browsing, needs_browser
from tests.end_to_end import encoded
from tests.exported_models import TASKS, steered_model, task_sound
from tests.serving import Served, serving

pytestmark = [needs_browser, pytest.mark.slow]

EXAMPLES = [
    Example(f"{task}-0", task, f"The {task} of it?", "go on", encoded(task_sound(kind, 0, 2)))
    for kind, task in enumerate(TASKS)
]
READY = "document.body?.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def made():
    return steered_model(2)


@pytest.fixture(scope="module")
def server(made) -> Iterator[Served]:
    with serving({"one": made, "two": made}, Limits(max_new_tokens=8), examples=EXAMPLES) as server:
        yield server


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with browsing(tmp_path) as tab:
        yield tab


def take_example(tab: Tab, number: int) -> None:
    tab.run(f"document.querySelectorAll('#examples button')[{number}].click()")
    tab.wait("document.getElementById('ticks').children.length")


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_a_clip_is_asked_and_the_encoders_are_seen(server: Served, tab: Tab, width: int, dark: bool) -> None:
    tab.look(width=width, dark=dark)
    tab.visit(f"{server.url}/")
    tab.wait(READY)
    take_example(tab, 1)
    assert tab.run("document.getElementById('text').value") == EXAMPLES[1].question
    tab.run("document.getElementById('other').value = 'two'; document.getElementById('send').click()")
    tab.wait("document.querySelectorAll('.encoders').length === 2")
    assert tab.run("document.querySelector('.right').textContent") == "The right answer: go on"
    newest = "document.querySelectorAll('.pair:first-child article:first-child .ran')"
    ran = f"[...{newest}].map(who => who.textContent).join()"
    assert tab.run(ran) == "hubert_one,wav2vec2"
    # A switch for an encoder, beside its bar: answer again without it.
    tab.run("document.querySelector('[aria-label=\"answer again without hubert_one\"]').click()")
    tab.wait("document.querySelectorAll('.encoders').length === 3")
    assert "hubert_one" not in tab.run(ran)
    assert tab.run("document.querySelector('.left-out').textContent") == "without hubert_one"
    assert tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert tab.console == []
    assert all(url.startswith((server.url, "data:", "blob:")) for url in tab.requests), tab.requests


def test_the_keyboard_is_enough(server: Served, tab: Tab) -> None:
    tab.look()
    tab.visit(f"{server.url}/")
    tab.wait(READY)

    def reach(condition: str) -> None:
        for _ in range(40):
            tab.press("Tab", 9)
            if tab.run(f"Boolean({condition})"):
                return
        raise AssertionError(condition)

    reach("document.activeElement.tagName === 'SUMMARY'")
    tab.press("Enter", 13, "\r")
    reach("document.activeElement.matches('#examples button')")
    tab.press("Enter", 13, "\r")
    tab.wait("document.getElementById('ticks').children.length")
    reach("document.activeElement.matches('#encoders input[value=wav2vec2]')")
    tab.press(" ", 32, " ")
    tab.run("document.getElementById('text').focus()")
    tab.press("Enter", 13, "\r")
    tab.wait("document.querySelectorAll('.encoders').length === 1")
    assert tab.run("document.querySelector('.left-out').textContent") == "without wav2vec2"


def test_what_goes_wrong_is_said_and_a_token_is_asked_for(made, tab: Tab) -> None:
    with serving({"one": made}, token="secret") as server:
        tab.look()
        tab.visit(f"{server.url}/")
        tab.wait(READY)
        assert "token" in tab.run("document.getElementById('problem').textContent")
        assert tab.run("document.getElementById('ask').hidden")
        tab.run("document.getElementById('token').value = 'secret'; document.querySelector('#locked button').click()")
        tab.wait("!document.getElementById('ask').hidden")
        tab.run(
            "(() => { const list = new DataTransfer(); list.items.add(new File(['no audio'], 'clip.wav'));"
            "const input = document.getElementById('file'); input.files = list.files;"
            "input.dispatchEvent(new Event('change')); })()"
        )
        tab.wait("!document.getElementById('heard').hidden")
        tab.run("document.getElementById('send').click()")
        tab.wait("document.querySelector('.said.failed')")
        assert "not an audio file" in tab.run("document.querySelector('.said').textContent")
