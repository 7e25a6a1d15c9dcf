"""Speed of the phantom room, and a contact sheet to hold beside the paper's Figure 2.

python benchmarks/phantom.py [--crops N] [--sheet PATH] [--json PATH]
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ctc_ray.phantom import PROFILES, CellKind, draw_crops, draw_field

SHEET_KINDS = tuple(kind for kind in CellKind if kind is not CellKind.BACKGROUND_LEUKOCYTE)


def crops_per_second(count: int) -> float:
    """Crops drawn in a second of one core's time (not wall time, which other processes share)."""
    draw_crops(256, seed=0)
    start = time.process_time()
    draw_crops(count, seed=1)
    return count / (time.process_time() - start)


def seconds_per_field(count: int) -> float:
    """Seconds of one core's time for a field with all its pages."""
    start = time.process_time()
    for field in range(1, count + 1):
        draw_field(PROFILES["paper"], patient="P01", field=field, seed=0)
    return (time.process_time() - start) / count


def stretch(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The paper's contrast: each crop and channel from its own minimum to its own maximum, 0 to 1."""
    low, high = float(image.min()), float(image.max())
    return ((image - low) / max(high - low, 1.0)).astype(np.float32)


def tiles(crop: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
    """Composite (DAPI magenta, CK green), DAPI, CK and CD45 as RGB images of one crop (3, 48, 48)."""
    dapi, ck, cd45 = (stretch(channel) for channel in crop)
    grey = [np.repeat(channel[..., None], 3, axis=2) for channel in (dapi, ck, cd45)]
    return [np.stack([dapi, ck, dapi], axis=2), *grey]


def draw_sheet(path: Path, *, per_kind: int = 6, seed: int = 0) -> None:
    """Write a PNG: one row a kind, `per_kind` cells a row, four views a cell as in Figure 2."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(SHEET_KINDS), per_kind * 4, figsize=(per_kind * 4 * 0.7, len(SHEET_KINDS) * 0.75))
    for axis in axes.ravel():
        axis.axis("off")
    for row, kind in enumerate(SHEET_KINDS):
        crops, _ = draw_crops(per_kind, seed=seed + row, kinds={kind: 1.0})
        for column, image in enumerate(image for crop in crops for image in tiles(crop)):
            axes[row, column].imshow(image, vmin=0, vmax=1, interpolation="nearest")
        axes[row, 0].text(-0.1, 1.05, kind, transform=axes[row, 0].transAxes, fontsize=7)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.98, wspace=0.05, hspace=0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measure, print a table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=int, default=4096, help="crops to draw for the rate")
    parser.add_argument("--fields", type=int, default=4, help="fields to draw for the time of a field")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (PNG) there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures = {
        "crops_per_second_per_core": round(crops_per_second(arguments.crops), 1),
        "seconds_per_field": round(seconds_per_field(arguments.fields), 3),
        "processor": platform.processor() or platform.machine(),
        "numpy": np.__version__,
    }
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.sheet:
        draw_sheet(arguments.sheet)


if __name__ == "__main__":
    main()
