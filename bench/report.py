"""One HTML page of one or several runs: results, curves, calibration, drops, times, settings.

    python -m bench.report runs/baseline-20261126-120000 runs/mine --output page.html

A run is its folder, its `log.jsonl`, or a folder of runs, finished or not. Everything on the page
comes from the logs; it asks nothing of the network, runs no script, and can be sent as it is.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/report.py`

from bench import report_tables as tables  # noqa: E402
from bench.report_charts import Line, bars, line_chart  # noqa: E402
from bench.report_runs import Run, find_runs  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.runtime import sync_file  # noqa: E402

STYLE = Path(__file__).with_name("report.css")
# Nothing but the page's own style: what a log says cannot run or load.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
CURVES = (
    ("evaluation", "auc", "Test AUC"),
    ("evaluation", "log_loss", "Test log loss"),
    ("validation", "auc", "Validation AUC"),
    ("validation", "log_loss", "Validation log loss"),
    ("training", "loss", "Training loss"),
)
AXES = ("inputs trained", "seconds of training")


def curves(runs: Sequence[Run]) -> str:
    """A chart a value and axis, of what has a curve in any of the runs."""
    charts = []
    for kind, value, title in CURVES:
        for by_time, axis in enumerate(AXES):
            lines = [Line(run.name, run.place, run.curve(kind, value, by_time > 0)) for run in runs]
            if any(len(line.points) > 1 for line in lines):
                charts.append(line_chart(title, lines, axis))
    said = "<p>No curve was logged: --test-freq, --val-freq and --print-freq give one.</p>"
    if charts:
        said = '<p class="soft">The first tenth of a curve may lie outside its frame.</p>'
    return f'{said}<div class="charts">{"".join(charts)}</div>'


def calibration(runs: Sequence[Run]) -> str:
    """Shares of clicks against mean predictions of groups of as many test inputs."""
    lines = [
        Line(run.name, run.place, [(mean, rate) for _, mean, rate in run.reliability()])
        for run in runs
    ]
    if not any(line.points for line in lines):
        return "<p>No reliability table was logged: finished runs of older code have none.</p>"
    chart = line_chart("Share of clicks", lines, "mean prediction of the group", diagonal=True)
    return (
        "<p>The test inputs in ten groups of as many, by prediction; on the dashed line a "
        f'prediction of 0.3 is a click in 3 of 10.</p><div class="charts">{chart}</div>'
    )


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    warned = "".join(f"<li>{html.escape(text)}</li>" for text in tables.warnings(runs))
    telling, others = tables.settings(runs)
    trained = [(run.name, run.place, tables.parts_trained(run)) for run in runs]
    timed = [(run.name, run.place, tables.parts_of_time(run)) for run in runs]
    compares = ""
    if len(runs) > 1:
        compares = '<p class="soft">One run a column: small differences may be chance.</p>'
    clocks = ("training", "choosing inputs", "paused: evaluation, checkpoints", "other")
    sections = {
        "Results": compares + tables.results(runs),
        "Settings given" if len(runs) == 1 else "Settings that differ": telling
        + f"<details><summary>All other settings</summary>{others}</details>",
        "Curves": curves(runs),
        "Calibration": calibration(runs),
        "Hot and cold": bars(trained, ("trained, hot", "trained, cold", "dropped"), " inputs")
        + tables.hot_and_cold(runs),
        "Drops": tables.drops(runs),
        "Times": bars(timed, clocks, " s") + tables.times(runs),
        "Machine and code": tables.machines(runs),
    }
    body = "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items())
    return document(
        title,
        f'<nav class="key">{tables.legend(runs)}</nav>'
        + (f'<ul class="warnings">{warned}</ul>' if warned else "")
        + body,
    )


def document(title: str, body: str, policy: str = POLICY) -> str:
    """A page of its own with the report's style."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Slipstream: {html.escape(title)}</title>"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Write a page beside its place and put it there whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            sync_file(file)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    print(f"wrote {path}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="a run's folder, its log, or a folder of runs")
    parser.add_argument("--output", default="report.html", help="the page")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    """Write the page; returns its path."""
    args = parse_args(argv)
    path = Path(args.output)
    if path.suffix.lower() not in (".html", ".htm"):  # a log given by mistake stays
        raise ValueError(f"--output {path}: the page's name ends in .html")
    write_page(path, page(find_runs(args.runs)))
    return path


if __name__ == "__main__":
    cli.run_script(main)
