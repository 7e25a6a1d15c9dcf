"""Shapes and sizes of the network for every kind of configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctc_ray.errors import WeightsError
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork, num_parameters


def test_network_of_versatile_fluo_has_the_published_number_of_parameters() -> None:
    assert num_parameters(StarDistNetwork(NetworkConfig())) == 1_425_185


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 4), (1, 2)])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("features", [0, 6])
def test_network_outputs_lie_on_the_grid(grid: tuple[int, int], depth: int, features: int) -> None:
    config = NetworkConfig(
        n_channel_in=2, n_rays=8, grid=grid, unet_n_depth=depth, unet_n_filter_base=3, net_conv_after_unet=features
    )
    height, width = 2 * config.multiple[0], 3 * config.multiple[1]
    logits, dist = StarDistNetwork(config)(torch.zeros(2, 2, height, width))
    assert logits.shape == (2, 1, height // grid[0], width // grid[1])
    assert dist.shape == (2, 8, height // grid[0], width // grid[1])


def test_config_written_and_read_is_the_same() -> None:
    config = NetworkConfig(grid=(4, 4), n_rays=16, unet_n_depth=2, unet_prefix="x_")
    assert NetworkConfig.from_stardist(config.to_stardist()) == config


def test_config_without_a_grid_has_the_stock_default() -> None:
    assert NetworkConfig.from_stardist({}).grid == (1, 1)


def test_config_ignores_what_changes_nothing_at_inference() -> None:
    config = {"grid": [2, 2], "unet_dropout": 0.3, "train_epochs": 400, "use_gpu": True, "net_input_shape": [None] * 3}
    assert NetworkConfig.from_stardist(config) == NetworkConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_dim", 3),
        ("axes", "XYC"),
        ("backbone", "resnet"),
        ("n_classes", 2),
        ("unet_batch_norm", True),
        ("unet_activation", "gelu"),
        ("unet_activation", None),
        ("unet_activation", ["relu"]),
        ("grid", [3, 3]),
        ("grid", [0, 1]),
        ("grid", [2, 2, 2]),
        ("grid", 2),
        ("grid", "22"),
        ("grid", [2.0, 2.5]),
        ("unet_kernel_size", [4, 4]),
        ("unet_kernel_size", [10**9 + 1, 3]),
        ("unet_pool", [0, 2]),
        ("n_rays", 2),
        ("n_rays", "32"),
        ("n_rays", None),
        ("n_channel_in", 0),
        ("n_channel_in", 1.0),
        ("unet_n_depth", -1),
        ("unet_n_depth", 1000),
        ("unet_n_conv_per_depth", 0),
        ("unet_n_filter_base", 10**12),
        ("unet_n_filter_base", True),
        ("unet_expansion", 0),
        ("unet_expansion", float("nan")),
        ("unet_expansion", 0.01),
        ("unet_expansion", 15.5),
        ("unet_prefix", None),
        ("net_conv_after_unet", -1),
    ],
)
def test_config_of_another_kind_of_network_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(WeightsError, match=key):
        NetworkConfig.from_stardist({key: value})


def test_network_in_a_batch_equals_single_images() -> None:
    torch.manual_seed(0)
    network = StarDistNetwork(NetworkConfig(unet_n_filter_base=4, n_rays=8)).eval()
    images = torch.from_numpy(np.random.default_rng(0).random((2, 1, 32, 48), dtype=np.float32))
    with torch.inference_mode():
        together = network(images)
        single = network(images[1:])
    torch.testing.assert_close(together[0][1:], single[0])
    torch.testing.assert_close(together[1][1:], single[1])
