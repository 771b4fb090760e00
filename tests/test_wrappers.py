"""The shell scripts: every flag they pass is parsed by the real parser, and they run."""

import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY
from plain_logs import AVAZU
from test_interrupted import write_behaviours

from bench import paper_figures
from bench.fault_scenes import broken_pipe

WRAPPERS = {
    "run_dlrm_baseline.sh": ["data_utils", "dlrm_s_pytorch"],
    "run_input_segregation.sh": ["data_utils", "input_segregation"],
    "run_fae_baseline.sh": ["data_utils", "input_segregation", "fae_train"],
    "run_slipstream.sh": ["data_utils", "input_segregation", "slipstream_train"],
}
RAW_NAMES = {
    "kaggle": "train.txt",
    "terabyte": "day",
    "avazu": "train.gz",
    "taobao": "UserBehavior.csv",
}
METHODS = {
    "baseline": "run_dlrm_baseline.sh",
    "fae": "run_fae_baseline.sh",
    "slipstream": "run_slipstream.sh",
}
RECORDER = """#!{python}
import json, sys
if sys.argv[1] != "-":
    with open({log!r}, "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tree, so that wrappers write nothing into the real one."""
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "input", "*cache*")
    return shutil.copytree(REPOSITORY, tmp_path / "checkout", ignore=ignore)


