import math
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from helpers import MODEL_FLAGS, segregate_small, write_processed

from bench import compare, comparison_tables, methods, run_records
from bench.run_records import curve_of, finished_records
from slipstream.tools import cli, runtime
from slipstream.training.checkpoint import Checkpoints


def runs_of(*values):
    return [dict.fromkeys(comparison_tables.METRICS, 1.0) | {"auc": value} for value in values]


def test_differences_are_paired_and_ties_lie_within_their_spread():
    first = runs_of(0.70, 0.72, 0.74)
    better = runs_of(0.71, 0.73, 0.75)  # by 0.01 with every seed: no tie, whatever the seeds
    noisy = runs_of(0.69, 0.73, 0.745)
    rows = comparison_tables.tabulate({("a", ""): first, ("b", "x"): better, ("b", "y"): noisy})
    rows = [row for row in rows if row["metric"] == "auc"]
    assert [(row["method"], row["setting"]) for row in rows] == [("a", ""), ("b", "x"), ("b", "y")]
    assert [row["tie"] for row in rows] == [True, False, True]
    assert rows[1]["difference"] == pytest.approx(0.01)
    assert rows[1]["mean"] == pytest.approx(0.73) and rows[1]["sd"] == pytest.approx(0.02)
    lines = comparison_tables.markdown(
        comparison_tables.tabulate({("a", ""): first, ("b", "y"): noisy})
    ).splitlines()
    assert lines[2] == "| a | 0.7200 ± 0.0200 |  | 1.0000 | 1 | 1.0 |"
    assert lines[3].startswith("| b y | 0.7217 ± 0.0284 | +0.0017 ± 0.0") and "(tie)" in lines[3]
    [alone] = [
        row
        for row in comparison_tables.tabulate({("a", ""): runs_of(0.7)})
        if row["metric"] == "auc"
    ]
    assert math.isnan(alone["sd"]) and not alone["tie"]


def test_the_table_tells_ties_controls_and_who_did_not_get_there(capsys):
    """Also of the first method's further settings; a policy beside chance in its own setting."""
    stale, chance = "slipstream-stale", comparison_tables.RANDOM
    results = {("fae", ""): runs_of(0.70, 0.72, 0.74), ("fae", "w"): runs_of(0.69, 0.73, 0.745)}
    results |= {(stale, "d"): runs_of(0.71, 0.73, 0.75), (stale, "e"): runs_of(0.7, 0.7, 0.7)}
    results[stale, "d"][0]["training_s_to_target"] = math.nan
    for setting in ("d", "e"):
        results[chance, setting] = runs_of(0.709, 0.7291, 0.7492)
        for method in (stale, chance):  # in e not as many
            for number, run in enumerate(results[method, setting]):
                run["dropped_share"] = 0.133 + 0.001 * number
                run["dropped_share"] += 0.1 * ((method, setting) == (chance, "e"))
    rows = comparison_tables.tabulate(results)
    comparison_tables.print_table(rows, None)
    _, *lines = capsys.readouterr().out.splitlines()
    assert "(the first)" in lines[0] and "0.0017 ± 0.0259 (tie)" in lines[1]
    assert "13.4%" in lines[2] and "2 of 3" in lines[2] and "1.0" in lines[3]
    at = next(number for number, line in enumerate(lines) if "less slipstream-random" in line)
    assert lines[at + 1].split() == [stale, "d", "+0.0009", "±", "0.0002"]
    assert lines[at + 2] == f"{stale} e drops 13.4% where {chance} drops 23.4%: no control of it"
    assert not lines[at + 3]  # and chance has none
    [less] = [row for row in rows if row.get("random_interval") and row["metric"] == "auc"]
    assert less["random_difference"] == pytest.approx(0.0009) and less["random_tie"] is False
    head, _, *lines = comparison_tables.markdown(rows).splitlines()
    assert head.count("|") == 8 and "| +0.0100 ± 0.0000 | +0.0009 ± 0.0002 |" in lines[2]
    assert all(line.count("|") == 8 for line in lines)


