"""Tables of a report, and what it warns of."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.report_charts import colour, swatch
from bench.report_runs import Run, mapping, number, training_s
from bench.run_records import short_commit
from slipstream.tools.runlog import OVERHEAD, was_busy

NOTHING = "–"
LONG, LONG_TEXT = ' class="long"', 50  # a cell of more characters is written as a text
# Where things are: never a difference of runs.
PLACES = {
    *("run_name", "runs_dir", "processed_data_file", "segregated_data_dir"),
    *("save_model", "load_model", "raw_data_file"),
}
MACHINE = ("cpu", "cpu_cores", "memory_bytes", "gpu", "gpu_memory_bytes", "device")
VERSIONS = ("python", "torch", "numpy", "cuda", "os")

Cell = tuple[str, str]  # a row's name, and a run's text
Show = Callable[[float | None], str]


def _shown(form: str, factor: float = 1, unit: str = "") -> Show:
    def show(value: float | None) -> str:
        return NOTHING if value is None else f"{factor * value:{form}}{unit}"

    return show


metric, count, percent = _shown(".4f"), _shown(",.0f"), _shown(".1f", 100, " %")
megabytes, seconds = _shown(",.0f", 1e-6, " MB"), _shown(",.3g", 1, " s")


def long_seconds(value: float | None) -> str:
    """Seconds; of long times, whole ones."""
    return seconds(value) if value is None or value < 1000 else f"{value:,.0f} s"


def by_run(runs: Sequence[Run], cells: Callable[[Run], Iterable[Cell]], empty: str = "") -> str:
    """A table with a column a run, and a row a name that `cells` gives of any of them.

    Rows without a text in any run are left out.
    """
    found = [dict(cells(run)) for run in runs]
    names = list(dict.fromkeys(name for own in found for name in own))
    rows = []
    for name in names:
        texts = [own.get(name, NOTHING) for own in found]
        if any(text != NOTHING for text in texts):
            rows.append([html.escape(name), *texts])
    if not rows:
        return f"<p>{html.escape(empty)}</p>"
    return table(["", *map(_named, runs)], rows)


def _named(run: Run) -> str:
    return f'{swatch(run.place)} <span class="name">{html.escape(run.name)}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table that scrolls where it is too wide.

    `head` and the first cell of a row are HTML, the others texts.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for name, *cells in rows:
        rest = "".join(
            f"<td{LONG if len(cell) > LONG_TEXT else ''}>{html.escape(cell)}</td>" for cell in cells
        )
        lines.append(f'<tr><th scope="row">{name}</th>{rest}</tr>')
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{body}</table></div>'


def results(runs: Sequence[Run]) -> str:
    """The final table."""

    def cells(run: Run) -> Iterable[Cell]:
        end, final = run.end, run.final
        yield "test AUC", metric(number(end, "auc"))
        yield "limit of the planted model", metric(number(end, "planted_auc"))
        yield "test log loss", metric(number(end, "log_loss"))
        yield "normalised entropy", metric(number(end, "normalized_entropy"))
        yield "accuracy", metric(number(end, "accuracy"))
        yield "mean prediction / click rate", metric(number(final, "calibration"))
        yield "validation AUC", metric(number(mapping(end, "val"), "auc"))
        yield "last training loss", metric(number(end, "loss"))
        step, weights = number(end, "step"), number(end, "weights_of_step")
        yield "weights of step", count(weights) if weights != step else NOTHING
        reached = end.get("reached")
        yield "ended early", str(reached) if reached else NOTHING
        yield "mini-batches", count(step)
        yield "inputs trained", count(number(end, "samples"))
        yield "hot share of them", percent(number(end, "hot_share"))
        yield "inputs dropped", count(number(end, "dropped"))
        yield "dropped share of both", percent(number(end, "dropped_share"))
        yield "training, choice of inputs included", long_seconds(training_s(end))
        yield "inputs / s", count(_rate(end))
        yield "peak memory", megabytes(number(end, "peak_rss_bytes"))
        yield "peak memory of the device", megabytes(number(end, "peak_device_bytes"))

    return by_run(runs, cells)


def _rate(end: Mapping[str, Any]) -> float | None:
    rate, samples = number(end, "samples_per_s"), number(end, "samples")
    training = number(end, "training_s")
    if rate is None and samples and training:
        return samples / training
    return rate


def hot_and_cold(runs: Sequence[Run]) -> str:
    """What is hot: rows, inputs, and of what was trained."""

    def cells(run: Run) -> Iterable[Cell]:
        start, sizes = run.start, run.start.get("table_sizes")
        whole = [size for size in sizes if isinstance(size, int)] if isinstance(sizes, list) else []
        num_hot, num_train = number(start, "num_hot"), number(start, "num_train")
        hot_inputs = number(start, "num_hot_inputs")
        yield "tables", count(len(whole)) if whole else NOTHING
        yield "rows", count(sum(whole)) if whole else NOTHING
        yield "hot rows", count(num_hot)
        yield "training inputs", count(num_train)
        hot = hot_inputs / num_train if hot_inputs is not None and num_train else None
        yield "hot share of them", percent(hot)
        yield "hot share of the trained", percent(number(run.end, "hot_share"))
        yield "rows on the device", count(number(start, "num_resident"))
        yield "table there", megabytes(number(start, "table_device_bytes"))

    return by_run(runs, cells)


def parts_trained(run: Run) -> list[float]:
    """Inputs trained hot, trained cold, dropped."""
    samples, share = number(run.end, "samples") or 0, number(run.end, "hot_share") or 0
    share = min(max(share, 0), 1)
    return [samples * share, samples * (1 - share), number(run.end, "dropped") or 0]


def parts_of_time(run: Run) -> list[float]:
    """Seconds of training, of choosing inputs, paused, and the program's others."""
    training = number(run.end, "training_s") or 0
    choosing = (training_s(run.end) or 0) - training
    paused, program = (number(run.end, name) or 0 for name in ("paused_s", "program_s"))
    return [training, choosing, paused, max(0.0, program - training - choosing - paused)]


