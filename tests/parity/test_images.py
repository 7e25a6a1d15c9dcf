"""Real nuclei and phantom fields, real weights: our label image is the stock package's, tiled or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import zoom

from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.segment import StarDist
from ctc_ray.segment.published import REGISTRY, RELEASE_URL
from ctc_ray.segment.weights import load_weights, save_keras_folder

pytestmark = pytest.mark.parity

NUM_REAL = 12
ODD_SHAPES = {"97 x 131": (97, 131), "255 x 257": (255, 257), "333 x 222": (333, 222)}
TILES = {"2 x 2": (2, 2), "3 x 2": (3, 2), "1 x 4": (1, 4)}
REAL = [f"real {index}" for index in range(NUM_REAL)]
CROPPED = [f"crop {name}" for name in ODD_SHAPES]
NAMES = [*REAL, *CROPPED, "field 1036 x 1384", "dense 500 x 620"]
REPEATED = "repeated 240 x 240"
MAPPED = ["real 0", *CROPPED, "dense 500 x 620"]
KERAS_FIXTURES = ("keras2", "keras3")


def real_images(shared_data: Path) -> list[np.ndarray]:
    """The real images of the test split, (H, W) uint8."""
    paths = sorted((shared_data / "dsb2018" / "test" / "images").iterdir())
    return [np.asarray(Image.open(path)) for path in paths]


def mosaic_of(images: list[np.ndarray]) -> np.ndarray:
    """A crowded image (500, 620) uint8 of 20 real ones at half size, none of them twice.

    A repeated image would hold objects of mathematically equal probability, whose rank (the label) rounding decides.
    """
    pieces = [zoom(image.astype(np.float32), 0.5, order=1)[:125, :124] for image in images]
    pieces = [piece / np.percentile(piece, 99.8) * 200 for piece in pieces if piece.shape == (125, 124)][:20]
    rows = [np.concatenate(pieces[start : start + 5], axis=1) for start in range(0, 20, 5)]
    return np.clip(np.concatenate(rows), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images(shared_data: Path) -> dict[str, np.ndarray]:
    """Real images, a phantom CK field, a crowded mosaic of real nuclei and pieces of it of odd sizes."""
    real = real_images(shared_data)
    field = draw_field(PROFILES["demo"], patient="parity", field=3, seed=11).pages[2]
    mosaic = mosaic_of(real)
    drawn = dict(zip(REAL, real[::4], strict=False))
    for name, (height, width) in ODD_SHAPES.items():
        drawn[f"crop {name}"] = mosaic[100 : 100 + height, 150 : 150 + width]
    repeated = np.tile(mosaic[:120, :120], (2, 2))
    return drawn | {"field 1036 x 1384": field, "dense 500 x 620": mosaic, REPEATED: repeated}


def fixture_folder(shared_data: Path, layout: str, target: Path) -> Path:
    """A stock weight folder of random weights, as Keras 2 or Keras 3 wrote it."""
    source = shared_data / "keras_parity_fixture"
    target.mkdir()
    shutil.copy(source / "config.json", target / "config.json")
    shutil.copy(source / f"weights_{layout}_layout.h5", target / "weights_best.h5")
    with np.load(source / "expected.npz") as expected:
        cuts = {"prob": float(expected["prob_thresh"]), "nms": float(expected["nms_thresh"])}
        np.save(target / "image.npy", expected["image"])
    (target / "thresholds.json").write_text(json.dumps(cuts))
    return target


@pytest.fixture(scope="module")
def stock(
    run_stock: Callable[..., Any],
    images: dict[str, np.ndarray],
    shared_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of what stock finds: `<name>.npz`, and `<name>, <tiles>.npz` for the two large images."""
    root = tmp_path_factory.mktemp("stock_images")
    weights = load_weights()
    save_keras_folder(weights.network, weights.thresholds, root / "default")
    predict: list[dict[str, Any]] = []

    def ask(folder: Path, image: Path, out: str, n_tiles: tuple[int, int] | None = None, maps: bool = False) -> None:
        job = {"folder": str(folder), "image": str(image), "n_tiles": n_tiles, "maps": maps, "out": str(root / out)}
        predict.append(job)

    for name, image in images.items():
        np.save(root / f"{name}.npy", image)
        ask(root / "default", root / f"{name}.npy", f"{name}.npz", maps=name in MAPPED)
    for name in NAMES[-2:]:
        for tiles, n_tiles in TILES.items():
            ask(root / "default", root / f"{name}.npy", f"{name}, {tiles}.npz", n_tiles)
    for layout in KERAS_FIXTURES:
        folder = fixture_folder(shared_data, layout, root / layout)
        ask(folder, folder / "image.npy", f"{layout}.npz")
    about = run_stock(predict=predict)
    (root / "about.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def model() -> StarDist:
    return StarDist.load(precision="fp32", device="cpu")


@pytest.mark.parametrize("name", NAMES)
def test_image_gives_the_stock_label_image(
    name: str, stock: Path, images: dict[str, np.ndarray], model: StarDist
) -> None:
    found = model.predict(images[name])
    with np.load(stock / f"{name}.npz") as expected:
        np.testing.assert_array_equal(found.labels, expected["labels"])
        np.testing.assert_array_equal(found.points, expected["points"])
        np.testing.assert_allclose(found.prob, expected["prob"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.polygons, expected["coord"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MAPPED)
def test_image_gives_the_stock_maps(name: str, stock: Path, images: dict[str, np.ndarray], model: StarDist) -> None:
    prob, dist = model.maps(images[name])
    with np.load(stock / f"{name}.npz") as expected:
        np.testing.assert_allclose(prob, expected["prob_map"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(dist, expected["dist_map"], rtol=0, atol=1e-5 * expected["dist_map"].max())


def test_image_of_equally_probable_objects_gives_the_stock_objects(
    stock: Path, images: dict[str, np.ndarray], model: StarDist
) -> None:
    """Rank among equals is decided by rounding (the stock package tiled and untiled differs in it too)."""
    found = model.predict(images[REPEATED])
    with np.load(stock / f"{REPEATED}.npz") as expected:
        pairs = set(zip(found.labels.ravel().tolist(), expected["labels"].ravel().tolist(), strict=True))
        assert len(found) == len(expected["points"]) > 20
        assert len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs})


def test_images_hold_objects_enough_to_tell(stock: Path) -> None:
    counts = {}
    for name in NAMES:
        with np.load(stock / f"{name}.npz") as expected:
            counts[name] = len(expected["points"])
    assert sum(counts.values()) > 600
    assert min(counts.values()) >= 5, counts


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", NAMES[-2:])
def test_whole_image_gives_the_label_image_of_tiled_stock(
    name: str, tiles: str, stock: Path, images: dict[str, np.ndarray], model: StarDist
) -> None:
    found = model.predict(images[name])
    with np.load(stock / f"{name}, {tiles}.npz") as expected:
        np.testing.assert_array_equal(found.labels, expected["labels"])


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", NAMES[-2:])
def test_tiled_image_gives_the_label_image_of_stock_tiled_and_whole(
    name: str, tiles: str, stock: Path, images: dict[str, np.ndarray], model: StarDist
) -> None:
    found = model.predict(images[name], n_tiles=TILES[tiles])
    for expected_file in (f"{name}, {tiles}.npz", f"{name}.npz"):
        with np.load(stock / expected_file) as expected:
            np.testing.assert_array_equal(found.labels, expected["labels"])


@pytest.mark.parametrize("layout", KERAS_FIXTURES)
def test_fixture_of_either_keras_layout_gives_the_stock_label_image(layout: str, stock: Path) -> None:
    found = StarDist.load(stock / layout, precision="fp32", device="cpu").predict(np.load(stock / layout / "image.npy"))
    with np.load(stock / f"{layout}.npz") as expected:
        assert len(found) >= 10
        np.testing.assert_array_equal(found.labels, expected["labels"])


def test_exported_folder_carries_its_thresholds_into_the_stock_package(stock: Path, model: StarDist) -> None:
    with np.load(stock / f"{NAMES[0]}.npz") as expected:
        assert expected["thresholds"].tolist() == [model.thresholds.prob, model.thresholds.nms]


def test_registry_is_that_of_the_stock_package(stock: Path) -> None:
    theirs = json.loads((stock / "about.json").read_text())["registry"]
    assert {name: entry["hash"] for name, entry in theirs.items()} == dict(REGISTRY)
    assert {entry["url"] for entry in theirs.values()} == {f"{RELEASE_URL}/python_{name}.zip" for name in REGISTRY}