def run(checkout, script, *flags, cwd=None, stdout=subprocess.PIPE, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    return subprocess.run(
        [str(checkout / script), *map(str, flags)],
        cwd=cwd or checkout,
        env={**variables, "PYTHON": sys.executable, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )


def recorded(checkout, tmp_path, script, *flags, cwd=None, stdout=subprocess.PIPE, **environment):
    """Run a wrapper with a Python that only notes its arguments."""
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(RECORDER.format(python=sys.executable, log=str(log)))
    fake.chmod(0o755)
    for name in ("RAW_DATA", "COLUMNS_FILE", "PROCESSED_DATA"):
        if name in environment:  # it must be there, though nothing reads it
            path = Path(cwd or checkout) / environment[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    python = os.path.relpath(fake, cwd or checkout)
    environment = {"PYTHON": python, **environment}
    done = run(checkout, script, *flags, cwd=cwd, stdout=stdout, **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def check_calls(calls, expected):
    parsed = []
    for script, *flags in calls:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        parsed.append((module.__name__, module.parse_args(flags)))
    assert [name for name, _ in parsed if not name.startswith("bench")] == expected
    return dict(parsed)


@pytest.mark.parametrize("script", WRAPPERS)
def test_run_scripts_flags(checkout, tmp_path, script):
    flags = ["--seed", "7", "--verbose"]
    calls = recorded(checkout, tmp_path, script, *flags, RAW_DATA="some/train.txt")
    parsed = check_calls(calls, WRAPPERS[script])
    assert [args.verbose for args in parsed.values()] == [True] * len(parsed)
    last = parsed[WRAPPERS[script][-1]]
    assert last.seed == 7  # "$@" reaches the script
    if hasattr(last, "mini_batch_size"):  # Kaggle's network; how it is trained, the trainer decides
        decided = ("mini_batch_size", "learning_rate", "dense_learning_rate", "lr_decay_share")
        assert [getattr(last, name) for name in decided] == [None] * 4
        assert last.arch_sparse_feature_size == 16
        assert last.arch_mlp_bot == [0, 512, 256, 64, 16] and last.arch_mlp_top == [512, 256, 1]


def test_slipstream_as_in_the_paper(checkout, tmp_path):
    """`--paper` takes the place of our choice of inputs and of how it is trained."""
    parsed = []
    for flags in ([], ["--paper"]):
        (tmp_path / "log").unlink(missing_ok=True)
        calls = recorded(checkout, tmp_path, "run_slipstream.sh", "--seed", "7", *flags)
        calls = check_calls(calls, WRAPPERS["run_slipstream.sh"])
        parsed.append(vars(calls["slipstream_train"]))
        # Segregated for the same optimizer, each in a folder of its own: neither is made anew.
        rows = calls["input_segregation"]
        assert rows.optimizer == parsed[-1]["optimizer"]
        assert rows.segregated_data_dir == parsed[-1]["segregated_data_dir"]
    ours, paper = parsed
    assert (ours["drop_policy"], ours["drop_of_all"]) == ("stale", 25)
    assert (paper["drop_policy"], paper["alpha"], paper["drop_of_all"]) == ("stale", 1, 100)
    assert (ours["optimizer"], ours["mini_batch_size"]) == ("rwsadagrad", None)
    assert (paper["optimizer"], paper["mini_batch_size"]) == ("sgd", 1024)
    assert Path(ours["segregated_data_dir"]).name == "hot_cold"
    assert Path(paper["segregated_data_dir"]).name == "hot_cold_sgd"
    differing = {name for name in ours if ours[name] != paper[name]}
    assert differing == {
        *("drop_percentage", "drop_of_all", "alpha", "snapshot_start", "snapshot_window"),
        *("count_untouched_as_stale", "segregated_data_dir", "schedule"),
        *("optimizer", "mini_batch_size", "learning_rate", "lr_decay_share"),
    }


def test_without_data_a_synthetic_log_is_made_and_said_to_be(checkout, tmp_path):
    calls = recorded(checkout, tmp_path, "run_slipstream.sh")
    assert calls[0][0] == "bench/synthetic_log.py"
    parsed = check_calls(calls, WRAPPERS["run_slipstream.sh"])
    assert parsed["input_segregation"].hot_emb_gpu_mem < 268435456


def test_a_kaggle_log_in_its_place_is_used(checkout, tmp_path):
    (checkout / "input/kaggle").mkdir(parents=True)
    (checkout / "input/kaggle/train.txt").touch()
    calls = recorded(checkout, tmp_path, "run_slipstream.sh")
    parsed = check_calls(calls, WRAPPERS["run_slipstream.sh"])
    assert parsed["data_utils"].raw_data_file == "input/kaggle/train.txt"
    assert parsed["input_segregation"].hot_emb_gpu_mem == 268435456


def test_the_papers_figures_take_a_file_or_the_wrappers_variables(checkout, tmp_path):
    script, here = checkout / "bench/paper_figures.sh", tmp_path / "here"
    here.mkdir()
    log = here / "mine.npz"
    [call] = recorded(checkout, tmp_path, script, "mine.npz", "--seeds", "2", cwd=here)
    assert call == ["-m", "bench.paper_figures", str(log), "--seeds", "2"]
    (tmp_path / "log").unlink()
    variables = {"RAW_DATA": "train.txt", "HOT_EMB_GPU_MEM": "4M", "LEARNING_RATE": "0.5"}
    calls = recorded(checkout, tmp_path, script, "--only", "skew", cwd=here, **variables)
    made = check_calls(calls[:-1], ["data_utils"])["data_utils"]
    assert made.raw_data_file == str(here / "train.txt")
    log.touch()
    args, flags = paper_figures.parse_args([str(log), *calls[-1][3:]])
    assert calls[-1][2] == made.processed_data_file and args.hot_emb_gpu_mem == 4 << 20
    assert (args.only, flags[-2:]) == (["skew"], ["--learning-rate", "0.5"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data_set", ["kaggle", "terabyte", "avazu", "taobao"])
def test_recipes(checkout, tmp_path, data_set, method):
    raw = tmp_path / RAW_NAMES[data_set]
    criteo = "criteo_" * (data_set in ("kaggle", "terabyte"))
    calls = recorded(
        checkout,
        tmp_path,
        f"bench/dlrm_s_{criteo}{data_set}.sh",
        method,
        "--nepochs",
        "2",
        RAW_DATA=str(raw),
    )
    parsed = check_calls(calls, WRAPPERS[METHODS[method]])
    last = parsed[WRAPPERS[METHODS[method]][-1]]
    assert last.nepochs == 2
    assert parsed["data_utils"].data_set == data_set
    assert last.arch_mlp_bot[0] == {"avazu": 1, "taobao": 0}.get(data_set, 13)
    assert last.model == ("tbsm" if data_set == "taobao" else "dlrm")
    assert last.model_args == ([("attention", "mlp")] if data_set == "taobao" else [])
    assert parsed["data_utils"].history == (20 if data_set == "taobao" else 0)
    assert not last.arch_interaction_itself
    assert (last.optimizer, last.learning_rate) == ("rwsadagrad", None)
    if data_set == "terabyte":
        assert parsed["data_utils"].max_ind_range == 10_000_000
        assert last.arch_mlp_bot == [13, 512, 256, 64]
        if method != "baseline":
            assert parsed["input_segregation"].arch_sparse_feature_size == 64


def test_taobao_without_a_history(checkout, tmp_path):
    raw = {"RAW_DATA": str(tmp_path / RAW_NAMES["taobao"]), "HISTORY": "0"}
    calls = recorded(checkout, tmp_path, "bench/dlrm_s_taobao.sh", "baseline", **raw)
    parsed = check_calls(calls, WRAPPERS["run_dlrm_baseline.sh"])
    assert parsed["data_utils"].history == 0
    last = parsed["dlrm_s_pytorch"]
    assert (last.model, last.arch_interaction_itself) == ("dlrm", True)


def test_a_custom_log_and_its_options_reach_the_script(checkout, tmp_path):
    environment = {"DATA_SET": "custom", "COLUMNS_FILE": "my.json", "RAW_DATA": "logs/shop.csv"}
    environment |= {"BAD_LINES": "skip:7", "MAX_MEMORY": "3G", "VERBOSE": "1"}
    calls = recorded(checkout, tmp_path, "run_fae_baseline.sh", **environment)
    parsed = check_calls(calls, WRAPPERS["run_fae_baseline.sh"])
    args = parsed["data_utils"]
    assert (args.data_set, args.bad_lines, args.max_memory) == ("custom", 7, 3 << 30)
    assert args.verbose and parsed["input_segregation"].verbose
    assert args.columns == str(checkout / "my.json")
    assert re.fullmatch(r"input/logs-\d+/shop_processed.npz", args.processed_data_file)
    assert parsed["fae_train"].arch_mlp_bot[0] == 0  # as many as the data have


@pytest.mark.parametrize("what", ["avazu", "taobao"])
def test_other_logs_train_by_their_recipe(checkout, tmp_path, monkeypatch, capsys, what):
    """From the raw file to a trained Slipstream, by what one command runs."""
    raw = tmp_path / RAW_NAMES[what]
    if what == "taobao":
        write_behaviours(raw, rows=4000)
    else:
        rng = np.random.default_rng(0)
        lines = [",".join(AVAZU)]
        for row in range(3000):
            values = rng.zipf(1.5, 21) % 50
            fields = [row, int(rng.random() < 0.2), f"1410{21 + row // 1000}{row % 24:02}", *values]
            lines.append(",".join(map(str, fields)))
        raw.write_bytes(gzip.compress("\n".join(lines).encode()))
    small = {"RAW_DATA": str(raw), "HOT_EMB_GPU_MEM": "9000", "OMP_NUM_THREADS": "1"}
    script = f"bench/dlrm_s_{what}.sh"
    calls = recorded(checkout, tmp_path, script, "slipstream", "--test-freq", "0", **small)
    monkeypatch.chdir(checkout)
    for name, *flags in calls:
        importlib.import_module(name.removesuffix(".py")).main(flags)
    assert "slipstream: test AUC" in capsys.readouterr().out


def test_recipes_name_their_methods(checkout):
    done = run(checkout, "bench/dlrm_s_criteo_kaggle.sh", "sgd")
    assert done.returncode != 0 and "[baseline|fae|slipstream]" in done.stderr
    for flags in ([], ["fae"], ["--max-ind-range=7"]):
        done = run(checkout, "bench/dlrm_s_criteo_kaggle.sh", *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "kaggle/train.txt is not there: get it from https://" in done.stderr


@pytest.mark.parametrize("data_set", ["kaggle", "terabyte"])
def test_recipes_without_a_method_preprocess(checkout, tmp_path, data_set):
    """As the original's README has it; its flags reach data_utils.py."""
    raw = tmp_path / "elsewhere" / RAW_NAMES[data_set]
    raw.parent.mkdir()
    (raw.with_name("day_0") if data_set == "terabyte" else raw).touch()
    flags = [f"--raw-data-file={raw}", "--processed_data_file", tmp_path / "p.npz"]
    flags += ["--bad-lines", "skip:3"]
    calls = recorded(checkout, tmp_path, f"bench/dlrm_s_criteo_{data_set}.sh", *flags)
    parsed = check_calls(calls, ["data_utils"])["data_utils"]
    assert (parsed.raw_data_file, parsed.data_set) == (str(raw), data_set)
    assert parsed.processed_data_file == str(tmp_path / "p.npz") and parsed.bad_lines == 3


def test_a_missing_log_is_an_error_never_random_data(checkout):
    done = run(checkout, "run_slipstream.sh", RAW_DATA="input/none/train.txt")
    assert done.returncode == 2 and "SYNTHETIC" not in done.stdout
    assert "none/train.txt does not exist" in done.stderr
    # Before an interpreter is looked for, or packages are installed.
    for name in ("RAW_DATA", "PROCESSED_DATA", "COLUMNS_FILE"):
        path = {name: "nowhere/x.npz", "PYTHON": "/none"}
        done = run(checkout, "run_fae_baseline.sh", **path)
        assert done.returncode == 2 and f"error: {name}=" in done.stderr
        assert done.stderr.count("\n") == 1 and "does not exist" in done.stderr
    done = run(checkout, "run_slipstream.sh", DATA_SET="terabyte")
    assert done.returncode == 2 and "set RAW_DATA" in done.stderr


def test_a_processed_file_without_a_raw_log_is_used_as_it_is(checkout, tmp_path):
    """And paths start where the script is called."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    given = {"PROCESSED_DATA": "../mine.npz", "HOT_COLD": "rows", "EMB_DIM": "32"}
    calls = recorded(checkout, tmp_path, "run_slipstream.sh", cwd=elsewhere, **given)
    parsed = check_calls(calls, ["input_segregation", "slipstream_train"])
    for args in parsed.values():
        assert args.processed_data_file == str(tmp_path / "mine.npz")
        assert args.segregated_data_dir == str(elsewhere / "rows")
    assert parsed["slipstream_train"].arch_mlp_bot[-1] == 32


@pytest.mark.parametrize("where", ["full", "pipe"])
def test_what_cannot_be_said_ends_no_wrapper(checkout, tmp_path, where):
    """`| head -1`, and a full disk under `> file`."""
    stdout = broken_pipe() if where == "pipe" else os.open("/dev/full", os.O_WRONLY)
    given = {"PROCESSED_DATA": "mine.npz", "stdout": stdout}
    calls = recorded(checkout, tmp_path, "run_fae_baseline.sh", **given)
    check_calls(calls, ["input_segregation", "fae_train"])


def test_an_optimizer_and_a_rate_of_ones_own(checkout, tmp_path):
    given = {"OPTIMIZER": "sgd", "LEARNING_RATE": "0.7", "PROCESSES": "2"}
    calls = recorded(checkout, tmp_path, "run_fae_baseline.sh", **given)
    parsed = check_calls(calls, WRAPPERS["run_fae_baseline.sh"])
    assert parsed["fae_train"].learning_rate == 0.7 and parsed["fae_train"].processes == 2
    assert parsed["input_segregation"].optimizer == parsed["fae_train"].optimizer == "sgd"
    assert Path(parsed["fae_train"].segregated_data_dir).name == "hot_cold_sgd"


def test_two_runs_at_once_take_turns(checkout):
    """Both need the same files; each is built once, by the first, and is whole."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    environment |= {"PYTHON": sys.executable, "SYNTHETIC_ROWS": "20000", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [str(checkout / "run_input_segregation.sh")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert "".join(out for out, _ in said).count("segregated into") == 1


NOTES_LOCKS = """#!{python}
import json, os, sys
if sys.argv[1] != "-":
    places = {{os.fstat(int(word))[1:3] for word in os.environ["SLIPSTREAM_LOCKS"].split()}}
    folders = [path for path in {folders!r} if os.path.isdir(path) and os.stat(path)[1:3] in places]
    print("held by", sys.argv[1], len(places), *folders)
"""


def test_every_stage_is_handed_the_locks(checkout, tmp_path):
    """From the first one on, of the folders that any of them writes to."""
    fake = tmp_path / "python"
    rows, named = tmp_path / "new/rows", {"HOT_COLD": str(tmp_path / "new/rows/hot_cold")}
    for more, num_calls, folders in (
        ({}, 4, [checkout / "input/synthetic"]),
        (named, 4, [checkout / "input/synthetic", rows]),
        ({**named, "PROCESSED_DATA": str(checkout / "README.md")}, 2, [checkout, rows]),
    ):
        folders = [str(folder) for folder in folders]
        fake.write_text(NOTES_LOCKS.format(python=sys.executable, folders=folders))
        fake.chmod(0o755)
        done = run(checkout, "run_fae_baseline.sh", PYTHON=str(fake), **more)
        assert done.returncode == 0, done.stderr
        held = [line.split()[3:] for line in done.stdout.splitlines() if line.startswith("held")]
        assert held == [[str(len(folders)), *folders]] * num_calls, done.stdout


@pytest.mark.parametrize("value", ["yes", "1"])
def test_a_variable_of_the_users_skips_nothing(checkout, tmp_path, value):
    """What a run script tells another one that it calls, exported in a shell."""
    variables = {"SLIPSTREAM_PREPARED": value, "SLIPSTREAM_LOCKS": "0"}
    calls = recorded(
        checkout, tmp_path, "run_fae_baseline.sh", RAW_DATA="some/train.txt", **variables
    )
    check_calls(calls, WRAPPERS["run_fae_baseline.sh"])


def test_a_pipe_is_no_log(checkout, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, path in (
        ("RAW_DATA", tmp_path / "pipe"),
        ("COLUMNS_FILE", "/dev/fd/63"),
        ("PROCESSED_DATA", "/dev/zero"),
    ):
        done = run(checkout, "run_fae_baseline.sh", **{name: str(path), "PYTHON": "/none"})
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"error: {name}={path} is a pipe or a device" in done.stderr


@pytest.mark.parametrize("flag", ["--raw-data-file=x.txt", "--processed_data_file"])
def test_a_wrappers_log_is_named_by_a_variable(checkout, flag):
    done = run(checkout, "run_fae_baseline.sh", flag, "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "name the log by RAW_DATA" in done.stderr and done.stdout == ""


def test_one_log_one_file(checkout, tmp_path):
    """Logs of one name in folders of one name, and of days in their names."""
    found = []
    for raw in (
        "a/logs/train.csv",
        "b/logs/train.csv",
        "a/logs/c.2024-03-01",
        "a/logs/c.2024-03-02",
    ):
        (tmp_path / "log").unlink(missing_ok=True)
        calls = recorded(checkout, tmp_path, "run_dlrm_baseline.sh", RAW_DATA=str(tmp_path / raw))
        calls = check_calls(calls, WRAPPERS["run_dlrm_baseline.sh"])
        found.append(calls["data_utils"].processed_data_file)
        assert calls["dlrm_s_pytorch"].processed_data_file == found[-1]
    assert len(set(found)) == 4
    # Below input/ it lies beside its log.
    for raw in ("v1/clicks/train.txt", "v2/clicks/train.txt", "kaggle/train.txt"):
        (tmp_path / "log").unlink()
        calls = recorded(checkout, tmp_path, "run_dlrm_baseline.sh", RAW_DATA=f"input/{raw}")
        processed = check_calls(calls, WRAPPERS["run_dlrm_baseline.sh"])["data_utils"]
        assert processed.processed_data_file == f"input/{raw[:-4]}_processed.npz"


def test_an_unfit_python_is_named(checkout):
    done = run(checkout, "run_fae_baseline.sh", PYTHON="/nonexistent/python")
    assert done.returncode == 2 and "cannot import all of: torch" in done.stderr


def test_the_pipeline_from_nothing_and_again(checkout):
    small = {"SYNTHETIC_ROWS": "6000", "HOT_EMB_GPU_MEM": "200000", "OMP_NUM_THREADS": "1"}
    first = run(checkout, "run_slipstream.sh", "--count-untouched-as-stale=true", **small)
    assert first.returncode == 0, first.stderr
    assert "SYNTHETIC log of 6000 rows" in first.stdout
    assert re.search(r"^slipstream: test AUC 0\.\d+ \(limit 0\.", first.stdout, re.MULTILINE)
    # One screen, with three lines of a large log's steps; of so few rows there is more to warn of.
    few = ("note:", "warning:", "epoch 1: nothing dropped")
    said = first.stdout.replace(sys.executable, "python3").splitlines()
    said = [line for line in said if not line.startswith(few)]
    assert len(said) <= 24 - 3 and max(map(len, said)) <= 100, first.stdout
    report = checkout / "input/synthetic/train_processed.npz.columns.txt"
    assert f"{report.relative_to(checkout)} has what they hold" in first.stdout
    assert "category 26 " in report.read_text() and "category 26" not in first.stdout
    assert first.stdout.count("./run_slipstream.sh --") == 2 and "predict.py" in first.stdout
    again = run(checkout, "run_fae_baseline.sh", **small)
    assert again.returncode == 0, again.stderr
    names = ("train.txt", "train_processed.npz", "hot_cold")
    current = "up to date: " + ", ".join(f"input/synthetic/{name}" for name in names)
    said = again.stdout.splitlines()
    assert said[1] == current and said[2].startswith("training on 5,143 inputs"), again.stdout
    assert "fae: test AUC" in again.stdout and "next:" not in again.stdout
    assert len(list((checkout / "runs").glob("*/log.jsonl"))) == 2


@pytest.mark.parametrize(
    ("flags", "control"),
    [
        ([], "./run_slipstream.sh --drop-policy random  #"),
        (["--paper"], "./run_slipstream.sh --paper --drop-policy random  #"),
        (["--drop-policy", "random"], None),
        (["--drop_policy=cold"], None),
    ],
)
def test_the_control_that_is_proposed_is_that_of_the_run(flags, control):
    """What a first run says last: not itself, and of --paper not another recipe's."""
    text = (REPOSITORY / "bench/prepare.sh").read_text()
    propose = re.search(r"^propose\(\) \{.*?^\}$", text, re.MULTILINE | re.DOTALL)[0]
    code = f'{propose}\nmodel="" PYTHON=python; propose "$@"; echo "$SLIPSTREAM_NEXT"'
    said = subprocess.run(
        ["bash", "-c", code, "./run_slipstream.sh", *flags],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    first, *_ = said.splitlines()
    assert first.startswith(f"next: {control or './run_slipstream.sh --save-model'}"), said
    assert ("control" in said) == (control is not None) and said.startswith("next: ")


def test_shellcheck():
    scripts = [*REPOSITORY.glob("*.sh"), *REPOSITORY.glob("bench/*.sh"), REPOSITORY / ".ci/run"]
    assert len(scripts) >= 8
    checker = shutil.which("shellcheck") or os.path.join(
        os.path.dirname(sys.executable), "shellcheck"
    )
    if not os.path.exists(checker):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [checker, "-x", *map(str, scripts)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    for script in scripts:
        if script.name not in ("prepare.sh", "python.sh", "recipe.sh"):  # sourced
            assert "set -euo pipefail" in script.read_text(), script.name