def times(runs: Sequence[Run]) -> str:
    """Seconds by clock."""

    def cells(run: Run) -> Iterable[Cell]:
        for name in ("training_s", *OVERHEAD, "paused_s", "program_s"):
            yield name.removesuffix("_s"), long_seconds(number(run.end, name))
        yield "segregation, before", long_seconds(number(run.end, "segregation_s"))

    return by_run(runs, cells)


def drops(runs: Sequence[Run]) -> str:
    """A line a choice of inputs; empty without any."""
    rows = [
        [_named(run), *_choice(record)]
        for run in runs
        for record in run.of("drop")
        if len(record) > 1
    ]
    if not rows:
        return "<p>No inputs were dropped.</p>"
    head = ["run", "epoch", "step", "inputs before", "policy", "target", "achieved", "dropped"]
    head += ["candidates", "alpha", "T", "rows touched", "note"]
    if not any(note for *_, note in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return table(head, rows)


def _choice(record: Mapping[str, Any]) -> list[str]:
    epoch, threshold = number(record, "epoch"), record.get("threshold")
    bounds = threshold if isinstance(threshold, list) else [threshold]
    values = [number({"T": bound}, "T") for bound in bounds]
    is_stale = number(record, "alpha") is not None
    # The log's null is an infinite T: too few inputs could be stale.
    limits = ["∞" if value is None else f"{value:.3g}" for value in values]
    pool = str(record.get("pool", ""))
    note = str(record.get("reason") or record.get("why") or "")
    return [
        NOTHING if epoch is None else count(epoch + 1),
        *(count(number(record, name)) for name in ("step", "samples")),
        str(record.get("policy", NOTHING)),
        *(count(number(record, name)) for name in ("target", "achieved", "dropped")),
        f"{count(number(record, 'candidates'))} {pool}".rstrip(),
        _shown("g")(number(record, "alpha")),
        ", ".join(limits) if is_stale else NOTHING,
        percent(number(record, "rows_touched_share")),
        note,
    ]


def settings(runs: Sequence[Run]) -> tuple[str, str]:
    """Settings that tell the runs apart (of one run: those that were given), and the others,
    which are alike but for places.
    """
    flags = [_settings_of(run) for run in runs]
    given = [_given(run) for run in runs]
    names = list(dict.fromkeys(name for own in flags for name in own))

    def tells(name: str) -> bool:
        values = [own[name] for own in flags if name in own]
        is_given = any(name in names for names in given)
        if name in PLACES:
            return False
        if len(runs) == 1:
            return is_given
        return any(value != values[0] for value in values) or (len(values) < len(runs) and is_given)

    def cells(run: Run) -> Iterable[Cell]:
        for name in filter(tells, names):
            if name in flags[run.place]:
                yield f"--{name.replace('_', '-')}", setting(flags[run.place][name])

    said = "No setting was given." if len(runs) == 1 else "The runs have the same settings."
    rest = []
    for name in names:
        if not tells(name):
            values = dict.fromkeys(setting(own[name]) for own in flags if name in own)
            flag = html.escape(f"--{name.replace('_', '-')}")
            rest.append([flag, ", ".join(value for value in values if value != NOTHING) or NOTHING])
    return by_run(runs, cells, said), table(["", "of all runs that have it"], rest)


def _settings_of(run: Run) -> dict[str, Any]:
    """The flags, with what was decided where they left it open."""
    flags, precision = mapping(run.start, "flags"), mapping(run.start, "settings").get("precision")
    decided = {**mapping(run.start, "training"), "precision": precision}
    return {
        name: value if decided.get(name) is None else decided[name] for name, value in flags.items()
    }


def _given(run: Run) -> set[str]:
    argv = run.start.get("argv")
    words = [str(word).partition("=")[0] for word in argv] if isinstance(argv, list) else []
    return {word[2:].replace("-", "_") for word in words if word.startswith("--")}


def setting(value: Any) -> str:
    """A flag's value, as it is given."""
    if value is None or value == []:
        return NOTHING
    if isinstance(value, list):
        is_layers = len(value) > 1 and all(isinstance(item, int) for item in value)
        return ("-" if is_layers else " ").join(map(setting, value))
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)


