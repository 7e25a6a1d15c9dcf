"""Figures of the report: each function turns one frame, or a few crops, into a picture for the page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from PIL import Image
from skimage.segmentation import find_boundaries

from ctc_ray.report.real_field import RealField
from ctc_ray.schema import CHANNEL_NAMES, CROP_SIZE_PX

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7A5195", "#8C6D1F", "#2F8F9D", "#B3446C")
"""Colour-blind-safe colours. Source: Okabe and Ito; the last four follow Tol."""
BACKGROUND_COLOUR = "#9AA0A6"
_GAP_PX = 3
_OUTLINE = (255, 140, 0)


def cluster_name(cluster: int | None) -> str:
    """How the page calls a cluster."""
    if cluster is None:
        return "All cells"
    return "Background" if cluster == -1 else f"Cluster {cluster}"


def cluster_colour(cluster: int | None) -> str:
    """Colour of a cluster."""
    return BACKGROUND_COLOUR if cluster is None or cluster < 0 else PALETTE[cluster % len(PALETTE)]


def stretch(plane: npt.NDArray[Any], low: float, high: float, gamma: float = 1.0) -> npt.NDArray[np.uint8]:
    """Map counts to grey: `low` and below to 0, `high` and above to 255, in between by the power `gamma` (1 is linear)."""
    scaled = np.clip((plane.astype(np.float32) - low) / max(high - low, 1e-9), 0.0, 1.0)
    return np.asarray(np.round(255.0 * scaled**gamma), dtype=np.uint8)


def cell_strip(
    crop: npt.NDArray[Any], limits: Mapping[str, tuple[int, int]], gamma: float = 1.0
) -> npt.NDArray[np.uint8]:
    """Lay a crop out as the paper's Figure 2 does: DAPI/CK together, DAPI, CK, CD45.

    Args:
        crop: (C, 48, 48) in the order of `Channel`.
        limits: channel -> (black, white) in counts, the same for all cells of a report.
        gamma: power of the grey curve, likewise; below 1 dim signal shows beside bright.

    Returns:
        (48, 4*48 + gaps, 4) RGBA; the gaps are transparent. In the first panel DAPI is magenta and CK green.

    Source: paper, Figure 2; departure: one contrast for the whole cohort where the reference stretches each crop by itself.
    """
    grey = {name: stretch(plane, *limits[name], gamma) for name, plane in zip(CHANNEL_NAMES, crop, strict=False)}
    blank = np.zeros(crop.shape[1:], np.uint8)
    dapi, ck, cd45 = (grey.get(name, blank) for name in CHANNEL_NAMES)
    panels = [np.stack(colours, axis=2) for colours in ((dapi, ck, dapi), (dapi,) * 3, (ck,) * 3, (cd45,) * 3)]
    strip = np.zeros((CROP_SIZE_PX, len(panels) * (CROP_SIZE_PX + _GAP_PX) - _GAP_PX, 4), np.uint8)
    for position, panel in enumerate(panels):
        left = position * (CROP_SIZE_PX + _GAP_PX)
        strip[:, left : left + CROP_SIZE_PX, :3] = panel
        strip[:, left : left + CROP_SIZE_PX, 3] = 255
    return strip


def png_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode (H, W), (H, W, 3) or (H, W, 4) as a `data:` URI of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(pixels)).decode()}"


def png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode (H, W), (H, W, 3) or (H, W, 4) uint8 as PNG."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG", optimize=True)
    return sink.getvalue()


def real_field_png(field: RealField) -> bytes:
    """Draw a real field in grey (1 to 99.8 %) with the outline of every instance."""
    low, high = np.percentile(field.image, [1, 99.8])
    grey = stretch(field.image, float(low), float(high))
    pixels = np.stack([grey] * 3, axis=2)
    outline = find_boundaries(field.labels, mode="inner")  # type: ignore[no-untyped-call]
    pixels[outline] = _OUTLINE
    return png_bytes(pixels)


def map_payload(points: pl.DataFrame, outlines: pl.DataFrame) -> str:
    """Pack the latent map for the page's script: columns, and indices into lists of names; safe inside a script element.

    Args:
        points: POINTS_FRAME with `probability` and `error`.
        outlines: `cluster_outlines`.
    """
    columns: dict[str, Any] = {
        "id": points["cell_id"].to_list(),
        "x": [round(v, 3) for v in points["umap_x"].to_list()],
        "y": [round(v, 3) for v in points["umap_y"].to_list()],
        "probability": [None if v is None else round(v, 3) for v in points["probability"].to_list()],
    }
    payload: dict[str, Any] = {"points": columns, "names": {}, "outlines": []}
    for name in ("patient", "role", "label", "error"):
        names = sorted(points[name].drop_nulls().unique().to_list())
        place = {value: index for index, value in enumerate(names)}
        columns[name] = [None if value is None else place[value] for value in points[name].to_list()]
        payload["names"][name] = names
    clusters = sorted(points["cluster"].drop_nulls().unique().to_list())
    columns["cluster"] = [clusters.index(value) for value in points["cluster"].to_list()]
    payload["names"]["cluster"] = [cluster_name(value) for value in clusters]
    payload["clusterColours"] = [cluster_colour(value) for value in clusters]
    payload["palette"] = list(PALETTE)
    for (cluster, _), part in outlines.group_by(["cluster", "part"], maintain_order=True):
        line = part.sort("position")
        number = int(str(cluster))
        payload["outlines"].append(
            {
                "name": cluster_name(number),
                "colour": cluster_colour(number),
                "x": [round(v, 3) for v in line["x"].to_list()],
                "y": [round(v, 3) for v in line["y"].to_list()],
            }
        )
    return script_json(payload)


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, `>` or `&`, and no separators that end a line of script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
