"""How fast `predict.py` scores a raw log, beside parsing alone and the forward pass alone.

    python -m bench.predict_rate --load-model runs/model --raw-data-file input/synthetic/train.txt

Reads the log without scoring it (a rows/s), scores rows that are in memory (b rows/s), and does
what predict.py does (c), in one process, in fp32 and bf16; prints medians, and c over
1 / (1 / a + 1 / b), which is 1 where both are done one after the other and nothing else costs. Peak
memory is that of the whole process, 9 bytes a row for the metrics among it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/predict_rate.py`

from slipstream.logs.rawfile import BLOCK_BYTES, RawFile, Tally, parse_file  # noqa: E402
from slipstream.logs.scoring import Encoded, joined  # noqa: E402
from slipstream.serving.model import TrainedModel, load_model  # noqa: E402
from slipstream.serving.scores import score_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.runtime import peak_rss_bytes  # noqa: E402

PRECISIONS = ("fp32", "bf16")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--load-model", required=True, help="a folder of --save-model")
    parser.add_argument("--raw-data-file", required=True, help="the log to score")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, help="turns")
    return parser.parse_args(argv)


def encoded_rows(model: TrainedModel, path: Path) -> Encoded:
    """All rows of a log, in memory."""
    blocks = model.reader.blocks(RawFile(path), Tally(), BLOCK_BYTES)
    return joined([block.encoded for block in blocks])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure; returns the medians by precision."""
    args = parse_args(argv)
    path, found = Path(args.raw_data_file), {}
    for precision in PRECISIONS:
        model = load_model(args.load_model, precision=precision)
        reader = model.reader
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder) / "scores.csv")

            def parse(reader: Any = reader) -> int:
                raw, tally = RawFile(path), Tally()
                rows = parse_file(raw, reader.log_format, BLOCK_BYTES, reader.modulus, tally)
                return sum(len(block.labels) for block in rows)

            def score(model: TrainedModel = model, output: str = output) -> int:
                return score_log(model, path, output)["rows"]

            seconds: dict[str, list[float]] = {"parse": [], "score": [], "forward": []}
            for _ in range(args.repeats):
                num_rows = timed(parse, seconds["parse"])
                timed(score, seconds["score"])
            peak = peak_rss_bytes()  # before all rows are in memory
            encoded = encoded_rows(model, path)

            def forward(model: TrainedModel = model, encoded: Encoded = encoded) -> int:
                return len(model.logits(encoded))

            for _ in range(args.repeats):
                timed(forward, seconds["forward"])
            del encoded
        rate = {name: num_rows / statistics.median(values) for name, values in seconds.items()}
        ideal = 1 / (1 / rate["parse"] + 1 / rate["forward"])
        found[precision] = {**rate, "of_both": rate["score"] / ideal, "peak_rss_bytes": peak}
        print(
            f"{precision}: {num_rows:,} rows; parsing alone {rate['parse']:,.0f} rows/s, forward "
            f"alone {rate['forward']:,.0f}, predict {rate['score']:,.0f}: "
            f"{rate['score'] / ideal:.2f} of 1 / (1/a + 1/b); peak memory {peak / 1e6:,.0f} MB"
        )
    return found


def timed(work: Callable[[], int], seconds: list[float]) -> int:
    """Do it, and note how long it took."""
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


if __name__ == "__main__":
    cli.run_script(main)