def records(*aucs, samples=100, seconds=1.0, **more):
    """A log of one evaluation every `samples` inputs and `seconds` of training."""
    times = {"snapshot_s": 0.0, "threshold_s": 0.0}
    curve = [
        {"kind": "evaluation", "auc": auc, "samples": samples * n, "training_s": seconds * n}
        | {"normalized_entropy": 0.9, **times}
        for n, auc in enumerate(aucs, start=1)
    ]
    summary = {**curve[-1], "kind": "summary", "log_loss": 0.5, "dropped_share": 0.1, **more}
    return [*curve, summary]


def test_metrics_are_read_off_the_curves():
    first = records(0.6, 0.7, 0.74, 0.75)
    found = comparison_tables.metrics_of(
        records(0.65, 0.7495, 0.752, samples=110, seconds=0.5), first
    )
    assert found["samples"] == 330 and found["samples_to_target"] == 220
    assert found["training_s"] == 1.5 and found["training_s_to_target"] == 1.0
    assert found["auc_first_at_samples"] == pytest.approx(0.74 + 0.3 * 0.01)
    assert found["auc_first_at_time"] == pytest.approx(0.65)
    slow = comparison_tables.metrics_of(
        records(0.6, 0.7, snapshot_s=0.25, classification_s=0.5), first
    )
    assert slow["overhead_s"] == 0.75 and slow["training_s"] == 2.75
    assert math.isnan(slow["samples_to_target"]) and math.isnan(slow["training_s_to_target"])
    assert comparison_tables.metrics_of(first, first)["auc_first_at_time"] == 0.75
    # On its way it has not had the rates' fall that is to come: no control.
    decaying = [{"kind": "start", "training": {"lr_decay_share": 0.3}}, *first]
    found = comparison_tables.metrics_of(records(0.6), decaying)
    assert math.isnan(found["auc_first_at_samples"]) and math.isnan(found["auc_first_at_time"])


def test_the_fair_control_is_named_and_why_nothing_was_dropped(capsys):
    """Not the control that was run; reasons each once, with how often."""
    start = {"kind": "start", "training": {"lr_decay_share": 0.3, "mini_batch_size": 10}}
    none, short = {"dropped": 0, "reason": "short"}, {"dropped": 0, "why": "less than one input"}

    def log(samples, share, *drops):
        drops = [{"kind": "drop", "epoch": n, **drop} for n, drop in enumerate(drops)]
        return [start, *drops, *records(0.7, samples=samples, dropped_share=share)]

    settings = {"d": "--alpha 0.5", "half": "--learning-rate 1", "less7": "--num-batches 7"}
    kinds = {("fae", ""): log(100, 0.0), ("fae", "less7"): log(70, 0.0)}
    kinds |= {("slipstream-stale", "d"): log(77, 0.2, {"dropped": 3}, none)}
    kinds |= {("slipstream-random", "half"): log(53, 0.5), ("slipstream-cold", ""): log(100, 0.0)}
    kinds["slipstream-cold", ""][1:1] = [{"kind": "drop", "epoch": 0, **short}]
    args = SimpleNamespace(settings=settings, runs_dir="r s", markdown=False, csv=None)
    compare.report({kind: [log, log] for kind, log in kinds.items()}, args, ["left out"])
    said = capsys.readouterr().out
    assert "--settings 'less5=--learning-rate 1 --num-batches 5'\n" in said
    assert "bench.front --runs-dir 'r s'" in said and "first stopped" not in said
    assert (
        "left out\nslipstream-stale d: nothing dropped in 2 of 4 epochs of its runs; short" in said
    )
    assert "slipstream-cold: nothing dropped in 2 of 2 epochs of its runs; less than one" in said


def test_smoke(runs_here, capsys):
    rows = compare.main(["--smoke", "--num-seeds", "1", "--methods", "fae", "slipstream-random"])
    values = {(row["method"], row["metric"]): row["mean"] for row in rows}
    assert values["slipstream-random", "samples"] < values["fae", "samples"]
    assert values["fae", "auc"] == values["fae", "auc_first_at_samples"] > 0.55
    assert "planted model's limit" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--smoke", "--settings", "x"], ["--smoke", "--alpha", "2"]])
