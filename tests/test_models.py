"""DCNv2 and TBSM: by their definitions in float64, trained by all three scripts, gone on with."""

import numpy as np
import pytest
import torch
from helpers import MODEL_FLAGS, assert_same_weights
from torch.nn.functional import linear, relu

import data_utils
import dlrm_s_pytorch
import fae_train
import input_segregation
import slipstream_train
from slipstream.logs import taobao
from slipstream.logs.features import Feature, FeatureLayout
from slipstream.model.features import features_of
from slipstream.model.networks import build_network, find_network
from slipstream.serving.model import load_model

B, L, DIM = 5, 4, 6
SEQUENCES = FeatureLayout(
    (
        Feature("user", (0,), 0),
        Feature("item", (1,), 1),
        Feature("category", (2,), 2),
        Feature("items before", (3, 4, 5, 6), 1, "sequence"),
        Feature("categories before", (7, 8, 9, 10), 2, "sequence"),
    )
)


def network_of(name, layout, **options):
    features = features_of(layout, 3, DIM)
    spec = find_network(name, {"arch_mlp_bot": [3, 7, DIM], "arch_mlp_top": [9, 1], **options})
    return build_network(spec, features, seed=1).double()


def mlp(x, layers, last=False):
    """Layers one by one, with ReLU between them."""
    for number, (weight, bias) in enumerate(layers):
        x = linear(x, weight, bias)
        x = relu(x) if last or number < len(layers) - 1 else x
    return x


def layers_of(network, name):
    part = [m for m in getattr(network, name) if isinstance(m, torch.nn.Linear)]
    return [(m.weight, m.bias) for m in part]


def assert_alike(network, got, expected, inputs):
    """Values and all gradients."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(len(got), dtype=torch.double)
    wanted = [*network.parameters(), *inputs]
    grads = [torch.autograd.grad((z * weights).sum(), wanted) for z in (got, expected)]
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 5])
def test_dcnv2_is_its_definition(rank):
    torch.manual_seed(0)
    layout = FeatureLayout(SEQUENCES.features[:3])
    network = network_of("dcnv2", layout, rank=rank)
    assert network.cross.down[0].weight.shape == (rank or 4 * DIM // 4, 4 * DIM)
    dense = torch.randn(B, 3, dtype=torch.double, requires_grad=True)
    vectors = torch.randn(B, 3, DIM, dtype=torch.double, requires_grad=True)
    first = torch.cat([mlp(dense, layers_of(network, "bot_l"), True), *vectors.unbind(1)], dim=1)
    x = first
    for down, up in zip(network.cross.down, network.cross.up, strict=True):
        rows = [up.weight @ (down.weight @ one) + up.bias for one in x]
        x = first * torch.stack(rows) + x
    expected = mlp(x, layers_of(network, "top_l"))[:, 0]
    assert_alike(network, network(dense, vectors), expected, (dense, vectors))


@pytest.mark.parametrize("attention", ["dot", "mlp"])
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_tbsm_is_its_definition(attention, num_sequences):
    """Input by input; one of them without any step before it, one with all of them."""
    torch.manual_seed(0)
    layout = FeatureLayout(SEQUENCES.features[: 3 + num_sequences])
    network = network_of("tbsm", layout, attention=attention, step_width=8)
    dense = torch.randn(B, 3, dtype=torch.double, requires_grad=True)
    vectors = torch.randn(B, 3, DIM, dtype=torch.double, requires_grad=True)
    lengths = [0, L, 1, 2, 3]
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    names = [f.name for f in layout.features[3:]]
    rows = [torch.randn(B, L, DIM, dtype=torch.double, requires_grad=True) for _ in names]
    torch.nn.init.normal_(network.of_age)
    got = network(dense, vectors, {n: (r, mask) for n, r in zip(names, rows, strict=True)})

    def step(parts):
        products = [parts[1] @ parts[0]] if len(parts) == 2 else []
        seen = torch.cat([*parts, *(p[None] for p in products)])
        return mlp(seen, layers_of(network, "step_l")) + sum(parts)

    expected = []
    for i, length in enumerate(lengths):
        z = step([vectors[i, 1 + s] for s in range(num_sequences)])
        before = [step([part[i, t] for part in rows]) for t in range(length)]
        if attention == "dot":
            scores = [z @ one / DIM**0.5 for one in before]
        else:
            layers = layers_of(network, "attention_l")
            scores = [mlp(torch.cat([z, one, z * one]), layers)[0] for one in before]
        context = torch.zeros(DIM, dtype=torch.double)
        scores = [score + network.of_age[length - 1 - t] for t, score in enumerate(scores)]
        if before:
            shares = torch.softmax(torch.stack(scores), dim=0)
            context = sum(share * one for share, one in zip(shares, before, strict=True))
        others = [vectors[i, n] for n in range(3) if n == 0 or n > num_sequences]
        dense_vector = mlp(dense[i], layers_of(network, "bot_l"), True)
        seen = [z, context, dense_vector, *others]
        products = [seen[a] @ seen[b] for a in range(len(seen)) for b in range(a + 1)]
        seen = torch.cat([*seen, torch.stack(products)])
        expected.append(mlp(seen, layers_of(network, "top_l"))[0])
    assert_alike(network, got, torch.stack(expected), (dense, vectors, *rows))
    for part in rows:  # nothing reaches what is not there
        (gradient,) = torch.autograd.grad(
            network(dense, vectors, {n: (r, mask) for n, r in zip(names, rows, strict=True)}).sum(),
            part,
        )
        assert (gradient[~mask] == 0).all()


def write_clicks(path, num_clicks=1500, num_users=30):
    """Users come back to what they clicked."""
    rng = np.random.default_rng(3)
    last = rng.integers(1, 40, num_users)
    with open(path, "w") as file:
        for time in np.sort(rng.integers(taobao.START, taobao.END, num_clicks)):
            user = rng.integers(num_users)
            item = last[user] if rng.random() < 0.5 else rng.integers(1, 40)
            last[user] = item
            file.write(f"{user + 1},{item},{item % 7 + 1},pv,{time}\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Taobao's log with a history of 3, all rows hot or some, and a model that TBSM learnt."""
    folder = tmp_path_factory.mktemp("taobao")
    write_clicks(folder / "UserBehavior.csv")
    data_utils.preprocess("taobao", folder / "UserBehavior.csv", folder / "p.npz", history=3)
    for name, budget in (("all", "1000000"), ("some", "3000")):
        words = ["--processed-data-file", folder / "p.npz", "--segregated-data-dir", folder / name]
        words += ["--hot-emb-gpu-mem", budget, "--arch-sparse-feature-size", "8"]
        input_segregation.main([str(word) for word in words])
    train(dlrm_s_pytorch, folder, "baseline", "--save-predictions", folder / "s.csv")
    return folder


