"""HTML page of a report: style and script inline, without network requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mowe_ray.output.charts import PALETTE, escape, tag

# The palette is moved in lightness for dark.
STYLE = """
:root { PALETTE
  color-scheme: light dark; --paper: #ffffff; --ink: #1c2126; --soft: #59636e; --muted: #8a949e; --rule: #e3e7ea;
  --wash: #f5f7f8; --accent: #0072b2; --pale: #9cc9e6; --strong: #00395c; --bad: #b3261e;
  --on: #fff; --edge: rgb(0 0 0 / .38);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --ink: #e6eaed; --soft: #a3adb6; --muted: #77828c; --rule: #2b3238; --wash: #1b2026;
    --accent: #4fb0ea; --pale: #24435a; --strong: #a8dcff; --bad: #ff8a80;
    --on: #10151a; --edge: none; --c0: #4fb0ea; --c1: #f0b429;
    --c2: #2cc295; --c3: #de94bb; --c4: #f5813f; --c5: #9bd4f7; --c6: #ddd04a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1060px; margin: 0 auto; padding: 44px 28px 80px; }
h1 { font-size: 17px; font-weight: 500; color: var(--soft); margin: 2px 0 14px; }
h2 { font-size: 19px; font-weight: 650; margin: 0 0 4px; letter-spacing: -.01em; }
h3 { font-size: 15px; font-weight: 650; margin: 0; }
section { margin-top: 44px; padding-top: 20px; border-top: 1px solid var(--rule); }
p { margin: 0 0 10px; max-width: 78ch; }
figure { margin: 0; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--wash); padding: 12px 14px; border-radius: 6px; overflow-x: auto; margin: 8px 0 14px; }
summary { cursor: pointer; color: var(--accent); padding: 4px 0; }
.study {
  font-size: 12px; letter-spacing: .08em; text-transform: uppercase; color: var(--accent); font-weight: 650;
  margin: 0;
}
.answer {
  font-size: 26px; line-height: 1.32; font-weight: 600; letter-spacing: -.015em; margin: 0 0 16px; max-width: 40em;
  text-wrap: pretty;
}
.more { margin: 0; padding: 0 0 0 18px; max-width: 84ch; }
.more li { margin: 0 0 4px; }
.note { font-size: 13px; color: var(--soft); margin: 2px 0 8px; max-width: 100ch; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: 1px; margin: 30px 0 0;
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden;
}
.tiles > div { box-shadow: 0 0 0 1px var(--rule); padding: 13px 16px; }
.tiles b { display: block; font-size: 20px; font-weight: 600; letter-spacing: -.01em; line-height: 1.3; }
.tiles small { font-size: 12.5px; color: var(--soft); display: block; line-height: 1.45; }
.two {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 34px 44px;
  margin-top: 16px;
}
.three {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); gap: 20px 30px;
  margin-top: 16px; align-items: end;
}
.plot { display: block; overflow: visible; width: 100%; }
.plot.framed { width: calc(100% - 64px); margin: 18px 16px 60px 48px; }
.plot.labelled { width: calc(100% - 176px); margin-right: 128px; }
.plot text { font-size: 12px; fill: var(--soft); }
.plot .mid { text-anchor: middle; }
.plot .end { text-anchor: end; }
.plot .label {
  fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round;
}
.plot.parallel { margin-left: 16px; width: calc(100% - 32px); margin-bottom: 34px; }
.plot .minor-axis { font-size: 11.5px; }
.plot .label.minor { fill: var(--soft); font-size: 11.5px; }
.plot .label.key, .plot .label.first { font-weight: 600; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--muted); }
.stretched { overflow: visible; }
.stretched path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.front { stroke: var(--muted); stroke-width: 1.5px; stroke-dasharray: 5 4; opacity: .7; }
.dot { fill: var(--k); stroke: var(--paper); stroke-width: 1px; }
.dot.open { fill: var(--paper); stroke: var(--k); stroke-width: 2px; }
.halo { fill: none; stroke: var(--ink); stroke-width: 1.5px; }
.target { fill: transparent; }
.error { stroke: var(--k); stroke-width: 1.5px; opacity: .75; }
.interval { stroke: var(--k); stroke-width: 3px; stroke-linecap: round; }
.faint { fill: var(--muted); opacity: .38; }
.curve { stroke: var(--k); stroke-width: 1.2px; opacity: .5; }
.way { stroke: var(--k); stroke-width: 1.6px; opacity: .55; }
.way:hover, .way.winner { opacity: 1; stroke-width: 3px; }
.course { stroke: var(--k); stroke-width: 2px; }
.cursor { stroke: var(--muted); stroke-dasharray: 2 3; }
.curve:hover { opacity: 1; stroke-width: 2.5px; }
.curve.winner { stroke-width: 3px; opacity: 1; }
.stop { stroke: var(--k); stroke-width: 2.5px; }
.plot .cross { fill: var(--bad); font-size: 16px; font-weight: 700; }
.effect { break-inside: avoid; max-width: 620px; }
.effect h3 { margin-top: 8px; }
.rows {
  display: grid; grid-template-columns: 38% 1fr 92px; column-gap: 14px; align-items: center;
}
.rows.long { grid-template-columns: fit-content(34%) 1fr 170px; }
.rows.long .name { min-width: 0; }
.name { font-size: 13px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.best { font-weight: 650; color: var(--accent); }
.rows .group { grid-column: 1 / -1; font-size: 13px; font-weight: 650; margin-top: 7px; }
.value { font-size: 12.5px; color: var(--soft); text-align: right; }
.chips { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; margin: 10px 0 0; max-width: none; }
.chips.narrow { display: none; }
.chips.in-row { margin: 0; }
.chips i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.loads {
  display: grid; grid-template-columns: minmax(110px, 36%) 2fr 1fr; gap: 5px 16px; align-items: center;
  margin-top: 12px;
}
.loads .head { font-size: 12px; color: var(--soft); }
.loads .note { margin: 0; }
.loads.told { grid-template-columns: fit-content(32%) 1fr 62px 62px; }
.loads .n { font-size: 12.5px; color: var(--soft); text-align: right; }
.segment { stroke: var(--paper); stroke-width: 1.5px; }
.plot .inside {
  fill: var(--on); font-size: 11px; font-weight: 600; paint-order: stroke; stroke: var(--edge); stroke-width: 2px;
}
.plot.bar, .plot.bar svg { overflow: hidden; }
.wide { overflow-x: auto; margin: 12px 0 0; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 5px 12px 5px 0; text-align: left; white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tbody td { border-bottom: 1px solid var(--rule); }
td.n, th.n { text-align: right; padding: 5px 12px; }
tr.won td { background: color-mix(in oklab, var(--accent) 9%, transparent); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.heat td { text-align: center; padding: 7px 14px; min-width: 82px; border: 2px solid var(--paper); }
.heat th { padding: 7px 14px 7px 0; }
.heat thead th { text-align: center; border: 0; padding: 4px 14px; }
.failed, .worse { color: var(--bad); }
.better { color: var(--accent); }
.alarm {
  border-left: 4px solid var(--bad); background: color-mix(in oklab, var(--bad) 9%, var(--paper)); padding: 9px 14px;
  border-radius: 0 6px 6px 0; margin: 14px 0; max-width: 84ch;
}
.alarm b { color: var(--bad); }
.sets tbody { border-bottom: 1px solid var(--muted); }
.sets th { font-weight: 600; vertical-align: top; }
.sets td, .sets tbody th { border-bottom: 0; padding-top: 6px; padding-bottom: 3px; vertical-align: top; }
.sets small { display: block; color: var(--soft); font-size: 11.5px; line-height: 1.35; font-weight: 400; }
.sets .better small, .sets .worse small { color: inherit; }
.sets .first b { font-weight: 650; }
.sets b { font-weight: 400; }
.stopped { color: var(--soft); }
#tip {
  position: fixed; z-index: 9; display: none; pointer-events: none; white-space: pre-line; max-width: 320px;
  padding: 7px 10px; border-radius: 6px; background: var(--ink); color: var(--paper); font-size: 12.5px;
  line-height: 1.4;
}
[data-tip] { cursor: default; }
@media (max-width: 860px), print { .plot .label.minor { display: none; } }
@media (max-width: 640px) {
  main { padding: 26px 16px 60px; }
  .answer { font-size: 21px; }
  .tiles b { font-size: 18px; }
  .plot .label.key { display: none; }
  .plot.labelled { width: calc(100% - 64px); margin-right: 16px; }
  .plot.labelled .label { display: none; }
  .chips.narrow { display: flex; }
  .loads { grid-template-columns: minmax(80px, 34%) 1fr; }
  .loads:not(.told) > :nth-child(3n) { display: none; }
  .loads.told { grid-template-columns: fit-content(30%) 1fr 50px 46px; column-gap: 8px; }
  .rows, .rows.long { grid-template-columns: 32% 1fr 92px; column-gap: 10px; }
  .rows.long { grid-template-columns: fit-content(34%) 1fr 56px; }
  .value small { display: none; }
  .sets tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 84px; }
}
@media print {
  :root { color-scheme: light; }
  main { max-width: none; padding: 0; }
  #tip { display: none !important; }
  section { margin-top: 22px; }
  figure, .tiles, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .wide { overflow: visible; }
  table { font-size: 9px; }
  .sets small { font-size: 7.5px; }
  .sets th, .sets td, .sets td.n, .sets th.n { padding-left: 3px; padding-right: 3px; white-space: normal; }
  .three { grid-template-columns: repeat(3, 1fr); }
}
""".replace("PALETTE", " ".join(f"--c{i}: {code};" for i, code in enumerate(PALETTE)), 1)

SCRIPT = """
(() => {
  const tip = document.getElementById("tip");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  const follow = (plot, event) => {
    const [label, low, high, curves] = JSON.parse(plot.dataset.curves), box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width, at = low + (high - low) * share;
    const close = (a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a;
    const found = curves.map(([name, points]) => [name, points.reduce(close)]);
    const first = Math.round(found[0][1][0]);
    for (const [key, of] of [["x1", share], ["x2", share], ["y2", 1]]) cursor.setAttribute(key, 100 * of + "%");
    plot.append(cursor);
    return [`${label} ${first}`, ...found.map(([name, [x, y]]) =>
      `${name} ${y}` + (Math.round(x) === first ? "" : ` (${label} ${Math.round(x)})`))].join("\\n");
  };
  const show = event => {
    const mark = event.target.closest?.("[data-tip], [data-curves]");
    tip.style.display = mark ? "block" : "none";
    if (!mark) return cursor.remove();
    tip.textContent = mark.dataset.tip ?? follow(mark, event);
    const box = tip.getBoundingClientRect();
    const below = event.clientY + 18 + box.height < innerHeight;
    tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (below ? event.clientY + 18 : event.clientY - box.height - 12) + "px";
  };
  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
  for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const up = head.ariaSort !== "ascending", at = head.cellIndex;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.ariaSort = up ? "ascending" : "descending";
    const key = row => row.cells[at].dataset.v ?? row.cells[at].textContent;
    const compare = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
      return (up ? 1 : -1) * (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b));
    };
    body.append(...[...body.rows].sort(compare));
  });
})();
"""


def page(title: str, *sections: str, style: str = "", script: str = "") -> str:
    """Return a complete HTML document, with the style and the script of parts that only some pages have."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # browsers ask for one otherwise
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>"
    )
    body = tag("main", *sections) + '<div id="tip" role="tooltip"></div>' + f"<script>{SCRIPT}{script}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def section(title: str, body: str, note: str = "", name: str | None = None) -> str:
    """Put markup under a heading, `title` and `note` being markup too, `name` its id; nothing at all without a body."""
    head = tag("h2", title) + (tag("p", note, class_="note") if note else "")
    return tag("section", head, body, id=name) if body else ""


def folded(figures: Sequence[str], most: int, kind: str) -> str:
    """Put figures into a grid of a kind, `two` or `three` across, those after the first `most` folded away."""
    if not figures:
        return ""
    grid, rest = tag("div", *figures[:most], class_=kind), figures[most:]
    return grid + (tag("details", tag("summary", f"{len(rest)} more"), tag("div", *rest, class_=kind)) if rest else "")


def tiles(contents: Iterable[Sequence[str]]) -> str:
    """Write tiles of (number, lines below it ...)."""
    written = [
        tag("div", tag("b", escape(b)), *(tag("small", escape(line)) for line in lines)) for b, *lines in contents
    ]
    return tag("div", *written, class_="tiles")
