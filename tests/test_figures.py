"""Every figure's command runs on a small log, and its CSV holds what it should."""

import numpy as np
import pandas
import pytest

from bench import figures
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
        assert len(rows) >= figures.NUM_SNAPSHOTS - 1
        assert (rows.p10 <= rows["median"]).all() and (rows["median"] <= rows.p90).all()
        assert rows["median"].iloc[-1] < rows["median"].iloc[0], group


def check_thresholds(made):
    """T grows with D, and with alpha: more rows of an input must be stale."""
    table = made["thresholds"].pivot(index="drop_percentage", columns="alpha", values="threshold")
    values = table.to_numpy()
    assert values.shape == (19, len(figures.ALPHAS)) and np.isfinite(values[:10, 0]).all()
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
