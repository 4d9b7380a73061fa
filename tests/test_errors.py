"""Bad input to functional, backend and names: each message names the argument and the remedy."""

from __future__ import annotations

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F

W = torch.ones(4, 6)

CASES = [
    (
        lambda: F.gram_penalty([W], "ortoreg"),
        ValueError,
        r"unknown penalty 'ortoreg'; did you mean 'orthoreg'\? Valid: cosine, dso, frobenius, ",
    ),
    (
        lambda: F.gram_penalty([W], side="row"),
        ValueError,
        "unknown side 'row'; did you mean 'rows'",
    ),
    (
        lambda: F.gram_penalty(W),
        TypeError,
        r"weights must be a sequence of tensors; put the tensor in a list: \[weight\]",
    ),
    (lambda: F.gram_penalty([W, 3]), TypeError, r"weights\[1\] must be a Tensor, got int"),
    (
        lambda: F.gram_penalty([W.int()]),
        TypeError,
        r"weights\[0\] has dtype torch.int32, expected float64",
    ),
    (
        lambda: F.gram_penalty([W[0]]),
        ValueError,
        r"weights\[0\] has shape \(6,\), expected \[filters, \.\.\.\] with at least 2",
    ),
    (
        lambda: F.gram_penalty([W.to_sparse()]),
        TypeError,
        r"layout torch.sparse_coo; call .to_dense\(\)",
    ),
    (
        lambda: F.gram_penalty([W, W.to("meta")]),
        ValueError,
        r"weights\[1\] is on meta, but weights\[0\] is on cpu",
    ),
    (lambda: F.gram_penalty([W], biases=[]), ValueError, "biases has 0 entries, expected 1"),
    (
        lambda: F.gram_penalty([W], biases=[torch.ones(3)]),
        ValueError,
        r"biases\[0\] has shape \(3,\), expected \[4\]",
    ),
    (
        lambda: F.gram_penalty([W], biases=[torch.ones(4).double()]),
        ValueError,
        r"biases\[0\] is torch.float64 on cpu, but its weight is torch.float32",
    ),
    (
        lambda: F.gram_penalty([W], groups=[3]),
        ValueError,
        r"groups\[0\] is 3, expected a positive divisor of the 4 filters",
    ),
    (lambda: F.gram_penalty([W], groups=[1, 1]), ValueError, "groups has 2 entries, expected 1"),
    (
        lambda: F.gram_penalty([W], coefficients=[1.0, 2.0]),
        ValueError,
        r"coefficients has shape \(2,\), expected \[1\]: one for each",
    ),
    (
        lambda: F.gram_penalty([W], pruned=[None, None]),
        ValueError,
        "pruned has 2 entries, expected 1",
    ),
    (
        lambda: F.gram_penalty([W], pruned=[[0]]),
        TypeError,
        r"pruned\[0\] must be a bool mask \[4\] or an int64",
    ),
    (
        lambda: F.gram_penalty([W], pruned=[torch.ones(3, dtype=torch.bool)]),
        ValueError,
        r"pruned\[0\] has shape \(3,\)",
    ),
    (
        lambda: F.filter_scores([W], criteria="l1"),
        TypeError,
        r"criteria must be a sequence of names; write \('l1',\)",
    ),
    (
        lambda: F.filter_scores([W], criteria=("fischer",)),
        ValueError,
        "unknown criterion 'fischer'; did you mean 'fisher'",
    ),
    (
        lambda: F.filter_scores([W], criteria=("taylor",)),
        ValueError,
        "criterion 'taylor' needs gradients: pass grads",
    ),
    (
        lambda: F.filter_scores([W], [None], ("fisher",)),
        ValueError,
        r"grads\[0\] is None, but criterion 'fisher' needs gradients: call backward",
    ),
    (
        lambda: F.filter_scores([W], [W, W], ("fisher",)),
        ValueError,
        "grads has 2 entries, expected 1",
    ),
    (
        lambda: F.filter_scores([W], [W.t()], ("fisher",)),
        ValueError,
        r"grads\[0\] has shape \(6, 4\) on cpu, expected \(4, 6\)",
    ),
    (lambda: F.filter_scores([W], dim=2), ValueError, "dim is 2, expected 0"),
    (lambda: F.filter_scores([W], dim=1, biases=[None]), ValueError, "biases belong to filters"),
    (
        lambda: F.filter_scores([W], criteria=()),
        ValueError,
        "criteria is empty, expected some of l1",
    ),
    (lambda: F.gram_penalty([W], groups=1), TypeError, "groups must be a sequence with one entry"),
    (lambda: F.gram_penalty([W], coefficients="a"), TypeError, "coefficients must be numbers"),
    (
        lambda: F.add_gram_penalty_grad_([W], strength="a"),
        TypeError,
        "strength must be a number or a tensor, got str",
    ),
    (lambda: F.gram_penalty([W], "xyzzy"), ValueError, r"unknown penalty 'xyzzy'\. Valid: cosine"),
    (
        lambda: ox.backend("cud").__enter__(),
        ValueError,
        "unknown backend 'cud'; did you mean 'cuda'",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=[c[2][:40] for c in CASES])
def test_message_names_the_argument_and_the_remedy(call, kind, message) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_forced_backend_refuses_tensors_elsewhere() -> None:
    with ox.backend("reference"):
        assert torch.isfinite(F.gram_penalty([W])).all()
    if not torch.cuda.is_available():
        with (
            pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: "),
            ox.backend("cuda"),
        ):
            pass
    with (
        ox.backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' was forced, but the tensors are on meta"),
    ):
        F.gram_penalty([W.to("meta")])


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHOREG_EXT_BACKEND", "referense")
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        F.gram_penalty([W])
    monkeypatch.setenv("ORTHOREG_EXT_BACKEND", "reference")
    assert F.gram_penalty([W]).shape == (1,)


def test_backend_is_restored_after_an_error() -> None:
    before = ox.build_info()["backend"]
    with pytest.raises(KeyError), ox.backend("reference"):
        raise KeyError
    assert ox.build_info()["backend"] == before
