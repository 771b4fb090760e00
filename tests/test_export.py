"""A saved model as an ONNX graph: the same probabilities, without PyTorch; and one line where it
cannot be.
"""

import functools
import json
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from helpers import REPOSITORY, write_processed
from torch.onnx._internal.exporter._registration import ONNXRegistry

import data_utils
import dlrm_s_pytorch
from slipstream.serving import export
from slipstream.serving.model import load_model

onnx = pytest.importorskip("onnx", reason="requirements-optional.txt is not installed")
pytest.importorskip("onnxscript", reason="requirements-optional.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-optional.txt is not installed")

OWN = REPOSITORY / "tests/own_network.py"
NUM_NEW = 4104
MODEL = (
    "--arch-sparse-feature-size 4 --mini-batch-size 32 --num-batches 12 --learning-rate 0.3 "
    "--device cpu --print-freq 0"
).split()
LAYERS = "--arch-mlp-bot auto-8-4 --arch-mlp-top 8-1".split()
CASES = {
    "dot": LAYERS,
    "cat": [*LAYERS, "--arch-interaction-op", "cat", "--loss-threshold", "0.1"],
    "itself": [*LAYERS, "--arch-interaction-itself", "true"],
    "deepfm": ["--model", "deepfm.py:DeepFM", "--model-args", "hidden=8"],
    "dcnv2": [*LAYERS, "--model", "dcnv2", "--model-args", "rank=3"],
    "attends": ["--model", f"{OWN}:Attends"],
    "tbsm": [*LAYERS, "--model", "tbsm"],
}
SEQUENCES = ("attends", "tbsm")
COLUMNS = {
    "label": "bought",
    "dense": [
        "visits",
        *(
            {"name": name, "type": "number", "transform": transform}
            for name, transform in (
                ("price", "signed_log"),
                ("moment", "standardize"),
                ("share", "none"),
            )
        ),
    ],
    "categorical": [
        "user",
        "item",
        {"name": "genres", "values": 3, "separator": "|", "pool": "mean"},
        {"name": "last", "values": 4, "separator": "|", "pool": "sum", "table": "item"},
    ],
}


def write_clicks(path, num_rows, first_value=0):
    """With empty cells; values below 3 are unseen where another log begins at 3."""
    rng = np.random.default_rng(num_rows)

    def values(kind, top=40):
        return f"{kind}{min(int(rng.pareto(0.7)), top) + first_value}"

    def listed(kind, most):
        return "|".join(values(kind, 6) for _ in range(rng.integers(0, most + 1)))

    with open(path, "w", encoding="utf-8") as file:
        file.write("user,item,genres,last,visits,price,moment,share,bought\n")
        for row in range(num_rows):
            user = values("u") if row % 9 else ""
            moment = f"{1_700_000_000 + int(rng.integers(0, 10**6))}" if row % 7 else ""
            cells = (user, values("i"), listed("g", 3), listed("i", 4), rng.integers(-1, 50))
            more = (f"{rng.normal(0, 9):.2f}", moment, f"{rng.random():.3f}", rng.integers(0, 2))
            file.write(",".join(map(str, (*cells, *more))) + "\n")


def train(folder, name, processed, *flags):
    words = ["--processed-data-file", folder / processed, "--runs-dir", folder / "runs"]
    words += [*MODEL, *CASES[name], "--save-model", folder / name, *flags]
    return dlrm_s_pytorch.main([str(word) for word in words])


def own_network(name):
    words = CASES[name]
    return words[1] if words[0] == "--model" else None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of each case, its graph, and what it says of new rows."""
    folder = tmp_path_factory.mktemp("export")
    write_clicks(folder / "log.csv", 900, first_value=3)
    write_clicks(folder / "new.csv", NUM_NEW)
    for name, pool, thinned in (("pooled", "sum", 0.5), ("sequences", "sequence", 0.0)):
        columns = json.loads(json.dumps(COLUMNS))
        columns["categorical"][3]["pool"] = pool
        (folder / f"{name}.json").write_text(json.dumps(columns))
        data_utils.preprocess(
            "custom",
            folder / "log.csv",
            folder / f"{name}.npz",
            columns=folder / f"{name}.json",
            data_sub_sample_rate=thinned,
            min_count=2 if thinned else 1,
        )
    page = (REPOSITORY / "docs/own.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n# input/own/deepfm.py\n(.*?)```", page, re.DOTALL)
    (folder / "deepfm.py").write_text(text)
    frame = pl.read_csv(folder / "new.csv", infer_schema_length=0)
    expected = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Its table of operators, a second of work for each graph, is the same.
        kept = functools.cache(ONNXRegistry.from_torchlib)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(kept))
        for name in CASES:
            processed = "sequences.npz" if name in SEQUENCES else "pooled.npz"
            if name == "dot":  # as a trainer does it
                train(folder, name, processed, "--save-onnx", folder / "dot.onnx")
            else:
                train(folder, name, processed)
            network = own_network(name)
            model = load_model(name, network=network, device="cpu", precision="fp32")
            if name != "dot":  # cat: tables in a file beside it
                most = 1000 if name == "cat" else export.MOST_BYTES
                export.export_model(model, folder / f"{name}.onnx", most_bytes=most)
            expected[name] = model.predict(frame)
            assert model.unseen[:2].min() >= 0 and model.shift == (name not in SEQUENCES) * np.log(
                0.5
            )
    return folder, expected


SERVE = """
import sys
from pathlib import Path
import numpy as np
from bench.serve_onnx import BLOCK_BYTES, Encoded, RawFile, Served, Tally
found = {}
for name in sys.argv[2:]:
    served = Served(f"{name}.onnx", f"{name}/vocabulary.npz")
    (block,) = served.reader.blocks(RawFile(Path("new.csv")), Tally(0), BLOCK_BYTES)
    dense, ids, unseen = block.encoded
    assert unseen.min() >= 0 and unseen.max() > 0 and ids.min() == -1
    for size, num in ((1, 30), (7, 350), (4096, len(ids))):
        starts = range(0, num, size)
        parts = [slice(start, min(start + size, num)) for start in starts]
        found[f"{name}.{size}"] = np.concatenate(
            [served.probabilities(Encoded(dense[part], ids[part], unseen)) for part in parts]
        )
    # What is no id of a table is absent, as -1 is.
    far = np.where(ids < 0, 10**6, ids)
    found[f"{name}.far"] = served.probabilities(Encoded(dense, far, unseen))
