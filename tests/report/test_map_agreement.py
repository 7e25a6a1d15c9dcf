"""The figure of two maps: read from what the map stage wrote, drawn with matched clusters in one colour."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.config import MapConfig, RunConfig
from ctc_ray.latent.comparison import compare_with_other
from ctc_ray.records import Record, publish, read_record
from ctc_ray.report.agreement import agreement_identity, map_agreement, map_panel, read_agreement
from ctc_ray.report.figures import cluster_colour

CONFIG = RunConfig(map=MapConfig(compare_with="pool"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, mixture: ModuleType) -> Cohort:
    """A map, and a second on the same plane whose clusters 0 and 1 have changed names and whose cluster 2 is background."""
    made = mixture.build_cohort(tmp_path_factory.mktemp("compared"), num_cells=40)
    mixture.write_map(made.cohort, made.kinds)
    store = made.cohort.store
    publish(store, "latent/dino/pool", {}, Record("map", "pool", "2", {}, {}))
    for patient in made.cohort.patient_ids():
        tables: dict[str, bytes | pa.Buffer | pa.Table] = {}
        for path in made.cohort.shards(f"latent/dino/map/cells/{patient}"):
            table = store.read_table(path)
            renamed = np.array([1, 0, -1, -1], np.int16)[table["cluster"].to_numpy()]
            place = table.schema.get_field_index("cluster")
            tables[path.rsplit("/", 1)[-1]] = table.set_column(place, "cluster", pa.array(renamed))
        publish(store, f"latent/dino/pool/cells/{patient}", tables, Record("map", patient, "2", {}, {}))
    compare_with_other(CONFIG.map, made.cohort)
    return made.cohort  # type: ignore[no-any-return]


def test_comparison_of_a_map_is_found_and_read(compared: Cohort) -> None:
    agreement = read_agreement(compared, RunConfig())
    assert agreement is not None
    assert agreement.summary["other"] == "pool"
    assert agreement.summary["adjusted_rand_of_clustered"] == 1.0
    assert agreement.shared["num_cells"].sum() == agreement.summary["num_cells"] == 240
    record = read_record(compared.store, "latent/dino/map/agreement/pool")
    assert record is not None
    assert agreement_identity(compared, CONFIG) == record.identity
    other = RunConfig(map=MapConfig(name="pool"))
    assert read_agreement(compared, other) is None
    assert agreement_identity(compared, other) == "none"


def test_section_holds_both_maps_and_the_cells_they_share(compared: Cohort) -> None:
    agreement = read_agreement(compared, CONFIG)
    assert agreement is not None
    section = map_agreement(agreement)
    assert section.html.count("<svg") == 2
    assert section.html.count('h0"') == len(set(agreement.cells["cluster"])) + len(
        set(agreement.cells["cluster_other"])
    )
    dots = section.html.count("h0M") + section.html.count('h0"')
    assert dots == 2 * agreement.cells.height
    assert section.html.count("<tr") == agreement.shared.height + 1


def test_matched_clusters_have_one_colour_and_others_are_black() -> None:
    values = {"umap_x_other": [0.0, 1.0, 2.0], "umap_y_other": [0.0, 0.0, 0.0], "cluster_other": [1, 0, 5]}
    picture = map_panel(pl.DataFrame(values), "_other", {1: 0, 0: 1}, "pool")
    order = [picture.index(colour) for colour in (cluster_colour(0), cluster_colour(1), "#000000")]
    assert order == sorted(order)


def test_damaged_comparison_counts_as_none(compared: Cohort) -> None:
    path = "latent/dino/map/agreement/pool/cells.parquet"
    data = compared.store.read_bytes(path)
    compared.store.delete(path)
    assert read_agreement(compared, CONFIG) is None
    compared.store.write_bytes(path, data)
    assert read_agreement(compared, CONFIG) is not None
