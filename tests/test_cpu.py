import ctypes

import pytest
import torch

from slipstream.tools.cpu import keep_freed_memory, tune_cpu, use_onednn


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_num_threads(1)
    use_onednn(False)


def test_products_keep_full_precision_whoever_computes_them():
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 367, generator=generator) for n in (700, 512))
    gradient = torch.randn(700, 512, generator=generator)
    for wanted in (True, False):
        taken = use_onednn(wanted)
        assert wanted or not taken
        for got, expected in (
            (torch.nn.functional.linear(x, weight), x.double() @ weight.double().t()),
            (gradient.t() @ x, gradient.double().t() @ x.double()),
        ):
            assert (got.double() - expected).norm() / expected.norm() < 1e-6


def test_products_that_would_be_rounded_are_refused(monkeypatch):
    """A kernel that rounds the factors to bf16 is noticed, and PyTorch's default restored."""
    plain = torch.nn.functional.linear

    def rounded(x, weight):
        return plain(x.bfloat16().float(), weight.bfloat16().float())

    monkeypatch.setattr(torch.nn.functional, "linear", rounded)
    assert not use_onednn(True)
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    "differs", [{"amx_tile": True}, {"avx512_f": False}, {"architecture": "x"}]
)
def test_other_cpus_keep_pytorchs_choice(monkeypatch, differs):
    able = {"amx_tile": False, "avx512_f": True, "architecture": "x86_64", **differs}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert not use_onednn(True)
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_what_is_said_is_so():
    taken = use_onednn(True)
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if taken else "ieee")


@pytest.mark.parametrize("taken", [0, 1])
def test_both_thresholds_of_malloc_are_set(monkeypatch, taken):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))
            return taken

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert keep_freed_memory() == bool(taken)
    assert (-3, 1 << 30) in calls and (not taken or (-1, 1 << 30) in calls)


def test_settings_are_reported():
    chosen = tune_cpu(2)
    assert chosen["threads"] == torch.get_num_threads() == 2
    assert chosen["memory_kept"] == keep_freed_memory()
    assert chosen["matrix_products"] in ("onednn", "default")
