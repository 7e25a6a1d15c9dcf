"""What the shipped weights find in images that no training saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree
from stardist.data import test_image_nuclei_2d as real_field

from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.phantom.kinds import CTC_KINDS
from ctc_ray.segment import StarDist
from ctc_ray.segment.scores import average_precision
from ctc_ray.segment.training_images import read_pairs
from ctc_ray.segment.weights import DEFAULT_WEIGHTS, SAFETENSORS_FILE


def test_default_weights_are_small_and_described() -> None:
    assert (DEFAULT_WEIGHTS / SAFETENSORS_FILE).stat().st_size <= 6_000_000
    card = (DEFAULT_WEIGHTS / "MODEL_CARD.md").read_text()
    for word in ("Licence", "Data", "AP@0.5", "CC0"):
        assert word in card


def test_default_weights_on_the_real_field_of_the_stardist_package(record_property: pytest.FixtureRequest) -> None:
    image, mask = real_field(return_mask=True)
    found = StarDist.load(precision="fp32").predict(image)
    score = average_precision([mask.astype(np.int32)], [found.labels], iou=0.5)
    record_property("ap50", score)  # type: ignore[operator]
    assert score > 0.85


@pytest.mark.slow
def test_default_weights_find_the_ctcs_of_phantom_fields() -> None:
    model = StarDist.load()
    found = total = 0
    for index in range(6):
        field = draw_field(PROFILES["demo"], patient=f"unseen-{index}", field=1 + index, seed=424_242)
        instances = model.predict(field.pages[2])
        ctcs = field.truth.filter(field.truth["kind"].is_in([str(kind) for kind in CTC_KINDS]))
        centres = ctcs.select("row", "col").to_numpy()
        at = np.clip(np.round(centres).astype(int), 0, np.array(instances.labels.shape) - 1)
        distance, _ = cKDTree(instances.points).query(centres)
        found += int(((instances.labels[at[:, 0], at[:, 1]] > 0) | (distance <= 8)).sum())
        total += len(centres)
    assert total > 80
    assert found / total >= 0.99


@pytest.mark.slow
def test_default_weights_on_the_test_nuclei_reach_the_figure_of_the_model_card(shared_data: Path) -> None:
    model, test = StarDist.load(), shared_data / "dsb2018" / "test"
    pairs = read_pairs(test / "images", test / "masks")
    found = [model.predict(pair.image).labels for pair in pairs]
    score = average_precision([pair.labels for pair in pairs], found, iou=0.5)
    assert len(pairs) == 50
    assert round(score, 2) >= 0.83
    assert f"AP@0.5 {score:.2f}" in (DEFAULT_WEIGHTS / "MODEL_CARD.md").read_text()


def test_train_split_of_real_nuclei_is_not_the_test_split(shared_data: Path) -> None:
    train, test = (
        {path.name for path in (shared_data / "dsb2018" / part / "images").iterdir()} for part in ("train", "test")
    )
    assert len(test) == 50
    assert not train & test
