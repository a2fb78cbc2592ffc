"""The samples of an evaluation on its page: to hear, to read beside the answers, to sort and to filter; confusions.

Cards are markup; the page's script only shows, hides and orders them, and plays one clip at a time.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from mowe_ray.evaluation.report.summary import score, test_set_names, typeset
from mowe_ray.evaluation.results import Clip, Confusion, Evaluation, SampleAnswer, ShownSample
from mowe_ray.output.charts import chips, colour, escape, tag

STYLE = """
.filters { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: end; margin: 14px 0 6px; font-size: 13px; }
.filters label { color: var(--soft); font-size: 12px; }
.filters select, .filters input {
  display: block; font: inherit; font-size: 13px; color: var(--ink); background: var(--paper); padding: 5px 8px;
  border: 1px solid var(--muted); border-radius: 6px; max-width: 100%; min-width: 0; margin-top: 2px; height: 33px;
}
.filters output { color: var(--soft); padding-bottom: 6px; }
.plain {
  font: inherit; font-size: 13px; color: var(--accent); background: none; border: 1px solid var(--rule);
  border-radius: 6px; padding: 5px 12px; cursor: pointer;
}
:is(.plain, .filters select, .filters input, .play, .heat button):focus-visible {
  outline: 2px solid var(--accent); outline-offset: 1px;
}
.sample { border-top: 1px solid var(--rule); padding: 16px 0 18px; }
.sample[hidden] { display: none; }
.sample header { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline; font-size: 13px; }
.sample header b { overflow-wrap: anywhere; }
.sample header span { color: var(--soft); }
.why { border: 1px solid var(--rule); border-radius: 99px; padding: 0 9px; font-size: 12px; }
.sample .asked { margin: 7px 0 5px; overflow-wrap: anywhere; white-space: pre-line; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 10px 32px; }
.side h4 { font-size: 12px; font-weight: 500; color: var(--soft); margin: 0; }
.side h4 i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
.side p { margin: 1px 0 2px; overflow-wrap: anywhere; white-space: pre-line; }
.side small { color: var(--soft); font-size: 12.5px; display: block; }
.sample del { color: var(--bad); text-decoration-thickness: 1.5px; }
.sample ins { background: color-mix(in oklab, var(--accent) 15%, transparent); border-radius: 3px; padding: 0 2px; }
.side .chips { margin: 3px 0 0; font-size: 12.5px; gap: 0 14px; }
.player { display: flex; align-items: center; gap: 12px; margin: 9px 0 2px; max-width: 560px; --at: 0; }
.play {
  flex: none; width: 36px; height: 36px; border-radius: 50%; border: 0; background: var(--accent); color: var(--paper);
  cursor: pointer; padding: 0; display: grid; place-items: center;
}
.play svg { width: 14px; height: 14px; fill: currentColor; }
.play .on, .playing .play .off { display: none; }
.playing .play .on { display: block; }
.wave { position: relative; flex: 1; height: 36px; border-radius: 4px; }
.wave:focus-within { outline: 2px solid var(--accent); outline-offset: 3px; }
.wave svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.wave path { stroke: var(--muted); stroke-width: 1.6; opacity: .6; }
.wave .played { clip-path: inset(0 calc(100% - 100% * var(--at)) 0 0); }
.wave .played path { stroke: var(--accent); opacity: 1; }
.wave input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: pointer; }
.player time { font-size: 12.5px; color: var(--soft); min-width: 34px; }
.heat button { all: unset; cursor: pointer; padding: 7px 14px; margin: -7px -14px; text-decoration: underline dotted; }
.heat td.hit { font-weight: 650; }
"""

SCRIPT = """
(() => {
  const room = document.getElementById("samples");
  const cards = [...room.querySelectorAll(".sample")], form = room.querySelector("form");
  const more = room.querySelector(".more"), chosen = room.querySelector(".chosen"), page = 12;
  let cell = null, most = page;
  const kinds = {
    all: () => true, wrong: card => card.error > 0, right: card => !(+card.error > 0),
    differ: card => card.spread > 0, heard: card => card.heard,
  };
  const update = () => {
    const want = Object.fromEntries(new FormData(form)), words = want.find.toLowerCase();
    const [key, sign] = want.sort.split(" "), groups = Object.keys(want).filter(name => name.startsWith("group "));
    const shown = cards.filter(({dataset: card, textContent}) =>
      (!want.task || card.task === want.task) && (!want.encoder || JSON.parse(card.ran).includes(want.encoder)) &&
      groups.every(name => !want[name] || JSON.parse(card.groups)[name.slice(6)] === want[name]) &&
      kinds[want.show](card) && (!cell || card.cells.split(" ").includes(cell.dataset.cell)) &&
      textContent.toLowerCase().includes(words));
    shown.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]));
    for (const card of cards) card.hidden = true;
    for (const card of shown.slice(0, most)) { card.hidden = false; more.before(card); }
    more.hidden = shown.length <= most;
    chosen.hidden = !cell;
    chosen.textContent = cell ? cell.dataset.pair + " \\u00d7" : "";
    form.querySelector("output").textContent = `${shown.length} of ${cards.length}`;
  };
  form.addEventListener("input", () => { most = page; update(); });
  form.addEventListener("submit", event => event.preventDefault());
  more.addEventListener("click", () => { most += 4 * page; update(); });
  chosen.addEventListener("click", () => { cell = null; update(); });
  for (const button of document.querySelectorAll("[data-cell]")) button.addEventListener("click", () => {
    form.reset();
    cell = button; most = page;
    update();
    room.scrollIntoView();
    chosen.focus({preventScroll: true});
  });
  const sound = new Audio();
  let player = null;
  const draw = () => {
    const seconds = player.dataset.seconds, at = Math.min(1, sound.currentTime / seconds);
    player.classList.toggle("playing", !sound.paused);
    player.style.setProperty("--at", at);
    player.querySelector("input").value = at;
    player.querySelector("time").textContent = `${sound.currentTime.toFixed(1)} s`;
  };
  const load = other => {
    if (player === other) return;
    if (player) { sound.pause(); player.classList.remove("playing"); }
    player = other;
    sound.src = player.dataset.audio;
  };
  for (const kind of ["play", "pause", "ended", "timeupdate", "seeked"]) sound.addEventListener(kind, draw);
  sound.addEventListener("error", () => { player.querySelector("time").textContent = "cannot be played"; });
  for (const each of room.querySelectorAll(".player")) {
    each.querySelector("button").addEventListener("click", () => {
      const stop = player === each && !sound.paused;
      load(each);
      if (stop) sound.pause(); else sound.play().catch(() => {});
    });
    each.querySelector("input").addEventListener("input", event => {
      const at = event.target.value;
      load(each);
      sound.currentTime = at * each.dataset.seconds;
    });
  }
  update();
})();
"""

_KINDS = (
    ("all", "all"),
    ("wrong", "with errors"),
    ("right", "without errors"),
    ("differ", "models differ"),
    ("heard", "with sound"),
)
_SORTS = (
    ("rank 1", "most telling"),
    ("error -1", "most errors"),
    ("error 1", "fewest errors"),
    ("unsure -1", "router least sure"),
    ("seconds -1", "longest"),
)


def samples_view(evaluation: Evaluation) -> str:
    """Return filters and a card for each sample; empty without samples."""
    samples = evaluation.samples
    if not samples:
        return ""
    names = test_set_names((sample.dataset, sample.task) for sample in samples)
    encoders = list(dict.fromkeys(member for model in evaluation.models for member in model.members))
    several = len(evaluation.models) > 1
    menus = [
        _menu("task", "Task", [("", "all"), *((name, name) for name in names.values())])
        if len(names) > 1
        else _no("task"),
        _menu("encoder", "Encoder", [("", "any"), *((name, name) for name in encoders)])
        if encoders
        else _no("encoder"),
        *_group_menus(samples),
        _menu("show", "Show", [kind for kind in _KINDS if several or kind[0] != "differ"]),
        _menu("sort", "Order", [kind for kind in _SORTS if encoders or not kind[0].startswith("unsure")]),
        tag("label", "Words", '<input name="find" type="search" size="12" autocomplete="off">'),
        tag("output"),
        tag("button", class_="plain chosen", type="button", hidden="", title="Show all again"),
    ]
    confused = _confusion_numbers(evaluation)
    colours = {model.name: colour(i) for i, model in enumerate(evaluation.models)} if several else {}
    members = {model.name: {m: colour(i) for i, m in enumerate(model.members)} for model in evaluation.models}
    cards = [
        _card(i, sample, names[sample.dataset, sample.task], confused, colours, members)
        for i, sample in enumerate(samples)
    ]
    more = tag("button", "Show more", class_="plain more", type="button", hidden="")
    return tag("form", *menus, class_="filters") + tag("div", *cards, more)


def _menu(name: str, title: str, options: Sequence[tuple[str, str]]) -> str:
    written = [tag("option", escape(label), value=value) for value, label in options]
    return tag("label", escape(title), tag("select", *written, name=name))


def _group_menus(samples: Sequence[ShownSample]) -> list[str]:
    """Return a menu for each thing that samples are scored apart by, such as category and difficulty."""
    values: dict[str, dict[str, None]] = {}
    for sample in samples:
        for name, value in sample.groups.items():
            values.setdefault(name, {})[value] = None
    return [
        _menu(f"group {name}", name.replace("_", " ").capitalize(), [("", "any"), *((v, v) for v in sorted(found))])
        for name, found in values.items()
        if len(found) > 1
    ]


def _no(name: str) -> str:
    return f'<input type="hidden" name="{name}" value="">'


def _card(
    rank: int,
    sample: ShownSample,
    test_set: str,
    confused: Mapping[tuple[str, str, str], int],
    colours: Mapping[str, str],
    members: Mapping[str, Mapping[str, str]],
) -> str:
    errors = [answer.error for answer in sample.answers]
    cells = [
        f"{confused[key]}-{answer.label[0]}-{answer.label[1]}"
        for answer in sample.answers
        if answer.label is not None and (key := (answer.model, sample.dataset, sample.task)) in confused
    ]
    ran = sorted({member for answer in sample.answers for member, _, on in _deciding(answer) if on})
    length = f"{sample.duration_s:.1f} s" if sample.duration_s else "no audio"
    head = tag(
        "header",
        tag("b", escape(sample.id)),
        tag("span", escape(", ".join([test_set, length, *sample.groups.values()]))),
        tag("span", escape(sample.why), class_="why") if sample.why else "",
        title=sample.where,
    )
    asked = tag("p", escape(sample.instruction), class_="asked") if sample.instruction else ""
    if sample.choices:
        asked += tag("p", escape(f"Choices: {', '.join(sample.choices)}"), class_="note")
    right = tag("h4", "Reference" if len(sample.references) == 1 else "References")
    right += "".join(tag("p", escape(text)) for text in sample.references)
    sides = [tag("div", right, class_="side")]
    sides += [_side(answer, sample.references, colours, members[answer.model]) for answer in sample.answers]
    return tag(
        "article",
        head,
        _player(sample),
        asked,
        tag("div", *sides, class_="sides"),
        class_="sample",
        data_rank=rank,
        data_task=test_set,
        data_error=f"{sum(errors) / len(errors):.4f}",
        data_spread=f"{max(errors) - min(errors):.4f}",
        data_unsure=f"{max(map(_entropy, sample.answers)):.4f}",
        data_seconds=sample.duration_s,
        data_ran=json.dumps(ran),
        data_groups=json.dumps(sample.groups, ensure_ascii=False),
        data_heard="yes" if sample.clip or sample.file else None,
        data_cells=" ".join(cells),
    )


_PLAY = '<svg class="off" viewBox="0 0 14 14" aria-hidden="true"><path d="M3 1l10 6-10 6z"></path></svg>'
_PAUSE = '<svg class="on" viewBox="0 0 14 14" aria-hidden="true"><path d="M2 1h4v12H2zM8 1h4v12H8z"></path></svg>'


def _player(sample: ShownSample) -> str:
    if sample.clip is None:
        return ""
    clip, name = sample.clip, escape(sample.id)
    bars = tag("svg", tag("path", d=_bars(clip)), viewBox=f"0 0 {4 * len(clip.peaks)} 100", preserveAspectRatio="none")
    seek = f'<input type="range" min="0" max="1" step="0.01" value="0" aria-label="Position in {name}">'
    audio = sample.file or f"data:audio/mpeg;base64,{base64.b64encode(clip.mp3).decode()}"
    length = f"{clip.seconds:.1f} s" + (" of it" if clip.is_cut else "")
    return tag(
        "div",
        tag("button", _PLAY, _PAUSE, class_="play", type="button", aria_label=f"Play {sample.id}"),
        tag("div", bars, bars.replace("<svg", '<svg class="played"', 1), seek, class_="wave"),
        tag("time", length),
        class_="player",
        data_audio=audio,
        data_seconds=f"{clip.seconds:.3f}",
    )


def _bars(clip: Clip) -> str:
    return "".join(f"M{4 * i + 2} {50 - max(2, p) / 2:g}V{50 + max(2, p) / 2:g}" for i, p in enumerate(clip.peaks))


def _side(
    answer: SampleAnswer, references: Sequence[str], colours: Mapping[str, str], members: Mapping[str, str]
) -> str:
    mark = tag("i", style=f"background:{colours[answer.model]}") if colours else ""
    head = tag("h4", mark, escape(answer.model if colours else "Answer"))
    scores = ", ".join(f"{title} {typeset(score(value))}" for title, value in answer.scores.items())
    text = tag("p", word_difference(references, answer.answer) or tag("small", "nothing was said"))
    fired = [(members[name], f"{name} {100 * p:.0f} %") for name, p, on in _deciding(answer) if on]
    tip = "\n".join(
        f"{'per clip' if router == 'dependent' else 'every clip'}: "
        + ", ".join(f"{name} {p:.2f}{' (ran)' if on else ''}" for name, p, on in choice)
        for router, choice in answer.routing.items()
    )
    ran = tag("div", chips(fired), data_tip=tip) if fired else ""
    return tag("div", head, text, tag("small", escape(scores)), ran, class_="side")


def _deciding(answer: SampleAnswer) -> list[tuple[str, float, bool]]:
    """Return the choice of the router that looks at the clip, else of the one that does not."""
    return answer.routing.get("dependent") or answer.routing.get("independent") or []


def _entropy(answer: SampleAnswer) -> float:
    return sum(-p * math.log(p) for _, p, _ in answer.routing.get("dependent", []) if 0 < p < 1)


_WORD = re.compile(r"\S+")
_ALIKE = 0.25  # with less in common two texts are not aligned: the marks would say nothing


def word_difference(references: Sequence[str], answer: str) -> str:
    """Mark in an answer what the nearest reference says otherwise: words too many, and struck out those missing.

    Case and punctuation do not count.
    """
    given = _WORD.findall(answer)
    pairs = [
        (SequenceMatcher(None, _bare(words), _bare(given), autojunk=False), words)
        for words in map(_WORD.findall, references)
    ]
    if not pairs:
        return escape(answer)
    matcher, words = max(pairs, key=lambda pair: pair[0].ratio())
    if matcher.ratio() < _ALIKE and len(given) > 1:
        return tag("ins", escape(answer))
    parts = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(escape(" ".join(given[c:d])))
        else:
            parts += [tag("del", escape(" ".join(words[a:b])))] if b > a else []
            parts += [tag("ins", escape(" ".join(given[c:d])))] if d > c else []
    return " ".join(parts)


def _bare(words: Sequence[str]) -> list[str]:
    return [re.sub(r"^\W+|\W+$", "", word.casefold()) or word for word in words]


def _confusion_numbers(evaluation: Evaluation) -> dict[tuple[str, str, str], int]:
    found = [(model.name, one.dataset, one.task) for model in evaluation.models for one in model.confusions]
    return {key: number for number, key in enumerate(found)}


_MOST_LABELS = 24


def confusion_tables(evaluation: Evaluation) -> str:
    """Return for each closed list of labels and each model what was answered where each label was right."""
    numbers = _confusion_numbers(evaluation)
    names = test_set_names((dataset, task) for _, dataset, task in numbers)
    cells: dict[tuple[str, str, str], set[tuple[int, int]]] = {}
    for sample in evaluation.samples:
        for answer in sample.answers:
            if answer.label is not None:
                cells.setdefault((answer.model, sample.dataset, sample.task), set()).add(answer.label)
    figures = []
    for model in evaluation.models:
        for one in model.confusions:
            key = model.name, one.dataset, one.task
            title = ", ".join([model.name] * (len(evaluation.models) > 1) + [names[one.dataset, one.task]])
            if len(one.labels) <= _MOST_LABELS:
                table = _table(one, numbers[key], cells.get(key, set()))
                figures.append(tag("figure", tag("h3", escape(title)), table))
    return tag("div", *figures, class_="two") if figures else ""


def _table(confusion: Confusion, number: int, shown: set[tuple[int, int]]) -> str:
    other = any(row[-1] for row in confusion.counts)
    columns = [*confusion.labels, *(["no label"] if other else [])]
    head = tag("tr", tag("th", "right \\ answered"), *(tag("th", escape(label), scope="col") for label in columns))
    rows = [
        tag(
            "tr",
            tag("th", escape(label), scope="row"),
            *(_cell(confusion, number, i, j, columns[j], shown) for j in range(len(columns))),
        )
        for i, label in enumerate(confusion.labels)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="heat"), class_="wide")


def _cell(confusion: Confusion, number: int, i: int, j: int, column: str, shown: set[tuple[int, int]]) -> str:
    row = confusion.counts[i]
    share = row[j] / max(1, sum(row))
    style = f"background:color-mix(in oklab, var(--{'accent' if i == j else 'bad'}) {45 * share:.0f}%, var(--paper))"
    pair = f"right {confusion.labels[i]}, answered {column}"
    tip = f"{pair}\n{row[j]} of {sum(row)} samples"
    content = escape(row[j]) if row[j] else ""
    if (i, j) in shown:
        content = tag("button", content, type="button", data_cell=f"{number}-{i}-{j}", data_pair=pair)
    return tag("td", content, style=style, data_tip=tip, class_="hit" if i == j else None)
