"""Cells of four channels pretrain and embed as those of three do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from cells_cohort import add_patient, small_cohort
from small_runs import SMALL

from ctc_ray.config import load_config
from ctc_ray.embed.stage import run_embed
from ctc_ray.phantom import draw_crops
from ctc_ray.pretrain.augment import MarkerAugment, ViewGeometry
from ctc_ray.pretrain.intensity import IntensityRule
from ctc_ray.pretrain.stage import run_pretrain
from ctc_ray.progress import Progress

ROLES = {"007": "pretrain", "12": "train"}


def four_channels(num: int, seed: int) -> np.ndarray:
    """Phantom crops and a fourth marker, which is the second one, dimmer and mirrored."""
    crops, _ = draw_crops(num, seed=seed)
    return np.concatenate([crops, (crops[:, 1:2, :, ::-1] * 0.6).astype(np.uint8)], axis=1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_marker_views_keep_the_number_of_channels(channels: int) -> None:
    rule = IntensityRule("constants", (0.0,) * channels, (1.0,) * channels, 3.0)
    augment = MarkerAugment(rule, ViewGeometry(global_px=32, local_px=16, num_local=2))
    views = augment(torch.rand(5, channels, 48, 48), torch.Generator().manual_seed(0))
    assert views.global_views.shape == (2, 5, channels, 32, 32)
    assert views.local_views.shape == (2, 5, channels, 16, 16)


@pytest.mark.ray
@pytest.mark.slow
def test_four_channels_pretrain_and_embed(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES)
    crops = four_channels(24, seed=1)
    add_patient(cohort, "007", four_channels(24, seed=0))
    add_patient(cohort, "12", np.concatenate([crops, np.where(np.arange(4)[:, None, None] == 3, 0, crops)]))
    config = load_config(
        None, [*SMALL, "pretrain.steps=6", "pretrain.num_workers=1", "embed.num_actors=1", "embed.precision=fp32"]
    )
    quiet = Progress(quiet=True)
    run_pretrain(config, cohort, progress=quiet)
    description = cohort.store.read_json("encoders/dino/encoder.json")
    assert description["channels"] == len(description["intensity"]["low"]) == 4
    run_embed(config, cohort, patients=["12"], progress=quiet)
    ids = cohort.read_columns("cells/12", ["cell_id"])["cell_id"].to_pylist()
    frame = pl.from_arrow(cohort.read_columns("embeddings/dino/12", ["cell_id", "embedding"]))
    assert isinstance(frame, pl.DataFrame)
    vector_of = dict(zip(frame["cell_id"], frame["embedding"].to_list(), strict=True))
    vectors = np.array([vector_of[cell] for cell in ids])
    assert np.isfinite(vectors).all()
    # The second half are the same cells without their fourth marker.
    assert (np.abs(vectors[:24] - vectors[24:]).max(axis=1) > 1e-4).all()
