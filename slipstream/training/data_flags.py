"""The flags that say which data a trainer trains on, and those data: opened, made, or generated.

And what a saved model says in place of flags, where it is evaluated alone.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from slipstream.logs.flags import RAW_FLAGS
from slipstream.logs.formats import KAGGLE_DAYS
from slipstream.logs.processed import ClickLog, Lookups, generated_log, load_processed
from slipstream.logs.sources import default_processed_file, find_raw_files
from slipstream.model import flags as model_flags
from slipstream.tools import cli
from slipstream.tools.cli import Flag
from slipstream.tools.locks import exclusive
from slipstream.tools.npz import fingerprint, open_npz, unpack_manifest
from slipstream.tools.places import resolved
from slipstream.training.batching import SCHEDULES
from slipstream.training.flags import recipe_of
from slipstream.training.rows import bytes_per_row
from slipstream.training.saved import Saved, found_checkpoint
from slipstream.training.segregation import HOT_ROW_FLAGS, ROWS_FILE, default_folder, segregate
from slipstream.training.sets import PreparedData, baseline_data, load_segregated
from slipstream.training.test_file import TEST_DATA_FILE, tested_on

NUM_GENERATED_DENSE = 13  # as Criteo
DATA_SIZE = 100_000
FINITE = cli.number(float, -1e9, 1e9)
GENERATED = (
    Flag(
        "--data-generation",
        ("dataset", "random", "synthetic"),
        "dataset",
        "dataset: --processed-data-file; random: uniform, nothing to learn; synthetic: power-law "
        "ids and labels of a planted model",
    ),
    Flag(
        "--processed-data-file",
        str,
        None,
        "a processed .npz of data_utils.py, or of the older DLRM scripts",
    ),
    *RAW_FLAGS,
    TEST_DATA_FILE,
    Flag(
        "--data-size",
        cli.positive_int,
        None,
        "inputs that random and synthetic make, held-out ones included; not given: as many as "
        f"--num-batches needs, or {DATA_SIZE:,}",
    ),
    Flag(
        "--arch-embedding-size",
        cli.layer_sizes,
        "1000-500-100-100-50-50-20-10",
        "rows per table, for random and synthetic; a data set brings its own",
    ),
)
LOOKUPS = (
    Flag(
        "--num-indices-per-lookup",
        cli.positive_int,
        1,
        "of random data: rows of each table for an input, which are added up; at most",
    ),
    Flag(
        "--num-indices-per-lookup-fixed",
        cli.boolean,
        False,
        "as many for every input; else from 1 to that number",
    ),
    Flag("--rand-data-dist", ("uniform", "gaussian"), "uniform", "of random data: of the ids"),
    Flag("--rand-data-min", FINITE, 0.0, "of gaussian ids: the least"),
    Flag("--rand-data-max", FINITE, 1.0, "of gaussian ids: the largest"),
    Flag("--rand-data-mu", FINITE, -1.0, "of gaussian ids: the mean; -1: half-way between the two"),
    Flag("--rand-data-sigma", cli.positive_float, 1.0, "of gaussian ids: the standard deviation"),
)
SEGREGATED = (
    Flag(
        "--segregated-data-dir",
        str,
        None,
        "a folder made by input_segregation.py; not given: hot_cold beside --processed-data-file "
        "(with sgd hot_cold_sgd), made first where there is none of that file",
    ),
    Flag(
        "--processed-data-file",
        str,
        None,
        "refuse a folder that was not made from this processed .npz; not given: no check",
    ),
    *RAW_FLAGS,
    TEST_DATA_FILE,
    Flag(
        "--schedule",
        SCHEDULES,
        "interleaved",
        "hot and cold batches evenly mixed, or all cold, then all hot (the published code)",
    ),
)


def check_generated(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values of `GENERATED` that do not fit together, by `parser.error`."""
    named = bool(args.processed_data_file or args.raw_data_file)
    if args.data_generation == "dataset" and not named and not args.inference_only:
        parser.error("--processed-data-file is needed with --data-generation=dataset")
    if args.data_generation != "dataset" and named:
        parser.error("--processed-data-file goes with --data-generation=dataset")
    if args.data_generation != "dataset" and args.test_data_file:
        parser.error("--test-data-file goes with --data-generation=dataset")
    if args.data_generation != "random":
        for flag in LOOKUPS:
            if getattr(args, flag.dest) != flag.usual:
                parser.error(f"{flag.name} goes with --data-generation random")
    if args.data_size is not None and args.data_size < KAGGLE_DAYS:
        parser.error(f"--data-size {args.data_size}: expected at least {KAGGLE_DAYS}")


