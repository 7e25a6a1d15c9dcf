"""DINO head, loss and teacher against slow, obvious references."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ctc_ray.pretrain.dino import DinoHead, DinoLoss, DinoNetwork, koleo, teacher_of, update_teacher


def _slow_loss(student: torch.Tensor, probabilities: torch.Tensor, temperature: float) -> float:
    """Every pair of different views, every crop, every prototype, one by one."""
    total, pairs = 0.0, 0
    for t in range(len(probabilities)):
        for v in range(len(student)):
            if v == t:
                continue
            pairs += 1
            per_crop = []
            for b in range(student.shape[1]):
                log_p = torch.log_softmax(student[v, b] / temperature, dim=0)
                per_crop.append(-sum(float(q) * float(lp) for q, lp in zip(probabilities[t, b], log_p, strict=True)))
            total += sum(per_crop) / len(per_crop)
    assert pairs == 2 * (len(student) - 1)
    return total / pairs


@given(st.integers(0, 1000), st.integers(2, 5))
@settings(max_examples=8, deadline=None)
def test_loss_equals_sum_over_pairs(seed: int, num_views: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_views, 3, 7, generator=generator)
    loss = DinoLoss(7)
    loss.centre.copy_(torch.randn(7, generator=generator))
    probabilities = loss.teacher_probabilities(torch.randn(2, 3, 7, generator=generator), 0.07)
    assert float(loss(student, probabilities)) == pytest.approx(_slow_loss(student, probabilities, 0.1), rel=1e-5)


def test_teacher_probabilities_are_centred_and_sharpened() -> None:
    loss = DinoLoss(3)
    loss.centre.copy_(torch.tensor([1.0, 0.0, 0.0]))
    probabilities = loss.teacher_probabilities(torch.tensor([[[1.0, 0.0, 0.1]]]), 0.04)
    assert torch.allclose(probabilities.sum(-1), torch.ones(1, 1))
    assert int(probabilities.argmax()) == 2


def test_centre_starts_at_first_batch_mean_then_moves_by_momentum() -> None:
    loss = DinoLoss(2)
    loss.update_centre(torch.tensor([[[1.0, 3.0], [3.0, 5.0]]]))
    assert loss.centre.tolist() == [2.0, 4.0]
    loss.update_centre(torch.zeros(1, 1, 2))
    assert torch.allclose(loss.centre, torch.tensor([1.8, 3.6]))


def test_centre_uses_average_over_workers() -> None:
    loss = DinoLoss(2)
    loss.update_centre(torch.ones(1, 1, 2), reduce=lambda value: value + 1)
    assert loss.centre.tolist() == [2.0, 2.0]


def test_head_logits_are_cosines() -> None:
    head = DinoHead(8, hidden=16, bottleneck=4, prototypes=32)
    logits = head(torch.randn(5, 8) * 100)
    assert logits.shape == (5, 32)
    assert float(logits.detach().abs().max()) <= 1.0 + 1e-5
    with torch.no_grad():
        before = head(torch.ones(1, 8))
        head.prototypes.mul_(7.0)
        assert torch.allclose(before, head(torch.ones(1, 8)), atol=1e-5)


def _network(seed: int = 0) -> DinoNetwork:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.BatchNorm1d(8))
    network = DinoNetwork(backbone, DinoHead(8, hidden=8, bottleneck=4, prototypes=16))
    network([torch.randn(2, 3, 1, 4, 4)])
    return network


def test_network_returns_logits_in_view_order() -> None:
    network = _network().eval()
    views = torch.randn(2, 3, 1, 4, 4)
    (together,), features = network([views])
    (alone,), _ = network([views[1:]])
    assert together.shape == (2, 3, 16)
    assert features.shape == (6, 8)
    assert torch.allclose(together[1], alone[0], atol=1e-6)


def test_teacher_starts_equal_and_follows_by_momentum() -> None:
    student = _network()
    teacher = teacher_of(student)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())
    before = [p.clone() for p in teacher.parameters()]
    buffers = [b.clone() for b in teacher.buffers()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    update_teacher(teacher, student, 0.9)
    for old, new in zip(before, teacher.parameters(), strict=True):
        assert torch.allclose(new, old + 0.1, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(buffers, teacher.buffers(), strict=True))


@given(st.floats(0.5, 0.999), st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_teacher_is_the_weighted_sum_of_all_past_students(momentum: float, num_updates: int) -> None:
    student = nn.Linear(3, 2)
    teacher = copy.deepcopy(student)
    history = [student.weight.detach().clone()]
    generator = torch.Generator().manual_seed(num_updates)
    for _ in range(num_updates):
        with torch.no_grad():
            student.weight.copy_(torch.randn(2, 3, generator=generator))
        history.append(student.weight.detach().clone())
        update_teacher(teacher, student, momentum)
    expected = momentum**num_updates * history[0]
    for age, weight in enumerate(reversed(history[1:])):
        expected = expected + (1 - momentum) * momentum**age * weight
    assert torch.allclose(teacher.weight, expected, atol=1e-5)


def test_teacher_with_momentum_one_stays_and_with_zero_copies() -> None:
    student = _network()
    teacher = teacher_of(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5).add_(0.1)
    before = [p.clone() for p in teacher.parameters()]
    update_teacher(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    update_teacher(teacher, student, 0.0)
    assert all(torch.allclose(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_loss_gradient_equals_slow_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 3, 7, generator=generator, requires_grad=True)
    loss = DinoLoss(7)
    probabilities = loss.teacher_probabilities(torch.randn(2, 3, 7, generator=generator), 0.07)
    (fast,) = torch.autograd.grad(loss(student, probabilities), student)
    pairs = [(t, v) for t in range(2) for v in range(4) if t != v]
    slow_loss = torch.stack(
        [-(probabilities[t] * torch.log_softmax(student[v] / 0.1, dim=-1)).sum(-1).mean() for t, v in pairs]
    ).mean()
    (slow,) = torch.autograd.grad(slow_loss, student)
    assert torch.allclose(fast, slow, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_parts_and_of_many_blocks_equals_loss_of_the_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(v, 50, 4096, generator=generator).mul(0.1).to(dtype).requires_grad_() for v in (2, 3)]
    loss = DinoLoss(4096)
    probabilities = loss.teacher_probabilities(torch.randn(2, 50, 4096, generator=generator), 1.0)
    whole = torch.cat(parts)
    log_student = torch.log_softmax(whole.float() / 0.1, dim=-1)
    others = log_student.sum(dim=0, keepdim=True) - log_student[:2]
    expected = -(probabilities * others).sum(dim=-1).mean(dim=1).sum() / 8
    found = loss(parts, probabilities)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for fast, slow in zip(
        torch.autograd.grad(3.0 * found, parts), torch.autograd.grad(3.0 * expected, parts), strict=True
    ):
        assert fast.dtype == dtype
        assert float((fast - slow).float().norm()) <= (1e-5 if dtype == torch.float32 else 4e-3) * float(slow.norm())


def test_loss_is_least_where_the_student_agrees_with_the_teacher() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(2, 5, 9, generator=generator)
    teacher[1] = teacher[0]
    loss = DinoLoss(9)
    probabilities = loss.teacher_probabilities(teacher, 0.1)
    agreeing = loss(teacher, probabilities)  # the same temperature on both sides
    entropy = torch.special.entr(probabilities[0]).sum(-1).mean()
    assert float(agreeing) == pytest.approx(float(entropy), rel=1e-5)
    for seed in range(5):
        other = teacher + 0.1 * torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(seed))
        assert float(loss(other, probabilities)) > float(agreeing)


def test_koleo_is_the_mean_negative_log_distance_to_the_nearest_neighbour() -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    unit = features / features.norm(dim=1, keepdim=True)
    nearest = [min(float((unit[i] - unit[j]).norm()) for j in range(12) if j != i) for i in range(12)]
    assert float(koleo(features)) == pytest.approx(-sum(math.log(value) for value in nearest) / 12, rel=1e-5)


def test_koleo_is_finite_for_identical_features_and_its_gradient_drives_neighbours_apart() -> None:
    same = torch.ones(4, 3, requires_grad=True)
    value = koleo(same)
    value.backward()
    assert torch.isfinite(value)
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()
    near = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2]], requires_grad=True)
    before = koleo(near)
    before.backward()
    assert near.grad is not None
    assert float(koleo(near.detach() - 0.01 * near.grad)) < before.item()
