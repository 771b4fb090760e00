"""Every figure's command runs on a small log, and its CSV holds what it should."""

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from bench import figures, paper_style, readme_picture, run_figures, training_figures
from bench.run_figures import runs_by_kind
from slipstream.tools import cli


def make_all(folder):
    """All figures' tables, by name, each made by its command."""
    # One log and one comparison for all; they are the same for each.
    paths = figures.make_small_log(folder, figures.QUICK_ROWS, figures.QUICK_BUDGET)
    compared, tables, make_quick = [], {}, figures.make_quick

    def make_once(args, _):
        if compared and args.name in ("times", "speed", "policies", "drop"):
            args.runs_dir, args.table = compared
            return
        make_quick(args, folder)
        if args.name == "curves":
            compared.extend([args.runs_dir, args.table])

    for name in figures.FIGURES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, "make_small_log", lambda *values: paths)
            patch.setattr(figures, "make_quick", make_once)
            path = figures.main([name, "--quick", "--output-dir", str(folder)])
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
        tables[name] = pandas.read_csv(path.with_suffix(".csv"))
    return tables


def check_shares(made):
    for _, rows in made["skew"].groupby("table"):
        assert rows.accesses_share.is_monotonic_increasing
        assert rows.iloc[-1][["rows_share", "accesses_share"]].tolist() == [1, 1]
    assert made["skew"].table.nunique() == 1 + figures.NUM_TABLES
    rows = made["budget"]
    assert rows.megabytes.is_monotonic_decreasing and rows.inputs_share.iloc[0] == 1
    assert (rows.inputs_share <= rows.accesses_share).all()


def check_change(made):
    for group, rows in made["change"].groupby("group"):
        assert len(rows) >= training_figures.NUM_SNAPSHOTS - 1
        assert (rows.p10 <= rows["median"]).all() and (rows["median"] <= rows.p90).all()
        assert rows["median"].iloc[-1] < rows["median"].iloc[0], group


def check_thresholds(made):
    """T grows with D, and with alpha: more rows of an input must be stale."""
    table = made["thresholds"].pivot(index="drop_percentage", columns="alpha", values="threshold")
    values = table.to_numpy()
    assert values.shape == (19, len(training_figures.ALPHAS)) and np.isfinite(values[:10, 0]).all()
    assert (values[1:] >= values[:-1]).all() and (values[:, 1:] >= values[:, :-1]).all()
    assert (values[10, 1:] > values[10, :-1]).any()


def check_comparison(made):
    curves = made["curves"]
    assert set(curves.run) == {"fae", "slipstream-random"}
    fae = curves[curves.run == "fae"]
    assert len(fae) > 10 and fae.samples.is_monotonic_increasing
    policies = made["policies"].set_index("method")
    last = curves.groupby("run").auc.last()
    expected = last["slipstream-random"] - last["fae"]
    assert policies.loc["slipstream-random", "difference"] == pytest.approx(expected, abs=1e-5)
    assert policies.loc["fae", "stopped_difference"] == pytest.approx(0, abs=1e-6)
    assert policies.loc["slipstream-random", "samples"] < policies.loc["fae", "samples"]
    left = policies.samples["slipstream-random"] / policies.samples["fae"]
    dropped = made["drop"].set_index("method").dropped_share
    assert dropped["slipstream-random"] == pytest.approx(1 - left, rel=0.01)
    assert made["times"].equals(curves)
    seconds = made["speed"].set_index("run").filter(like="_s").sum(axis=1)
    expected = curves.groupby("run").training_s.last()
    assert seconds.to_dict() == pytest.approx(expected.to_dict(), rel=0.05)


def test_all_figures(tmp_path, runs_here):
    """In one test: they share a log."""
    made = make_all(tmp_path)
    check_shares(made)
    check_change(made)
    check_thresholds(made)
    check_comparison(made)


