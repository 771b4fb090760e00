"""Small data and flags that several test modules share."""

import contextlib
import importlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np

import dlrm_s_pytorch
import input_segregation
from slipstream.logs.formats import equal_days
from slipstream.tools import cli
from slipstream.tools.npz import pack_manifest, write_npz

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE_SIZES = np.array([40, 1, 300, 7, 1000], np.int64)
NUM_DENSE = 3
MODEL_FLAGS = (
    "--arch-sparse-feature-size 8 --arch-mlp-bot 3-16-8 --arch-mlp-top 16-1 "
    "--mini-batch-size 32 --test-mini-batch-size 200 --learning-rate 0.2 --lr-decay-share 0 "
    "--optimizer sgd --precision fp32 --device cpu --print-freq 0"
).split()


def small_arrays(num_rows=4000, table_sizes=TABLE_SIZES, seed=0):
    """X_int, X_cat, y of a log with power-law ids and a planted first-order model."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(-1, 50, (num_rows, NUM_DENSE)).astype(np.int32)
    ids = np.stack([(rng.zipf(1.4, num_rows) - 1) % size for size in table_sizes], axis=1).astype(
        np.int32
    )
    effects = [rng.normal(0, 1, size) for size in table_sizes]
    logit = sum(effect[column] for effect, column in zip(effects, ids.T, strict=True)) - 1
    y = (rng.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    return dense, ids, y


def write_processed(path, num_rows=4000, table_sizes=TABLE_SIZES, seed=0, manifest=None, **changes):
    """A processed file; `changes` are members in place of its own, or beside them."""
    dense, ids, y = small_arrays(num_rows, table_sizes, seed)
    members = {"X_int": dense, "X_cat": ids, "y": y, "counts": table_sizes}
    if manifest is not None:
        changes["manifest"] = pack_manifest(manifest)
    write_npz(path, {**members, "days": equal_days(num_rows), **changes})
    return path


def segregate_small(processed, *flags):
    """Segregate with dim 8; without flags 120 hot rows, which leaves hot and cold inputs."""
    folder = Path(processed).parent / "hot_cold"
    flags = flags or ("--hot-emb-gpu-mem", str(120 * 8 * 4))
    input_segregation.main(
        ["--processed-data-file", str(processed), "--segregated-data-dir", str(folder)]
        + ["--arch-sparse-feature-size", "8", "--optimizer", "sgd", *flags]
    )
    return folder


def dlrm(bot, top, num_features, op="dot", itself=False, seed=0):
    """A DLRM of plain features; the seed decides its weights."""
    from slipstream.model.features import plain_features
    from slipstream.model.networks import build_network, find_network

    options = {"arch_mlp_bot": bot, "arch_mlp_top": top, "arch_interaction_op": op}
    spec = find_network("dlrm", {**options, "arch_interaction_itself": itself})
    return build_network(spec, plain_features(bot[0], num_features, bot[-1]), seed)


def click_model(network, num_features, precision="fp32"):
    """It, as the trainer calls it."""
    from slipstream.logs.features import plain_layout
    from slipstream.model.networks import ClickModel

    return ClickModel(network, plain_layout(num_features), precision)


def run_script(script, *flags, **environment):
    """Run a script as a user would: (exit status, stdout, stderr lines)."""
    import os

    run = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return run.returncode, run.stdout, run.stderr.strip().splitlines()


def run_here(words, **options):
    """In `subprocess.run`'s place: a script of the repository in this process, which has what it
    imports (seconds each).
    """
    script = Path(words[1])
    path = script.relative_to(REPOSITORY) if script.is_absolute() else script
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run_script(lambda: module.main([str(word) for word in words[2:]]))
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def saved_rows(folder):
    """All weights of a saved model by name, rows in (table, id) order."""
    from slipstream.training.saved import find_checkpoint

    arrays = find_checkpoint(folder).arrays
    kept = ("rows", "row_sums", "step.")
    return {
        name.removeprefix("step."): np.array(value)
        for name, value in arrays.items()
        if name.startswith(kept)
    }


def assert_same_weights(first, second):
    """Every weight equal, bit for bit."""
    first, second = saved_rows(first), saved_rows(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.array_equal(value, second[name]), name


def train(script, folder, *flags):
    """Run a trainer's `main` on `p.npz`, or its `hot_cold`, in a folder with `MODEL_FLAGS`."""
    data = ["--segregated-data-dir", folder / "hot_cold"]
    if script is dlrm_s_pytorch:
        data = ["--processed-data-file", folder / "p.npz"]
    flags = [*data, *MODEL_FLAGS, "--runs-dir", folder / "runs", *flags]
    return script.main([str(flag) for flag in flags])
