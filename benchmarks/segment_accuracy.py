"""How well a StarDist model finds nuclei in real fields and CTCs in phantom fields.

    python -m benchmarks.segment_accuracy [--weights FOLDER] [--nuclei ../shared/data/dsb2018/test] [--ctcs 300]

Average precision (TP over TP + FP + FN) at IoU 0.5 to 0.9 on labelled images of nuclei; recall of CTCs and precision of
all instances at IoU 0.5 on phantom CK fields with their artefacts, drawn until there are enough CTCs. Prints tables and
writes them as JSON, with hardware, versions and the weights' fingerprint, to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import psutil
import torch
from scipy.spatial import cKDTree
from scipy.stats import binomtest
from stardist.matching import matching

from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.phantom.fields import PhantomField
from ctc_ray.phantom.kinds import CTC_KINDS
from ctc_ray.progress import Progress
from ctc_ray.records import library_versions
from ctc_ray.segment import Instances, StarDist
from ctc_ray.segment.scores import average_precision
from ctc_ray.segment.training_images import Pair, read_pairs

IOUS = (0.5, 0.6, 0.7, 0.8, 0.9)
NEAR_PX = 8.0
"""A truth row counts as found by its centre when that lies in an instance, or this near to the centre of one."""
PHANTOM_SEED = 90_210
"""Of fields that no training has seen: those of `train_default_segmenter.py` have other seeds and patients."""
MAX_FIELDS = 200


@dataclass
class PhantomTally:
    """Counts over phantom fields.

    Attributes:
        truth: one row for every cell in view: kind, diameter, whether it has an outline in CK, whether it was found.
        instances: what the model found.
        hits: those that match an outline at IoU 0.5, cells whose centre lies beyond the border included.
        fields: how many were drawn.
    """

    truth: pl.DataFrame
    instances: int = 0
    hits: int = 0
    fields: int = 0

    def ctcs(self) -> pl.DataFrame:
        """The rows of CTCs."""
        return self.truth.filter(pl.col("kind").is_in([str(kind) for kind in CTC_KINDS]))


def interval(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    found = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(found.low), float(found.high)


def nuclei_scores(model: StarDist, pairs: list[Pair], progress: Progress) -> dict[str, float]:
    """AP at each IoU over all images."""
    found = []
    with progress.task("nuclei", total=len(pairs)) as task:
        for pair in pairs:
            found.append(model.predict(pair.image).labels)
            task.advance()
    truth = [pair.labels for pair in pairs]
    return {f"ap{round(100 * iou)}": average_precision(truth, found, iou=iou) for iou in IOUS}


def phantom_tally(model: StarDist, profile: str, progress: Progress, *, fields: int, ctcs: int) -> PhantomTally:
    """Segment phantom fields of a profile, until there are enough of them and of CTCs with an outline."""
    frames: list[pl.DataFrame] = []
    tally = PhantomTally(pl.DataFrame())
    seen = 0
    with progress.task(f"phantom {profile}") as task:
        while (tally.fields < fields or seen < ctcs) and tally.fields < MAX_FIELDS:
            index = tally.fields
            field = draw_field(
                PROFILES[profile], patient=f"test-{index}", field=1 + index % 6, seed=PHANTOM_SEED, masks=True
            )
            rows = score_field(field, model.predict(field.pages[2]), tally)
            frames.append(rows)
            seen += PhantomTally(rows).ctcs().filter("outlined").height
            task.advance(note=f"{seen} CTCs")
    tally.truth = pl.concat(frames)
    return tally


def score_field(field: PhantomField, found: Instances, tally: PhantomTally) -> pl.DataFrame:
    """Add a field's instances to the tally; gives its truth with what was found."""
    if field.ck_mask is None:
        raise RuntimeError("draw_field gave no masks although they were asked for")
    pairs = matching(field.ck_mask, found.labels, thresh=0.5, report_matches=True)
    matched = {one for (one, _), score in zip(pairs.matched_pairs, pairs.matched_scores, strict=True) if score >= 0.5}
    tally.instances += len(found)
    tally.hits += len(matched)
    tally.fields += 1
    labels = np.arange(1, field.truth.height + 1)
    return field.truth.select("kind", "diameter_um").with_columns(
        outlined=pl.Series(np.isin(labels, np.unique(field.ck_mask))),
        iou50=pl.Series(np.isin(labels, list(matched))),
        centre=pl.Series(found_by_centre(field.truth, found)),
    )


