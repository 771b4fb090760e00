import pytest

from slipstream.training.memory import training_needs

SIZES = {
    "num_rows": 1000,
    "dim": 16,
    "optimizer": "sgd",
    "dense_optimizer": "adam",
    "num_ranks": 1,
    "num_resident": 100,
    "num_features": 3,
    "batch_size": 8,
    "test_batch_size": 16,
    "num_parameters": 50,
    "num_buffers": 5,
    "num_activations": 20,
    "num_snapshot_rows": 100,
    "num_choice_inputs": 70,
    "num_train": 90,
    "on_device": True,
}


@pytest.mark.parametrize(
    ("what", "host", "device"),
    [
        ("embedding rows", 1000 * 64, 0),
        ("resident rows", 0, 100 * 64),
        ("places of rows", 900 * 16, (100 + 2 * 24 + 48) * 4),
        ("staging areas", (3 * 24 + 48) * 64, (2 * 24 + 48) * 64),
        ("the network", 0, 16 * 50 + 4 * 5),
        ("activations", 0, 8 * 8 * 20),
        ("snapshots", 0, 100 * (2 * 64 + 5)),
        ("choice of inputs", 53 * 70, 0),
        ("order of the inputs", 8 * 90, 0),
    ],
)
def test_needs(what, host, device):
    [need] = [need for need in training_needs(**SIZES) if need.what == what]
    assert (need.host, need.device) == (host, device)


def test_on_a_cpu_all_rows_are_in_one_place():
    needs = training_needs(**{**SIZES, "num_resident": 1000, "on_device": False})
    assert sum(need.device for need in needs if need.what.endswith(" rows")) == 4 * 1000  # places
    places = {"optimizer": "rwsadagrad", "num_resident": 1000, "on_device": False}
    more = training_needs(**{**SIZES, **places})
    assert [need.device for need in more if need.what == "places of rows"] == [4 * 1000]
    assert [need.device for need in more if need.what == "resident rows"] == [0]
