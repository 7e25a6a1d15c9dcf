"""Load the encoder of a cohort inside a worker."""

from __future__ import annotations

from ctc_ray.cohort import Cohort
from ctc_ray.config import EmbedConfig
from ctc_ray.embed.embedder import DEFAULT_NAME, Embedder
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, DESCRIPTION_FILE, WEIGHTS_FILE, read_folder
from ctc_ray.pretrain.precision import default_device
from ctc_ray.storage import Store


def load_embedder(store: Store, section: EmbedConfig, precision: str) -> Embedder:
    """Load the encoder that a section names: the one of the package, or of the cohort.

    Args:
        store: of the cohort.
        section: settings.
        precision: resolved.

    Raises:
        MissingInputError: the cohort has no such encoder.
        WeightsError: it is damaged.
    """
    if section.encoder == DEFAULT_NAME:
        (weights, description), where = read_folder(DEFAULT_FOLDER), str(DEFAULT_FOLDER)
    else:
        folder = Cohort(store).encoder(section.encoder)
        where = store.describe(folder)
        weights = store.read_bytes(f"{folder}/{WEIGHTS_FILE}")
        description = store.read_bytes(f"{folder}/{DESCRIPTION_FILE}")
    return Embedder.from_files(
        weights,
        description,
        where,
        precision=precision,
        intensity=None if section.intensity == "encoder" else section.intensity,
        device=default_device(section.use_gpu),
        batch_size=section.batch_size,
    )
