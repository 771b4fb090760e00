"""Features of several id columns: shared tables, pooling, sequences, and absent elements, whose row
of zeros never moves.
"""

import itertools

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, assert_same_weights, saved_rows, segregate_small
from hypothesis import given, settings
from hypothesis import strategies as st

import dlrm_s_pytorch
import fae_train
import input_segregation
import slipstream_train
from slipstream.logs.features import Feature, FeatureLayout, layout_of
from slipstream.logs.formats import equal_days
from slipstream.logs.processed import load_processed
from slipstream.model.features import Pooling
from slipstream.tools.npz import open_npz, pack_manifest, unpack_manifest, write_npz
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.sets import load_segregated

OWN = REPOSITORY / "tests/own_network.py"
# Five columns, three tables: items in a cell each, as a list, and as a history of the same table.
FEATURES = [
    {"name": "item", "columns": [0], "table": 0},
    {"name": "tags", "columns": [1, 2, 3], "table": 1, "pooling": "mean"},
    {"name": "seen", "columns": [4, 5], "table": 0, "pooling": "sum"},
    {"name": "city", "columns": [6], "table": 2},
]
SIZES = np.array([300, 40, 7], np.int64)
TABLE_OF_COLUMN = [0, 1, 1, 1, 0, 0, 2]
FLAGS = (
    "--arch-sparse-feature-size 8 --arch-mlp-bot 3-16-8 --arch-mlp-top 16-1 --mini-batch-size 32 "
    "--test-mini-batch-size 200 --learning-rate 0.2 --lr-decay-share 0 --optimizer sgd "
    "--precision fp32 --device cpu --print-freq 0"
).split()
DROP = "--drop-percentage 40 --alpha 0.5 --drop-min-steps 0".split()


def write_log(path, features=FEATURES, num_rows=3000, seed=0):
    rng = np.random.default_rng(seed)
    sizes = SIZES[TABLE_OF_COLUMN]
    ids = ((rng.zipf(1.4, (num_rows, 7)) - 1) % sizes).astype(np.int32)
    absent = rng.random(ids.shape) < 0.4
    absent[:, [0, 6]] = False
    ids[absent] = -1
    dense = rng.integers(0, 50, (num_rows, 3)).astype(np.int32)
    effect = rng.normal(0, 1, 300)
    logit = effect[ids[:, 0]] + np.where(ids[:, 4] >= 0, effect[ids[:, 4]], 0) - 1
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    members = {"X_int": dense, "X_cat": ids, "y": labels, "counts": SIZES}
    manifest = pack_manifest({"features": features})
    write_npz(path, {**members, "days": equal_days(num_rows), "manifest": manifest})
    return path


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "small_processed.npz")


def run(script, folder, *flags):
    words = ["--runs-dir", folder / "runs", *FLAGS, *flags]
    return script.main([str(word) for word in words])


def brute_force_pool(layout, rows, ids):
    """Vector by vector, element by element."""
    vectors = []
    for b in range(len(ids)):
        mine = []
        for feature in layout.features:
            here = [rows[b, c] for c in feature.columns if ids[b, c] >= 0]
            total = sum(here, torch.zeros(rows.shape[2]))
            mine.append(total / len(here) if feature.pooling == "mean" and here else total)
        vectors.append(torch.stack(mine))
    return torch.stack(vectors)


def test_pooling_equals_brute_force_and_absent_rows_get_no_gradient():
    layout = layout_of({"features": FEATURES}, 7, 3, "log")
    ids = torch.randint(-1, 5, (50, 7), generator=torch.Generator().manual_seed(1))
    ids[:, [0, 6]] = ids[:, [0, 6]].clamp(min=0)
    ids[3, 1:4] = -1  # a list of nothing
    rows = torch.randn(50, 7, 4, requires_grad=True)
    vectors, sequences = Pooling(layout)(rows, ids >= 0)
    assert not sequences
    torch.testing.assert_close(vectors, brute_force_pool(layout, rows, ids))
    # Whatever the network does with it, infinite gradients too.
    (vectors * torch.inf).sum().backward()
    assert (rows.grad[ids < 0] == 0).all() and not (rows.grad[ids >= 0] == 0).any()


