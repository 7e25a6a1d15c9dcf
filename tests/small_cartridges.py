"""Small cartridges and small networks, so that tests stay quick; fixtures of the rooms that segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.weights import Thresholds, save_folder

FIELD_SHAPE = (144, 176)


def draw_small_field(seed: int, num_cells: int = 8, dtype: str = "uint8") -> np.ndarray:
    """Four pages (4, 144, 176): bright discs on a noisy background in each."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[: FIELD_SHAPE[0], : FIELD_SHAPE[1]]
    pages = rng.poisson(6.0, (4, *FIELD_SHAPE)).astype(np.float64)
    for _ in range(num_cells):
        row, col = rng.uniform(0, FIELD_SHAPE[0]), rng.uniform(0, FIELD_SHAPE[1])
        disc = np.exp(-0.5 * ((rows - row) ** 2 + (cols - col) ** 2) / rng.uniform(3, 7) ** 2)
        pages += disc * rng.uniform(40, 160, (4, 1, 1))
    limit = 255 if dtype == "uint8" else 4095
    return np.clip(pages * (1 if dtype == "uint8" else 16), 0, limit).astype(dtype)


def archive_xml(num_rows: int, num_columns: int, shape: tuple[int, int] = FIELD_SHAPE, events: str = "") -> str:
    return (
        f"<archive><runs><record><numrows>{num_rows}</numrows><numcols>{num_columns}</numcols>"
        f"<camxsize>{shape[1]}</camxsize><camysize>{shape[0]}</camysize></record></runs>"
        f"<events>{events}</events></archive>"
    )


@pytest.fixture
def write_cartridge(tmp_path: Path) -> Callable[..., Path]:
    """Write `<root>/<patient>/processed/` with small fields and an xml; gives the folder of the images."""

    def write(
        patient: str, frames: Sequence[int] = (1, 2), *, grid: tuple[int, int] = (1, 2), root: str = "cartridges"
    ) -> Path:
        folder = tmp_path / root / patient / "processed"
        folder.mkdir(parents=True)
        for frame in frames:
            # Not hash(): its text salt differs from process to process.
            seed = sum(patient.encode()) * 1000 + frame
            tifffile.imwrite(folder / f"{patient}p{frame:03d}.tif", draw_small_field(seed), photometric="minisblack")
        (folder / f"{patient}.xml").write_text(archive_xml(*grid))
        return folder

    return write


@pytest.fixture(scope="session")
def bright_spot_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one filter that calls every bright pixel an object of 6 px radius: exact, quick, needs no training."""
    config = NetworkConfig(unet_n_depth=1, unet_n_filter_base=1, net_conv_after_unet=0)
    network = StarDistNetwork(config)
    with torch.no_grad():
        for name, layer in network.convolutions.items():
            assert isinstance(layer, torch.nn.Conv2d)
            assert layer.bias is not None
            layer.weight.zero_()
            layer.bias.zero_()
            middle = layer.kernel_size[0] // 2
            source = layer.in_channels - 1  # of a concatenation the skip
            layer.weight[:, source, middle, middle] = 1.0
            if name == "prob":
                layer.weight.fill_(6.0)
                layer.bias.fill_(-2.0)
            if name == "dist":
                layer.weight.zero_()
                layer.bias.fill_(6.0)
    folder = tmp_path_factory.mktemp("bright_spot_weights")
    save_folder(network, Thresholds(prob=0.5, nms=0.3), folder)
    return folder
