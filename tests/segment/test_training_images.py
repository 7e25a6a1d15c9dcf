"""Pairs of training images and masks: how they are found, read and set aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from disc_images import disc_pair, write_pairs
from skimage.io import imsave

from ctc_ray.config import PhantomConfig, load_config
from ctc_ray.errors import CartridgeError, MissingInputError, SchemaError, TooManyFailuresError
from ctc_ray.phantom import draw_field, write_phantom
from ctc_ray.phantom.archive import encode_tiff
from ctc_ray.phantom.kinds import PROFILES
from ctc_ray.progress import Progress
from ctc_ray.records import read_failures
from ctc_ray.segment.train_segmenter import run_train_segmenter
from ctc_ray.segment.training_images import find_pairs, read_pair, read_pairs, read_usable_pairs
from ctc_ray.storage import Store


def save(path: Path, image: np.ndarray) -> None:
    path.unlink(missing_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, image)
    else:
        imsave(path, image, check_contrast=False)


def zero_byte(image: Path, mask: Path) -> None:
    image.write_bytes(b"")


def truncated(image: Path, mask: Path) -> None:
    image.write_bytes(image.read_bytes()[:200])


def text(image: Path, mask: Path) -> None:
    image.write_text("no image")


def no_tiff(image: Path, mask: Path) -> None:
    image.with_suffix(".tif").write_text("no image")
    image.unlink()


def broken_mask(image: Path, mask: Path) -> None:
    mask.write_bytes(mask.read_bytes()[:100])


def colours(image: Path, mask: Path) -> None:
    save(image, np.zeros((96, 96, 3), np.uint8) + np.arange(96, dtype=np.uint8)[:, None, None])


def other_shape(image: Path, mask: Path) -> None:
    save(mask, np.ones((5, 5), np.uint16))


def constant(image: Path, mask: Path) -> None:
    save(image, np.full((96, 96), 65_535, np.uint16))


def empty_mask(image: Path, mask: Path) -> None:
    save(mask, np.zeros((96, 96), np.uint16))


def foreground_mask(image: Path, mask: Path) -> None:
    save(mask, 255 * (disc_pair(1).labels > 0).astype(np.uint8))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (zero_byte, "0 bytes"),
        (truncated, "cannot be read"),
        (text, "cannot be read"),
        (no_tiff, "not a TIFF"),
        (broken_mask, "cannot be read"),
        (colours, "one channel"),
        (other_shape, r"\(5, 5\)"),
        (constant, "no contrast.*65535"),
        (empty_mask, "no object.*empty_masks"),
        (foreground_mask, "a number for each object"),
    ],
)
def test_unusable_pair_is_set_aside_with_its_reason(
    tmp_path: Path, damage: Callable[[Path, Path], None], reason: str
) -> None:
    images, masks = write_pairs(tmp_path, 3)
    damage(images / "disc-1.png", masks / "disc-1.png")
    usable, failures = read_usable_pairs(find_pairs(images, masks))
    assert [pair.name for _, pair in usable] == ["disc-0", "disc-2"]
    (row,) = failures
    assert Path(row.source).stem == "disc-1"
    with pytest.raises(CartridgeError, match=reason):
        raise CartridgeError(row.message)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_with_values_that_are_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    images, masks = write_pairs(tmp_path, 1)
    pixels = disc_pair(0).image.astype(np.float32)
    pixels[3, 4] = value
    (images / "disc-0.png").unlink()
    save(images / "disc-0.tif", pixels)
    with pytest.raises(CartridgeError, match="1 pixels that are not finite"):
        read_pairs(images, masks)


@pytest.mark.parametrize("mask", [np.full((96, 96), -1, np.int16), np.full((96, 96), 0.5, np.float32)])
def test_mask_that_holds_no_labels_is_refused(tmp_path: Path, mask: np.ndarray) -> None:
    images, masks = write_pairs(tmp_path, 1)
    (masks / "disc-0.png").unlink()
    save(masks / "disc-0.tif", mask)
    with pytest.raises(CartridgeError, match="no label image"):
        read_pairs(images, masks)


def test_one_object_in_one_piece_is_no_foreground_mask(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 1)
    save(masks / "disc-0.png", (disc_pair(0).labels == 3).astype(np.uint16))
    assert read_pairs(images, masks)[0].labels.max() == 1


def test_empty_mask_is_read_as_background_where_the_caller_says_so(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 1)
    empty_mask(images / "disc-0.png", masks / "disc-0.png")
    (files,) = find_pairs(images, masks)
    assert not read_pair(files, allow_empty=True).labels.any()


def test_missing_mask_and_doubled_name_and_empty_folder_are_refused(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 2)
    save(images / "disc-1.tif", disc_pair(1).image)
    with pytest.raises(SchemaError, match="one name"):
        find_pairs(images, masks)
    (images / "disc-1.tif").unlink()
    (masks / "disc-1.png").unlink()
    with pytest.raises(MissingInputError, match="disc-1"):
        find_pairs(images, masks)
    with pytest.raises(MissingInputError, match="no images"):
        find_pairs(tmp_path / "nowhere", masks)


def test_masks_may_carry_a_suffix_and_names_may_be_any_text(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path / "ein Ordner mit Ümläuten", 2)
    for path in list(masks.iterdir()):
        path.rename(path.with_stem(f"{path.stem}_Maske ä"))
    pairs = find_pairs(images, masks, mask_suffix="_Maske ä")
    assert [one.name for one in pairs] == ["disc-0", "disc-1"]


def test_phantom_cartridges_give_the_ck_page_and_its_mask(tmp_path: Path) -> None:
    settings = PhantomConfig(patients=1, fields=2, seed=11, masks=True)
    write_phantom(settings, tmp_path)
    files = find_pairs(tmp_path, tmp_path / ".masks")
    assert [one.name for one in files] == ["P01p001", "P01p002"]
    drawn = draw_field(PROFILES["demo"], patient="P01", field=2, seed=11, masks=True)
    pair = read_pair(files[1])
    assert pair.image.shape == drawn.pages[2].shape
    stored = tifffile.imread(tmp_path / "P01" / "processed" / "P01p002.tif")
    np.testing.assert_array_equal(pair.image, stored[2])
    np.testing.assert_array_equal(pair.labels, tifffile.imread(tmp_path / ".masks" / "P01" / "P01p002_ck.tif"))
    # Objects are where the page is bright: image and mask are of one page.
    assert np.median(pair.image[pair.labels > 0]) > np.median(pair.image[pair.labels == 0])


def test_cartridge_field_cut_off_anywhere_is_never_read_as_another_page(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    whole = encode_tiff(np.stack([disc_pair(seed).image for seed in range(4)]))
    save(tmp_path / "masks" / "a_ck.tif", disc_pair(2).labels.astype(np.uint16))
    (tmp_path / "images" / "a.tif").write_bytes(whole)
    (files,) = find_pairs(tmp_path / "images", tmp_path / "masks")
    np.testing.assert_array_equal(read_pair(files).image, disc_pair(2).image)
    read, refused = 0, 0
    for length in range(0, len(whole), 97):
        files.image.write_bytes(whole[:length])
        try:
            image = read_pair(files).image
        except CartridgeError:
            refused += 1
        else:
            read += 1
            np.testing.assert_array_equal(image, disc_pair(2).image)
    # The page of CK is whole long before the file is.
    assert read > 20
    assert refused > 200


def test_page_that_a_field_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "i" / "a.tif").write_bytes(encode_tiff(np.stack([disc_pair(seed).image for seed in range(2)])))
    save(tmp_path / "m" / "a.tif", disc_pair(0).labels.astype(np.uint16))
    (files,) = find_pairs(tmp_path / "i", tmp_path / "m")
    with pytest.raises(CartridgeError, match=r"2 pages.*train_segmenter\.page"):
        read_pair(files)
    assert read_pair(files, page=1).image.shape == (96, 96)


def settings_for(steps: int, *more: str) -> list[str]:
    small = ["batch_size=1", "patch_size_px=64", "n_filter_base=4", "checkpoint_every=2", f"steps={steps}", *more]
    return [f"train_segmenter.{setting}" for setting in small]


def test_training_goes_on_without_the_bad_images_and_lists_them(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 4)
    zero_byte(images / "disc-2.png", masks / "disc-2.png")
    config = load_config(None, settings_for(2, "max_failure_fraction=0.25"))
    trained = run_train_segmenter(config, images, masks, tmp_path / "o", progress=Progress(quiet=True), local=True)
    assert (trained.set_aside, trained.images + trained.held_out) == (1, 3)
    rows = read_failures(Store(tmp_path / "o"), "train-segmenter")
    assert rows["kind"].to_list() == ["CartridgeError"]
    assert "disc-2" in rows["message"][0]


def test_too_many_bad_images_fail_the_training_and_are_listed(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 4)
    zero_byte(images / "disc-2.png", masks / "disc-2.png")
    with pytest.raises(TooManyFailuresError, match="1 of 4 images"):
        run_train_segmenter(
            load_config(None, settings_for(2)), images, masks, tmp_path / "o", progress=Progress(quiet=True), local=True
        )
    assert read_failures(Store(tmp_path / "o"), "train-segmenter").height == 1


def test_masks_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 2)
    for name in ("disc-0.png", "disc-1.png"):
        empty_mask(images / name, masks / name)
    config = load_config(None, settings_for(2, "empty_masks=background"))
    with pytest.raises(MissingInputError, match="has an object"):
        run_train_segmenter(config, images, masks, tmp_path / "o", progress=Progress(quiet=True), local=True)