assert "torch" not in sys.modules
np.savez(sys.argv[1], **found)
"""


def test_graphs_say_what_the_models_say_without_pytorch(models):
    folder, expected = models
    done = subprocess.run(
        [sys.executable, "-c", SERVE, folder / "found.npz", *CASES],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as found:
        for name, probabilities in expected.items():
            assert probabilities.std() > 0.003
            for size in ("1", "7", "4096", "far"):
                got = found[f"{name}.{size}"]
                assert got.dtype == np.float32 and len(got) in (30, 350, NUM_NEW)
                np.testing.assert_allclose(got, probabilities[: len(got)], rtol=0, atol=1e-5)
    assert len({round(float(p[0]), 4) for p in expected.values()}) == len(CASES)


def test_what_a_graph_says_of_itself(models):
    """Names in their order, the checkpoint; tables beside it, the file of an older one gone."""
    folder, _ = models
    graph = onnx.load(folder / "dot.onnx", load_external_data=False)
    (entry,) = (one for one in graph.metadata_props if one.key == "slipstream")
    about = json.loads(entry.value)
    assert about["dense"] == ["visits", "price", "moment", "share"]
    assert about["ids"] == ["user", "item", *["genres"] * 3, *["last"] * 4]
    assert (about["version"], about["step"], about["network"]) == (1, 12, "dlrm")
    assert about["vocabulary"] == load_model(folder / "dot").reader.vocabulary.checksum
    assert about["logit_shift"] == pytest.approx(np.log(0.5))
    shapes = [[d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim]
              for one in (*graph.graph.input, *graph.graph.output)]  # fmt: skip
    assert shapes == [["batch", 4], ["batch", 9], ["batch"]]
    (data,) = folder.glob("cat.onnx.*")
    rows = load_model(folder / "cat").rows
    assert data.stat().st_size >= rows.nbytes
    (folder / "cat.onnx.0123456789ab.data").touch()
    graph = onnx.load(folder / "cat.onnx", load_external_data=False)
    assert data.name in {e.value for one in graph.graph.initializer for e in one.external_data}


def test_a_network_that_fixes_the_number_of_inputs_is_refused(models, monkeypatch):
    folder, _ = models
    model = load_model(folder / "dot", device="cpu", precision="fp32")
    forward = model.model.network.forward
    monkeypatch.setattr(
        model.model.network,
        "forward",
        lambda dense, vectors: forward(dense, vectors) + dense.new_ones(len(dense)),
    )
    with pytest.raises(ValueError, match=r"dlrm (fixes the number of inputs|cannot be exported)"):
        export.export_model(model, folder / "dot2.onnx")
    assert not list(folder.glob("dot2*"))


def test_what_cannot_be_exported_is_told_before_training(tmp_path, monkeypatch, capsys):
    processed = write_processed(tmp_path / "p.npz", 400)
    words = ["--processed-data-file", str(processed), "--save-onnx", str(tmp_path / "m.onnx")]
    with pytest.raises(SystemExit):
        dlrm_s_pytorch.parse_args(words)
    assert "--save-onnx writes the model of --save-model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="these data keep no vocabulary"):
        dlrm_s_pytorch.main([*words, "--save-model", str(tmp_path / "m")])
    assert not (tmp_path / "m").exists()
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        export.main(["--load-model", "m", "--save-onnx", "m.onnx"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "needs onnx and onnxscript: python -m pip install -r requirements-optional.txt" in said