@pytest.mark.parametrize("stopped", [0.69, math.nan])
def test_a_table_without_runs_stopped_earlier_shows_none(tmp_path, stopped):
    """As a comparison's where rates fall at a run's end."""
    values = {"auc": 0.7, "samples": 9, "dropped_share": 0.1, "auc_first_at_samples": stopped}
    rows = [
        {"method": method, "setting": "", "metric": name, "n": 2, "mean": value}
        | {"difference": 0.0, "interval": 0.01}
        for method in ("fae", "slipstream-cold")
        for name, value in values.items()
    ]
    pandas.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    for draw in (run_figures.policies, run_figures.drop):
        with paper_style.style():
            _, [[axes]] = paper_style.new_figure(3)
            draw(SimpleNamespace(table=tmp_path / "t.csv"), axes)
        labels = axes.get_legend_handles_labels()[1]
        assert len(labels) == 1 + math.isfinite(stopped)


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["skew"], "needs --segregated-data-dir"), (["curves", "--runs-dir", "none"], "no finished")],
)
def test_missing_data_are_said(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: figures.main(flags))
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def write_run(folder, name, seed=1, aucs=(0.6, 0.7), steps=None, finished=True, **more):
    """A log such as the trainers leave; `more` is of its first line, `flags` beside the usual."""
    flags = {"run_name": name, "runs_dir": str(folder), "test_freq": len(aucs), "alpha": 0.8}
    flags |= {"seed": seed, "processed_data_file": "input/a/p.npz", **more.pop("flags", {})}
    start = {"kind": "start", "method": "slipstream", "seed": seed, "commit": "c1"}
    start |= {"machine": {"cpu": "x", "cpu_cores": 2}, "num_train": 700, "num_hot": 3}
    start |= {"table_sizes": [5, 6], "data": {"source": "s1"}, "flags": flags, **more}
    curve = [
        {"kind": "evaluation", "auc": auc, "step": step, "samples": 10 * step, "training_s": 1.0}
        for step, auc in zip(steps or range(10, 999, 10), aucs, strict=False)
    ]
    last = {**curve[-1], "kind": "summary"} if finished else {"kind": "failed", "reason": "x"}
    (folder / name).mkdir()
    lines = [json.dumps(record) for record in (start, *curve, last)]
    (folder / name / "log.jsonl").write_text("\n".join(lines))


def kinds(folder):
    return {label: len(logs) for label, logs in runs_by_kind(folder).items()}


STALE, RANDOM = {"drop_policy": "stale"}, {"drop_policy": "random"}


@pytest.fixture
def runs(tmp_path):
    """Runs as the wrappers leave them: kinds, seeds, a repeat, and two that did not finish."""
    write_run(tmp_path, "slipstream-1", flags=STALE)
    write_run(tmp_path, "slipstream-2", seed=2, aucs=(0.7, 0.8), flags=STALE)
    write_run(tmp_path, "slipstream-3", aucs=(0.5, 0.9), flags=STALE | {"save_model": "m"})
    write_run(tmp_path, "slipstream-4", flags=STALE | {"alpha": 0.5})
    write_run(tmp_path, "mine", flags=RANDOM | {"print_freq": 7})
    other = {"method": "fae", "table_sizes": [5, 7], "flags": {"alpha": 0.8}}
    write_run(tmp_path, "fae-5", aucs=(0.65,), **other)
    write_run(tmp_path, "fae-6", finished=False, **other)
    write_run(tmp_path, "fae-7", finished=False, **other)
    return tmp_path


