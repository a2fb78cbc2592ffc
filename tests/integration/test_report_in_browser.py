"""The reports in a real browser: no message on the console, nothing asked of the network, charts and script at work."""

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from mowe_ray.evaluation.report.page import report as evaluation_report
from mowe_ray.sweeping.report.page import report
from tests.browser import browsing, needs_browser, opened, serving
from tests.made_evaluation import EVALUATIONS
from tests.made_study import histories, planted_study

pytestmark = needs_browser


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """Serves the test's folder."""
    with serving(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def html() -> str:
    """The report of a made-up study."""
    config, made = planted_study()
    return report(config, made, histories(made), "model:\n  router:\n    top_k: 2\n", elapsed_s=5400.0)


def test_report_asks_for_nothing_and_complains_of_nothing(
    html: str, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    page = opened(html, server, tmp_path)
    assert page.console == []
    assert page.requests == [f"http://127.0.0.1:{server.server_port}/report.html"]
    assert page.dom.count('role="img"') > 20
    assert page.dom.count('class="curve') == 31 + 32  # the failed trial has no validation
    assert "matters most in a pool" in page.dom


@pytest.mark.parametrize("name", ["three models", "with samples", "collapsed", "many datasets", "empty"])
def test_an_evaluation_asks_for_nothing_and_complains_of_nothing(
    name: str, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    page = opened(evaluation_report(EVALUATIONS[name]), server, tmp_path)
    assert page.console == []
    assert page.requests == [f"http://127.0.0.1:{server.server_port}/report.html"]
    assert page.dom.count('role="img"') == evaluation_report(EVALUATIONS[name]).count('role="img"')
    assert page.dom.count('role="alert"') == (4 if name == "collapsed" else 0)


@pytest.mark.parametrize("name", ["with samples", "many datasets"])
def test_no_evaluation_is_wider_than_a_telephone(name: str, server: ThreadingHTTPServer, tmp_path: Path) -> None:
    act = """<script>
      document.currentScript.remove();
      const frame = document.createElement("iframe");
      frame.style.width = "390px";
      frame.srcdoc = document.documentElement.outerHTML;
      frame.onload = () => {
        const inside = frame.contentDocument.documentElement;
        document.body.dataset.beyond = inside.scrollWidth - inside.clientWidth;
      };
      document.body.append(frame);
    </script></body>"""
    page = opened(evaluation_report(EVALUATIONS[name]).replace("</body>", act, 1), server, tmp_path)
    assert page.dom.split('data-beyond="')[1].split('"')[0] == "0"


@pytest.mark.parametrize(
    "flaw",
    [
        '<script src="http://example.invalid/x.js"></script>',
        '<img src="https://example.invalid/x.png">',
        "<style>@font-face { font-family: x; src: url(//example.invalid/x.woff) } body { font-family: x }</style>",
        '<link rel="stylesheet" href="beside.css">',
    ],
)
def test_a_page_that_asks_is_noticed(flaw: str, html: str, server: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert len(opened(html.replace("</body>", f"{flaw}</body>"), server, tmp_path).requests) > 1


@pytest.mark.parametrize("flaw", ["nowhere.at.all();", "console.warn('hm')", "throw new Error('oh')"])
def test_a_page_that_complains_is_noticed(flaw: str, html: str, server: ThreadingHTTPServer, tmp_path: Path) -> None:
    page = opened(html.replace("</body>", f"<script>{flaw}</script></body>"), server, tmp_path)
    assert len(page.console) == 1


def test_headings_sort_and_marks_explain_themselves(html: str, server: ThreadingHTTPServer, tmp_path: Path) -> None:
    act = """<script>
      const heads = [...document.querySelectorAll("th button")];
      const score = heads.find(head => head.textContent === "score");
      score.click();
      const column = () => [...document.querySelectorAll("tbody tr")].filter(row => row.cells.length > 5)
        .map(row => row.cells[score.parentElement.cellIndex].dataset.v);
      const up = column().join(" ");
      score.click();
      const mark = document.querySelector("[data-tip]");
      mark.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 9, clientY: 9}));
      document.body.dataset.up = up;
      document.body.dataset.down = column().join(" ");
      document.body.dataset.shown = document.getElementById("tip").textContent === mark.dataset.tip;
    </script></body>"""
    page = opened(html.replace("</body>", act), server, tmp_path)
    assert page.console == []
    attributes = dict(part.split("=", 1) for part in page.dom.split("<body ")[1].split(">")[0].split('" '))
    up, down = ([float(v) for v in attributes[f"data-{way}"].strip('"').split()] for way in ("up", "down"))
    assert len(up) == 31  # one has no score; it stays at the end
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert attributes["data-shown"].strip('"') == "true"


def test_samples_are_played_sought_filtered_and_reached_from_a_confusion(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text(evaluation_report(EVALUATIONS["with samples"]), encoding="utf-8")
    with browsing(tmp_path) as tab:
        tab.look(width=390, dark=True)
        tab.visit(f"http://127.0.0.1:{server.server_port}/report.html")
        tab.wait("document.querySelector('#samples output')?.textContent === '17 of 17'")
        tab.run("document.querySelector('.play').focus()")
        tab.press("Enter", 13, "\r")
        tab.wait("document.querySelector('.playing time')?.textContent > '0.2'")
        assert tab.run("document.querySelector('.playing .play').ariaLabel").startswith("Play ")
        tab.run("""(() => { const seek = document.querySelector(".playing input"); seek.value = 0.8;
                seek.dispatchEvent(new Event("input", {bubbles: true})); })()""")
        tab.wait("!document.querySelector('.playing')")  # it has come to its end
        shown = "[...document.querySelectorAll('.sample:not([hidden])')]"
        tab.run("""(() => { const form = document.querySelector("#samples form"); form.task.value = "asr";
                form.show.value = "differ"; form.dispatchEvent(new Event("input")); })()""")
        kept = tab.run(f"{shown}.map(card => [card.dataset.task, card.dataset.spread > 0])")
        assert kept == [["asr", True]] * 5
        tab.run("""(() => { const form = document.querySelector("#samples form"); form.reset();
                form["group difficulty"].value = "hard"; form.dispatchEvent(new Event("input")); })()""")
        assert sorted(tab.run(f"{shown}.map(card => card.querySelector('b').textContent)")) == [
            "er-1", "er-3", "er-5", "er-7",
        ]  # fmt: skip
        pair = tab.run("""(() => { const cell = document.querySelector("[data-cell]:not(.hit *)"); cell.click();
                return [cell.textContent, cell.dataset.pair + " \\u00d7"]; })()""")
        assert tab.run(f"[String({shown}.length), document.activeElement.textContent]") == pair
        assert tab.run("document.documentElement.scrollWidth") == 390
        assert tab.console == []
        assert [url for url in tab.requests if not url.startswith("data:")] == [
            f"http://127.0.0.1:{server.server_port}/report.html"
        ]
