"""The training loop: deterministic, resumable, and loud about bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ctc_ray.errors import SchemaError, WeightsError
from ctc_ray.pretrain.augment import ViewGeometry
from ctc_ray.pretrain.intensity import IntensityRule
from ctc_ray.pretrain.settings import MARKER, PAPER, DinoSettings
from ctc_ray.pretrain.trainer import DinoTrainer, ResidentCrops, StreamedCrops, train

RULE = IntensityRule("constants", (0.0,) * 3, (1.0,) * 3, 10.0)
SETTINGS: DinoSettings = replace(
    MARKER,
    architecture="resnet10t",
    geometry=ViewGeometry(global_px=32, local_px=16, num_local=1),
    steps=6,
    batch_size=4,
    prototypes=32,
    head_hidden=16,
    head_bottleneck=8,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _source(seed: int = 3) -> ResidentCrops:
    crops = np.random.default_rng(0).integers(0, 256, (11, 3, 48, 48)).astype(np.uint8)
    return ResidentCrops(crops, batch_size=4, seed=seed)


def _trained(steps: int, settings: DinoSettings = SETTINGS) -> tuple[DinoTrainer, list[float]]:
    trainer = DinoTrainer(settings, RULE)
    losses: list[float] = []
    train(trainer, _source(), until=steps, on_step=lambda m: losses.append(m.loss))
    return trainer, losses


def _equal(a: DinoTrainer, b: DinoTrainer) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_training_with_same_seed_gives_same_weights_and_other_seed_others() -> None:
    first, losses = _trained(3)
    again, losses_again = _trained(3)
    other, losses_other = _trained(3, replace(SETTINGS, seed=1))
    assert losses == losses_again
    assert _equal(first, again)
    assert losses != losses_other
    assert not _equal(first, other)


def test_resumed_training_equals_uninterrupted() -> None:
    whole, losses = _trained(6)
    half, first_losses = _trained(3)
    resumed = DinoTrainer(SETTINGS, RULE)
    resumed.load(half.tensors(), half.step)
    rest: list[float] = []
    train(resumed, _source(), on_step=lambda m: rest.append(m.loss))
    assert first_losses + rest == losses
    assert _equal(whole, resumed)


def test_step_changes_student_and_moves_teacher_less() -> None:
    trainer = DinoTrainer(SETTINGS, RULE)
    before = trainer.tensors()
    train(trainer, _source(), until=2)
    after = trainer.tensors()
    name = "backbone.conv1.0.weight"
    moved = float((after[f"student.{name}"] - before[f"student.{name}"]).norm())
    followed = float((after[f"teacher.{name}"] - before[f"teacher.{name}"]).norm())
    assert 0 < followed < moved
    # The teacher's batch statistics come from its own passes.
    assert not torch.equal(after["teacher.backbone.bn1.running_mean"], before["teacher.backbone.bn1.running_mean"])


def test_frozen_prototypes_stay_until_their_step() -> None:
    trainer = DinoTrainer(replace(SETTINGS, freeze_fraction=0.5), RULE)
    start = trainer.student.head.prototypes.detach().clone()
    train(trainer, _source(), until=3)
    assert torch.equal(trainer.student.head.prototypes, start)
    train(trainer, _source(), until=4)
    assert not torch.equal(trainer.student.head.prototypes, start)


def test_paper_preset_takes_a_step() -> None:
    settings = replace(SETTINGS, preset="paper", clip="agc", horizon_factor=PAPER.horizon_factor, input_px=40, steps=2)
    _, losses = _trained(2, settings)
    assert all(np.isfinite(losses))


def test_checkpoint_callback_runs_every_n_steps_and_at_the_end() -> None:
    seen: list[int] = []
    train(DinoTrainer(SETTINGS, RULE), _source(), checkpoint=lambda t: seen.append(t.step), checkpoint_every=4)
    assert seen == [4, 6]


def test_fewer_crops_than_a_batch_raise_schema_error() -> None:
    with pytest.raises(SchemaError, match="fewer than one batch"):
        ResidentCrops(np.zeros((3, 3, 48, 48), np.uint8), batch_size=4, seed=0)


def test_ended_stream_raises_schema_error() -> None:
    with pytest.raises(SchemaError, match="gave no batch"):
        StreamedCrops(iter([])).batch(0)


def test_non_finite_loss_raises_with_step() -> None:
    trainer = DinoTrainer(SETTINGS, RULE)
    with torch.no_grad():
        trainer.student.head.mlp[0].weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match="step 0"):
        train(trainer, _source())


def test_resident_epoch_visits_every_crop_at_most_once() -> None:
    crops = np.zeros((10, 1, 2, 2), np.uint8)
    crops[:, 0, 0, 0] = np.arange(10)
    source = ResidentCrops(crops, batch_size=3, seed=5)
    seen = [round(float(v) * 255) for step in range(source.steps_per_epoch) for v in source.batch(step)[:, 0, 0, 0]]
    assert len(seen) == len(set(seen)) == 9
    again = ResidentCrops(crops, batch_size=3, seed=5)
    assert torch.equal(again.batch(7), source.batch(7))


def test_resident_sixteen_bit_crops_keep_their_counts() -> None:
    crops = np.full((2, 1, 2, 2), 65535, np.uint16)
    assert float(ResidentCrops(crops, batch_size=2, seed=0).batch(0).amin()) == 1.0


def test_weights_of_other_architecture_are_refused() -> None:
    other = DinoTrainer(replace(SETTINGS, prototypes=16), RULE)
    with pytest.raises(WeightsError, match="prototypes"):
        DinoTrainer(SETTINGS, RULE).load(other.tensors(), 1)
