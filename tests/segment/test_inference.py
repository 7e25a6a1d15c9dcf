"""The network in windows and strips gives the numbers of the plain network; what is empty is skipped, and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ctc_ray.config import SegmentConfig
from ctc_ray.errors import ConfigError
from ctc_ray.segment import gating, inference
from ctc_ray.segment.convolution import (
    FrozenConvolution,
    FrozenUpConvolution,
    fused_convolutions_work,
    split_upsampling_works,
)
from ctc_ray.segment.gating import (
    HALO_PX,
    MOST_ACTIVE,
    TILE_PX,
    active_tiles,
    gated_windows,
    tiled_windows,
)
from ctc_ray.segment.inference import FieldNetwork, Window
from ctc_ray.segment.instances import image_percentiles
from ctc_ray.segment.model import StarDist
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.plan import resolve_settings
from ctc_ray.segment.windows import Box, Reach

CPU = torch.device("cpu")
CONFIGS = {
    "versatile": NetworkConfig(unet_n_filter_base=8, net_conv_after_unet=16),
    "grid 1": NetworkConfig(unet_n_filter_base=8, grid=(1, 1), net_conv_after_unet=16, unet_n_depth=2),
    "grid 4": NetworkConfig(unet_n_filter_base=8, grid=(4, 4), net_conv_after_unet=16, unet_n_depth=1),
    "grid 2 by 1": NetworkConfig(unet_n_filter_base=8, grid=(2, 1), net_conv_after_unet=16, unet_n_depth=2),
    "three channels": NetworkConfig(unet_n_filter_base=8, n_channel_in=3, n_rays=8, unet_n_depth=2),
    "wide kernels": NetworkConfig(unet_n_filter_base=8, unet_kernel_size=(5, 3), unet_n_depth=2),
    "no features": NetworkConfig(unet_n_filter_base=8, net_conv_after_unet=0, unet_n_depth=2),
    "elu, linear last": NetworkConfig(
        unet_n_filter_base=8, unet_activation="elu", unet_last_activation="linear", unet_n_depth=2
    ),
    "three convolutions": NetworkConfig(unet_n_filter_base=8, unet_n_conv_per_depth=3, unet_n_depth=2),
}


def _network(config: NetworkConfig, seed: int = 0) -> StarDistNetwork:
    torch.manual_seed(seed)
    network = StarDistNetwork(config).eval()
    for convolution in network.convolutions.values():
        nn.init.normal_(convolution.bias, std=0.1)
    return network


def _field(config: NetworkConfig, blocks: tuple[int, int], seed: int = 0) -> np.ndarray:
    rows, columns = (count * step for count, step in zip(blocks, config.multiple, strict=True))
    return np.random.default_rng(seed).random((config.n_channel_in, rows, columns), dtype=np.float32)


def _plain(network: StarDistNetwork, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        logits, dist = network(torch.from_numpy(image)[None])
    return torch.sigmoid(logits)[0, 0].numpy(), dist[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strip_bytes", [1, 20_000, 1 << 30])
def test_whole_field_in_strips_of_any_size_gives_the_plain_networks_maps(
    name: str, strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "STRIP_BYTES", strip_bytes)
    network = _network(CONFIGS[name])
    image = _field(network.config, (5, 4))
    frozen = FieldNetwork(network, dtype=torch.float32, device=CPU)
    prob, dist = frozen.maps(image, frozen.whole(image.shape[1:]))
    expected_prob, expected_dist = _plain(network, image)
    np.testing.assert_allclose(prob, expected_prob, atol=1e-5)
    np.testing.assert_allclose(dist, expected_dist, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(CONFIGS)))
def test_any_window_without_a_halo_limit_gives_the_whole_fields_numbers(data: st.DataObject, name: str) -> None:
    network = _network(CONFIGS[name])
    image = _field(network.config, (8, 7), seed=1)
    frozen = FieldNetwork(network, dtype=torch.float32, device=CPU)
    rows, columns = Reach(network.config, image.shape[1:]).shape_of(0)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    box = Box(top, left, data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns)))
    prob, dist = frozen.maps(image, [Window((box,))])
    expected_prob, expected_dist = _plain(network, image)
    np.testing.assert_allclose(prob[box.slices], expected_prob[box.slices], atol=1e-5)
    np.testing.assert_allclose(dist[box.slices], expected_dist[box.slices], atol=1e-5)
    outside = prob.copy()
    outside[box.slices] = 0
    assert not outside.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_needs_of_a_position_are_no_larger_than_the_pixels_that_move_it(name: str) -> None:
    """Gradients say which pixels have an influence; the window must hold them all and be tight to a block."""
    network = _network(CONFIGS[name])
    config = network.config
    blocks = (14, 14)
    image = torch.from_numpy(_field(config, blocks))[None].requires_grad_()
    reach = Reach(config, tuple(image.shape[2:]))
    rows, columns = reach.shape_of(0)
    row, column = rows // 2, columns // 2
    logits, _ = network(image)
    logits[0, 0, row, column].backward()
    moved = image.grad.abs().sum(dim=(0, 1)).numpy() > 0
    needed = reach.needs_of(Box(row, column, row + 1, column + 1)).image
    outside = moved.copy()
    outside[needed.slices] = False
    assert moved.any()
    assert not outside.any()
    height, width = needed.shape
    touched = np.flatnonzero(moved.any(axis=1)), np.flatnonzero(moved.any(axis=0))
    assert height < touched[0][-1] - touched[0][0] + 1 + 6 * config.multiple[0]
    assert width < touched[1][-1] - touched[1][0] + 1 + 6 * config.multiple[1]


def test_peaks_are_the_maps_positions_above_the_cut_in_row_major_order() -> None:
    network = _network(CONFIGS["versatile"])
    image = _field(network.config, (8, 9), seed=2)
    frozen = FieldNetwork(network, dtype=torch.float32, device=CPU)
    prob, dist = frozen.maps(image, frozen.whole(image.shape[1:]))
    cut = float(np.quantile(prob, 0.7))
    found = frozen.peaks(image, frozen.whole(image.shape[1:]), prob_thresh=cut)
    expected = np.argwhere(prob > cut)
    np.testing.assert_array_equal(found.positions, expected)
    np.testing.assert_array_equal(found.prob, prob[tuple(expected.T)])
    np.testing.assert_allclose(found.dist, dist[tuple(expected.T)], atol=1e-5)


def test_peaks_above_one_are_none_with_the_right_widths() -> None:
    network = _network(CONFIGS["versatile"])
    image = _field(network.config, (4, 4))
    frozen = FieldNetwork(network, dtype=torch.float32, device=CPU)
    found = frozen.peaks(image, frozen.whole(image.shape[1:]), prob_thresh=1.0)
    assert found.positions.shape == (0, 2)
    assert found.dist.shape == (0, network.config.n_rays)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU(), nn.Identity()])
def test_frozen_convolution_gives_the_plain_layer_with_its_activation(activation: nn.Module) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1)
    maps = torch.randn(1, 3, 17, 9).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        frozen = FrozenConvolution(layer, activation, dtype=torch.float32, device=CPU)
        torch.testing.assert_close(frozen(maps), activation(layer(maps)), atol=1e-5, rtol=0)


def test_fused_convolutions_that_are_missing_fall_back_to_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fused_convolutions_work.cache_clear()
    split_upsampling_works.cache_clear()
    try:
        network = _network(CONFIGS["versatile"])
        image = _field(network.config, (3, 3))
        frozen = FieldNetwork(network, dtype=torch.float32, device=CPU)
        assert not fused_convolutions_work(torch.float32)
        prob, _ = frozen.maps(image, frozen.whole(image.shape[1:]))
        np.testing.assert_allclose(prob, _plain(network, image)[0], atol=1e-5)
    finally:
        fused_convolutions_work.cache_clear()
        split_upsampling_works.cache_clear()


def test_missing_sum_with_the_skip_connection_falls_back_to_the_plain_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(FrozenUpConvolution, "__call__", missing)
    split_upsampling_works.cache_clear()
    try:
        network = _network(CONFIGS["versatile"])
        image = _field(network.config, (3, 3))
        frozen = FieldNetwork(network, dtype=torch.float32, device=CPU)
        prob, _ = frozen.maps(image, frozen.whole(image.shape[1:]))
        np.testing.assert_allclose(prob, _plain(network, image)[0], atol=1e-5)
    finally:
        split_upsampling_works.cache_clear()


def _sparse_field(places: list[tuple[int, int]], *, shape: tuple[int, int] = (480, 640), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    field = rng.normal(0.1, 0.02, shape).astype(np.float32)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    for row, column in places:
        field += np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 6.0**2)).astype(np.float32)
    return field


def test_active_tiles_of_a_sparse_field_hold_every_object_and_little_else() -> None:
    rng = np.random.default_rng(3)
    places = [(int(rng.integers(20, 460)), int(rng.integers(20, 620))) for _ in range(12)]
    active = active_tiles(_sparse_field(places))
    for row, column in places:
        for edge_row, edge_column in ((-8, 0), (8, 0), (0, -8), (0, 8), (0, 0)):
            assert active[(row + edge_row) // TILE_PX, (column + edge_column) // TILE_PX]
    assert active.mean() < 0.35


def test_active_tiles_of_pure_noise_are_nearly_none() -> None:
    assert active_tiles(_sparse_field([], seed=5)).mean() < 0.02


def test_active_tiles_of_a_gradient_without_objects_are_few() -> None:
    slope = np.linspace(0.0, 0.08, 640, dtype=np.float32)[None]
    assert active_tiles(_sparse_field([], seed=6) + slope).mean() < 0.05


def test_active_tiles_of_a_crowded_image_are_all() -> None:
    rng = np.random.default_rng(4)
    crowded = np.kron(rng.random((30, 40)) < 0.6, np.ones((16, 16))).astype(np.float32)
    assert active_tiles(crowded).all()


def test_active_tiles_keep_the_inside_of_a_large_clump() -> None:
    field = _sparse_field([], seed=7)
    field[100:300, 200:420] += 0.8
    active = active_tiles(field)
    assert active[100 // TILE_PX : 300 // TILE_PX, 200 // TILE_PX : 420 // TILE_PX].all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0]))
def test_gated_windows_cover_each_active_position_once_and_of_a_sparse_field_no_other(seed: int, share: float) -> None:
    config, padded = NetworkConfig(), (1040, 1392)
    tiles = -(-padded[0] // TILE_PX), -(-padded[1] // TILE_PX)
    active = np.random.default_rng(seed).random(tiles) < share
    shape = Reach(config, padded).shape_of(0)
    count = np.zeros(shape, dtype=int)
    for window in gated_windows(active, config, padded):
        for region in window.regions:
            count[region.slices] += 1
    side = TILE_PX // config.grid[0]
    expected = np.kron(active, np.ones((side, side), dtype=int))[: shape[0], : shape[1]]
    np.testing.assert_array_equal(count, expected if active.mean() <= MOST_ACTIVE else np.ones_like(expected))


def test_gated_windows_of_a_busy_field_are_one_window_with_exact_numbers() -> None:
    active = np.random.default_rng(0).random((65, 87)) < 0.3
    (window,) = gated_windows(active, NetworkConfig(), (1040, 1392))
    assert window.halo_px is None


def test_skipping_the_background_finds_the_same_objects_on_a_sparse_field() -> None:
    rng = np.random.default_rng(8)
    places = [(int(rng.integers(30, 450)), int(rng.integers(30, 610))) for _ in range(8)]
    field = (_sparse_field(places) * 100).astype(np.uint8)
    full = StarDist.load(None, precision="fp32").predict(field)
    gated = StarDist.load(None, precision="fp32", skip_background=True).predict(field)
    assert len(full) >= 6
    assert len(gated) == len(full)
    both = (full.labels > 0) & (gated.labels > 0)
    assert both.sum() > 0.97 * ((full.labels > 0) | (gated.labels > 0)).sum()
    assert HALO_PX % NetworkConfig().multiple[0] == 0


def test_tiled_windows_split_the_maps_without_gap_or_overlap() -> None:
    config, padded = NetworkConfig(), (208, 336)
    count = np.zeros(Reach(config, padded).shape_of(0), dtype=int)
    for window in tiled_windows((3, 4), config, padded):
        for region in window.regions:
            count[region.slices] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("n_tiles", [(1, 1), (2, 2), (3, 1)])
def test_predict_in_tiles_gives_the_untiled_labels(n_tiles: tuple[int, int]) -> None:
    places = [(40 + 55 * i, 35 + 61 * j) for i in range(6) for j in range(8)]
    field = (_sparse_field(places, shape=(389, 530)) * 100).astype(np.uint8)
    model = StarDist.load(None, precision="fp32")
    whole, tiled = model.predict(field), model.predict(field, n_tiles=n_tiles)
    assert len(whole) > 20
    np.testing.assert_array_equal(tiled.labels, whole.labels)


def test_predict_in_no_tiles_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_tiles"):
        StarDist.load(None, precision="fp32").predict(np.zeros((64, 64), dtype=np.uint8), n_tiles=(0, 2))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(["uint8", "uint16", "float32", "int32"]),
    low=st.floats(0, 100),
    high=st.floats(0, 100),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_image_percentiles_are_numpys(seed: int, dtype: str, low: float, high: float, shape: tuple[int, int]) -> None:
    plane = np.random.default_rng(seed).integers(0, 255, shape).astype(dtype)
    np.testing.assert_array_equal(image_percentiles(plane, (low, high)), np.percentile(plane, [low, high]))


def test_constants_of_the_gate_enter_the_fingerprint_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used, unused = SegmentConfig(), SegmentConfig(skip_background=False)
    before = resolve_settings(used, "fp32").fingerprint, resolve_settings(unused, "fp32").fingerprint
    monkeypatch.setattr(gating, "HALO_PX", 64)
    after = resolve_settings(used, "fp32").fingerprint, resolve_settings(unused, "fp32").fingerprint
    assert before[0] != before[1]
    assert after[0] != before[0]
    assert after[1] == before[1]
