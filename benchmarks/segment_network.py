"""Ways to run the segmentation network on a CPU: seconds for one field, network alone.

    python -m benchmarks.segment_network [--threads 2]

A field of 1036x1384 (padded to 1040x1392, 150 GFLOP) through the plain module in both memory layouts, the module frozen by
TorchScript, compiled by `torch.compile`, and this project's kernel with and without its parts; float32 and bfloat16, medians of
alternating rounds in one process. Prints a table and writes `benchmarks/results/segment_network.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.segment_accuracy import hardware
from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.progress import Progress
from ctc_ray.records import library_versions
from ctc_ray.segment import inference
from ctc_ray.segment.inference import FieldNetwork
from ctc_ray.segment.instances import normalize_percentile, pad_to_multiple
from ctc_ray.segment.model import native_bf16
from ctc_ray.segment.network import StarDistNetwork
from ctc_ray.segment.weights import load_weights

Run = Callable[[], object]


def plain(network: StarDistNetwork, dtype: torch.dtype) -> StarDistNetwork:
    """A copy with its body in the dtype, heads in float32."""
    copied = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    for name, layer in copied.convolutions.items():
        layer.to(torch.float32 if name in ("prob", "dist") else dtype)
    return copied


def kernel(network: StarDistNetwork, image: np.ndarray, dtype: torch.dtype, *, strips: bool, joins: bool) -> Run:
    """This project's kernel on the whole field, with or without strips and the split first decoder convolutions."""
    frozen = FieldNetwork(network, dtype=dtype, device=torch.device("cpu"))
    if not joins:
        frozen._joins = {}
    strip_bytes = inference.STRIP_BYTES if strips else 1 << 40

    def run() -> object:
        kept, inference.STRIP_BYTES = inference.STRIP_BYTES, strip_bytes
        try:
            return frozen.peaks(image, frozen.whole((image.shape[1], image.shape[2])), prob_thresh=0.5)
        finally:
            inference.STRIP_BYTES = kept

    return run


def ways_of(network: StarDistNetwork, image: np.ndarray, dtype: torch.dtype) -> dict[str, Run]:
    """Name -> what runs the field once."""
    body = plain(network, dtype)
    batch = torch.from_numpy(image)[None].to(dtype)
    last = batch.to(memory_format=torch.channels_last)
    ways: dict[str, Run] = {"plain, channels last": lambda: body(last)}
    if dtype == torch.float32:
        contiguous = copy.deepcopy(network).eval()
        ways["plain, contiguous"] = lambda: contiguous(batch)
        script = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(body, last)))
        ways["TorchScript, frozen"] = lambda: script(last)
    compiled = torch.compile(copy.deepcopy(body))
    ways["torch.compile"] = lambda: compiled(last)
    ways["fused convolutions"] = kernel(network, image, dtype, strips=False, joins=False)
    ways["and strips"] = kernel(network, image, dtype, strips=True, joins=False)
    ways["and split upsampling"] = kernel(network, image, dtype, strips=True, joins=True)
    return ways


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "segment_network.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network = load_weights(None).network.eval()
    page = draw_field(PROFILES["paper"], patient="N1", field=1, seed=779).pages[2]
    padded = pad_to_multiple(normalize_percentile(page[..., None]), network.config.multiple)
    image = np.ascontiguousarray(np.moveaxis(padded, -1, 0))
    dtypes = [torch.float32, *([torch.bfloat16] if native_bf16() else [])]
    ways = {
        (str(dtype).removeprefix("torch."), name): run
        for dtype in dtypes
        for name, run in ways_of(network, image, dtype).items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    with torch.inference_mode(), Progress().task("rounds", total=arguments.rounds + 1) as task:
        for number in range(arguments.rounds + 1):
            for key, run in ways.items():
                started = time.perf_counter()
                try:
                    run()
                except (RuntimeError, torch._dynamo.exc.BackendCompilerFailed) as error:  # no C++ compiler, say
                    print(f"{key} does not run here: {type(error).__name__}")
                    seconds[key].append(float("nan"))
                else:
                    if number:  # the first call compiles and packs
                        seconds[key].append(time.perf_counter() - started)
            task.advance()
    rows = [
        {"dtype": dtype, "way": name, "seconds": statistics.median(values)} for (dtype, name), values in seconds.items()
    ]
    for row in rows:
        print(f"{row['dtype']:9} {row['way']:24} {row['seconds']:.3f} s")
    report = {"rows": rows, "threads": arguments.threads, "rounds": arguments.rounds}
    report |= {"versions": library_versions(), "hardware": hardware()}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