def test_unrelated_runs_are_told_apart(runs, capsys):
    path = figures.main(["curves", "--runs-dir", str(runs), "--output-dir", str(runs / "out")])
    shown, errors = capsys.readouterr()
    assert "left out: 2 runs" in errors
    rows = pandas.read_csv(path.with_suffix(".csv")).set_index("run")
    small, large = "700 inputs, 2 tables of 11 rows", "700 inputs, 2 tables of 12 rows"
    assert set(rows.index) == {
        f"slipstream-stale, {small}, --alpha 0.8",
        f"slipstream-stale, {small}, --alpha 0.8 #2",
        f"slipstream-stale, {small}, --alpha 0.5",
        f"slipstream-random, {small}, --alpha 0.8",
        f"fae, {large}, --alpha 0.8",
    }
    # Seeds are averaged; the repeat of seed 1 is not. Which is which is said.
    first = rows.loc[f"slipstream-stale, {small}, --alpha 0.8"]
    assert first.auc.tolist() == pytest.approx([0.65, 0.75]) and set(first.n) == {2}
    assert rows.loc[f"slipstream-stale, {small}, --alpha 0.8 #2"].auc.tolist() == [0.5, 0.9]
    assert "alpha 0.8: slipstream-1, slipstream-2\n" in shown and "#2: slipstream-3\n" in shown
    for name in ("times", "speed"):
        figures.main([name, "--runs-dir", str(runs), "--output-dir", str(runs / "out")])


@pytest.mark.parametrize(
    ("other", "first", "second"),
    [
        ({"commit": "c2+changes"}, "commit c1", "commit c2+"),
        ({"flags": STALE | {"learning_rate": 1.0}}, "", ""),  # one that the first has not
        ({"flags": STALE | {"alpha": 1.0}}, "--alpha 0.8", "--alpha 1"),
        ({"num_hot": 4}, "hot rows 3", "hot rows 4"),
        ({"loaded": "m"}, "begun anew", "begun from m"),
        ({"machine": {"gpu": "H"}}, "on x, 2 cores", "on H"),
        # Another log of the same size, another segregation of the same log.
        (
            {"data": {"source": "s2"}, "flags": STALE | {"processed_data_file": "input/b/p.npz"}},
            "a/p.npz",
            "b/p.npz",
        ),
        ({"data": {"source": "s1", "files": {"train_hot": "x"}}}, "", ""),
    ],
)
def test_what_differs_is_never_averaged(tmp_path, other, first, second):
    write_run(tmp_path, "a", flags=STALE)
    write_run(tmp_path, "b", **{"seed": 2, "flags": STALE, **other})
    labels = list(kinds(tmp_path))
    expected = [", ".join(filter(None, ["slipstream-stale", end])) for end in (first, second)]
    assert labels == (expected if first else ["slipstream-stale", "slipstream-stale #2"])


def test_policies_of_two_files_and_two_methods_are_told_apart(tmp_path):
    write_run(tmp_path, "a", flags={"drop_policy": "a/mine.py:score"})
    write_run(tmp_path, "b", seed=2, flags={"drop_policy": "b/mine.py:score"})
    write_run(tmp_path, "c", method="fae", flags={"learning_rate": 0.1})
    write_run(tmp_path, "d", method="baseline", data={}, flags={"learning_rate": 0.2})
    assert list(kinds(tmp_path)) == [
        "slipstream-mine.py:score",
        "slipstream-mine.py:score #2",
        "fae, --learning-rate 0.1",
        "baseline, --learning-rate 0.2",
    ]


def test_generated_data_of_another_seed_are_other_data(tmp_path):
    made = {"data_generation": "random", "data_size": 800, "arch_embedding_size": [5, 6]}
    for seed in (1, 2):
        write_run(tmp_path, str(seed), seed, method="baseline", data={}, flags=made)
    assert list(kinds(tmp_path)) == [
        "baseline, random data of seed 1",
        "baseline, random data of seed 2",
    ]


@pytest.mark.parametrize(
    ("steps", "points"),
    [
        ([100, 200, 300], [100, 200, 300]),
        ([100, 200, 304], [100, 200, 302]),  # fewer were dropped, so it ends a little later
        ([100, 200, 300, 304], [100, 200, 302]),
        ([100, 200, 400], None),
        ([101, 200, 300], None),
        ([300], None),
    ],
)
@pytest.mark.parametrize("compared", [False, True])
def test_evaluations_of_other_steps_are_not_averaged(tmp_path, steps, points, compared):
    """Neither in a comparison, whose runs are named by its methods and settings."""
    if compared:
        (tmp_path / "comparison.json").write_text("{}")
    aucs = (0.6, 0.7, 0.75, 0.8)
    write_run(tmp_path, "fae-x-seed1", 1, aucs, [100, 200, 300], method="fae")
    write_run(tmp_path, "fae-x-seed2", 2, aucs, steps, method="fae")
    name = "fae-x" if compared else "fae"
    if points is None:
        assert kinds(tmp_path) == {name: 1, f"{name} #2": 1}
        return
    assert kinds(tmp_path) == {name: 2}
    path = figures.main(["curves", "--runs-dir", str(tmp_path), "--output-dir", str(tmp_path)])
    samples = pandas.read_csv(path.with_suffix(".csv")).samples
    assert samples.tolist() == [10 * point for point in points]


