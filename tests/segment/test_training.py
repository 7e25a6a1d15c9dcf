"""Targets, loss, sampling and the training loop: against slow references, seeded, resumable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from disc_images import TINY, disc_pair, short, write_pairs

from ctc_ray.config import load_config
from ctc_ray.errors import StaleOutputError, WeightsError
from ctc_ray.progress import Progress
from ctc_ray.segment import StarDist
from ctc_ray.segment.patches import PatchSampler, split_pairs
from ctc_ray.segment.scores import average_precision
from ctc_ray.segment.targets import star_loss, star_targets
from ctc_ray.segment.train_segmenter import run_train_segmenter
from ctc_ray.segment.training import Schedule, train


def test_targets_equal_walking_along_each_ray() -> None:
    labels = disc_pair(1).labels
    prob, dist = star_targets(labels, n_rays=8, grid=(2, 2))
    assert prob.shape == (48, 48)
    assert dist.shape == (48, 48, 8)
    assert ((prob > 0) == (labels[::2, ::2] > 0)).all()
    rows, columns = np.nonzero(labels[::2, ::2])
    for row, column in list(zip(rows, columns, strict=True))[::37]:
        for ray in range(8):
            step = np.array([np.sin(2 * np.pi * ray / 8), np.cos(2 * np.pi * ray / 8)])
            at, own = np.array([2.0 * row, 2.0 * column]), labels[2 * row, 2 * column]
            length = 0.0
            while True:
                at, length = at + step, length + 1
                pixel = np.round(at).astype(int)
                if not (pixel >= 0).all() or not (pixel < labels.shape).all() or labels[tuple(pixel)] != own:
                    break
            assert dist[row, column, ray] == pytest.approx(length, abs=1.0)


def test_loss_equals_the_published_formula_written_out() -> None:
    rng = np.random.default_rng(0)
    logits, prob = rng.normal(size=(2, 1, 5, 6)), rng.random((2, 1, 5, 6)) * (rng.random((2, 1, 5, 6)) > 0.5)
    dist, target = rng.normal(size=(2, 4, 5, 6)), rng.random((2, 4, 5, 6)) * 9
    loss = star_loss(*(torch.from_numpy(values) for values in (logits, dist, prob, target)))
    predicted = 1 / (1 + np.exp(-logits))
    entropy = -np.mean(prob * np.log(predicted) + (1 - prob) * np.log(1 - predicted))
    error = np.mean(np.mean(prob * np.abs(dist - target), axis=1)) / (np.mean(prob) + 1e-7)
    background = np.mean(np.mean((1 - prob) * np.abs(dist), axis=1))
    assert float(loss.total) == pytest.approx(entropy + 0.2 * (error + 1e-4 * background), rel=1e-6)


def test_patch_is_a_function_of_seed_and_index() -> None:
    def sampler(seed: int) -> PatchSampler:
        return PatchSampler(
            [disc_pair(1), disc_pair(2)], patch_px=64, seed=seed, foreground_fraction=0.9, scale_range=(0.7, 1.4)
        )

    again, other = sampler(0), sampler(1)
    for index in (5, 3):
        image, labels = sampler(0).draw(index)
        np.testing.assert_array_equal(image, again.draw(index)[0])
        np.testing.assert_array_equal(labels, again.draw(index)[1])
        assert not np.array_equal(image, other.draw(index)[0])
        assert image.shape == labels.shape == (64, 64)
        assert image.dtype == np.float32


def test_patches_keep_image_and_mask_together() -> None:
    sampler = PatchSampler([disc_pair(4)], patch_px=64, seed=2, foreground_fraction=1.0, scale_range=(0.6, 1.7))
    for index in range(20):
        image, labels = sampler.draw(index)
        inside, outside = image[labels > 0], image[labels == 0]
        assert np.median(inside) > np.quantile(outside, 0.9)


def test_patch_of_an_image_smaller_than_the_patch_is_reflected() -> None:
    sampler = PatchSampler([disc_pair(4, side=40)], patch_px=64, seed=2, foreground_fraction=0.9, scale_range=(1, 1))
    assert sampler.draw(0)[0].shape == (64, 64)


def test_schedule_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(steps=100, warmup_steps=10, decay_fraction=0.5, learning_rate=1.0)
    rates = [schedule.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_held_out_pairs_are_seeded_and_disjoint() -> None:
    pairs = [disc_pair(seed) for seed in range(10)]
    kept, held = split_pairs(pairs, fraction=0.2, seed=3)
    assert len(held) == 2
    assert {pair.name for pair in kept} | {pair.name for pair in held} == {pair.name for pair in pairs}
    assert not {pair.name for pair in kept} & {pair.name for pair in held}
    assert [pair.name for pair in split_pairs(pairs, fraction=0.2, seed=3)[1]] == [pair.name for pair in held]


def test_training_lowers_the_loss_and_writes_loadable_weights(tmp_path: Path) -> None:
    pairs = [disc_pair(seed) for seed in range(4)]
    thresholds = train(pairs, [disc_pair(9)], tmp_path, schedule=short(40), network=TINY)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == list(range(10, 41, 10))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert StarDist.load(tmp_path).thresholds == thresholds


@pytest.mark.slow
def test_training_on_discs_finds_the_discs_of_another_image(tmp_path: Path) -> None:
    pairs = [disc_pair(seed) for seed in range(6)]
    train(pairs, [disc_pair(9)], tmp_path, schedule=short(400), network=TINY)
    test, model = disc_pair(11), StarDist.load(tmp_path)
    assert average_precision([test.labels], [model.predict(test.image).labels], iou=0.5) > 0.5


def test_training_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    pairs, held = [disc_pair(0), disc_pair(1)], [disc_pair(9)]
    train(pairs, held, tmp_path / "whole", schedule=short(20), network=TINY)

    class Killed(BaseException):
        pass

    def kill(step: int, loss: float) -> None:
        if step == 14:
            raise Killed

    with pytest.raises(Killed):
        train(pairs, held, tmp_path / "parts", schedule=short(20), network=TINY, on_step=kill)
    seen: list[int] = []
    train(pairs, held, tmp_path / "parts", schedule=short(20), network=TINY, on_step=lambda step, _: seen.append(step))
    assert seen == list(range(11, 21))
    whole, parts = StarDist.load(tmp_path / "whole"), StarDist.load(tmp_path / "parts")
    assert whole.weights.fingerprint == parts.weights.fingerprint


def test_training_of_other_settings_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    pairs, held = [disc_pair(0), disc_pair(1)], [disc_pair(9)]
    train(pairs, held, tmp_path, schedule=short(10), network=TINY)
    with pytest.raises(StaleOutputError, match="another"):
        train(pairs, held, tmp_path, schedule=short(10, seed=5), network=TINY)


def test_train_segmenter_from_folders_goes_on_where_it_stopped(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 3)
    settings = ["steps=6", "batch_size=1", "patch_size_px=64", "n_filter_base=4", "checkpoint_every=3"]
    config = load_config(None, [f"train_segmenter.{setting}" for setting in settings])
    first = run_train_segmenter(config, images, masks, tmp_path / "out", progress=Progress(quiet=True), local=True)
    assert (first.steps_now, first.images, first.held_out) == (6, 2, 1)
    second = run_train_segmenter(config, images, masks, tmp_path / "out", progress=Progress(quiet=True), local=True)
    assert second.steps_now == 0
    assert second.thresholds == first.thresholds


def test_old_checkpoint_without_a_precision_is_taken_up(tmp_path: Path) -> None:
    pairs, held = [disc_pair(0), disc_pair(1)], [disc_pair(9)]
    assert "precision" not in short(10).identity()
    assert short(10, precision="fp32").identity()["precision"] == "fp32"
    train(pairs, held, tmp_path, schedule=short(10), network=TINY)
    with pytest.raises(StaleOutputError):
        train(pairs, held, tmp_path, schedule=short(10, precision="fp32"), network=TINY)


def test_damaged_checkpoint_is_named_with_its_remedy(tmp_path: Path) -> None:
    pairs, held = [disc_pair(0), disc_pair(1)], [disc_pair(9)]
    train(pairs, held, tmp_path, schedule=short(10), network=TINY)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:20], whole[:-100], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"checkpoint\.safetensors.*delete it"):
            train(pairs, held, tmp_path, schedule=short(10), network=TINY)


def test_loss_that_is_not_finite_ends_the_training_before_it_is_saved(tmp_path: Path) -> None:
    pairs, held = [disc_pair(0)], [disc_pair(9)]
    with pytest.raises(WeightsError, match="learning_rate"):
        train(pairs, held, tmp_path, schedule=replace(short(10), learning_rate=1e30), network=TINY)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_start_from_weights_of_another_architecture_is_refused(tmp_path: Path) -> None:
    pairs, held = [disc_pair(0)], [disc_pair(9)]
    train(pairs, held, tmp_path / "a", schedule=short(1), network=TINY)
    other = replace(TINY, n_rays=16)
    with pytest.raises(WeightsError, match="architecture"):
        train(pairs, held, tmp_path / "b", schedule=short(1), network=other, initial=tmp_path / "a")
    train(pairs, held, tmp_path / "c", schedule=short(1), network=TINY, initial=tmp_path / "a")
