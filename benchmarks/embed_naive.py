"""What a user would write first, beside ours: a PNG a channel a cell, a DataLoader, 224 px, float32.

The naive way reads three PNGs of 48 x 48 px a cell with Pillow through a torch DataLoader (in the process itself, one thread), scales
by 255 to -1..1, resizes bilinearly to 224 px as the reference does, and runs timm's module in float32. Ours reads the Parquet
shard and embeds at the native 48 px, in the precision that the stage resolves. Both: one thread, the shipped encoder's weights (XCiT
takes any size), files in the page cache, one after the other in every round; processor time counts, which on an idle machine is the
wall time of one thread.

Beside the speed stands what the size does to the result: the F1 of CTCs on phantom cells of other patients, by the classifier of
`ctc-ray train` (32 principal components, an SVM) on either embedding. The naive vectors are scaled as the naive way scales; a third
row gives 224 px with the encoder's own intensity rule.

Run by `python -m benchmarks.embed --folder FOLDER --sizes --naive`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from PIL import Image
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader, Dataset

from benchmarks.embed_cohort import patients_of
from ctc_ray.classify.svm import Classifier
from ctc_ray.cohort import Cohort
from ctc_ray.embed import Embedder
from ctc_ray.latent.reduce import PrincipalComponents
from ctc_ray.phantom import CellKind, draw_crops
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, load_folder
from ctc_ray.pretrain.intensity import IntensityRule, scale_for_network, to_fraction
from ctc_ray.pretrain.slices import Slice, read_slice
from ctc_ray.schema import CHANNEL_NAMES, unpack_pixels

NAIVE_PX = 224
NAIVE_CELLS = 64
OUR_CELLS = 2_000
ROUNDS = 3
NAIVE_BATCH = 32
PATIENTS = 6
CELLS_A_PATIENT = 60
PCA_DIM = 32


class _PngCells(Dataset[torch.Tensor]):
    """Three PNGs a cell to a (3, 48, 48) float32 tensor."""

    def __init__(self, folder: Path, num_cells: int) -> None:
        self._folder, self._num_cells = folder, num_cells

    def __len__(self) -> int:
        return self._num_cells

    def __getitem__(self, cell: int) -> torch.Tensor:
        channels = []
        for name in CHANNEL_NAMES:
            with Image.open(self._folder / f"{cell}_{name}.png") as image:
                channels.append(np.asarray(image))
        return torch.from_numpy(np.stack(channels)).float() / 255


def compare(cohort: Cohort) -> dict[str, Any]:
    """CPU seconds of both, one thread, and F1 of both."""
    torch.set_num_threads(1)
    (shard,) = cohort.shards(cohort.cells(patients_of(1)[0]))
    embed = Embedder.load()
    backbone, _ = load_folder(DEFAULT_FOLDER)
    naive_s, ours_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        table = read_slice(cohort.store, Slice(shard, 0, NAIVE_CELLS), ["pixels"])
        write_pngs(Path(folder), unpack_pixels(table["pixels"], table.schema.field("pixels")))
        for _ in range(ROUNDS):
            started = time.process_time()
            naive_vectors(backbone, DataLoader(_PngCells(Path(folder), NAIVE_CELLS), NAIVE_BATCH))
            naive_s.append((time.process_time() - started) / NAIVE_CELLS)
            started = time.process_time()
            table = read_slice(cohort.store, Slice(shard, 0, OUR_CELLS), ["cell_id", "pixels"])
            embed(unpack_pixels(table["pixels"], table.schema.field("pixels")))
            ours_s.append((time.process_time() - started) / OUR_CELLS)
    ratios = [slow / fast for slow, fast in zip(naive_s, ours_s, strict=True)]
    return {
        "naive_cpu_ms_a_crop": round(1e3 * median(naive_s), 3),
        "ours_cpu_ms_a_crop": round(1e3 * median(ours_s), 3),
        "our_precision": embed.precision,
        "ratio": round(median(ratios), 1),
        "ratios": [round(ratio, 1) for ratio in ratios],
        "f1": f1_scores(embed, backbone),
    }


def write_pngs(folder: Path, crops: npt.NDArray[Any]) -> None:
    """One PNG a channel a cell."""
    for cell, crop in enumerate(crops):
        for name, channel in zip(CHANNEL_NAMES, crop, strict=True):
            Image.fromarray(channel).save(folder / f"{cell}_{name}.png")


@torch.inference_mode()
def naive_vectors(backbone: torch.nn.Module, loader: Any) -> npt.NDArray[np.float32]:
    """Vectors (N, D) of batches of fractions of full scale, scaled and resized as the reference does."""
    vectors = []
    for batch in loader:
        large = F.interpolate(batch * 2 - 1, size=(NAIVE_PX, NAIVE_PX), mode="bilinear", align_corners=False)
        vectors.append(backbone(large).numpy())
    return np.concatenate(vectors)


def f1_scores(embed: Embedder, backbone: torch.nn.Module) -> dict[str, Any]:
    """F1 of CTCs on patients that gave no labels, by both embeddings."""
    crops, is_ctc, train = phantom_cells()
    fractions = to_fraction(crops)
    own = (scale_for_network(fractions, embed.rule) + 1) / 2
    reference = (scale_for_network(fractions, IntensityRule("reference")) + 1) / 2
    vectors = {
        f"native 48 px, {embed.precision}": embed(crops),
        f"naive, {NAIVE_PX} px, fp32": naive_vectors(backbone, reference.split(NAIVE_BATCH)),
        f"{NAIVE_PX} px, fp32, the encoder's intensity rule": naive_vectors(backbone, own.split(NAIVE_BATCH)),
    }
    scores: dict[str, Any] = {"training_cells": int(train.sum()), "judged_cells": int((~train).sum())}
    for name, found in vectors.items():
        pca = PrincipalComponents.fit(found[train], PCA_DIM)
        model = Classifier.fit(pca, pca.transform(found[train]), is_ctc[train])
        scores[name] = round(float(f1_score(is_ctc[~train], model.predict(found[~train]))), 3)
    return scores


def phantom_cells() -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Crops of all kinds evenly, whether each is a CTC, and whether its patient gives labels."""
    crops, is_ctc, train = [], [], []
    for number in range(2 * PATIENTS):
        drawn, kinds = draw_crops(
            CELLS_A_PATIENT, seed=7_700 + number, kinds=dict.fromkeys(CellKind, 1.0), patient=f"naive-{number}"
        )
        crops.append(drawn)
        is_ctc.append(np.char.startswith(kinds, "ctc").astype(np.int64))
        train.append(np.full(len(drawn), number < PATIENTS))
    return np.concatenate(crops), np.concatenate(is_ctc), np.concatenate(train)