def test_a_run_with_its_end_alone_shows(tmp_path):
    from matplotlib import pyplot

    write_run(tmp_path, "a", aucs=(0.7,), method="fae")
    axes = pyplot.figure().subplots()
    figures.curves(figures.parse_args(["curves", "--runs-dir", str(tmp_path)]), axes)
    [line] = axes.lines
    assert line.get_marker() == "o" and line.get_ydata() == [0.7]
    pyplot.close("all")


def test_the_readme_picture_is_of_runs_alone(tmp_path, monkeypatch):
    """Mean AUC and median seconds of finished runs; the committed table is drawn as it is."""
    monkeypatch.setattr(readme_picture, "DPI", 40)
    runs, table = tmp_path / "runs", tmp_path / "curves.csv"
    about = {"machine": {"cpu": "X", "cpu_cores": 2}, "commit": "abc"}
    for number, method in enumerate(readme_picture.LINES):
        for seed, seconds in ((1, 1.0), (2, 2.0), (3, 6.0)):
            folder = runs / f"{method}-seed{seed}"
            folder.mkdir(parents=True)
            records = [{"kind": "start", "method": method}]
            for part in (1, 2):
                auc = 0.7 + 0.01 * number + 0.001 * seed * part
                end = {"auc": auc, "samples": 100 * part, "training_s": seconds * part}
                records.append({"kind": "evaluation", "step": part, **end, "snapshot_s": 0.5})
            records.append({**records[-1], "kind": "summary"})
            (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (runs / "comparison.json").write_text(json.dumps(about))
    words = ["--runs-dir", str(runs), "--csv", str(table), "--output", str(tmp_path / "a.png")]
    assert readme_picture.main(words).read_bytes()[:4] == b"\x89PNG"
    rows = pandas.read_csv(table)
    assert rows.method.unique().tolist() == list(readme_picture.LINES) and (rows.n == 3).all()
    fae = rows[rows.method == "fae"]
    assert fae.training_s.tolist() == [2.5, 4.5] and fae.samples.tolist() == [100, 200]
    np.testing.assert_allclose(fae.auc, [0.732, 0.734])
    readme_picture.main(["--output", str(tmp_path / "b.png")])
    assert (tmp_path / "b.png").stat().st_size > 10_000
    (runs / "fae-seed1/log.jsonl").unlink()
    assert readme_picture.tabulate(runs)[-3]["n"] == 2
    for seed in (2, 3):
        (runs / f"fae-seed{seed}/log.jsonl").unlink()
    with pytest.raises(ValueError, match="no finished run of fae"):
        readme_picture.tabulate(runs)


@pytest.mark.parametrize(
    "label", ["run {}", "a run with a longer name {}", "x" * 60 + " {}", "x" * 60 + "\n\n{}"]
)
def test_many_lines_leave_room_for_themselves(tmp_path, monkeypatch, label):
    """The legend of 80 runs does not take the whole picture."""
    sizes = []

    def draw(args, axes):
        for number in range(80):
            axes.plot([0, 1], [0, number], label=label.format(number))
        axes.figure.canvas.mpl_connect(
            "draw_event", lambda _: sizes.append(axes.get_window_extent().height / axes.figure.dpi)
        )
        return [{"x": 1}]

    monkeypatch.setattr(figures, "FIGURES", {"curves": draw})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.main(["curves", "--runs-dir", ".", "--output-dir", str(tmp_path)])
    assert sizes[-1] > 2  # inches