def train(script, folder, name, *flags, hot="all", model="tbsm"):
    data = ["--processed-data-file", folder / "p.npz"]
    if script is not dlrm_s_pytorch:
        data = ["--segregated-data-dir", folder / hot]
    words = [*data, *MODEL_FLAGS, "--arch-mlp-bot", "auto-8", "--model", model]
    words += ["--optimizer", "rwsadagrad", "--learning-rate", "0.1", "--mini-batch-size", 37]
    words += ["--dense-learning-rate", "0.01", "--nepochs", 2]
    words += ["--runs-dir", folder / "runs", "--save-model", folder / name, *flags]
    return script.main([str(word) for word in words])


def test_fae_is_the_baseline_where_all_is_hot(folder):
    assert train(fae_train, folder, "fae")["auc"] > 0.6
    assert_same_weights(folder / "baseline", folder / "fae")


@pytest.mark.parametrize("model", ["tbsm", "dcnv2"])
def test_goes_on_with_cold_rows_and_drops(folder, tmp_path, model):
    """Any number of resident rows, and a run in parts: the same weights."""
    runs = tmp_path / "a", tmp_path / "b"
    flags = ["--alpha", "0.5", "--drop-percentage", "40", "--snapshot-window", "0.2"]
    flags += ["--drop-min-steps", "0"]
    if model == "dcnv2":  # on a log without sequences
        data_utils.preprocess("taobao", folder / "UserBehavior.csv", tmp_path / "p.npz")
        words = ["--processed-data-file", tmp_path / "p.npz", "--hot-emb-gpu-mem", "3000"]
        words += ["--segregated-data-dir", tmp_path / "some", "--arch-sparse-feature-size", "8"]
        input_segregation.main([str(word) for word in words])
        folder = tmp_path
    summary = train(slipstream_train, folder, runs[0], *flags, hot="some", model=model)
    assert summary["dropped"] > 0 and 0.05 < summary["hot_share"] < 0.95
    for steps in (20, 50, 0):
        again = ["--load-model", "auto", "--num-batches", steps, "--num-resident", steps]
        train(slipstream_train, folder, runs[1], *flags, *again, hot="some", model=model)
    assert_same_weights(*runs)
    bf16 = ["--precision", "bf16", "--num-batches", 30]
    summary = train(slipstream_train, folder, tmp_path / "c", *bf16, hot="some", model=model)
    assert 0.3 < summary["log_loss"] < 0.9


def test_a_new_line_is_scored_by_what_came_before_it(folder):
    """The log's own clicks, line by line: the scores of training's last evaluation."""
    import polars as pl

    model = load_model(folder / "baseline", device="cpu", batch_size=200)
    names = ["user", "item", "category", "behaviour", "time"]
    frame = pl.read_csv(folder / "UserBehavior.csv", has_header=False, new_columns=names)
    frame = frame.sort(["time", "user"], maintain_order=True)
    found = model.predict(frame)
    kept = pl.read_csv(folder / "s.csv")
    clicks = kept.filter(pl.col("label") == 1)["probability"].to_numpy()
    np.testing.assert_allclose(found[-len(clicks) :], clicks, rtol=0, atol=1e-6)


def test_a_log_is_extended_with_the_same_history(folder, tmp_path):
    words = ("taobao", folder / "UserBehavior.csv", tmp_path / "next.npz")
    for history in (0, 2):
        with pytest.raises(ValueError, match=f"--extend: history is 3 there, and {history} here"):
            data_utils.preprocess(*words, extend=folder / "p.npz", history=history)
    data_utils.preprocess(*words, extend=folder / "p.npz", history=3)
