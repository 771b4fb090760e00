"""Checkpoints as they are read: opened, compared with their checksums, and told apart.

`slipstream.training.checkpoint` writes them, and says what they hold.

    python -m slipstream.training.saved runs/model > network.py

prints the text of the file that a model's network is of, and runs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slipstream.tools import cli
from slipstream.tools.mapped import advise
from slipstream.tools.npz import check_sums, fingerprint, open_npz
from slipstream.tools.runtime import read_json
from slipstream.training.described import check_described, check_finite, check_state
from slipstream.training.rows import Shard

VERSION = 2  # 1, of DLRM alone, without random state, still loads
CHUNK_BYTES = 1 << 23  # of rows in memory at once
DESCRIPTION, STATE, BEST = "checkpoint.json", "state.npz", "best"
STEP_NAME = re.compile(r"step-[0-9]{10,}")
FLOAT = np.dtype(np.float32)
DAMAGED = "is damaged or of another version"
NETWORK_OPTIMIZER = "the network's optimizer"  # in `identity["run"]`


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was opened and found whole.

    Attributes:
        folder: where it lies.
        identity: of the run that wrote it: `model`, `data` and `run`, see `differences`. The
            model's `transforms` and the data's `sub_sampling` are as in a processed file's
            manifest; an older one does not say.
        values: where the run stood, by part.
        arrays: mapped, by `<part>.<name>`; `rows` and `row_sums` by table and id.
        network: its name, options, text of its file (which is never run), and the features.
        vocabulary: what a manifest says of it (`slipstream.logs.vocabulary`); None: not kept.
        files: where the data were, `processed` and `segregated`.
    """

    folder: Path
    identity: dict[str, dict[str, Any]]
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]
    network: dict[str, Any]
    vocabulary: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Mini-batches that were trained."""
        return int(self.values["trainer"]["progress"]["step"])

    def part(self, name: str) -> tuple[Any, dict[str, np.ndarray]]:
        """One part's values (None where it has none) and arrays."""
        start = name + "."
        arrays = {key[len(start) :]: a for key, a in self.arrays.items() if key.startswith(start)}
        return self.values.get(name), arrays

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Contents that do not fit together raise a `ValueError` that names the checkpoint."""
        try:
            yield
        except (
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            OverflowError,
            RuntimeError,  # PyTorch, for a number beyond fp32
        ) as error:
            raise ValueError(f"{self.folder} {DAMAGED}: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{self.folder} does not fit: {error}") from error

    def load_network(self, network: nn.Module) -> None:
        """Copy weights and buffers into `network`; every one here and there must be the other's."""
        _, arrays = self.part("step")
        with self.reading(), torch.no_grad():
            mine = state_arrays(network)
            stored = {name for name in arrays if name.startswith(("network.", "buffer."))}
            if stored != mine.keys():
                name = min(stored ^ mine.keys())
                raise ValueError(f"{name} is {'there' if name in stored else 'here'} alone")
            for name, value in mine.items():
                array = arrays[name]
                if array.shape != tuple(value.shape):
                    raise ValueError(
                        f"{name} has shape {array.shape} there, {tuple(value.shape)} here"
                    )
                mine_type = torch.empty(0, dtype=value.dtype).numpy().dtype
                if array.dtype != mine_type:
                    raise ValueError(f"{name} is of {array.dtype.str}; expected {mine_type}")
                if name.startswith("network."):  # a buffer may be infinite: that of a mask is
                    check_finite(name, array)
                value.copy_(torch.from_numpy(np.array(array)))

    def load_rows(
        self,
        num_rows: int,
        dim: int,
        slot_of_row: np.ndarray | None,
        with_sums: bool,
        null_row: bool = False,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows (num_rows, dim) in slot order and, where asked for, Adagrad's sums (num_rows,).

        With `null_row` zeros follow, see `EmbeddingTable`. Of a `shard` its rows, in its numbering.
        """
        shard = shard or Shard(num_rows, num_rows)
        with self.reading():
            loaded = [self._by_slot("rows", (num_rows, dim), slot_of_row, null_row, shard)]
            if with_sums:
                loaded.append(self._by_slot("row_sums", (num_rows,), slot_of_row, null_row, shard))
        return loaded[0], loaded[1] if with_sums else None

    def _by_slot(
        self,
        name: str,
        shape: tuple[int, ...],
        slot_of_row: np.ndarray | None,
        null_row: bool,
        shard: Shard,
    ) -> Tensor:
        stored = self.arrays[name]
        if stored.shape != shape or stored.dtype != FLOAT:
            raise ValueError(f"{name} has shape {stored.shape} of {stored.dtype}; {shape} here")
        by_slot = torch.empty((shard.num_kept + null_row, *shape[1:]), dtype=torch.float32)
        by_slot[shard.num_kept :] = 0
        least = 0.0 if name == "row_sums" else -np.inf
        for part in row_chunks(shape):
            check_finite(name, stored[part], least)
            slots = part if slot_of_row is None else slot_of_row[part]
            shard.put(by_slot, slots, torch.from_numpy(np.array(stored[part])))
            advise(stored[part], mmap.MADV_DONTNEED)
        return by_slot


def state_arrays(network: nn.Module) -> dict[str, Tensor]:
    """Parameters (`network.<name>`) and buffers (`buffer.<name>`), by their `saved_name`."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    state = network.state_dict()
    found = {
        f"{'network' if name in parameters else 'buffer'}.{saved_name(name)}": value
        for name, value in state.items()
    }
    if len(found) < len(state):
        raise ValueError("two of the network's tensors would be saved under one name; rename one")
    return found


def saved_name(name: str) -> str:
    """A parameter's name as part of a file's: what a member may not be called is spelt out.

    `city name` (of an `nn.ModuleDict`) becomes `city_u20_name`.
    """
    return re.sub(r"[^A-Za-z0-9_.]", lambda found: f"_u{ord(found[0]):x}_", name)


def row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of rows that take at most `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (4 * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def open_checkpoint(folder: str | Path) -> Saved:
    """Open one checkpoint and compare its checksums.

    Raises `ValueError` where a byte is not what was written, or it is of another version.
    """
    folder = Path(folder)
    described = _description(folder)
    identity = described["identity"]
    if rule := identity["run"]["the drop rule"]:
        # Before there were these bounds.
        identity["run"]["the drop rule"] = {"min_steps": 0, "of_all": 1.0, **rule}
    path = folder / STATE
    needed = ("rows",) if described["version"] == 1 else ("rows", "random.cpu")
    arrays = open_npz(path, needed)
    if fingerprint(path) != described["state"]:
        raise ValueError(f"{path} does not belong to {folder / DESCRIPTION}")
    check_sums(path)
    check_state(path, arrays)
    values, network, vocabulary = (described[name] for name in ("values", "network", "vocabulary"))
    if described["version"] == 1:
        arrays = {name.replace("step.mlp.", "step.network.", 1): a for name, a in arrays.items()}
    files = described.get("files", {})  # which older ones do not name
    return Saved(folder, identity, values, arrays, network, vocabulary, files)


def _description(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; `ValueError` where it is not what was written."""
    try:
        described: dict[str, Any] = read_json(folder / DESCRIPTION, allows_nan=True)
        checksum = described.pop("checksum")
        if described["version"] not in (1, VERSION) or checksum_of(described) != checksum:
            raise ValueError("its checksum differs")
        if described["version"] == 1:
            described |= _upgraded(described["identity"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / DESCRIPTION} {DAMAGED} ({error})") from error
    check_described(described, folder / DESCRIPTION)
    return described


def _upgraded(identity: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What version 1 did not say: it knew one network, and one optimizer of it for each of rows."""
    model, run = identity["model"], identity["run"]
    model["--model"] = "dlrm"
    run[NETWORK_OPTIMIZER] = {"sgd": "sgd", "rwsadagrad": "adagrad"}[run["--optimizer"]]
    rate = identity.get("rate", {})
    if "--learning-rate" in rate:
        rate["--dense-learning-rate"] = rate["--learning-rate"]
    options = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in model.items()
        if name.startswith("--arch-") and name != "--arch-sparse-feature-size"
    }
    network = {"name": "dlrm", "sha256": None, "text": None, "options": options, "features": None}
    return {"network": network, "vocabulary": None}


def checksum_of(described: dict[str, Any]) -> str:
    """Of a description without its checksum."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def find_checkpoint(folder: str | Path) -> Saved | None:
    """`folder` itself if it is a checkpoint, else the newest whole one in it; None: it has none.

    One that is damaged is named, and the one before it taken, last `best`. Raises `ValueError` when
    none is whole.
    """
    folder = Path(folder)
    if (folder / DESCRIPTION).exists():
        return open_checkpoint(folder)
    found = checkpoints_in(folder)
    if (folder / BEST / DESCRIPTION).exists():
        found.insert(0, folder / BEST)
    reason = ""
    for path in reversed(found):
        try:
            return open_checkpoint(path)
        except (ValueError, OSError) as error:
            print(f"{error}; it is left out", flush=True)
            reason = reason or str(error)
    if found:
        raise ValueError(
            f"{folder} has no checkpoint that is whole ({reason}); delete it to start anew"
        )
    return None


def found_checkpoint(folder: str | Path) -> Saved:
    """As `find_checkpoint`, but one that --load-model names must be there.

    Raises `FileNotFoundError` where it is not, and `ValueError` for a file of PyTorch's.
    """
    if Path(folder).is_file():
        raise ValueError(
            f"--load-model {folder} is a file, as DLRM's own script writes; ours is a folder: "
            "python -m bench.convert_dlrm makes one of it"
        )
    saved = find_checkpoint(folder)
    if saved is None:
        raise FileNotFoundError(f"--load-model: no checkpoint in {folder}")
    return saved


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{DESCRIPTION}") if _is_own(path))


def _is_own(path: Path) -> bool:
    return STEP_NAME.fullmatch(path.parent.name) is not None


def differences(here: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What two descriptions of a model, of data or of a run differ in, in words."""
    found = []
    for key in dict.fromkeys([*here, *saved]):
        mine, other = json.loads(json.dumps(here.get(key))), saved.get(key)
        if mine == other:
            continue
        if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
            place = next(
                i for i, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]
            )
            found.append(f"{key}[{place}] is {other[place]} there, {mine[place]} here")
        elif isinstance(mine, dict) and isinstance(other, dict):
            found += [f"{key}: {text}" for text in differences(mine, other)]
        else:
            short = [
                text if len(text := str(value)) < 40 else text[:37] + "..."
                for value in (other, mine)
            ]
            found.append(f"{key} is {short[0]} there, {short[1]} here")
    return found


def text_command(saved: Saved) -> str:
    """For an error line: how to have the text of a network's file, which is never run."""
    name = shlex.quote(saved.network["name"].partition(":")[0])
    folder = shlex.quote(str(saved.folder))
    return (
        f"`python -m slipstream.training.saved {folder} > elsewhere/{name}` writes out the text "
        "that it was trained with"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("model", help="the folder of --save-model, or one checkpoint in it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the text of a model's network, byte for byte."""
    folder = Path(parse_args(argv).model)
    if not (folder / DESCRIPTION).exists():
        found = [path.parent for path in folder.glob(f"{BEST}/{DESCRIPTION}")]
        found += checkpoints_in(folder)
        if not found:
            raise FileNotFoundError(f"no checkpoint in {folder}")
        folder = found[-1]
    network = _description(folder)["network"]
    if network["text"] is None:
        raise ValueError(f"{folder} is of --model {network['name']}, which has no file of its own")
    sys.stdout.flush()
    sys.stdout.buffer.write(network["text"].encode())


if __name__ == "__main__":
    cli.run_script(main)
