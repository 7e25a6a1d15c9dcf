"""What skipping the background costs: instances lost, and the share of a field that the network still sees.

    python -m benchmarks.segment_gating [--instances 20000]

Phantom CK fields of 10, 30, 84, 200 and 465 objects, a patient a field, are segmented with and without `skip_background` until the
ungated model has found so many instances. An instance is kept where a gated one matches it at IoU 0.5, one to one. Prints a
table a density, with how far the faintest instances rise above their surroundings, and writes
`benchmarks/results/segment_gating.json`. Exit code 1 below `--recall`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from stardist.matching import matching

from benchmarks.segment_accuracy import hardware
from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.progress import Progress
from ctc_ray.records import library_versions
from ctc_ray.segment import StarDist
from ctc_ray.segment.gating import active_tiles, background_rise
from ctc_ray.segment.instances import normalize_percentile

SEED = 4_096
"""Its patients are in no training, demo or test, and the gate's constants were chosen on others."""
DENSITIES = (10, 30, 84, 200, 465)


@dataclass
class Tally:
    """Counts of one density.

    Attributes:
        fields: drawn.
        instances: found without the gate.
        lost: of those, without a match in the gated result.
        extra: gated instances without a match.
        tiles: share of active tiles of each field.
        rises: of every ungated instance: rise above the surroundings, and the same in units of the field's noise.
        seconds: ungated and gated, of the network.
    """

    fields: int = 0
    instances: int = 0
    lost: int = 0
    extra: int = 0
    tiles: list[float] = field(default_factory=list)
    rises: list[tuple[float, float]] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """One row of the table."""
        rises = np.asarray(self.rises).reshape(-1, 2)
        whole, gated = np.asarray(self.seconds).T
        return {
            "fields": self.fields,
            "instances": self.instances,
            "lost": self.lost,
            "extra": self.extra,
            "tiles_share": float(np.mean(self.tiles)),
            "least_rise": float(rises[:, 0].min()),
            "least_rise_in_noise": float(rises[:, 1].min()),
            "network_seconds_whole": float(np.median(whole)),
            "network_seconds_gated": float(np.median(gated)),
        }


def add_field(tally: Tally, whole: StarDist, gated: StarDist, image: np.ndarray) -> None:
    """Segment one field both ways."""
    started = time.perf_counter()
    whole.candidates(image)
    middle = time.perf_counter()
    gated.candidates(image)
    tally.seconds.append((middle - started, time.perf_counter() - middle))
    truth, found = whole.predict(image), gated.predict(image)
    match = matching(truth.labels, found.labels, thresh=0.5)
    normalised = normalize_percentile(image)
    rise, noise = background_rise(normalised)
    block = math.ceil(image.shape[0] / rise.shape[0])
    for row, column in truth.points // block:
        near = rise[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
        tally.rises.append((float(near.max()), float(near.max() / noise)))
    tally.fields += 1
    tally.instances += len(truth)
    tally.lost += int(match.fn)
    tally.extra += int(match.fp)
    tally.tiles.append(float(active_tiles(normalised).mean()))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="weight folder; default: the shipped one")
    parser.add_argument("--instances", type=int, default=20_000)
    parser.add_argument("--recall", type=float, default=0.9995)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "segment_gating.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    whole = StarDist.load(arguments.weights, precision=arguments.precision)
    gated = StarDist.load(arguments.weights, precision=arguments.precision, skip_background=True)
    tallies = {density: Tally() for density in DENSITIES}
    with Progress().task("instances", total=arguments.instances) as task:
        while sum(tally.instances for tally in tallies.values()) < arguments.instances:
            number = tallies[DENSITIES[0]].fields
            for density, tally in tallies.items():
                profile = replace(PROFILES["paper"], ck_objects_mean=float(density), ck_objects_sd=0.0)
                page = draw_field(profile, patient=f"R{number}", field=1 + number % 175, seed=arguments.seed).pages[2]
                before = tally.instances
                add_field(tally, whole, gated, page)
                task.advance(tally.instances - before)
    rows = {density: tally.summary() for density, tally in tallies.items()}
    print(f"{'objects':>7} " + " ".join(f"{name:>21}" for name in next(iter(rows.values()))))
    for density, row in rows.items():
        print(f"{density:7d} " + " ".join(f"{value:21.4g}" for value in row.values()))
    instances, lost = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("instances", "lost"))
    recall = 1 - lost / instances
    print(f"{instances:,} instances, {lost} lost: recall {recall:.5f} (bar {arguments.recall})")
    report = {"densities": rows, "instances": instances, "lost": lost, "recall": recall, "seed": arguments.seed}
    report |= {"weights": whole.weights.fingerprint, "precision": whole.precision, "threads": arguments.threads}
    report |= {"versions": library_versions(), "hardware": hardware()}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(0 if recall >= arguments.recall else 1)


if __name__ == "__main__":
    main()