def machines(runs: Sequence[Run]) -> str:
    """Hardware, versions, threads, load and code."""

    def cells(run: Run) -> Iterable[Cell]:
        machine = mapping(run.start, "machine")
        for name in (*MACHINE, *VERSIONS):
            text = setting(machine.get(name))
            if name.endswith("_bytes"):
                text = _shown(".1f", 1 / 2**30, " GiB")(number(machine, name))
            yield name.removesuffix("_bytes").replace("_", " "), text
        tuned = mapping(run.start, "settings")
        for name in ("threads", "precision", "deterministic", "matrix_products", "thread_wait"):
            yield name.replace("_", " "), setting(tuned.get(name))
        load = number(run.end, "involuntary_switches_per_s")
        yield "interrupted by other work, times a second", count(load)
        yield "commit", commit(run)
        yield "log's identity", str(run.start.get("log_identity") or NOTHING)[:10]
        yield "begun from", setting(run.start.get("loaded"))

    return by_run(runs, cells)


def commit(run: Run) -> str:
    """The code's commit, short."""
    return short_commit(run.start.get("commit") or NOTHING)


def names_of(runs: Iterable[Run]) -> str:
    """Their names, as a text."""
    return ", ".join(run.name for run in runs)


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes the runs' figures hard to compare, or wrong: a text each."""
    found = [
        f"{run.name}: {run.unfinished}; its figures are so far." for run in runs if run.unfinished
    ]
    if _differ(runs, _machine):
        found.append("The runs are of different machines: times and speeds do not compare.")
    elif _differ(runs, lambda run: [mapping(run.start, "settings").get("threads")]):
        found.append("The runs had different numbers of threads: times do not compare.")
    if _differ(runs, _versions):
        found.append("The runs are of different versions of Python, PyTorch or NumPy.")
    if _differ(runs, commit):
        found.append("The runs are of different commits of this code.")
    if _differ(runs, _data):
        found.append("The runs are of different data: AUC and losses do not compare.")
    busy = [run for run in runs if _was_busy(run)]
    if busy:
        found.append(
            f"Other work often took cores from {names_of(busy)}: times and speeds say little."
        )
    for run in runs:
        failures = [record["error"] for record in run.of("checkpoint") if record.get("error")]
        failures += [run.end["save_failure"]] if run.end.get("save_failure") else []
        if failures:
            found.append(f"{run.name}: a model was not saved: {failures[-1]}")
    return found


def _differ(runs: Sequence[Run], of: Callable[[Run], Any]) -> bool:
    return any(of(run) != of(runs[0]) for run in runs)


def _machine(run: Run) -> list[Any]:
    return [mapping(run.start, "machine").get(name) for name in MACHINE]


def _versions(run: Run) -> list[Any]:
    return [mapping(run.start, "machine").get(name) for name in ("python", "torch", "numpy")]


def _data(run: Run) -> list[Any]:
    flags = mapping(run.start, "flags")
    generated = flags.get("data_generation", "dataset")
    seed = run.start.get("seed") if generated != "dataset" else None
    names = ("log_identity", "num_train", "num_held_out")
    return [generated, seed, *(run.start.get(name) for name in names)]


def _was_busy(run: Run) -> bool:
    load, program = (number(run.end, name) for name in ("involuntary_switches_per_s", "program_s"))
    return load is not None and program is not None and was_busy(load, program)


def legend(runs: Sequence[Run]) -> str:
    """Every run's colour, name, method and state."""
    parts = []
    for run in runs:
        state = "" if run.unfinished is None else ' <b class="state">unfinished</b>'
        parts.append(
            f'<li class="{colour(run.place)}">{swatch(run.place)} <b>{html.escape(run.name)}</b> '
            f"<span>{html.escape(run.method)}</span>{state}</li>"
        )
    return f"<ul>{''.join(parts)}</ul>"
