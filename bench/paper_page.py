"""The page of the papers' figures: each beside what the papers claim, and the runs it is of."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.paper_runs import Drawn, Plan
from bench.paper_style import save_picture
from bench.report import POLICY, document, write_page
from bench.report_tables import table
from bench.run_records import save_table

# The report's, and pictures that are in the page itself.
PICTURES = POLICY + "; img-src data:"
PANEL = (
    "<style>.paper{display:grid;gap:6px 28px;"
    "grid-template-columns:minmax(0,880px) minmax(16ch,1fr)}"
    ".paper img{width:100%;height:auto;background:#fff;border-radius:4px}"
    ".claim{border-left:4px solid var(--rule);padding-left:12px;align-self:start}"
    ".facts thead{display:none} .facts td{text-align:left;max-width:none}"
    ".claim b{display:block} nav.toc{columns:3 20ch;margin:10px 0 20px}"
    "nav.toc a{display:block;color:var(--run0)}"
    "@media(max-width:900px){.paper{grid-template-columns:minmax(0,1fr)}}</style>"
)


class Entry(NamedTuple):
    """A figure on the page."""

    name: str
    title: str
    claim: str
    drawn: Drawn


def save_figure(name: str, drawn: Drawn, out: Path, also: Sequence[str] = ()) -> None:
    """A figure's numbers as CSV, and its picture as PNG and in the formats of `also`."""
    from matplotlib import pyplot

    if drawn.rows:
        with contextlib.redirect_stdout(io.StringIO()):  # the page names them all
            save_table(drawn.rows, out / f"{name}.csv")
    if drawn.picture is not None:
        save_picture(drawn.picture, out / f"{name}.png", also)
        pyplot.close(drawn.picture)


def _figure(entry: Entry, plan: Plan, out: Path) -> str:
    drawn = entry.drawn
    shown = ""
    if drawn.picture is not None:
        image = base64.b64encode((out / f"{entry.name}.png").read_bytes()).decode()
        alt = html.escape(f"{entry.title}. {drawn.said}")
        shown = f'<img alt="{alt}" src="data:image/png;base64,{image}">'
    if drawn.table is not None:
        head, rows = drawn.table
        escaped = [[html.escape(row[0]), *row[1:]] for row in rows]
        shown += table([html.escape(text) for text in head], escaped)
    return (
        f'<h2 id="{entry.name}">{html.escape(entry.title)}</h2><div class="paper">'
        f"<div>{shown}<p>{html.escape(drawn.said)}</p>{_source(entry, plan)}</div>"
        f'<div class="claim"><b>The papers</b>{html.escape(entry.claim)}</div></div>'
    )


def _source(entry: Entry, plan: Plan) -> str:
    """Where a figure's numbers come from."""
    if entry.drawn.jobs:
        names = sorted({job.name for job in entry.drawn.jobs})
        what = (
            f"{len(names)} kinds of runs of {plan.num_train:,} inputs, seeds "
            f"{', '.join(map(str, plan.seeds))}"
        )
        listed = ", ".join(f"{name}-seed*" for name in names)
        runs = f"<details><summary>Runs: {html.escape(what)}</summary>{html.escape(listed)}"
        runs += " below runs/</details>"
    elif entry.drawn.rows and entry.name != "scaling":
        runs = f"Measured on the {plan.num_train:,} training inputs. "
    else:
        runs = ""
    if entry.drawn.rows:
        runs += f'Numbers: <a href="{entry.name}.csv">{entry.name}.csv</a>'
    return f'<div class="soft">{runs}</div>'


def write(entries: Sequence[Entry], plan: Plan, about: dict[str, Any]) -> Path:
    """Write the page into the plan's folder; `about` is said at its top."""
    listed = "".join(f'<a href="#{entry.name}">{html.escape(entry.title)}</a>' for entry in entries)
    facts = table(["", ""], [[html.escape(name), str(value)] for name, value in about.items()])
    body = "".join(_figure(entry, plan, plan.out) for entry in entries)
    path = plan.out / "index.html"
    contents = f'{PANEL}<div class="facts">{facts}</div><nav class="toc">{listed}</nav>{body}'
    write_page(path, document("The papers' figures", contents, PICTURES))
    return path
