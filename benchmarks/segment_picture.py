"""Draw what a StarDist model finds: a phantom CK field and a real image of nuclei, outlines over the pixels.

    python -m benchmarks.segment_picture PICTURE.png [--weights FOLDER] [--image IMAGE --mask MASK]

Found and true outlines agree where they are yellow alone; a true object without a match at IoU 0.5 is red, an instance
without one is cyan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from skimage.segmentation import find_boundaries
from stardist.matching import matching

from benchmarks.segment_accuracy import PHANTOM_SEED
from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.segment import StarDist
from ctc_ray.segment.training_images import PairFiles, read_pair

NUCLEI = Path("../shared/data/dsb2018/test")
YELLOW, RED, CYAN = (1.0, 0.85, 0.1), (1.0, 0.25, 0.25), (0.2, 0.9, 1.0)
Labels = npt.NDArray[np.int32]


def overlay(image: np.ndarray, truth: Labels, found: Labels) -> tuple[npt.NDArray[np.float64], str]:
    """The image as (H, W, 3), 0 to 1, with outlines over it; and its counts as text.

    Args:
        image: (H, W), any real dtype; shown from its 1 to its 99.8 percentile, with gamma 0.5 so that dim cells are seen.
        truth: (H, W) labels, 0 background.
        found: (H, W) labels, 0 background.
    """
    low, high = np.percentile(image, [1.0, 99.8])
    grey = np.sqrt(np.clip((image.astype(np.float64) - low) / max(high - low, 1e-9), 0, 1))
    picture = np.repeat(grey[..., None], 3, axis=2)
    score = matching(truth, found, thresh=0.5, report_matches=True)
    pairs = [pair for pair, iou in zip(score.matched_pairs, score.matched_scores, strict=True) if iou >= 0.5]
    missed = np.where(np.isin(truth, [one for one, _ in pairs]), 0, truth)
    matched = np.isin(found, [other for _, other in pairs])
    for labels, colour in (
        (np.where(matched, found, 0), YELLOW),
        (np.where(matched, 0, found), CYAN),
        (missed, RED),
    ):
        picture[find_boundaries(labels, mode="inner")] = colour  # type: ignore[no-untyped-call]
    counts = f"{score.n_true} true, {score.n_pred} found, {score.tp} match (yellow)"
    return picture, f"{counts}, {score.fn} missed (red), {score.fp} extra (cyan)"


def main() -> None:
    """Segment both images and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--weights", default=None, help="weight folder or name; the shipped default if not given")
    parser.add_argument("--image", type=Path, help="image of nuclei; the first of the test set's largest if not given")
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--field", type=int, default=0, help="number of the phantom field")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = StarDist.load(arguments.weights)
    field = draw_field(
        PROFILES["demo"],
        patient=f"test-{arguments.field}",
        field=1 + arguments.field % 6,
        seed=PHANTOM_SEED,
        masks=True,
    )
    if field.ck_mask is None:
        raise RuntimeError("draw_field gave no masks although they were asked for")
    image_path = arguments.image or max(sorted((NUCLEI / "images").glob("*.png")), key=lambda path: path.stat().st_size)
    mask_path = arguments.mask or NUCLEI / "masks" / image_path.name
    nuclei = read_pair(PairFiles(image_path.stem, image_path, mask_path), allow_empty=True)
    figure = Figure(figsize=(21, 10), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=[1384 / 1036, nuclei.image.shape[1] / nuclei.image.shape[0]])
    for axis, title, image, truth in (
        (axes[0], "phantom CK field", field.pages[2], field.ck_mask),
        (axes[1], "nuclei, Data Science Bowl 2018", nuclei.image, nuclei.labels),
    ):
        drawn, counts = overlay(image, truth, model.predict(image).labels)
        axis.imshow(drawn, interpolation="nearest")
        axis.set_title(f"{title}\n{counts}", fontsize=11)
        axis.set_axis_off()
        print(f"{title}: {counts}")
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
