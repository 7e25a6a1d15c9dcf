"""From instances to rows of the cell table: windows, positions, shapes and intensities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctc_ray.errors import SchemaError
from ctc_ray.schema import CROP_SIZE_PX, STATISTICS, cell_id, cells_schema, pack_pixels
from ctc_ray.segment.instances import FloatArray, Instances

IntArray = npt.NDArray[np.int64]


def window_origins(
    polygons: FloatArray, shape: tuple[int, int], size_px: int = CROP_SIZE_PX
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Place a square window around each polygon's bounding box.

    Args:
        polygons: (N, 2, n_rays) vertices (row, column) in pixels.
        shape: (H, W) of the field, both at least `size_px`.
        size_px: side of the window.

    Returns:
        Origins (N, 2) int64 (row, column), and (N,) bool: whether the window had to be shifted to stay inside.

    Source: reference `segmentation/core`: centre of the bounding box, cut to an integer, window shifted at the border.
    """
    centres = ((polygons.min(axis=2) + polygons.max(axis=2)) / 2).astype(np.int64)
    wanted = centres - size_px // 2
    origins = np.clip(wanted, 0, np.asarray(shape) - size_px)
    return origins, np.any(origins != wanted, axis=1)


def cut_crops(image_CHW: np.ndarray, origins: IntArray, size_px: int = CROP_SIZE_PX) -> np.ndarray:
    """Cut windows out of a field.

    Args:
        image_CHW: (C, H, W).
        origins: (N, 2) top left corners (row, column), windows wholly inside.
        size_px: side of the window.

    Returns:
        (N, C, size_px, size_px) of the image's dtype.
    """
    windows = np.lib.stride_tricks.sliding_window_view(image_CHW, (size_px, size_px), axis=(1, 2))
    cut: np.ndarray = windows[:, origins[:, 0], origins[:, 1]].swapaxes(0, 1)
    return np.ascontiguousarray(cut)


def measure(labels: npt.NDArray[np.int32], image_CHW: np.ndarray, num_instances: int) -> dict[str, np.ndarray]:
    """Position, shape and intensities of each instance, over its pixels in the label image.

    Args:
        labels: (H, W) int32; instance k has label k + 1.
        image_CHW: (C, H, W) counts, C as in `Channel`.
        num_instances: N.

    Returns:
        Arrays (N,): `area_px` int64; `row`, `col` (centroid, pixels), `eccentricity` (of the ellipse with the same second
        moments, 0 circle to 1 line) and the columns of `STATISTICS`, float64, NaN where an instance has no pixel.

    Source: eccentricity as scikit-image's `regionprops`.
    """
    rows, columns = np.nonzero(labels)
    of = labels[rows, columns] - 1

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(of, weights=weights, minlength=num_instances)

    area = np.bincount(of, minlength=num_instances)
    with np.errstate(invalid="ignore", divide="ignore"):
        row, col = total(rows) / area, total(columns) / area
        d_row, d_col = rows - row[of], columns - col[of]
        m_rr, m_cc = total(d_row**2) / area, total(d_col**2) / area
        m_rc = total(d_row * d_col) / area
        half, root = (m_rr + m_cc) / 2, np.sqrt(((m_rr - m_cc) / 2) ** 2 + m_rc**2)
        measured = {"area_px": area, "row": row, "col": col}
        ratio = (half - root) / np.maximum(half + root, 1e-12)
        measured["eccentricity"] = np.where(half + root > 0, np.sqrt(np.clip(1 - ratio, 0, 1)), 0.0)
        names = iter(STATISTICS)
        for channel in image_CHW:
            values = channel[rows, columns].astype(np.float64)
            mean, largest = total(values) / area, np.full(num_instances, -np.inf)
            np.maximum.at(largest, of, values)
            spread = np.sqrt(total((values - mean[of]) ** 2) / area)
            measured |= {next(names): mean, next(names): largest, next(names): spread}
    return measured


def cells_of_field(
    image_CHW: np.ndarray,
    found: Instances,
    *,
    patient: str,
    field: int,
    origin: tuple[int, int],
    fingerprint: str,
    pixel_size_um: float,
) -> pa.Table:
    """Rows of the cell table for one field.

    Args:
        image_CHW: (3, H, W) uint8 or uint16, in the order of `Channel`.
        found: instances of its CK page.
        patient: patient id.
        field: frame number.
        origin: (row, column) of the field's corner in the cartridge, pixels.
        fingerprint: of the segmentation; it enters every `cell_id`.
        pixel_size_um: edge of a pixel.

    Returns:
        A table of `cells_schema`, by falling probability. An instance whose every pixel belongs to a better one is left out:
        it has no pixels to measure.

    Raises:
        SchemaError: labels and image differ in size.
    """
    if found.labels.shape != image_CHW.shape[1:]:
        raise SchemaError(f"label image {found.labels.shape} and field {image_CHW.shape[1:]} differ in size")
    measured = measure(found.labels, image_CHW, len(found))
    seen = np.flatnonzero(measured["area_px"] > 0)
    measured = {name: values[seen] for name, values in measured.items()}
    points = found.points[seen]
    origins, shifted = window_origins(found.polygons[seen], found.labels.shape)
    columns: dict[str, object] = {
        "cell_id": [cell_id(patient, field, int(row), int(col), fingerprint) for row, col in points],
        "patient": [patient] * len(seen),
        "field": np.full(len(seen), field),
        "global_row": measured["row"] + origin[0],
        "global_col": measured["col"] + origin[1],
        "y0": origins[:, 0],
        "x0": origins[:, 1],
        "prob": found.prob[seen],
        "diameter_um": 2 * np.sqrt(measured["area_px"] / np.pi) * pixel_size_um,
        "at_edge": shifted,
        "point_row": points[:, 0],
        "point_col": points[:, 1],
        **measured,
    }
    schema = cells_schema(str(image_CHW.dtype), len(image_CHW))
    arrays = [
        pack_pixels(cut_crops(image_CHW, origins)) if f.name == "pixels" else pa.array(columns[f.name], f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
