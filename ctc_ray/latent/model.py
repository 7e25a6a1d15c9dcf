"""A fitted latent map: PCA, plane and clusters, its files, and how any cell is placed on it. Runs without Ray."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctc_ray.errors import MissingInputError, SchemaError
from ctc_ray.latent.cluster import Clusters
from ctc_ray.latent.placement import NUM_EPOCHS
from ctc_ray.latent.reduce import Float32, PrincipalComponents, UmapPlane
from ctc_ray.records import digest_of
from ctc_ray.schema import latent_schema
from ctc_ray.storage import Store

PCA_FILE = "models/pca.safetensors"
UMAP_FILE = "models/umap.npz"
CLUSTERS_FILE = "models/clusters.npz"
SUMMARY_FILE = "map.json"


@dataclass(frozen=True)
class LatentMap:
    """Everything that places a cell.

    Attributes:
        pca: embeddings to scores.
        plane: scores to places.
        clusters: places to clusters.
        plane_ids: (M,) ids of the cells that UMAP was fitted on: they keep their fitted place.
        cluster_ids: (L,) ids of the cells that HDBSCAN was fitted on: they keep their cluster.
        seed: of the placement.
        summary: what was asked and what was used, for `map.json`.
    """

    pca: PrincipalComponents
    plane: UmapPlane
    clusters: Clusters
    plane_ids: npt.NDArray[np.str_]
    cluster_ids: npt.NDArray[np.str_]
    seed: int = 42
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def pca_dim(self) -> int:
        """Principal components kept."""
        return len(self.pca.components)

    def locate(
        self, cell_ids: list[str], vectors_ND: npt.NDArray[np.floating]
    ) -> tuple[Float32, Float32, npt.NDArray[np.int16]]:
        """Place cells.

        Args:
            cell_ids: N ids; cells of the fit sets keep their fitted place and cluster.
            vectors_ND: (N, D) their embeddings.

        Returns:
            PCA scores (N, P), places (N, 2), clusters (N,).
        """
        scores = self.pca.transform(vectors_ND)
        places = np.empty((len(scores), 2), np.float32)
        fitted = {str(name): index for index, name in enumerate(self.plane_ids)}
        known = np.array([fitted.get(name, -1) for name in cell_ids], np.int64)
        places[known >= 0] = self.plane.points[known[known >= 0]]
        places[known < 0] = self.plane.place(scores[known < 0], seed=self.seed)
        labels = self.clusters.assign(places)
        clustered = {str(name): index for index, name in enumerate(self.cluster_ids)}
        own = np.array([clustered.get(name, -1) for name in cell_ids], np.int64)
        labels[own >= 0] = self.clusters.labels[own[own >= 0]]
        return scores, places, labels

    def table(self, cell_ids: list[str], patient: str, vectors_ND: npt.NDArray[np.floating]) -> pa.Table:
        """`locate` as a table of `latent_schema`."""
        scores, places, labels = self.locate(cell_ids, vectors_ND)
        pca = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), self.pca_dim)
        columns = [
            pa.array(cell_ids, pa.string()),
            pa.array([patient] * len(cell_ids), pa.string()),
            pca,
            pa.array(places[:, 0]),
            pa.array(places[:, 1]),
            pa.array(labels),
        ]
        return pa.Table.from_arrays(columns, schema=latent_schema(self.pca_dim))

    def files(self) -> dict[str, bytes]:
        """Files of the map by name, no pickle in any; the summary holds the digest of the others as `models`."""
        from safetensors.numpy import save

        pca = {"mean": self.pca.mean, "components": self.pca.components, "explained": self.pca.explained}
        models = {
            PCA_FILE: save({name: np.ascontiguousarray(value) for name, value in pca.items()}),
            UMAP_FILE: _npz(
                scores=self.plane.scores,
                points=self.plane.points,
                kernel=np.array([self.plane.a, self.plane.b]),
                num_neighbors=np.array(self.plane.num_neighbors),
                placing_epochs=np.array(self.plane.placing_epochs),
                backend=np.array(self.plane.backend),
                cell_id=self.plane_ids.astype("S"),
                seed=np.array(self.seed),
            ),
            CLUSTERS_FILE: _npz(
                points=self.clusters.points,
                labels=self.clusters.labels,
                sizes=np.array([self.clusters.min_cluster_size, self.clusters.min_samples]),
                cell_id=self.cluster_ids.astype("S"),
            ),
        }
        summary = {**self.summary, "models": self.digest()}
        return {
            **models,
            SUMMARY_FILE: json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n",
        }

    def digest(self) -> str:
        """Digest of everything that placing depends on; independent of file formats."""
        parts = [
            *(self.pca.mean, self.pca.components),
            *(self.plane.scores, self.plane.points, np.array([self.plane.a, self.plane.b, self.plane.num_neighbors])),
            *(self.clusters.points, self.clusters.labels, np.array(self.seed)),
            *(self.plane_ids.astype("S"), self.cluster_ids.astype("S")),
        ]
        if self.plane.placing_epochs != NUM_EPOCHS:  # maps older than this setting keep their digest
            parts.append(np.array(self.plane.placing_epochs))
        return digest_of(b"".join(np.ascontiguousarray(part).tobytes() + str(part.shape).encode() for part in parts))


def _npz(**arrays: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _arrays(store: Store, path: str) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(io.BytesIO(store.read_bytes(path)), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ValueError as error:
        raise SchemaError(
            f"{store.describe(path)} is not a model of ctc_ray: {error}. Run `ctc-ray map` with --force"
        ) from error


def load_pca(store: Store, folder: str) -> PrincipalComponents:
    """Load the PCA of a map from its folder.

    Raises:
        MissingInputError: there is no map.
        SchemaError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = f"{folder}/{PCA_FILE}"
    try:
        arrays = load(store.read_bytes(path))
        return PrincipalComponents(arrays["mean"], arrays["components"], arrays["explained"])
    except (SafetensorError, KeyError) as error:
        raise SchemaError(
            f"{store.describe(path)} is not a model of ctc_ray: {error}. Run `ctc-ray map` with --force"
        ) from error


def load_map(store: Store, folder: str) -> LatentMap:
    """Load a map from its folder; raises as `load_pca`."""
    if not store.exists(f"{folder}/{SUMMARY_FILE}"):
        raise MissingInputError(f"{store.describe(folder)} holds no latent map: run `ctc-ray map` first")
    umap, clusters = _arrays(store, f"{folder}/{UMAP_FILE}"), _arrays(store, f"{folder}/{CLUSTERS_FILE}")
    a, b = (float(value) for value in umap["kernel"])
    cluster_size, samples = (int(value) for value in clusters["sizes"])
    return LatentMap(
        pca=load_pca(store, folder),
        plane=UmapPlane(
            umap["scores"],
            umap["points"],
            a,
            b,
            int(umap["num_neighbors"]),
            int(umap.get("placing_epochs", NUM_EPOCHS)),
            str(umap.get("backend", "cpu")),
        ),
        clusters=Clusters(clusters["points"], clusters["labels"], cluster_size, samples),
        plane_ids=umap["cell_id"].astype("U"),
        cluster_ids=clusters["cell_id"].astype("U"),
        seed=int(umap["seed"]),
        summary=store.read_json(f"{folder}/{SUMMARY_FILE}"),
    )
