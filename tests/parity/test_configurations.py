"""Networks of every kind that the stock package builds, with random weights: equal maps, equal label images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctc_ray.segment import StarDist

pytestmark = pytest.mark.parity


@dataclass(frozen=True)
class Case:
    """A configuration, an image size and a version of Keras that writes the weight file."""

    config: dict[str, Any]
    shape: tuple[int, int] = (97, 131)
    keras: int = 3


CASES = {
    "stock defaults, grid 1": Case({}),
    "grid 2, depth 2, 8 rays": Case({"grid": (2, 2), "unet_n_depth": 2, "n_rays": 8, "unet_n_filter_base": 8}),
    "grid 4, 64 rays": Case({"grid": (4, 4), "n_rays": 64, "unet_n_filter_base": 8}),
    "grid 2 by 1": Case({"grid": (2, 1), "unet_n_filter_base": 8}),
    "grid 1 by 4": Case({"grid": (1, 4), "unet_n_filter_base": 8, "unet_n_depth": 2}),
    "three channels": Case({"n_channel_in": 3, "grid": (2, 2), "unet_n_filter_base": 16}),
    "two channels, no features layer": Case({"n_channel_in": 2, "net_conv_after_unet": 0, "unet_n_filter_base": 8}),
    "no features layer, grid 2": Case({"grid": (2, 2), "net_conv_after_unet": 0, "unet_n_filter_base": 16}),
    "depth 4, 16 filters": Case({"grid": (2, 2), "unet_n_depth": 4, "unet_n_filter_base": 16}, shape=(133, 97)),
    "64 filters": Case({"grid": (2, 2), "unet_n_filter_base": 64}, shape=(81, 65)),
    "three convolutions a level": Case({"unet_n_conv_per_depth": 3, "grid": (2, 2), "unet_n_filter_base": 8}),
    "one convolution a level": Case({"unet_n_conv_per_depth": 1, "grid": (4, 4), "unet_n_filter_base": 8}),
    "wide kernels": Case({"unet_kernel_size": (5, 3), "grid": (2, 2), "unet_n_filter_base": 8}),
    "pool 2 by 4": Case({"unet_pool": (2, 4), "unet_n_depth": 2, "unet_n_filter_base": 8}),
    "other activations": Case({"unet_activation": "elu", "unet_last_activation": "linear", "unet_n_filter_base": 8}),
    "last activation of the others": Case(
        {"unet_activation": "elu", "unet_last_activation": None, "unet_n_filter_base": 8}
    ),
    "slow growth, prefix, dropout": Case(
        {"unet_expansion": 1.5, "unet_prefix": "cell_", "unet_dropout": 0.2, "unet_n_filter_base": 8, "grid": (2, 2)}
    ),
    "keras 2, grid 2": Case({"grid": (2, 2), "unet_n_filter_base": 16}, keras=2),
    "keras 2, grid 4, three channels": Case(
        {"grid": (4, 4), "n_channel_in": 3, "unet_n_filter_base": 8, "n_rays": 64}, keras=2
    ),
    "keras 2, grid 1, no features layer": Case({"net_conv_after_unet": 0, "unet_n_filter_base": 16}, keras=2),
}


@pytest.fixture(scope="module")
def stock_models(
    run_stock: Callable[..., Any], draw_blobs: Callable[..., np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with, for case k, the weight folder `k`, the image `k.npy` and what stock finds, `k.npz`."""
    root = tmp_path_factory.mktemp("stock_models")
    for keras in (2, 3):
        build, predict = [], []
        for index, case in enumerate(CASES.values()):
            if case.keras != keras:
                continue
            folder, image = str(root / str(index)), str(root / f"{index}.npy")
            np.save(image, draw_blobs(case.shape, case.config.get("n_channel_in", 1), seed=index))
            build.append({"config": case.config, "folder": folder, "image": image, "seed": index})
            out = str(root / f"{index}.npz")
            predict.append({"folder": folder, "image": image, "n_tiles": None, "maps": True, "out": out})
        about = run_stock(build=build, predict=predict, keras=keras)
        assert about["keras"].startswith(str(keras))
    return root


@pytest.mark.parametrize("name", CASES)
def test_network_of_any_configuration_gives_the_stock_maps_and_label_image(name: str, stock_models: Path) -> None:
    index = list(CASES).index(name)
    model = StarDist.load(stock_models / str(index), precision="fp32", device="cpu")
    image = np.load(stock_models / f"{index}.npy")
    with np.load(stock_models / f"{index}.npz") as stock:
        prob, dist = model.maps(image)
        np.testing.assert_allclose(prob, stock["prob_map"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(dist, stock["dist_map"], rtol=0, atol=1e-5 * stock["dist_map"].max())
        found = model.predict(image)
        assert len(found) >= 10  # else the comparison says nothing
        np.testing.assert_array_equal(found.labels, stock["labels"])
        np.testing.assert_array_equal(found.points, stock["points"])
        tiled = model.predict(image, n_tiles=(2, 2))
        np.testing.assert_array_equal(tiled.labels, stock["labels"])
