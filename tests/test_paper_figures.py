"""All figures of the papers by one command: their numbers are the logs', and nothing runs twice."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from helpers import write_processed
from matplotlib.colors import same_color

import slipstream_train
from bench import methods, paper_curves, paper_data, paper_figures, paper_style
from bench.colours import COLOURS, METHOD_COLOURS, colours_of, method_of_label
from bench.paper_runs import Job
from bench.paper_scaling import scaling
from bench.paper_sweeps import SWEEPS, rows_of
from bench.run_records import all_training_s, finished_records
from slipstream.tools import cli
from slipstream.tools.npz import open_npz
from slipstream.tools.runtime import git_commit

NAMES = ["data", "profiling", "change", "curves", "speed_up", "overhead", "sample_rate", "scaling"]
FLAGS = "--quick --seeds 2 --points 4 --arch-mlp-bot 3-16-8 --hot-emb-gpu-mem 4320".split()


def make(folder):
    """Some figures of a tiny log: the call that made them, its folder, and its plan."""
    processed = write_processed(folder / "small_processed.npz", 1600)
    plans = []

    def call(*more, only=NAMES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paper_figures, "make_small_log", lambda *_: (processed, None))
            patch.setattr(paper_style, "DPI", 40)
            plan_of = paper_figures.plan_of
            patch.setattr(
                paper_figures,
                "plan_of",
                lambda *values: plans.append(plan_of(*values)) or plans[-1],
            )
            flags = [*FLAGS, "--out", str(folder / "out"), "--only", *only, *more]
            return paper_figures.main(flags)

    call()
    return SimpleNamespace(call=call, out=folder / "out", plans=plans, plan=plans[0])


def ends_of(made, method):
    return [finished_records(made.out / "runs" / f"{method}-seed{seed}")[-1] for seed in (1, 2)]


def check_numbers_and_lines(made):
    curves = pandas.read_csv(made.out / "curves.csv")
    speeds = pandas.read_csv(made.out / "speed_up.csv").set_index("method")
    assert set(speeds.index) == {"plain", "baseline", "fae", "slipstream", "random"}
    for method, rows in curves.groupby("method"):
        ends = ends_of(made, method)
        for name in ("auc", "accuracy"):
            mean = np.mean([end[name] for end in ends])
            assert rows[name].iloc[-1] == pytest.approx(mean, abs=1e-6)
        seconds = [all_training_s(end) for end in ends]
        assert speeds.training_s[method] == pytest.approx(np.median(seconds), rel=1e-4)
        assert speeds.fastest_s[method] == pytest.approx(min(seconds), rel=1e-4)
        assert speeds.samples[method] == np.mean([end["samples"] for end in ends])
    assert speeds.samples["random"] == speeds.samples["slipstream"] < speeds.samples["fae"]
    with paper_style.style():
        picture = paper_curves.curves(made.plan).picture
    drawn = {line.get_color(): line for line in picture.axes[0].lines}
    for method, rows in curves.groupby("method"):
        line = drawn[METHOD_COLOURS[method]]
        assert line.get_ydata() == pytest.approx(rows.auc.tolist(), abs=1e-6)
        assert line.get_xdata() == pytest.approx(rows.training_s.tolist(), rel=1e-4)
        [band] = [
            path.vertices
            for band in picture.axes[0].collections
            if same_color(band.get_facecolor()[0, :3], METHOD_COLOURS[method])
            for path in band.get_paths()
        ]
        assert band[:, 1].max() == pytest.approx(max(rows.auc + rows.auc_sd), abs=1e-6)
    overhead = pandas.read_csv(made.out / "overhead.csv").set_index(["method", "what"])
    spent = np.mean([end["threshold_s"] for end in ends_of(made, "slipstream")])
    assert overhead.seconds["slipstream", "threshold"] == pytest.approx(spent, rel=1e-4)


def check_sensitivity(made):
    table = pandas.read_csv(made.out / "sample_rate.csv").set_index("value")
    assert table.index.tolist() == list(SWEEPS["sample_rate"].values)
    [end, *_] = ends = ends_of(made, "slipstream")
    drops = [end["drops"][0] for end in ends]
    assert table.threshold[1.0] == pytest.approx(np.mean([d["threshold"] for d in drops]), 1e-4)
    assert table.dropped_of_left[1.0] == pytest.approx(0.3, abs=0.001)
    fae = ends_of(made, "fae")
    less = np.mean([one["auc"] - other["auc"] for one, other in zip(ends, fae, strict=True)])
    assert table.less_fae[1.0] == pytest.approx(less, abs=1e-6)


def check_data_and_hot_rows(made):
    facts = pandas.read_csv(made.out / "data.csv").set_index("what").value
    [hot_cold] = (made.out / "work").glob("hot4320_*")
    rows = open_npz(hot_cold / "embedding_rows.npz")
    assert facts["hot rows"] == rows["num_hot"] == 120
    assert (
        facts["embedding rows"] == 1348 and facts["bytes of a row, its optimizer's included"] == 36
    )
    hot = len(open_npz(hot_cold / "train_hot.npz")["y"])
    assert facts["inputs that touch hot rows alone"] == pytest.approx(
        hot / made.plan.num_train, 1e-4
    )
    table = pandas.read_csv(made.out / "profiling.csv").set_index("percent")
    assert (table.loc[100.0, ["agreement", "accesses_kept", "inputs_kept"]] == 1).all()
    assert table.agreement[0.1] < table.agreement[50.0] and table.inputs[5.0] == 69
    change = pandas.read_csv(made.out / "change.csv")
    assert change.popularity.max() == 120 and (change.change >= 0).all()
    first, last = (change[change.samples == change.samples.agg(end)] for end in ("min", "max"))
    assert last.change.median() < first.change.median()  # the rates have fallen


def check_page(made):
    page = (made.out / "index.html").read_text()
    pictures = [name for name in NAMES if (made.out / f"{name}.png").exists()]
    assert pictures == [name for name in NAMES if name not in ("data", "scaling")]
    assert page.count('src="data:image/png;base64,') == len(pictures)
    for name in NAMES:
        figure = {**paper_figures.FIGURES, "scaling": paper_figures.SCALING}[name]
        assert f'id="{name}">{figure.title}' in page
    for text in ("1.2x over FAE", "seeds 1, 2", str(git_commit()), "D = 30 %"):
        assert text in page
    assert (
        "slipstream-sample_rate0.001-seed*" in page and "Not run: no CSV of bench.scaling" in page
    )
    assert not re.search(r'<script|src="(?!data:)|https?:', page)


def check_only_unfinished_runs_are_trained_again(made):
    log = made.out / "runs" / "fae-seed2" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    before = {path: path.stat().st_mtime_ns for path in made.out.glob("runs/*/log.jsonl")}
    log.write_text("".join(lines[:-1]))
    made.call("--also", "pdf", "svg", only=["curves"])
    assert made.plans[-1].trained == 1
    assert (made.out / "curves.pdf").read_bytes()[:5] == b"%PDF-"
    assert "</svg>" in (made.out / "curves.svg").read_text()
    changed = [path for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert changed == [log]
    assert json.loads(log.read_text().splitlines()[-1])["auc"] == json.loads(lines[-1])["auc"]
    again = "flags --drop-percentage was not given, is '20'; choose another --out"
    with pytest.raises(ValueError, match=again):
        made.call("--drop-percentage", "20", only=["curves"])
    with pytest.MonkeyPatch.context() as patch:  # of other code they are other runs
        patch.setattr(methods, "code_texts", lambda *_: {"step.py": "other"})
        with pytest.raises(ValueError, match="another comparison: code"):
            made.call(only=["curves"])


def test_figures_of_a_small_log(tmp_path):
    """In one test: they share a log and its runs."""
    made = make(tmp_path)
    check_numbers_and_lines(made)
    check_sensitivity(made)
    check_data_and_hot_rows(made)
    check_page(made)
    check_only_unfinished_runs_are_trained_again(made)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give DATA, a processed .npz, or --quick"),
        (["a.npz", "--quick"], "give DATA"),
        (["none.npz"], "none.npz is no file"),
        (["--quick", "--only", "skew", "--seeds", "1", "--colour", "red"], "--colour is no flag"),
        (["--quick", "--seed", "3"], "--seed is the comparison's own"),
        (["--quick", "--seeds", "1", "a.npz"], "DATA comes first"),
    ],
)
def test_bad_words_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: paper_figures.main(words))
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and said in errors and errors.count("\n") == 1


def plan_with(flags, **more):
    """What sweeps ask of a plan."""
    words = ["--segregated-data-dir", "-", *flags.split()]
    return SimpleNamespace(parsed=lambda: slipstream_train.parse_args(words), **more)


def test_a_choice_that_is_none_and_an_infinite_threshold():
    """As the logs have them: no choice in a short epoch, null for a T that nothing reaches."""
    start = {"num_hot_inputs": 50, "num_train": 100, "num_hot": 7, "table_sizes": [5, 6]}
    drop = {"threshold": [0.1, None], "achieved": 3, "hot_remaining": 10}

    def records(job):
        if job.method in ("fae", "random"):
            auc = 0.7 - 0.02 * (job.method == "random")
            return [[start, {"auc": auc + more, "dropped_share": 0.2}] for more in (0, 0.02)]
        drops = [{"reason": "short"}] if job.setting else [drop]
        end = {"auc": 0.71, "dropped_share": 0.1, "drops": drops}
        return [[start, end], [start, end]]

    rows = rows_of(plan_with("", records=records), SWEEPS["alpha"])
    usual = next(row for row in rows if row["value"] == 1.0)
    assert usual["threshold"] == np.inf and usual["dropped_of_left"] == 0.3
    assert usual["less_fae"] == pytest.approx(0) and usual["less_fae_interval"] > 0.05
    assert usual["less_random"] == pytest.approx(0.02) and usual["less_random_interval"] > 0.05
    assert usual["random_less_fae"] == pytest.approx(-0.02) == -usual["less_random"]
    assert usual["random_less_fae_interval"] == 0 and usual["random_dropped_of_all"] == 0.2
    assert np.isnan(rows[0]["threshold"]) and rows[0]["dropped_of_left"] == 0
    assert rows[0]["hot_inputs"] == 0.5 and rows[0]["rows"] == 11


def test_settings_are_runs_of_their_own():
    plan = plan_with("")
    for name, sweep in SWEEPS.items():
        jobs = sweep.jobs(plan, "slipstream")
        assert jobs.count(Job("slipstream")) == 1, name  # the usual run is shared
        assert len({job.name for job in jobs}) == len(sweep.values)
    names = [job.name for sweep in SWEEPS.values() for job in set(sweep.all_jobs(plan))]
    assert sorted(set(names) & {name for name in names if names.count(name) > 1}) == [
        "fae",
        "random",
        "slipstream",
    ]
    # Chance needs runs of its own where the number or the time of the choice changes.
    assert SWEEPS["alpha"].jobs(plan, "random") == 6 * [Job("random")]
    assert len(set(SWEEPS["snapshot_window"].jobs(plan, "random"))) == 6


def test_what_the_reader_gave_is_usual():
    plan = plan_with("--alpha 0.8 --snapshot-start 40b --schedule phased")
    jobs = SWEEPS["alpha"].jobs(plan, "slipstream")
    alpha = dict(zip(SWEEPS["alpha"].values, jobs, strict=True))
    assert alpha[0.8] == Job("slipstream") and alpha[1.0].words == ("--alpha", "1")
    assert Job("slipstream") not in SWEEPS["snapshot_start"].jobs(plan, "slipstream")
    first, second, *_ = paper_curves.schedule_jobs(plan)
    assert first.words == ("--schedule", "interleaved") and second == Job("fae")


def test_bars_labels_and_caption_of_the_speed_are_one_statistic():
    """Medians of seconds: medians of ratios would put random first, and means FAE."""
    seconds = {"baseline": (10, 20, 40), "fae": (9, 10, 90), "slipstream": (8, 8.5, 50)}
    seconds["random"] = (4, 9, 20)

    def records(job):
        return [[{"samples": 10, "auc": 0.7, "training_s": s}] for s in seconds[job.method]]

    more = {"records": records, "seeds": range(3), "machine": {"gpu": "G"}}
    with paper_style.style():
        drawn = paper_curves.speed_up(plan_with("", why_no_plain=lambda: "none", **more))
    [axes] = drawn.picture.axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([1, 2, 20 / 8.5, 20 / 9])
    texts = [text.get_text() for text in axes.texts]
    assert texts[2].startswith("2.35x: 8.5 s") and texts[3].startswith("2.22x: 9 s")
    assert "Slipstream 1.18x over FAE" in drawn.said and "at random 1.11x; FAE 2.00x" in drawn.said
    [whiskers] = axes.collections[-1:]
    ends = [path.vertices[:, 0].tolist() for path in whiskers.get_paths()]
    assert ends[2] == pytest.approx([20 / 50, 20 / 8])


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_mini_batches_show_the_spread_over_seeds(num_seeds):
    """Whiskers of a standard deviation up and down at each point; of one seed there are none."""

    def records(job):
        start = {"training": {"mini_batch_size": int(job.setting.removeprefix("batch") or 64)}}
        aucs = (0.70, 0.72, 0.77)[:num_seeds]
        return [[start, {"samples": 9000, "training_s": 10 * auc, "auc": auc}] for auc in aucs]

    seeds = {"seeds": range(num_seeds), "noise": lambda jobs: "Noise."}
    plan = plan_with("", batch_size=64, num_train=9000, records=records, **seeds)
    with paper_style.style():
        drawn = paper_curves.mini_batch(plan)
    assert len(drawn.rows) == 12 and drawn.said.endswith(
        "Noise." if num_seeds == 1 else "Whiskers: standard deviation over seeds."
    )
    for axes, key in zip(drawn.picture.axes, ("rate_sd", "auc_sd"), strict=True):
        ends = [path.vertices[:, 1] for lines in axes.collections for path in lines.get_paths()]
        sizes = [np.ptp(end) for end in ends if np.isfinite(end).all()]
        factor = 2 * (1e-3 if key == "rate_sd" else 1)
        wanted = [factor * row[key] for row in drawn.rows] if num_seeds > 1 else []
        assert sizes == pytest.approx(wanted)


def test_scaling_is_drawn_where_it_was_run(tmp_path):
    lines = [
        {"kind": kind, "scheme": scheme, "scaling": "weak", "processes": w, "speedup": 0.8 * w}
        for kind in ("measured", "expected")
        for scheme in ("ours", "all-sharded")
        for w in (1, 2)
    ]
    pandas.DataFrame(lines).to_csv(tmp_path / "mine.csv", index=False)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with paper_style.style():
        drawn = scaling(tmp_path)
    assert [line["scheme"] for line in drawn.rows] == ["ours"] * 4
    assert "weak at W = 2: 1.60x" in drawn.said and "none has confirmed" in drawn.said
    (tmp_path / "scaling.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="scaling.csv has no column kind"):
        scaling(tmp_path)


def test_labels_keep_apart_and_in_order():
    places = paper_style.spread([0.5, 0.51, 0.52, 0.99], [0.1] * 4)
    assert np.diff(places).min() >= 0.1 - 1e-9 and places[-1] <= 1
    assert places[0] == 0.5 and paper_style.spread([0.2, 0.9], [0.1, 0.1]) == [0.2, 0.9]


def test_one_colour_a_method():
    assert method_of_label("slipstream-stale, --alpha 0.8") == "slipstream"
    assert method_of_label("slipstream-random d30") == "random" and method_of_label("mine") is None
    labels = ["fae", "slipstream-stale", "slipstream-random", "slipstream-mine.py:score"]
    found = colours_of(labels)
    assert found[:3] == [METHOD_COLOURS[name] for name in ("fae", "slipstream", "random")]
    assert len(set(found)) == 4
    assert colours_of(["fae a", "fae b"]) == list(COLOURS[:2])
    assert paper_data.OTHER_COLOURS[0] not in METHOD_COLOURS.values()
