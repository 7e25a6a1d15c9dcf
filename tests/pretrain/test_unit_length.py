"""Unit length and the attention built on it: equal to torch's and timm's own."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from timm.models.xcit import XCA

from ctc_ray.pretrain.precision import autocast
from ctc_ray.pretrain.unit_length import ContiguousXCA, unit_length, with_contiguous_attention

CPU = torch.device("cpu")


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_unit_length_and_its_gradient_equal_normalize() -> None:
    values, gradient = _values(7, 3, 12), _values(7, 3, 12, seed=1)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    unit_length(ours).backward(gradient)
    F.normalize(theirs, dim=-1).backward(gradient)
    assert torch.equal(unit_length(ours), F.normalize(theirs, dim=-1))
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_unit_length_gradient_of_many_rows_equals_normalize() -> None:
    values, gradient = _values(5001, 8), _values(5001, 8, seed=1)
    values[17] = 0.0
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    unit_length(ours, 1e-6).backward(gradient)
    F.normalize(theirs, dim=-1, eps=1e-6).backward(gradient)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_unit_length_gradient_passes_numerical_check() -> None:
    assert torch.autograd.gradcheck(unit_length, (_values(4, 5).double().requires_grad_(),))


def test_vectors_shorter_than_eps_are_divided_by_it_and_keep_finite_gradient() -> None:
    values = torch.tensor([[0.0, 0.0], [3e-4, 4e-4]], requires_grad=True)
    scaled = unit_length(values, 1e-2)
    assert torch.allclose(scaled, torch.tensor([[0.0, 0.0], [0.03, 0.04]]))
    scaled.sum().backward()
    assert values.grad is not None
    assert torch.allclose(values.grad, torch.full((2, 2), 100.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [36, 9])
def test_contiguous_attention_equals_timm(precision: str, tokens: int) -> None:
    torch.manual_seed(0)
    stock = XCA(32, num_heads=4, qkv_bias=True)
    ours = with_contiguous_attention(copy.deepcopy(stock))
    assert isinstance(ours, ContiguousXCA)
    found = []
    for module in (stock, ours):
        inputs = _values(3, tokens, 32).requires_grad_()
        with autocast("bf16" if precision == "bf16" else "fp32", CPU):
            outputs = module(inputs)
        outputs.backward(_values(3, tokens, 32, seed=1).to(outputs.dtype))
        assert inputs.grad is not None
        found.append((outputs.detach().float(), inputs.grad, module.qkv.weight.grad))
    tolerance = 1e-5 if precision == "fp32" else 2e-2  # bf16 keeps 8 bits
    for expected, actual in zip(*found, strict=True):
        assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


def test_xcit_keeps_names_and_vectors_and_its_copies_stay_fast() -> None:
    torch.manual_seed(0)
    stock = timm.create_model("xcit_nano_12_p8_224", num_classes=0).eval()
    ours = copy.deepcopy(with_contiguous_attention(copy.deepcopy(stock)))
    assert sum(isinstance(m, ContiguousXCA) for m in ours.modules()) == 12
    assert list(ours.state_dict()) == list(stock.state_dict())
    images = _values(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.allclose(ours(images), stock(images), atol=1e-4)


def test_backbone_without_such_attention_is_left_alone() -> None:
    backbone = timm.create_model("resnet10t", num_classes=0)
    kinds = [type(m) for m in backbone.modules()]
    assert [type(m) for m in with_contiguous_attention(backbone).modules()] == kinds