@given(st.integers(0, 40), st.integers(0, 100), st.sampled_from(["sgd", "rwsadagrad"]))
@settings(max_examples=60, deadline=None)
def test_the_null_row_stays_zero_wherever_rows_live(num_resident, seed, optimizer):
    """Any number of resident rows gives the same lookups and updates, bit for bit; also where the
    null row's place, behind areas that hold fewer rows than there are, is a host row's slot.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, 40, (2, 4), generator=generator)
    slots[0, 0] = min(num_resident + 3 * 8, 39)  # that very slot
    gradient = torch.randn(2, 4, 3, generator=generator)
    gradient[slots < 0] = 0
    outcomes = []
    for resident in (num_resident, 40):
        start = torch.cat([torch.arange(1, 121).view(40, 3) / 7, torch.zeros(1, 3)])
        device = torch.device("cpu")
        table = EmbeddingTable(start, resident, 8, device, optimizer, null_row=True)
        assert table.num_rows == 40
        for _ in range(2):
            staged = table.enter(table.stage(slots))
            looked_up = table.lookup(staged)
            assert torch.equal(table.present(staged), slots >= 0)
            assert (looked_up[slots < 0] == 0).all()
            table.update(staged, gradient.clone(), 0.1)
            table.write_back(staged)
        outcomes.append([looked_up, *table.read(slice(None)).values()])
        assert len(outcomes[-1][1]) == 40
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def test_training_is_the_same_wherever_rows_live(log, tmp_path):
    """Baseline, FAE, Slipstream; any number of resident rows; SGD, row-wise Adagrad; resumed."""
    folder = segregate_small(log, "--hot-emb-gpu-mem", str(80 * 8 * 4))
    slots = open_npz(folder / "train_hot.npz")["slots"]
    assert (slots < 80).all() and (slots == -1).any() and 200 < len(slots) < 2000
    segregated = ["--segregated-data-dir", folder]
    jobs = {
        "base": (dlrm_s_pytorch, ["--processed-data-file", log]),
        "fae": (fae_train, segregated),
        "slip": (slipstream_train, [*segregated, *DROP]),
    }
    for name, (script, flags) in jobs.items():
        rows = {}
        for resident in (0, 80, -1):
            saved = ["--save-model", tmp_path / f"{name}{resident}"]
            summary = run(script, tmp_path, *flags, "--num-resident", resident, *saved)
            rows[resident] = summary["auc"]
            assert_same_weights(tmp_path / f"{name}0", tmp_path / f"{name}{resident}")
        assert len(set(rows.values())) == 1
        assert (summary["dropped"] > 0) == (name == "slip")
    for steps in (13, 41, 0):  # through the window
        script, flags = jobs["slip"]
        auto = ["--save-model", tmp_path / "parts", "--load-model", "auto"]
        run(script, tmp_path, *flags, *auto, "--num-batches", steps)
    assert_same_weights(tmp_path / "slip0", tmp_path / "parts")
    adagrad = ["--processed-data-file", log, "--optimizer", "rwsadagrad"]
    adagrad += ["--learning-rate", 0.05, "--nepochs", 2]
    for resident in (50, -1):
        saved = ["--save-model", tmp_path / f"ada{resident}", "--num-resident", resident]
        assert run(dlrm_s_pytorch, tmp_path, *adagrad, *saved)["auc"] > 0.6
    assert_same_weights(tmp_path / "ada50", tmp_path / "ada-1")
    assert saved_rows(tmp_path / "ada50")["row_sums"].shape == (347,)


def test_segregation_counts_present_elements_alone(log):
    folder = segregate_small(log, "--hot-emb-gpu-mem", str(80 * 8 * 4))
    found, arrays = open_npz(folder / "embedding_rows.npz"), open_npz(log)
    offsets = np.concatenate([[0], np.cumsum(SIZES)[:-1]])[TABLE_OF_COLUMN]
    num_train = int(arrays["days"][-2])
    counts, hot, of_row = np.zeros(347, int), 0, found["slot_of_row"]
    for ids in arrays["X_cat"][:num_train]:
        rows = [i + offset for i, offset in zip(ids, offsets, strict=True) if i >= 0]
        counts[rows] += [1] * len(rows) if len(set(rows)) == len(rows) else 0
        for row in rows if len(set(rows)) < len(rows) else []:
            counts[row] += 1
        hot += all(of_row[row] < 80 for row in rows)
    assert np.array_equal(found["access_counts"][of_row], counts)
    prepared = load_segregated(folder, log)
    assert len(prepared.data.hot) == hot
    assert [feature.name for feature in prepared.layout.features] == [
        feature["name"] for feature in FEATURES
    ]
    # Inputs and elements are those of the log, in order.
    hot_slots, cold_slots = (
        inputs.categories for inputs in (prepared.data.hot, prepared.data.cold)
    )
    total = sum((slots >= 0).sum() for slots in (hot_slots, cold_slots))
    assert total == (arrays["X_cat"][:num_train] >= 0).sum()


def test_sequences_reach_the_network_with_their_mask(tmp_path, capsys):
    features = [*FEATURES[:2], {**FEATURES[2], "pooling": "sequence"}, FEATURES[3]]
    log = write_log(tmp_path / "small_processed.npz", features)
    flags = ["--processed-data-file", log, "--num-batches", 20]
    with pytest.raises(ValueError, match=r"the log has sequences \(seen\), and DLRM_Net has no"):
        run(dlrm_s_pytorch, tmp_path, *flags)
    for resident in (0, -1):
        more = ["--model", f"{OWN}:Attends", "--num-resident", resident]
        run(dlrm_s_pytorch, tmp_path, *flags, *more, "--save-model", tmp_path / f"m{resident}")
    assert_same_weights(tmp_path / "m0", tmp_path / "m-1")
    layout = load_processed(log).layout
    rows, present = torch.ones(2, 7, 4), torch.ones(2, 7, dtype=torch.bool)
    present[0, 5] = False
    vectors, sequences = Pooling(layout)(rows, present)
    assert vectors.shape == (2, 3, 4) and list(sequences) == ["seen"]
    elements, mask = sequences["seen"]
    assert elements[0].sum(1).tolist() == [4, 0] and mask.tolist() == [[True, False], [True, True]]


def test_a_folder_of_other_features_is_refused_and_made_again(log, capsys):
    """Their names and pooling are in the manifest, which no checksum of the arrays covers."""
    folder = segregate_small(log, "--hot-emb-gpu-mem", str(80 * 8 * 4))
    other = [*FEATURES[:1], {**FEATURES[1], "pooling": "sum"}, *FEATURES[2:]]
    write_log(log, other)
    with pytest.raises(ValueError, match="had other features; run input_segregation.py again"):
        load_segregated(folder, log)
    capsys.readouterr()
    segregate_small(log, "--hot-emb-gpu-mem", str(80 * 8 * 4))
    assert "rebuilding" in capsys.readouterr().out
    assert load_segregated(folder, log).layout.features[1].pooling == "sum"
    assert input_segregation.__doc__ and unpack_manifest(open_npz(log))["features"] == other


WRONG = {
    "columns [0, 1, 2, 3, 4, 5]; expected each of 0 to 6 once": FEATURES[:3],
    "have a name twice": [*FEATURES[:3], {**FEATURES[3], "name": "item"}],
    "tables other than 0 to 2": [*FEATURES[:3], {**FEATURES[3], "table": 1}],
    "pooling 'max'": [*FEATURES[:1], {**FEATURES[1], "pooling": "max"}, *FEATURES[2:]],
    "3 columns, and no pooling": [*FEATURES[:1], {**FEATURES[1], "pooling": "none"}, *FEATURES[2:]],
    "are no neighbours": [{**FEATURES[1], "columns": [3, 1]}],
    "not whole": [{"name": "x"}],
    "features are not": 5,
}


@pytest.mark.parametrize("said", WRONG)
def test_features_that_do_not_fit_are_said(tmp_path, said):
    log = write_log(tmp_path / "small_processed.npz", WRONG[said])
    with pytest.raises(ValueError, match="small_processed.npz: its manifest's features") as error:
        load_processed(log)
    assert said.removeprefix("features are ") in str(error.value)


def test_an_absent_element_is_refused_where_none_may_be(tmp_path):
    plain = [{"name": f"c{c}", "columns": [c], "table": c} for c in range(7)]
    for column, features in ((0, FEATURES), (1, plain)):
        path = write_log(tmp_path / "small_processed.npz", features)
        arrays = {name: np.array(array) for name, array in open_npz(path).items()}
        if features is plain:
            arrays["counts"] = SIZES[TABLE_OF_COLUMN]
        else:
            arrays["X_cat"][5, column] = -1
        write_npz(path, arrays)
        with pytest.raises(
            ValueError, match=f"category {column + 1} has ids from -1 .*expected 0 "
        ):
            load_processed(path)


def test_layouts_of_one_column_a_feature_are_plain():
    names = itertools.count()
    layout = FeatureLayout(tuple(Feature(f"f{next(names)}", (c,), c) for c in range(4)))
    assert layout.is_plain and not layout.has_absent and layout.num_columns == 4
    manifest = {"table_columns": [{"name": "user"}, {"name": "item"}]}
    assert [f.name for f in layout_of(manifest, 2, 2, "log").features] == ["user", "item"]
    with pytest.raises(ValueError, match="2 table sizes for 3 categories"):
        layout_of({}, 3, 2, "log")
