"""A page of runs, out of logs written by hand and of a real one; and what logs cannot be read."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from helpers import MODEL_FLAGS

import slipstream_train
from bench import report
from bench.report_runs import find_runs
from slipstream.tools import cli

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta"}


def records(aucs=(0.6, 0.7, 0.75), **more):
    """A run's, as the trainers write them; `more` is of its first line."""
    machine = {"cpu": "AMD", "cpu_cores": 2, "memory_bytes": 1 << 30, "torch": "2.13"}
    flags = {"nepochs": 1, "learning_rate": None, "run_name": "x", "drop_policy": "stale"}
    start = {"kind": "start", "method": "slipstream", "argv": ["x", "--nepochs", "1"]}
    start |= {"flags": flags, "training": {"learning_rate": 0.05}, "seed": 1, "commit": "c1"}
    start |= {"machine": machine, "settings": {"precision": "bf16", "threads": 2}}
    start |= {"table_sizes": [5, 6], "num_hot": 3, "num_train": 700, "num_hot_inputs": 400}
    start |= {"log_identity": "l1", "num_held_out": 100, **more}
    found, counts = [start], {}
    for step, auc in enumerate(aucs, start=1):
        counts = {"step": 10 * step, "samples": 1000 * step, "hot_share": 0.25, "dropped": 60}
        counts |= {"dropped_share": 0.02, "training_s": 2.0 * step, "snapshot_s": 0.5}
        counts |= {"paused_s": 1.0, "program_s": 9.0, "loss": 0.5 - 0.01 * step}
        judged = {"log_loss": 0.4312, "normalized_entropy": 0.9, "accuracy": 0.8, "auc": auc}
        found.append({"kind": "training", **counts})
        found.append({"kind": "validation", **counts, **judged})
        found.append({"kind": "evaluation", **counts, **judged, "final": step == len(aucs)})
    drop = {"kind": "drop", "epoch": 0, "policy": "stale", "pool": "hot", "alpha": 0.8}
    drop |= {
        "threshold": 0.0123,
        "target": 70,
        "achieved": 60,
        "why": "fewer were touched",
        "candidates": 400,
        "dropped": 60,
    }
    found.insert(4, {**drop, "step": 17, "samples": 1717, "rows_touched_share": 0.5})
    found[-1] |= {"reliability": [[50, 0.125, 0.25], [50, 0.5, 0.375]], "calibration": 0.97}
    summary = {**counts, **judged, "val": judged, "planted_auc": None, "peak_rss_bytes": 512e6}
    summary |= {"samples_per_s": 1234.5, "involuntary_switches_per_s": 2.0, "peak_device_bytes": 0}
    return [*found, {"kind": "summary", **summary}]


def write(folder, name, run):
    (folder / name).mkdir(parents=True)
    path = folder / name / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in run))
    return path


def page_of(*places, output):
    return report.main([*map(str, places), "--output", str(output)]).read_text()


class Balanced(HTMLParser):
    """Every tag is closed, in order; texts are kept."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name in ("src", "href", "onerror")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_runs_side_by_side(tmp_path, capsys):
    folder = tmp_path / "runs"
    write(folder, "a", records())
    write(folder, "b", records((0.5, 0.6, 0.8012), method="fae", flags={"nepochs": 2}))
    page = page_of(folder, folder / "a", output=tmp_path / "page.html")  # a is there once
    assert f"wrote {tmp_path / 'page.html'}" in capsys.readouterr().out
    parsed = Balanced(page)
    text = " ".join(parsed.texts)
    assert "2 runs" in text and "warnings" not in page.partition("</style>")[2]
    for row in (
        "test AUC 0.7500 0.8012",
        "mean prediction / click rate 0.9700 0.9700",
        "inputs / s 1,234 1,234",
        "--nepochs 1 2",
        "training, choice of inputs included 6.5 s 6.5 s",
        "hot share of them 57.1 % 57.1 %",
    ):
        assert row in text, row
    drop = "1 17 1,717 stale 70 60 60 400 hot 0.8 0.0123 50.0 % fewer were touched"
    assert drop in text
    # Decided by the trainer where the flag leaves it open; alike, so folded.
    assert "--learning-rate 0.05" in text.partition("All other settings")[2]
    # Curves by inputs and by time, one colour a run: 5 values, 2 axes, and calibration.
    charts = re.findall(r'<svg class="chart".*?</svg></svg>', page)
    assert len(charts) == 11 and all('class="run0"><title>a' in chart for chart in charts)
    assert all('class="run1"><title>b' in chart for chart in charts)
    assert "b: 0.8012 at 3,000" in charts[0] and "b: 0.8012 at 6.5" in charts[1]
    assert "a: 0.25 at 0.125" in charts[-1] and parsed.tags.count("figure") == 11
    assert "://" not in page and "@import" not in page


def test_text_of_logs_is_only_text(tmp_path):
    run = records(method=EVIL, commit=EVIL, loaded=EVIL)
    run[0]["flags"] |= {"drop_policy": EVIL, EVIL: [EVIL, {"x": EVIL}]}
    run[0]["machine"]["cpu"] = run[5]["policy"] = run[-1]["reached"] = EVIL
    run[4]["reason"] = EVIL + "\ud800"
    folder = tmp_path / EVIL.replace("/", "")
    write(folder, folder.name, run)
    page = page_of(folder, output=tmp_path / "page.html")
    assert "script" not in Balanced(page).tags and page.count("&lt;script&gt;") > 10
    assert "default-src 'none'" in page


def test_what_warns(tmp_path):
    """Other machines, data, code; load; a run that goes on, one that failed."""
    first = records()
    first[-1]["involuntary_switches_per_s"] = 900.0
    first.insert(3, {"kind": "checkpoint", "step": 10, "error": "disk full"})
    write(tmp_path, "busy", first)
    other = {"machine": {"cpu": "Intel"}, "commit": "c2", "num_held_out": 7}
    write(tmp_path, "failed", [*records(**other)[:-1], {"kind": "failed", "reason": "NaN <b>"}])
    going = write(tmp_path, "going", records()[:3])
    going.write_text(going.read_text() + '{"kind": "evalu')
    write(tmp_path, "begun", records()[:1])
    text = " ".join(Balanced(page_of(tmp_path, output=tmp_path / "page.html")).texts)
    for said in (
        "failed: failed: NaN <b> at step 30; its figures are so far",
        "going: still going on, or killed, after step 10",
        "begun: still going on, or killed;",
        "different machines",
        "different commits",
        "different data",
        "often took cores from busy:",
        "busy: a model was not saved: disk full",
    ):
        assert said in text, said
    assert "test AUC – 0.7500 0.7500 –" in text  # begun, busy, failed, going


def places_in(value, way=()):
    """The way to every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*way, key)
        if isinstance(item, (dict, list)):
            yield from places_in(item, (*way, key))