def check_segregated(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values of `SEGREGATED` that name no data, by `parser.error`."""
    named = args.segregated_data_dir or args.processed_data_file or args.raw_data_file
    if not named and not args.inference_only:
        parser.error("give --segregated-data-dir, or --processed-data-file to segregate it first")


def undisturbed(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Within it nobody replaces the processed file that `processed_file` makes of a raw log."""
    raw, processed = args.raw_data_file, args.processed_data_file
    folder = Path(processed or default_processed_file(args.data_set, raw)).parent if raw else None
    # One that is missing is made, or cannot be, by who writes there: its error says how to go on.
    return exclusive(folder) if folder is not None and folder.is_dir() else contextlib.nullcontext()


def processed_file(args: argparse.Namespace) -> str | None:
    """The processed file that `RAW_FLAGS` name, preprocessed first where a raw log is named.

    A raw log that is not there any more is not needed where its processed file is, nor is it where
    the file is one of DLRM's own scripts. Whatever is random in it does not depend on --seed.
    """
    raw, processed = args.raw_data_file, args.processed_data_file or None
    if not raw:
        return processed
    processed = processed or str(default_processed_file(args.data_set, raw))
    if Path(processed).exists():
        reason = None
        try:
            find_raw_files(args.data_set, raw, 1)
        except FileNotFoundError:
            if Path(raw).is_dir():  # of another data set: so may be the processed file in it
                raise
            reason = f"{raw} is not there"
        if reason is None and not unpack_manifest(open_npz(processed), processed):
            reason = f"{processed} was not made by data_utils.py"
        if reason is not None:
            print(f"note: {reason}; using {processed} as it is")
            return processed
    from slipstream.logs.preprocess import preprocess  # polars, which training does without

    preprocess(
        args.data_set,
        raw,
        processed,
        max_ind_range=args.max_ind_range,
        data_sub_sample_rate=args.data_sub_sample_rate,
        verbose=args.verbose,
    )
    return processed


def open_baseline(args: argparse.Namespace) -> PreparedData:
    """The data that `GENERATED` names, for the baseline."""
    kind = args.data_generation
    if kind == "dataset":
        with undisturbed(args):
            path = processed_file(args)
            assert path is not None
            prepared = baseline_data(load_processed(path, args.max_memory))
            return tested_on(prepared, args.test_data_file)
    return baseline_data(_generated(args, kind))


def _generated(args: argparse.Namespace, kind: str) -> ClickLog:
    num_dense = (args.arch_mlp_bot or [0])[0] or NUM_GENERATED_DENSE
    num_rows = args.data_size
    if num_rows is None:
        num_rows = DATA_SIZE
        if args.num_batches and args.mini_batch_size:  # one day of seven is held out
            needed = args.num_batches * args.mini_batch_size // max(args.nepochs, 1)
            num_rows = max(KAGGLE_DAYS, -(-needed * KAGGLE_DAYS // (KAGGLE_DAYS - 1)))
    lookups = Lookups(
        args.num_indices_per_lookup,
        args.num_indices_per_lookup_fixed,
        args.rand_data_dist,
        args.rand_data_min,
        args.rand_data_max,
        args.rand_data_mu,
        args.rand_data_sigma,
    )
    sizes = args.arch_embedding_size
    given = None if lookups == Lookups() else lookups
    return generated_log(kind, sizes, num_rows, num_dense, args.seed, given)


def take_saved_model(args: argparse.Namespace) -> None:
    """With --inference-only the checkpoint says what the model is, where the flags do not, and
    where its data were.

    Raises `ValueError` and `FileNotFoundError` where there is none that is whole, or its data are
    gone.
    """
    if not args.inference_only:
        return
    saved = found_checkpoint(args.load_model)
    identity = saved.identity
    _take_data(args, saved)
    model, run = identity["model"], identity["run"]
    taken = {name: model[name] for name in model if name != "--model"}
    if "the text of its file" in model and not args.model_args:
        args.model_args = list(taken.pop("--model-args").items())
    model_flags.take_saved(args, taken)
    args.loss_threshold = args.loss_threshold or run.get("--loss-threshold", 0.0)


def _take_data(args: argparse.Namespace, saved: Saved) -> None:
    """Evaluate on the data that the model was trained with, where no flag names any."""
    takes_folder = hasattr(args, "segregated_data_dir")
    if args.processed_data_file or args.raw_data_file:
        return
    if args.segregated_data_dir if takes_folder else args.data_generation != "dataset":
        return
    kind = "segregated" if takes_folder and "segregated" in saved.files else "processed"
    path = saved.files.get(kind)
    flag = "--segregated-data-dir" if kind == "segregated" else "--processed-data-file"
    if path is None or not Path(path).exists():
        where = "its checkpoint does not say where they are" if path is None else f"{path} is gone"
        raise FileNotFoundError(
            f"{saved.folder}: the data to evaluate on: {where}; name them by {flag}, or score a raw"
            " log with predict.py"
        )
    print(f"evaluating on {path}")
    setattr(args, "segregated_data_dir" if kind == "segregated" else "processed_data_file", path)


def open_segregated(args: argparse.Namespace) -> PreparedData:
    """The folder that `SEGREGATED` names, made for rows as large as the trainer's.

    One that is not named and not there is made, with the defaults of input_segregation.py.
    """
    optimizer, dim = recipe_of(args, 1).optimizer, args.arch_sparse_feature_size
    row_bytes = bytes_per_row(dim, optimizer)
    with undisturbed(args):
        processed, folder = processed_file(args), args.segregated_data_dir
        if folder is None:
            assert processed is not None
            folder = default_folder(processed, optimizer)
            if not _is_of(folder, processed):
                defaults = {flag.dest: flag.usual for flag in HOT_ROW_FLAGS}
                defaults |= {"arch_sparse_feature_size": dim, "optimizer": optimizer}
                with exclusive(resolved(folder).parent):
                    segregate(processed, folder, verbose=args.verbose, **defaults)
        prepared = load_segregated(folder, processed, row_bytes, args.max_memory)
        return tested_on(prepared, args.test_data_file)


def _is_of(folder: Path, processed: str) -> bool:
    """Whether a segregated folder is there, and made from that file."""
    try:
        rows = folder / ROWS_FILE
        manifest = unpack_manifest(open_npz(rows, others=False), rows)
    except (OSError, ValueError):
        return False
    return manifest.get("source") == fingerprint(processed)
