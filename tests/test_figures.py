"""Every figure's command runs on a small log, and its CSV holds what it should."""

import pandas
import pytest

from bench import figures
from slipstream import cli


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All figures' tables, by name, each made by its command."""
    folder = tmp_path_factory.mktemp("figures")
    tables = {}
    for name in figures.FIGURES:
        path = figures.main([name, "--quick", "--output-dir", str(folder)])
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
        tables[name] = pandas.read_csv(path.with_suffix(".csv"))
    return tables


def test_shares_rise_to_one(made):
    for _, rows in made["skew"].groupby("table"):
        assert rows.accesses_share.is_monotonic_increasing
        assert rows.iloc[-1][["rows_share", "accesses_share"]].tolist() == [1, 1]
    assert made["skew"].table.nunique() == 1 + figures.NUM_TABLES
    rows = made["budget"]
    assert rows.megabytes.is_monotonic_decreasing and rows.inputs_share.iloc[0] == 1
    assert (rows.inputs_share <= rows.accesses_share).all()


def test_rows_change_less_as_training_goes_on(made):
    for group, rows in made["change"].groupby("group"):
        assert len(rows) >= figures.NUM_SNAPSHOTS - 1
        assert (rows.p10 <= rows["median"]).all() and (rows["median"] <= rows.p90).all()
        assert rows["median"].iloc[-1] < rows["median"].iloc[0], group


def test_curves_and_policies_show_the_comparison(made):
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["skew"], "needs --segregated-data-dir"), (["curves", "--runs-dir", "none"], "no finished")],
)
def test_missing_data_are_said(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: figures.main(flags))
    assert stopped.value.code == 2 and said in capsys.readouterr().err