def found_by_centre(truth: pl.DataFrame, found: Instances) -> npt.NDArray[np.bool_]:
    """Whether each row's centre lies in an instance, or near to the centre of one."""
    centres = truth.select("row", "col").to_numpy()
    at = np.clip(np.round(centres).astype(int), 0, np.asarray(found.labels.shape) - 1)
    inside: npt.NDArray[np.bool_] = found.labels[at[:, 0], at[:, 1]] > 0
    if not len(found):
        return inside
    distance, _ = cKDTree(found.points).query(centres)
    near: npt.NDArray[np.bool_] = inside | (distance <= NEAR_PX)
    return near


def summarise(tally: PhantomTally) -> pl.DataFrame:
    """Recall by kind of cell, over cells with an outline in CK; CTCs together come first."""
    outlined = tally.truth.filter("outlined")
    groups = pl.concat([tally.ctcs().filter("outlined").with_columns(kind=pl.lit("all CTCs")), outlined])
    return (
        groups.group_by("kind", maintain_order=True)
        .agg(cells=pl.len(), recall_iou50=pl.col("iou50").mean(), recall_centre=pl.col("centre").mean())
        .sort("kind")
    )


def phantom_scores(tally: PhantomTally) -> dict[str, Any]:
    """The figures of a profile, as JSON values."""
    ctcs = tally.ctcs()
    outlined = ctcs.filter("outlined")
    hits = int(outlined["iou50"].sum())
    return {
        "fields": tally.fields,
        "instances": tally.instances,
        "precision_iou50": tally.hits / max(1, tally.instances),
        "precision_iou50_interval95": interval(tally.hits, max(1, tally.instances)),
        "ctcs": outlined.height,
        "ctcs_hidden_behind_other_cells": ctcs.height - outlined.height,
        "ctc_recall_iou50": hits / max(1, outlined.height),
        "ctc_recall_iou50_interval95": interval(hits, max(1, outlined.height)),
        "recall": summarise(tally).to_dicts(),
    }


def hardware() -> dict[str, object]:
    """What the figures were measured on."""
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()]
        model = next((name for name in names if "GHz" in name or "Processor" in name), platform.machine())
    except OSError:  # not Linux
        model = platform.processor() or platform.machine()
    return {"processor": model, "cpus": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 2**30)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=None, help="weight folder or name; the shipped default if not given")
    parser.add_argument("--nuclei", type=Path, default=Path("../shared/data/dsb2018/test"))
    parser.add_argument("--fields", type=int, default=12, help="phantom fields of each profile, at least")
    parser.add_argument("--ctcs", type=int, default=300, help="CTCs in the fields of the profile `demo`, at least")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/segment_accuracy.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    progress, started = Progress(), time.monotonic()
    model = StarDist.load(arguments.weights, precision=arguments.precision)
    results: dict[str, object] = {"weights": model.weights.fingerprint, "precision": model.precision}
    results["thresholds"] = {"prob": model.thresholds.prob, "nms": model.thresholds.nms}
    print(
        f"weights {model.weights.fingerprint}, {model.precision}, prob {model.thresholds.prob}, nms {model.thresholds.nms}"
    )
    if arguments.nuclei.is_dir():
        pairs = read_pairs(arguments.nuclei / "images", arguments.nuclei / "masks")
        scores = nuclei_scores(model, pairs, progress)
        results["nuclei"] = {"images": len(pairs), **scores}
        print(f"{len(pairs)} images of nuclei:", "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    for profile, ctcs in (("demo", arguments.ctcs), ("paper", 0)):
        tally = phantom_tally(model, profile, progress, fields=arguments.fields, ctcs=ctcs)
        found = phantom_scores(tally)
        results[profile] = {"seed": PHANTOM_SEED, **found}
        print(
            "phantom {0}: {fields} fields, {instances} instances, precision {precision_iou50:.3f}, {ctcs} CTCs, recall "
            "{ctc_recall_iou50:.4f} (95 % {1[0]:.4f} to {1[1]:.4f}), {ctcs_hidden_behind_other_cells} hidden".format(
                profile, found["ctc_recall_iou50_interval95"], **found
            )
        )
        with pl.Config(tbl_rows=20, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True):
            print(summarise(tally))
    results |= {"seconds": time.monotonic() - started, "versions": library_versions(), "hardware": hardware()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