def test_values_of_any_kind_make_a_page(tmp_path):
    """Logs of other versions: a value may be missing, or another kind of thing."""
    run = records((0.6, 0.7))
    kinds = ["x", None, [], {}, True, -1, 10**400, 5e-324, 1e299, [None], float("nan")]
    for number, way in enumerate(places_in(run)):
        if len(way) < 2 or way[-1] == "kind":
            continue
        changed = copy.deepcopy(run)
        place = changed
        for key in way[:-1]:
            place = place[key]
        for kind in (kinds[number % len(kinds)], kinds[(3 * number + 1) % len(kinds)]):
            place[way[-1]] = kind
            found = report.Run("a", 0, changed)
            assert report.page([found, report.Run("b", 1, run)]).endswith("</html>\n"), (way, kind)


def test_a_run_of_nothing_but_zeros_makes_a_page():
    """As of one that only evaluates: axes have a length all the same."""
    run = json.loads(re.sub(r": -?[0-9.]+([,}])", r": 0\1", json.dumps(records())))
    assert report.page([report.Run("a", 0, run)]).count('<svg class="chart"') == 11


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"kind": "start"}\n{"kind": "tr\n{"kind": "summary"}\n', "line 2, is no record"),
        ("[1]\n", "line 1, is no record"),
        ('{"epoch": 1, "acc": 0.5}\n', "line 1, is no record"),
        ("epoch,loss\n1,0.5\n", "line 1, is no record"),
        (b"\xff\xfe\x00", "line 1, is no record"),
        ("[" * 100_000, "line 1, is no record"),
        ('{"kind": "summary"}\n', "begins with no start record"),
        ("", "is empty"),
        (None, "holds no run; give a run's folder"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(tmp_path, capsys, content, said):
    page, folder = tmp_path / "page.html", tmp_path / "run"
    folder.mkdir()
    page.write_text("before")
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (folder / "log.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: report.main([str(folder), "--output", str(page)]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert page.read_text() == "before" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["none"], "none does not exist; give a run's folder"),
        (["run", "--output", "run/log.jsonl"], "the page's name ends in .html"),
        (["run", "--output", "no/page.html"], "No such file"),
        (["run", "--output", "run.html"], "Is a directory"),
    ],
)
def test_where_nothing_can_be_read_or_written(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    before = write(tmp_path, "run", records()).read_text()
    (tmp_path / "run.html").mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: report.main(flags))
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert (tmp_path / "run/log.jsonl").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.html"]


def test_a_real_run(segregated, tmp_path):
    """Its page holds its summary's figures; its log a small table of calibration, and when inputs
    went.
    """
    flags = ["--segregated-data-dir", segregated, *MODEL_FLAGS, "--runs-dir", tmp_path / "runs"]
    flags += ["--drop-min-steps", 0, "--drop-percentage", 30, "--test-freq", 20, "--alpha", 0.5]
    summary = slipstream_train.main([str(flag) for flag in flags])
    text = " ".join(Balanced(page_of(tmp_path / "runs", output=tmp_path / "page.html")).texts)
    assert f"test AUC {summary['auc']:.4f} " in text
    [run] = find_runs([str(tmp_path / "runs")])
    *way, final = run.of("evaluation")
    assert len(way) > 2 and not any("reliability" in record for record in way)
    sizes, means, rates = zip(*final["reliability"], strict=True)
    num_test = sum(sizes)
    assert len(sizes) == 10 and list(means) == sorted(means) and num_test > 200
    mean, rate = (
        sum(size * value for size, value in zip(sizes, values, strict=True)) / num_test
        for values in (means, rates)
    )
    assert final["mean_probability"] == pytest.approx(mean)
    assert final["calibration"] == pytest.approx(mean / rate)
    assert rate == pytest.approx(summary["test_click_rate"])
    [drop] = run.of("drop")
    assert 0 < drop["step"] < summary["step"] and drop["samples"] == 32 * drop["step"]
