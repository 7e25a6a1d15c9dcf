"""How well a StarDist model finds nuclei in real fields and CTCs in phantom fields.

    python benchmarks/segment_accuracy.py [--weights FOLDER] [--nuclei ../shared/data/dsb2018/test] [--fields 12]

Prints a table and writes it as JSON, with hardware and versions, to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from scipy.spatial import cKDTree
from stardist.matching import matching
from tqdm import tqdm

from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.phantom.kinds import CTC_KINDS
from ctc_ray.records import library_versions
from ctc_ray.segment import StarDist
from ctc_ray.segment.scores import average_precision
from ctc_ray.segment.training_images import Pair, read_pairs

IOUS = (0.5, 0.6, 0.7, 0.8, 0.9)
NEAR_PX = 8.0
"""A truth row counts as found when its centre lies in an instance, or this near to the centre of one."""
PHANTOM_SEED = 90_210
"""Of fields that no training has seen."""


@dataclass(frozen=True)
class PhantomTally:
    """Counts over phantom fields, by kind of cell."""

    truth: pl.DataFrame
    precision_iou50: float
    instances: int


def nuclei_scores(model: StarDist, pairs: list[Pair]) -> dict[str, float]:
    found = [model.predict(pair.image).labels for pair in tqdm(pairs, desc="nuclei")]
    truth = [pair.labels for pair in pairs]
    return {f"ap{round(100 * iou)}": average_precision(truth, found, iou=iou) for iou in IOUS}


def phantom_tally(model: StarDist, profile: str, num_fields: int) -> PhantomTally:
    frames, hits, instances = [], 0, 0
    for index in tqdm(range(num_fields), desc=f"phantom {profile}"):
        field = draw_field(
            PROFILES[profile], patient=f"test-{index}", field=1 + index % 6, seed=PHANTOM_SEED, masks=True
        )
        if field.ck_mask is None:
            continue
        found = model.predict(field.pages[2])
        pairs = matching(field.ck_mask, found.labels, thresh=0.5, report_matches=True)
        matched = {
            one for (one, _), score in zip(pairs.matched_pairs, pairs.matched_scores, strict=True) if score >= 0.5
        }
        instances, hits = instances + len(found), hits + len(matched)
        labels = np.arange(1, field.truth.height + 1)
        visible = np.isin(labels, np.unique(field.ck_mask))
        frames.append(
            field.truth.select("kind", "diameter_um").with_columns(
                outlined=pl.Series(visible),
                iou50=pl.Series(np.isin(labels, list(matched))),
                centre=pl.Series(found_by_centre(field.truth, found.labels, found.points)),
            )
        )
    return PhantomTally(pl.concat(frames), hits / max(1, instances), instances)


def found_by_centre(
    truth: pl.DataFrame, labels: npt.NDArray[np.int32], points: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    centres = truth.select("row", "col").to_numpy()
    at = np.clip(np.round(centres).astype(int), 0, np.asarray(labels.shape) - 1)
    inside = labels[at[:, 0], at[:, 1]] > 0
    if not len(points):
        return inside
    distance, _ = cKDTree(points).query(centres)
    return inside | (distance <= NEAR_PX)


def summarise(tally: PhantomTally) -> pl.DataFrame:
    is_ctc = pl.col("kind").is_in([str(kind) for kind in CTC_KINDS])
    outlined = tally.truth.filter("outlined")
    groups = pl.concat([outlined.filter(is_ctc).with_columns(kind=pl.lit("all CTCs")), outlined])
    return (
        groups.group_by("kind", maintain_order=True)
        .agg(cells=pl.len(), recall_iou50=pl.col("iou50").mean(), recall_centre=pl.col("centre").mean())
        .sort("kind")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=None, help="weight folder; the shipped default if not given")
    parser.add_argument("--nuclei", type=Path, default=Path("../shared/data/dsb2018/test"))
    parser.add_argument("--fields", type=int, default=12, help="phantom fields of each profile")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/segment_accuracy.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    model = StarDist.load(arguments.weights, precision=arguments.precision)
    results: dict[str, object] = {"weights": model.weights.fingerprint, "precision": model.precision}
    results["thresholds"] = {"prob": model.thresholds.prob, "nms": model.thresholds.nms}
    if arguments.nuclei.is_dir():
        results["nuclei"] = nuclei_scores(model, read_pairs(arguments.nuclei / "images", arguments.nuclei / "masks"))
        print("nuclei:", "  ".join(f"{name} {value:.3f}" for name, value in results["nuclei"].items()))  # type: ignore[attr-defined]
    for profile in ("demo", "paper"):
        tally = phantom_tally(model, profile, arguments.fields)
        table = summarise(tally)
        results[profile] = {
            "fields": arguments.fields,
            "precision_iou50": tally.precision_iou50,
            "instances": tally.instances,
            "recall": table.to_dicts(),
        }
        print(
            f"{profile}: {arguments.fields} fields, {tally.instances} instances, precision {tally.precision_iou50:.3f}"
        )
        with pl.Config(tbl_rows=20, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True):
            print(table)
    results |= {"seconds": time.monotonic() - started, "versions": library_versions()}
    results["hardware"] = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