def test_bad_flags_are_refused_at_once(flags, capsys, monkeypatch):
    monkeypatch.setattr(compare, "train", pytest.fail)
    monkeypatch.setattr(compare, "make_small_log", lambda *values: ("", ""))
    with pytest.raises(SystemExit) as stopped:
        compare.main(flags)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def interrupt(*_, **__):
    raise KeyboardInterrupt


def check_checkpoints(run, processed, runs, monkeypatch):
    """A run that is cut off goes on at its last checkpoint, to the same bits; nothing stays."""
    seed = ["--first-seed", "2", "--num-seeds", "1"]
    run(processed, *seed)
    log = runs / "baseline-seed2/log.jsonl"
    whole = finished_records(log.parent)
    log.unlink()
    names = {path.name for path in runs.iterdir()}
    save = Checkpoints.save

    def cut_off(self, step, parts):
        return save(self, step, parts) if step < 15 else interrupt()

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="seed2 failed: interrupt"):
        patch.setattr(Checkpoints, "save", cut_off)
        run(processed, *seed, "--checkpoint-every", "5")
    assert list((runs / "baseline-seed2.checkpoints").glob("step-*10"))
    run(processed, *seed, "--checkpoint-every", "5")
    again = finished_records(log.parent)
    assert again[0]["resumed"] and again[0]["loaded"].endswith("step-0000000010")
    assert [r["auc"] for r in curve_of(again)] == [r["auc"] for r in curve_of(whole)]
    assert {path.name for path in runs.iterdir()} == names


def test_runs_are_reused_only_for_the_same_data_and_flags(tmp_path, runs_here, monkeypatch, capsys):
    def run(processed, *flags):
        folder = segregate_small(processed)
        common = ["--processed-data-file", str(processed), "--segregated-data-dir", str(folder)]
        common += [
            "--runs-dir",
            str(tmp_path / "runs"),
            "--num-seeds",
            "1",
            "--methods",
            "baseline",
        ]
        return compare.main([*common, *MODEL_FLAGS, "--num-batches", "20", *flags])

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = write_processed(tmp_path / "a/p.npz", 700)
    table = run(first)
    written = (tmp_path / "runs/baseline-seed1/log.jsonl").stat().st_mtime_ns
    assert run(first)[0]["mean"] == table[0]["mean"] > 0.4
    assert (tmp_path / "runs/baseline-seed1/log.jsonl").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="processed was .*; choose another --runs-dir"):
        run(write_processed(tmp_path / "b/p.npz", 700, seed=1))
    with pytest.raises(ValueError, match="flags --learning-rate was '0.2', is '0.01'; choose"):
        run(first, "--learning-rate", "0.01")
    # A setting, or another text of a policy, is of its runs alone.
    run(first, "--settings", "fast=--learning-rate 0.5 --alpha 0.5")
    run(first, "--settings", "fast=--learning-rate 0.5 --alpha 0.6")  # which a baseline has not
    again = "flag --learning-rate was '0.5', is '0.6'; delete .*baseline-fast-seed.0-9.. alone"
    with pytest.raises(ValueError, match=again):
        run(first, "--settings", "fast=--learning-rate 0.6")
    run(first)
    texts = methods.code_texts()
    assert "slipstream/training/staleness.py" in texts and "dlrm_s_pytorch.py" in texts
    monkeypatch.setattr(methods, "code_texts", lambda: texts | {"slipstream/x.py": "a" * 64})
    with pytest.raises(ValueError, match="code slipstream/x.py was not given, is aaaaaaaa; choose"):
        run(first)
    monkeypatch.setattr(methods, "code_texts", lambda: texts)
    # Who is interrupted is told what is kept.
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_records.subprocess, "run", interrupt)
        run(first, "--num-seeds", "3")
    assert "1 of 3 runs are finished and kept in " in capsys.readouterr().err
    check_checkpoints(run, first, tmp_path / "runs", monkeypatch)
    # Nothing is held by a comparison that did not come to a result.
    for log in (tmp_path / "runs").glob("*/log.jsonl"):
        log.write_text("{}\n")
    run(write_processed(tmp_path / "b/p.npz", 700, seed=1), "--first-seed", "4")
    assert (tmp_path / "runs/baseline-seed4/log.jsonl").exists()


