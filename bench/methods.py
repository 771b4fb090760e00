"""The methods that a comparison runs, the flags that make them, and settings beside them."""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import dlrm_s_pytorch
import fae_train
import slipstream_train
from bench.run_records import code_texts
from slipstream.model.networks import NETWORKS, find_network
from slipstream.tools import cli
from slipstream.training.policies import BUILT_IN, find_policy

Kind = tuple[str, str]  # method, setting
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("dlrm_s_pytorch", ()),
    "baseline-bf16": ("dlrm_s_pytorch", ("--precision", "bf16")),
    "baseline-fp32": ("dlrm_s_pytorch", ("--precision", "fp32")),
    "fae": ("fae_train", ()),
    **{
        f"slipstream-{policy}": ("slipstream_train", ("--drop-policy", policy))
        for policy in BUILT_IN
    },
}
DEFAULT_METHODS = [name for name in METHODS if not name.startswith("baseline-")]
OWN_POLICY = "slipstream-FILE.py:FUNCTION"
SCRIPTS: dict[str, Any] = {
    "dlrm_s_pytorch": dlrm_s_pytorch,
    "fae_train": fae_train,
    "slipstream_train": slipstream_train,
}
# What a comparison gives every run itself.
DECIDED = {
    *("--processed-data-file", "--segregated-data-dir", "--runs-dir", "--run-name"),
    *("--print-freq", "--test-freq", *cli.SEED.name.split()),
}


def method_of(text: str) -> str:
    """Check a method's name; a reader's own policy is one, too."""
    is_own = text.startswith("slipstream-") and ".py:" in text
    if text not in METHODS and not is_own:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected one of {', '.join(METHODS)}, or {OWN_POLICY}"
        )
    return text


def folder_of(method: str) -> str:
    """A method's name as a part of a folder's."""
    if method in METHODS:
        return method
    return "slipstream-" + re.sub(r"[^\w.-]", "_", Path(method).name.replace(".py:", "."))


def script_of(method: str) -> tuple[str, tuple[str, ...]]:
    """The script of a method, and the flags that make it."""
    if method in METHODS:
        return METHODS[method]
    return "slipstream_train", ("--drop-policy", method.removeprefix("slipstream-"))


@cache
def flags_of(script: str) -> frozenset[str]:
    """The flags that a script's parser has."""
    data = ["--processed-data-file", "-"]
    if script != "dlrm_s_pytorch":
        data += ["--segregated-data-dir", "-"]
    return frozenset(
        f"--{name.replace('_', '-')}" for name in vars(SCRIPTS[script].parse_args(data))
    )


def command_of(kind: Kind, args: argparse.Namespace, flags: list[str]) -> tuple[str, list[str]]:
    """A kind's script and its flags, but for those of each run."""
    method, name = kind
    script, own_flags = script_of(method)
    words = [*flags, *split_setting(args.settings.get(name, ""), method)[0]]
    # What the comparison decides comes last: it wins over the user's flags.
    words += [*own_flags, "--processed-data-file", args.processed_data_file]
    if script != "dlrm_s_pytorch":
        words += ["--segregated-data-dir", args.segregated_data_dir]
    return script, words


def flags_in(text: str) -> list[tuple[str, list[str]]]:
    """A setting's flags, each by its name with hyphens and as its words.

    Raises `ArgumentTypeError` for one that no trainer has, or that the comparison decides.
    """
    found: list[tuple[str, list[str]]] = []
    for word in shlex.split(text):
        if word.startswith("--") or not found:
            found.append((word.partition("=")[0].replace("_", "-"), []))
        found[-1][1].append(word)
    for name, _ in found:
        if name in DECIDED:
            raise argparse.ArgumentTypeError(f"{name} is the comparison's own")
        if not any(name in flags_of(script) for script in SCRIPTS):
            raise argparse.ArgumentTypeError(f"{name} is no flag of a trainer")
    return found


def split_setting(text: str, method: str) -> tuple[list[str], list[str]]:
    """Of a setting's flags, the words of those that a method takes, and the others' names.

    It takes those that its script has and that do not make it another method.
    """
    script, own_flags = script_of(method)
    kept: list[str] = []
    left_out: list[str] = []
    for name, words in flags_in(text):
        if name in flags_of(script) and name not in own_flags:
            kept += words
        else:
            left_out.append(name)
    return kept, left_out


def kinds_of(args: argparse.Namespace) -> tuple[list[Kind], list[str]]:
    """The kinds of runs, and a line for each part of a setting that some methods do not take.

    A method that takes none of a setting's flags is run without it, once.
    """
    kinds: list[Kind] = []
    without: dict[str, list[str]] = {}
    for method in args.methods:
        for name, text in args.settings.items() or [("", "")]:
            kept, left_out = split_setting(text, method)
            if left_out:
                what = f"setting {name} without {', '.join(left_out)}"
                without.setdefault(what, []).append(method)
            kinds.append((method, "" if left_out and not kept else name))
    said = [f"{what}: {', '.join(methods)}" for what, methods in without.items()]
    return list(dict.fromkeys(kinds)), said


def check_flags(kinds: list[Kind], args: argparse.Namespace, flags: list[str]) -> None:
    """Have bad flags refused now, before anything is trained.

    By the scripts' own `parser.error`, or as a `ValueError` or `OSError`: a network or policy that
    there is not, or a setting that no method takes.
    """
    for kind in kinds:
        script, words = command_of(kind, args, flags)
        parsed = SCRIPTS[script].parse_args(words)
        if parsed.model not in NETWORKS:
            find_network(parsed.model, dict(parsed.model_args))
        if script == "slipstream_train":
            find_policy(parsed.drop_policy, parsed.alpha, dict(parsed.drop_policy_args))
    for name in args.settings:
        if name not in {setting for _, setting in kinds}:
            raise ValueError(f"setting {name}: none of the methods takes a flag of it")


def code_of(flags: Sequence[str], *more: str) -> dict[str, Any]:
    """What a folder of runs claims of their code: ours, see `code_texts`, and what flags name."""
    return {"code": code_texts(*more), "own file": texts_of(flags)}


def texts_of(words: Iterable[str]) -> dict[str, str]:
    """The checksums of the readers' own files that flags name, as path/to/file.py:Name."""
    found = {}
    for word in words:
        path = Path(word.partition("=")[2] or word if word.startswith("--") else word)
        path = Path(str(path).rpartition(":")[0])
        if path.suffix == ".py" and path.is_file():
            found[word] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
