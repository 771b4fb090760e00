"""Every figure's command runs on a small log, and its CSV holds what it should."""

import json

import numpy as np
import pandas
import pytest

from bench import figures, training_figures
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


def test_all_figures(tmp_path):
    """In one test: they share a log."""
    made = make_all(tmp_path)
    check_shares(made)
    check_change(made)
    check_thresholds(made)
    check_comparison(made)


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["skew"], "needs --segregated-data-dir"), (["curves", "--runs-dir", "none"], "no finished")],
)
def test_missing_data_are_said(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: figures.main(flags))
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def write_run(folder, name, seed=1, aucs=(0.6, 0.7), commit="c1", finished=True, **flags):
    """A log such as the trainers leave."""
    flags = {"seed": seed, "run_name": name, "runs_dir": str(folder), "alpha": 0.8, **flags}
    start = {"kind": "start", "method": flags.pop("method", "slipstream"), "flags": flags}
    start |= {"seed": seed, "commit": commit, "machine": {"cpu": "x"}, "num_train": 700}
    start |= {"table_sizes": [5, flags.pop("rows", 6)]}
    curve = [
        {"kind": "evaluation", "auc": auc, "samples": 100 * n, "training_s": 1.0 * n}
        for n, auc in enumerate(aucs, start=1)
    ]
    last = {**curve[-1], "kind": "summary"} if finished else {"kind": "failed", "reason": "x"}
    (folder / name).mkdir()
    lines = [json.dumps(record) for record in (start, *curve, last)]
    (folder / name / "log.jsonl").write_text("\n".join(lines))


@pytest.fixture
def runs(tmp_path):
    """Runs as the wrappers leave them: three kinds, a repeat, and one that did not finish."""
    write_run(tmp_path, "slipstream-20261125-1", drop_policy="stale")
    write_run(tmp_path, "slipstream-20261125-2", seed=2, aucs=(0.7, 0.8), drop_policy="stale")
    write_run(tmp_path, "slipstream-20261125-3", aucs=(0.5, 0.9), drop_policy="stale")
    write_run(tmp_path, "slipstream-20261125-4", drop_policy="stale", alpha=0.5)
    write_run(tmp_path, "mine", drop_policy="random", save_model="m")
    write_run(tmp_path, "fae-20261125-5", method="fae", rows=7, aucs=(0.65,))
    write_run(tmp_path, "fae-20261125-6", method="fae", finished=False)
    return tmp_path


def test_unrelated_runs_are_told_apart(runs, capsys):
    path = figures.main(["curves", "--runs-dir", str(runs), "--output-dir", str(runs / "out")])
    assert "left out: 1 runs" in capsys.readouterr().err
    rows = pandas.read_csv(path.with_suffix(".csv")).set_index("run")
    small, large = "700 inputs, 2 tables of 11 rows", "700 inputs, 2 tables of 12 rows"
    assert set(rows.index) == {
        f"slipstream-stale, {small}, --alpha 0.8",
        f"slipstream-stale, {small}, --alpha 0.8 #2",
        f"slipstream-stale, {small}, --alpha 0.5",
        f"slipstream-random, {small}",
        f"fae, {large}",
    }
    # Seeds are averaged; the repeat of seed 1 is not.
    first = rows.loc[f"slipstream-stale, {small}, --alpha 0.8"]
    assert first.auc.tolist() == pytest.approx([0.65, 0.75]) and set(first.n) == {2}
    assert rows.loc[f"slipstream-stale, {small}, --alpha 0.8 #2"].auc.tolist() == [0.5, 0.9]
    for name in ("times", "speed"):
        figures.main([name, "--runs-dir", str(runs), "--output-dir", str(runs / "out")])


def test_runs_of_other_code_or_at_other_places_are_not_averaged(tmp_path):
    write_run(tmp_path, "a", method="fae")
    write_run(tmp_path, "b", method="fae", seed=2, aucs=(0.5, 0.6, 0.7))
    write_run(tmp_path, "c", method="fae", seed=3, commit="c2")
    kinds = runs_by_kind(tmp_path)
    assert {label: len(logs) for label, logs in kinds.items()} == {
        "fae, commit c1": 1,
        "fae, commit c1 #2": 1,
        "fae, commit c2": 1,
    }