def test_changes_beside_a_commit_have_a_checksum(tmp_path, monkeypatch):
    """Of what they are, also in a module that git does not know: other changes, other runs."""
    module = tmp_path / "slipstream/tools/runtime.py"
    module.parent.mkdir(parents=True)
    module.write_text("a = 1\n")
    monkeypatch.setattr(runtime, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runtime.git_commit() is None
    for words in ("init -q", "add .", "-c user.name=a -c user.email=b commit -qm a"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    found = [runtime.git_commit()]
    (tmp_path / "notes.txt").write_text("no code\n")
    assert runtime.git_commit() == found[0] and found[0].isalnum()
    for path, text in ((module, "a = 2\n"), (module, "a = 3\n"), (tmp_path / "x.py", "new = 1\n")):
        path.write_text(text)
        found.append(runtime.git_commit())
    (tmp_path / "x.py").rename(tmp_path / "slipstream/x.py")
    for text in ("new = 1\n", "new = 2\n"):
        (tmp_path / "slipstream/x.py").write_text(text)
        found.append(runtime.git_commit())
    assert len(set(found)) == 5 and found[3] == found[2]  # x.py was no part of the package
    assert all(name.startswith(f"{found[0]}+changes-") for name in found[1:])
    short = run_records.short_commit(found[1])
    assert short == found[0][:8] + "+" + found[1].rpartition("-")[2][:6]
    assert run_records.short_commit("c2+changes") == "c2+"


def test_a_settings_flags_go_to_each_method_that_has_them(tmp_path, monkeypatch, capsys):
    """What a method has no flag for is left out, and said; bad flags are refused before anything
    runs.
    """
    commands = {}

    def train(run, args, flags):
        commands[run[:2]] = compare.command_of(run[:2], args, flags)[1]
        return [{"kind": "start", "method": "fae"}, *records(0.6, 0.7)]

    monkeypatch.setattr(compare, "train", train)
    processed = write_processed(tmp_path / "p.npz", 700)
    data = ["--processed-data-file", str(processed)]
    data += ["--segregated-data-dir", str(segregate_small(processed))]
    data += ["--runs-dir", str(tmp_path / "runs"), "--num-seeds", "1", *MODEL_FLAGS]
    (tmp_path / "mine.py").write_text("def score(chunk):\n    return chunk.losses()\n")
    own = f"slipstream-{tmp_path}/mine.py:score"
    methods = ["--methods", "baseline", "fae", "slipstream-stale", own]
    settings = ["--settings", "a=--drop_percentage=60 --alpha 0.5"]
    settings += ["b=--learning-rate 3 --alpha 0.7 --drop-policy cold"]
    compare.main([*data, *methods, *settings, "--markdown"])
    assert list(commands) == [
        *(("baseline", ""), ("baseline", "b"), ("fae", ""), ("fae", "b")),
        *(("slipstream-stale", "a"), ("slipstream-stale", "b"), (own, "a"), (own, "b")),
    ]
    assert "--alpha" not in commands["fae", "b"] and "--learning-rate" in commands["fae", "b"]
    assert "--alpha" in commands[own, "b"] and "cold" not in commands[own, "b"]
    assert commands[own, "a"][-5] == f"{tmp_path}/mine.py:score"
    assert compare.run_name((own, "a", 1)) == "slipstream-mine.score-a-seed1"
    said = capsys.readouterr().out
    lines = [
        "setting a without --drop-percentage, --alpha: baseline, fae",
        "setting b without --alpha, --drop-policy: baseline, fae",
        f"setting b without --drop-policy: slipstream-stale, {own}",
    ]
    assert "\n".join(lines) in said and "\n\n".join(lines) in said  # the table's, and markdown's
    monkeypatch.setattr(compare, "train", pytest.fail)
    # Another text of the file is another comparison, another policy beside it is not.
    run = tmp_path / "runs/slipstream-mine.score-a-seed1"
    run.mkdir()
    (run / "log.jsonl").write_text('{"kind": "start", "method": "fae"}\n{"kind": "summary"}\n')
    (tmp_path / "its.py").write_text("def score(chunk):\n    return chunk.losses()\n")
    monkeypatch.setattr(compare, "train", train)
    compare.main([*data, "--methods", "fae", f"slipstream-{tmp_path}/its.py:score"])
    (tmp_path / "mine.py").write_text("def score(chunk):\n    return -chunk.losses()\n")
    monkeypatch.setattr(compare, "train", pytest.fail)
    again = "own file slipstream-mine.score was .*; delete .*mine.score-a-seed.0-9.. alone"
    with pytest.raises(ValueError, match=again):
        compare.main([*data, *methods, *settings])
    monkeypatch.setattr(compare, "train", train)
    compare.main([*data, *methods[:-1], *settings])  # the others' runs are used again


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--methods fae --settings 'a=--alpha 0.5'", "none of the methods takes a flag of it"),
        ("--methods slipstream-stale --settings 'a=--drop-policy cold'", "none of the methods"),
        ("--methods baseline-bf16 --settings 'a=--precision fp32'", "none of the methods"),
        ("--methods slipstream-stale --settings 'a=--alpha 2'", "at most 1"),
        ("--methods fae slipstream-stale --settings 'a=--alfa 1'", "--alfa is no flag"),
        ("--methods fae --settings 'a=0.5'", "0.5 is no flag"),
        ("--methods fae --settings 'a=--seed 3 --learning-rate 1'", "the comparison's own"),
        ("--methods fae --settings 'a=--model no.py:Net'", "no.py does not exist"),
        ("--methods fae slipstream-no.py:score", "no.py does not exist"),
        ("--methods fae slipstream-best", "expected one of baseline,"),
        ("--methods slipstream-a/x.py:f slipstream-b/x.py:f", "the same name"),
        ("--methods fae baseline --alpha 0.5", "unrecognized arguments: --alpha"),
    ],
)
def test_what_no_run_could_take_is_refused_at_once(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.setattr(compare, "train", pytest.fail)
    data = ["--processed-data-file", "none.npz", "--segregated-data-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: compare.main([*data, *shlex.split(flags)]))
    errors = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and said in errors[0], errors


def test_a_method_gets_the_flags_that_its_own_parser_has():
    """Also those of the baseline alone, which FAE lacks."""
    text = "--data-size 9 --schedule phased --learning_rate=1 --model-args a=1 b=2 --alpha 1"
    shared = "--learning_rate=1 --model-args a=1 b=2".split()
    split = methods.split_setting
    assert split(text, "baseline") == (["--data-size", "9", *shared], ["--schedule", "--alpha"])
    assert split(text, "fae") == (["--schedule", "phased", *shared], ["--data-size", "--alpha"])
    own = "slipstream-x/my policy.py:f"
    kept, left_out = split(text, own)
    assert kept == ["--schedule", "phased", *shared, "--alpha", "1"] and left_out == ["--data-size"]
    assert compare.run_name((own, "", 2)) == "slipstream-my_policy.f-seed2"


def test_checkpoints_of_other_runs_are_not_gone_on_with(tmp_path):
    """Of a kind whose flags differ they go; of what is as it was they stay."""

    def claim(common, **flags):
        kinds = {kind: {"flag": {"--x": value}} for kind, value in flags.items()}
        run_records.claim_runs(tmp_path, {"code": common, "kinds": kinds}, ("kinds",))
        return sorted(path.parents[1].name for path in tmp_path.glob("*/*/checkpoint.json"))

    def interrupted(*names):
        for name in names:
            step = tmp_path / f"{name}.checkpoints" / "step-0000000005"
            step.mkdir(parents=True)
            (step / "checkpoint.json").touch()
        return sorted(f"{name}.checkpoints" for name in names)

    claim(1, fae=1, stale=1)
    all_of = interrupted("fae-seed1", "fae-seeds-seed1", "stale-seed2")
    assert claim(1, fae=1, stale=1) == all_of
    assert claim(1, fae=2) == all_of[1:]  # not those of a kind that is named alike
    assert claim(2, fae=2, stale=1) == []
    (tmp_path / "comparison.json").write_text('{"kinds": []}')
    with pytest.raises(ValueError, match="is damaged"):
        claim(2)
