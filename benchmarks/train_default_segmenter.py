"""Train the shipped segmenter: real nuclei of the Data Science Bowl and phantom CK fields.

    python -m benchmarks.train_default_segmenter --nuclei ../shared/data/dsb2018/train --work /tmp/segmenter

Draws phantom fields with their outlines into WORK/data, puts the nuclei beside them and trains into WORK/model with the
code of `ctc-ray train-segmenter --local`. Run it again to go on after an interruption. WORK/model then is a weight folder; its
`history.jsonl` has AP at IoU 0.5 on held-out images against steps. With `--take FOLDER` nothing is trained: the weights of
the last checkpoint, of a training that may be under way, go to FOLDER with thresholds chosen on the same held-out images.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from skimage.io import imsave

from ctc_ray.config import TrainSegmenterConfig, load_config
from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.progress import Progress
from ctc_ray.segment import StarDist
from ctc_ray.segment.patches import split_pairs
from ctc_ray.segment.scores import optimise_thresholds
from ctc_ray.segment.train_segmenter import run_train_segmenter
from ctc_ray.segment.training_images import find_pairs, read_usable_pairs
from ctc_ray.segment.weights import Thresholds, save_folder

PHANTOM_SEED = 2002
"""Its patients are in no demo, test or benchmark."""


def write_phantom_pairs(data: Path, num_fields: int, progress: Progress) -> None:
    """Two fields a patient; three in four of the profile that is rich in CTCs, the rest with the paper's mix."""
    with progress.task("phantom fields", total=num_fields) as task:
        for index in range(num_fields):
            profile = "paper" if index % 4 == 0 else "demo"
            name = f"{profile}-{PHANTOM_SEED}-{index:03d}.png"
            if not (data / "masks" / name).exists():
                patient, frame = f"T{index // 2:03d}", 1 + index % 6
                field = draw_field(PROFILES[profile], patient=patient, field=frame, seed=PHANTOM_SEED, masks=True)
                if field.ck_mask is None:
                    raise RuntimeError("draw_field gave no masks although they were asked for")
                imsave(data / "images" / name, field.pages[2], check_contrast=False)
                imsave(data / "masks" / name, field.ck_mask.astype(np.uint16), check_contrast=False)
            task.advance()


def copy_nuclei(nuclei: Path, data: Path) -> None:
    for folder in ("images", "masks"):
        for path in sorted((nuclei / folder).glob("*.png")):
            if not (data / folder / path.name).exists():
                shutil.copyfile(path, data / folder / path.name)


def take_checkpoint(section: TrainSegmenterConfig, work: Path, out: Path) -> Thresholds:
    """Write the newest weights of a training with thresholds of their own; gives those."""
    usable, _ = read_usable_pairs(find_pairs(work / "data" / "images", work / "data" / "masks"), page=section.page)
    _, held_out = split_pairs(usable, fraction=section.held_out_fraction, seed=section.seed)
    # fp32: the weights that are saved must not have gone through bfloat16.
    model = StarDist.load(work / "model" / "latest", precision="fp32")
    thresholds = optimise_thresholds(model, [pair for _, pair in held_out])
    save_folder(model.weights.network, thresholds, out)
    return thresholds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nuclei", type=Path, default=Path("../shared/data/dsb2018/train"), help="with images/ and masks/"
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--fields", type=int, default=80, help="phantom fields")
    parser.add_argument("--set", action="append", default=[], help="train_segmenter.KEY=VALUE")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="only write the last checkpoint's weights there")
    arguments = parser.parse_args()
    progress = Progress()
    config = load_config(None, arguments.set)
    if arguments.take:
        print(take_checkpoint(config.train_segmenter, arguments.work, arguments.take))
        return
    data = arguments.work / "data"
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    write_phantom_pairs(data, arguments.fields, progress)
    copy_nuclei(arguments.nuclei, data)
    print(
        run_train_segmenter(
            config, data / "images", data / "masks", arguments.work / "model", progress=progress, local=True
        )
    )


if __name__ == "__main__":
    main()
