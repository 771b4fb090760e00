"""Make a checkpoint folder of a model that DLRM's own script saved, a `.pt` file.

    python -m bench.convert_dlrm --pt model.pt --save-model runs/converted \
        --processed-data-file kaggleAdDisplayChallenge_processed.npz

Weights of MLPs and tables are taken, the optimizer's state and the place in the epoch are not. The
processed file must be the one that the model was trained on: ids are numbered as there. The file is
read as weights alone (`weights_only`), so no code of it runs. Then

    python dlrm_s_pytorch.py --processed-data-file ..._processed.npz --inference-only \
        --load-model runs/converted
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/convert_dlrm.py`

import dlrm_s_pytorch  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.places import regular_file  # noqa: E402
from slipstream.tools.runlog import Clocks, NoLog  # noqa: E402
from slipstream.training.build import (  # noqa: E402
    build_model,
    build_trainer,
    describe_features,
    network_of,
)
from slipstream.training.checkpoint import Checkpoints, Every, checkpoint_folder  # noqa: E402
from slipstream.training.flags import settings_of  # noqa: E402
from slipstream.training.resume import PRECISION, identity_of  # noqa: E402
from slipstream.training.sets import PreparedData, baseline_data  # noqa: E402

# DLRM keeps its accuracies as numpy's numbers.
NUMBERS = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]


def read_weights(path: str) -> dict[str, Tensor]:
    """The weights by name; `ValueError` for a file that is not DLRM's, or holds more than data."""
    scalar = np.float64(0).__reduce__()[0]
    regular_file(path)
    try:
        with torch.serialization.safe_globals([*NUMBERS, scalar]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # PyTorch's own reader, whatever it meets
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    weights = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(weights, dict) or "bot_l.0.weight" not in weights:
        raise ValueError(f"{path} has no weights of DLRM: expected state_dict with bot_l.0.weight")
    return {str(name): value for name, value in weights.items()}


def sizes_of(weights: dict[str, Tensor], mlp: str) -> list[int]:
    """An MLP's layer sizes, its input's first."""
    layers = sorted(
        (name for name in weights if name.startswith(f"{mlp}.") and name.endswith(".weight")),
        key=lambda name: int(name.split(".")[1]),
    )
    return [weights[layers[0]].shape[1], *(weights[name].shape[0] for name in layers)]


INTERACTIONS: dict[str, list[str]] = {
    "dot": [],
    "itself": ["--arch-interaction-itself"],
    "cat": ["--arch-interaction-op", "cat"],
}


def interaction_flags(num_inputs: int, num_tables: int, dim: int, given: str | None) -> list[str]:
    """How vectors meet, told from the top MLP's input; `ValueError` where it cannot be told."""
    num = num_tables + 1
    sizes = {
        "dot": num * (num - 1) // 2 + dim,
        "itself": num * (num + 1) // 2 + dim,
        "cat": num * dim,
    }
    fitting = [name for name, size in sizes.items() if size == num_inputs]
    if given is not None:
        fitting = [name for name in fitting if name == given]
    if len(fitting) != 1:
        raise ValueError(
            f"a top MLP of {num_inputs} inputs with {num_tables} tables of dim {dim} fits "
            f"{' and '.join(fitting) or 'no interaction'}; name it by --interaction"
        )
    return INTERACTIONS[fitting[0]]


def network_flags(
    weights: dict[str, Tensor], prepared: PreparedData, interaction: str | None
) -> list[str]:
    """The network's flags; `ValueError` where its tables are not the processed file's."""
    tables = [value for name, value in weights.items() if name.startswith("emb_l.")]
    sizes = [len(table) for table in tables]
    if sizes != prepared.table_sizes.tolist():
        raise ValueError(
            f"the model has tables of {sizes} rows, the processed file of "
            f"{prepared.table_sizes.tolist()}: it was trained on another file"
        )
    dim = tables[0].shape[1]
    bottom, top = sizes_of(weights, "bot_l"), sizes_of(weights, "top_l")
    return [
        *("--arch-sparse-feature-size", str(dim)),
        *("--arch-mlp-bot", "-".join(map(str, bottom))),
        *("--arch-mlp-top", "-".join(map(str, top[1:]))),
        *interaction_flags(top[0], len(tables), dim, interaction),
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--pt", required=True, help="the file that DLRM's --save-model wrote")
    parser.add_argument("--processed-data-file", required=True, help="what it was trained on")
    parser.add_argument("--save-model", required=True, help="folder to write")
    parser.add_argument(
        "--interaction",
        choices=INTERACTIONS,
        default=None,
        help="how vectors meet: dot, dot also with themselves, or cat; not given: by the weights",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    """Convert; returns the checkpoint's folder."""
    args = parse_args(argv)
    weights = read_weights(args.pt)
    prepared = baseline_data(load_processed(args.processed_data_file))
    words = ["--processed-data-file", args.processed_data_file, "--optimizer", "sgd"]
    words += [*network_flags(weights, prepared, args.interaction), "--device", "cpu"]
    settings = settings_of(dlrm_s_pytorch.parse_args(words), prepared.data.num_train)
    spec = network_of(settings.model)
    model, table = build_model(settings, spec, prepared, torch.device("cpu"))
    mlps = {name: value for name, value in weights.items() if not name.startswith("emb_l.")}
    model.network.load_state_dict(mlps)
    start = 0
    for name in (name for name in weights if name.startswith("emb_l.")):
        rows = weights[name].float()
        table.write(np.arange(start, start + len(rows)), rows)
        start += len(rows)
    run: tuple[Any, ...] = (settings, spec, "baseline", prepared, "interleaved", None)
    identity = identity_of(*run)
    identity["rate"][PRECISION] = "fp32"
    network = spec.describe() | {"features": describe_features(prepared, settings.model)}
    with checkpoint_folder(args.save_model, False) as folder:
        checkpoints = Checkpoints(folder, identity, network, table, None, Every(), 1)
        trainer = build_trainer(
            *(settings, prepared, "interleaved", model, table, None, NoLog(), Clocks()),
            checkpoints=checkpoints,
        )
        trainer.keeper.save(is_last=True)
        trainer.loader.close()
    assert checkpoints.last_path is not None
    print(f"model: {checkpoints.last_path}")
    return checkpoints.last_path


if __name__ == "__main__":
    cli.run_script(main)
