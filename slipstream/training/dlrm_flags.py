"""What the flags of DLRM, FAE and Slipstream's original code that are not ours ask for.

Each is noted and left out, takes the form of a flag of ours, or is refused in one line that names
what to use. A flag of the same name here is ours, and its help says what it does.
"""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.tools.foreign import Foreign, by_name

NO_WORKERS = "inputs are cut from mapped files, without worker processes"
MAPPED = "processed files are always mapped"
COMPRESSED = "rows are as wide as --arch-sparse-feature-size; --max-ind-range makes tables smaller"
LOGGED = "every run writes runs/<name>/log.jsonl"
RANKS = "several processes train by --processes N, or under torchrun"
TRACES = "synthetic data are of a planted model; access traces are not read"
ORIGINAL_FEATURES = 26  # of Criteo, by which the original counts `non_changing_index`


def _alpha(value: str) -> Sequence[str]:
    return (f"--alpha={min(float(value) / ORIGINAL_FEATURES, 1.0):.12g}",)


def _percent(value: str) -> Sequence[str]:
    return (f"--drop-percentage={100 * float(value):g}",)


# Of dlrm_s_pytorch.py, by its groups.
DLRM = (
    Foreign("--weighted-pooling", "rows are summed or averaged", refuses=True),
    Foreign("--md-flag", COMPRESSED, 0, refuses=True),
    Foreign("--md-threshold", "goes with --md-flag, which is not here"),
    Foreign("--md-temperature", "goes with --md-flag, which is not here"),
    Foreign("--md-round-dims", "goes with --md-flag, which is not here", 0),
    Foreign("--qr-flag", COMPRESSED, 0, refuses=True),
    Foreign("--qr-threshold", "goes with --qr-flag, which is not here"),
    Foreign("--qr-operation", "goes with --qr-flag, which is not here"),
    Foreign("--qr-collisions", "goes with --qr-flag, which is not here"),
    Foreign("--activation-function", "it is relu", refuses=True, harmless=("relu",)),
    Foreign("--round-targets", "labels are 0 or 1", -1),
    Foreign("--data-trace-file", TRACES, refuses=True),
    Foreign("--data-trace-enable-padding", TRACES, -1, harmless=("False", "false", "0")),
    Foreign("--num-workers", NO_WORKERS),
    Foreign("--test-num-workers", NO_WORKERS),
    Foreign("--memory-map", MAPPED, 0),
    Foreign("--dataset-multiprocessing", "preprocessing takes all cores by itself", 0),
    Foreign("--print-precision", "numbers are printed to four digits, and logged in full"),
    Foreign("--sync-dense-params", "processes always add their gradients up", -1),
    Foreign(
        "--quantize-mlp-with-bit",
        "the network is fp32, tf32 or bf16: --precision",
        refuses=True,
        harmless=("32",),
    ),
    Foreign("--quantize-emb-with-bit", "rows are fp32", refuses=True, harmless=("32",)),
    Foreign("--use-gpu", "--device auto takes a GPU where there is one", 0),
    Foreign("--local-rank", RANKS, refuses=True, harmless=("-1", "0")),
    Foreign("--dist-backend", f"{RANKS}, by NCCL or gloo", refuses=True, harmless=("",)),
    Foreign("--print-time", "progress lines always say it", 0),
    Foreign("--print-wall-time", "evaluations are logged with their times", 0),
    Foreign("--mlperf-logging", LOGGED, 0),
    Foreign("--mlperf-bin-loader", MAPPED, 0),
    Foreign("--mlperf-bin-shuffle", "inputs are shuffled by --data-randomize", 0),
    Foreign("--mlperf-coalesce-sparse-grads", "gradients of equal rows are always added up", 0),
    Foreign(
        "--mlperf-grad-accum-iter", "take a larger --mini-batch-size", refuses=True, harmless=("1",)
    ),
)
# Of FAE's profiler and trainers, and of Slipstream's.
FAE = (
    Foreign(
        "--data-generation",
        "a log is segregated: --processed-data-file",
        refuses=True,
        harmless=("dataset",),
    ),
    *(
        Foreign(f"--{name}", "is of generated data")
        for name in (
            *("data-size", "arch-embedding-size", "num-indices-per-lookup", "rand-data-dist"),
            *("rand-data-min", "rand-data-max", "rand-data-mu", "rand-data-sigma"),
        )
    ),
    Foreign("--num-indices-per-lookup-fixed", "is of generated data", -1),
    Foreign("--train-hot-file", "the sets are those of --segregated-data-dir"),
    Foreign("--train-normal-file", "the sets are those of --segregated-data-dir"),
    Foreign("--hot-emb-dict-file", "hot rows are those of --segregated-data-dir"),
    Foreign("--avazu-db-path", "--data-set avazu reads train.csv itself"),
    Foreign("--avazu-train-file", "--data-set avazu reads train.csv itself"),
    Foreign("--avazu-test-file", "the last day is held out"),
)
SLIPSTREAM = (
    Foreign(
        "--cluster-forming-threshold",
        "T is found from --drop-percentage; --threshold sets it by hand",
    ),
    Foreign("--confidence-rate", "the original does not read it either"),
    Foreign("--minibatch-percentage", "", becomes=lambda value: (f"--snapshot-window={value}",)),
    Foreign("--starting-minibatch", "", becomes=lambda value: (f"--snapshot-start={value}b",)),
    Foreign("--non-changing-index", "", becomes=_alpha),
    Foreign("--target-drop-percentage", "", becomes=_percent),
)
# Where a trainer's line is given to segregation, or to preprocessing.
ELSEWHERE = "is the trainers'"
OF_TRAINERS = (
    *(Foreign(f"--{name}", ELSEWHERE, -1) for name in ("save-onnx", "plot-compute-graph")),
    *(
        Foreign(f"--{name}", ELSEWHERE)
        for name in (
            *("arch-mlp-bot", "arch-mlp-top", "arch-embedding-size", "arch-interaction-op"),
            *("arch-sparse-feature-size", "loss-function", "optimizer", "learning-rate"),
            *("mini-batch-size", "test-mini-batch-size", "nepochs", "num-batches", "print-freq"),
            *("test-freq", "data-generation", "data-randomize", "tensor-board-filename"),
        )
    ),
)
DROPPING_ELSEWHERE = tuple(
    Foreign(name, "is slipstream_train.py's")
    for name in (*(flag.name for flag in SLIPSTREAM), "--sample-rate")
)
TRAINERS = by_name(DLRM, FAE, DROPPING_ELSEWHERE)
SLIPSTREAM_TRAINER = by_name(DLRM, FAE, SLIPSTREAM)
SEGREGATION = by_name(OF_TRAINERS, DLRM, FAE)
PREPROCESSING = by_name(OF_TRAINERS, DLRM)
