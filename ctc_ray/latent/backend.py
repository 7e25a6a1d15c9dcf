"""What fits UMAP: umap-learn on a processor, or cuML on a GPU where the extra `rapids` is installed. Runs without Ray."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import ResourceError

Backend = Literal["cpu", "cuml", "auto"]


def cuml_is_installed() -> bool:
    """Whether cuML can be imported; does not import it."""
    return find_spec("cuml") is not None


def gpu_is_there() -> bool:
    """Whether this process sees a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def resolve_backend(wished: Backend) -> Literal["cpu", "cuml"]:
    """Turn `auto` into what this process has.

    Raises:
        ResourceError: `cuml` is asked for, and cuML or a GPU is not there.
    """
    if wished == "cpu" or (wished == "auto" and not cuml_is_installed()):
        return "cpu"
    if not cuml_is_installed():
        raise ResourceError(
            "map.backend=cuml needs cuML, which is not installed: `pip install 'ctc-ray[rapids]'`, or set map.backend=cpu"
        )
    if gpu_is_there():
        return "cuml"
    if wished == "auto":
        return "cpu"
    raise ResourceError(
        "map.backend=cuml needs a GPU, and this process sees none: start Ray on a machine with one, or set map.backend=cpu"
    )


def fit_by_cuml(
    scores_MP: npt.NDArray[np.float32], neighbors: int, min_dist: float, seed: int
) -> tuple[npt.NDArray[np.float32], float, float]:
    """Fit a plane with cuML, which finds the neighbours itself.

    Args:
        scores_MP: (M, P) PCA scores.
        neighbors: of UMAP.
        min_dist: of UMAP.
        seed: of UMAP.

    Returns:
        Places (M, 2) and the two parameters of the kernel, which are those of umap-learn.
    """
    from cuml.manifold import UMAP
    from umap.umap_ import find_ab_params

    a, b = (float(value) for value in find_ab_params(1.0, min_dist))
    model = UMAP(n_components=2, n_neighbors=neighbors, a=a, b=b, random_state=seed, output_type="numpy")
    places = model.fit_transform(np.ascontiguousarray(scores_MP, np.float32))
    return np.ascontiguousarray(places, np.float32), a, b
