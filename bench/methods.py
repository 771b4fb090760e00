"""The methods that a comparison runs, the flags that make them, and settings beside them."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dlrm_s_pytorch
import fae_train
import slipstream_train
from slipstream.model import flags as model_flags
from slipstream.training import drop_flags
from slipstream.training import flags as flag_tables
from slipstream.training.policies import BUILT_IN

Kind = tuple[str, str]  # method, setting
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("dlrm_s_pytorch", ()),
    "baseline-bf16": ("dlrm_s_pytorch", ("--precision", "bf16")),
    "fae": ("fae_train", ()),
    **{
        f"slipstream-{policy}": ("slipstream_train", ("--drop-policy", policy))
        for policy in BUILT_IN
    },
}
DEFAULT_METHODS = [name for name in METHODS if name != "baseline-bf16"]
OWN_POLICY = "slipstream-FILE.py:FUNCTION"
SCRIPTS: dict[str, Any] = {
    "dlrm_s_pytorch": dlrm_s_pytorch,
    "fae_train": fae_train,
    "slipstream_train": slipstream_train,
}


def method_of(text: str) -> str:
    """Check a method's name; a reader's own policy is one, too."""
    is_own = text.startswith("slipstream-") and ".py:" in text
    if text not in METHODS and not is_own:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected one of {', '.join(METHODS)}, or {OWN_POLICY}"
        )
    return text


def script_of(method: str) -> tuple[str, tuple[str, ...]]:
    """The script of a method, and the flags that make it."""
    if method in METHODS:
        return METHODS[method]
    return "slipstream_train", ("--drop-policy", method.removeprefix("slipstream-"))


def command_of(kind: Kind, args: argparse.Namespace, flags: list[str]) -> tuple[str, list[str]]:
    """A kind's script and its flags, but for those of each run."""
    method, name = kind
    script, own_flags = script_of(method)
    words = [*flags, *split_setting(args.settings.get(name, ""), script)[0]]
    # What the comparison decides comes last: it wins over the user's flags.
    words += [*own_flags, "--processed-data-file", args.processed_data_file]
    if script != "dlrm_s_pytorch":
        words += ["--segregated-data-dir", args.segregated_data_dir]
    return script, words


def split_setting(text: str, script: str) -> tuple[list[str], list[str]]:
    """Of a setting's flags, the words of those that a script has, and those that it has not."""
    groups: list[list[str]] = []
    for word in shlex.split(text):
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    tables = [model_flags.FLAGS, flag_tables.TRAINING, flag_tables.MACHINE]
    tables += [flag_tables.EVALUATION, flag_tables.RUN]
    tables.append(flag_tables.GENERATED if script == "dlrm_s_pytorch" else flag_tables.SEGREGATED)
    if script == "slipstream_train":
        tables.append(drop_flags.FLAGS)
    known = {name for table in tables for flag in table for name in flag.name.split()}
    # One that no script knows is each script's to refuse.
    others = {name for flag in drop_flags.FLAGS for name in flag.name.split()}
    others |= {name for flag in flag_tables.SEGREGATED for name in flag.name.split()}
    kept: list[str] = []
    left_out: list[str] = []
    for group in groups:
        name = group[0].partition("=")[0].replace("_", "-")
        if name in known or name not in others:
            kept += group
        else:
            left_out.append(name)
    return kept, left_out


def kinds_of(args: argparse.Namespace) -> tuple[list[Kind], list[str]]:
    """The kinds of runs, and a line for each part of a setting that a method has no flag for.

    A method that has none of a setting's flags is run without it, once.
    """
    kinds: list[Kind] = []
    said = []
    for method in args.methods:
        script, _ = script_of(method)
        for name, text in args.settings.items() or [("", "")]:
            kept, left_out = split_setting(text, script)
            if left_out:
                said.append(f"{method} has no {', '.join(left_out)} of setting {name}")
            kinds.append((method, name if kept else ""))
    return list(dict.fromkeys(kinds)), list(dict.fromkeys(said))


def check_flags(kinds: list[Kind], args: argparse.Namespace, flags: list[str]) -> None:
    """Have each script refuse bad flags now, before anything is trained, by `parser.error`."""
    for kind in kinds:
        script, words = command_of(kind, args, flags)
        SCRIPTS[script].parse_args(words)
    for name, text in args.settings.items():
        if shlex.split(text) and name not in {setting for _, setting in kinds}:
            raise ValueError(f"setting {name}: none of the methods has a flag of it")


def texts_of(words: Iterable[str]) -> dict[str, str]:
    """The checksums of the readers' own files that flags name, as path/to/file.py:Name."""
    found = {}
    for word in words:
        path = Path(word.rpartition(":")[0])
        if path.suffix == ".py" and path.is_file():
            found[word] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
