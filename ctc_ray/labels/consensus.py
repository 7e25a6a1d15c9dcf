"""One rule from label events to labels.

1. An event that a later event undoes does not count. An undo that is itself undone has no effect (redo). A reader can undo
   only events of their own.
2. Of one reader's remaining answers about one cell, the latest counts (equal times: the larger event id).
3. The label with the most readers wins; where the highest count is shared, the label is `unsure`. `unsure` and `artefact`
   are answers like the others.

For classification `ctc` is 1, `non_ctc` and `artefact` are 0, and cells labelled `unsure` are left out.
"""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.errors import LabelError
from ctc_ray.labels.events import read_events
from ctc_ray.records import digest_of

CLASS_OF_LABEL = {"ctc": 1, "non_ctc": 0, "artefact": 0}
"""Label -> class; `unsure` has none."""
_CONSENSUS_TYPES = {
    "cell_id": pl.String,
    "patient": pl.String,
    "label": pl.String,
    "num_readers": pl.Int64,
    "agreement": pl.Float64,
}


def active_events(events: pl.DataFrame) -> pl.DataFrame:
    """Answers that count: not undone, one a reader and cell.

    Args:
        events: columns of `LABELS_SCHEMA`.

    Returns:
        The same columns, sorted by cell and reader.

    Raises:
        LabelError: an event undoes one that is not there, is of another reader, or is not older.
    """
    ordered = events.sort("at", "event_id")
    undone = _undone(ordered.select("event_id", "reader", "undoes"))
    return (
        ordered.filter(~pl.col("event_id").is_in(list(undone)) & pl.col("label").is_not_null())
        .group_by("cell_id", "reader", maintain_order=True)
        .last()
        .select(events.columns)
        .sort("cell_id", "reader")
    )


def _undone(ordered: pl.DataFrame) -> set[str]:
    """Ids that no longer count; events come oldest first, so that walking back meets every undo before its target."""
    position = {name: index for index, name in enumerate(ordered["event_id"])}
    readers = ordered["reader"].to_list()
    undone: set[str] = set()
    rows = list(ordered.select("event_id", "undoes").iter_rows())
    for index in range(len(rows) - 1, -1, -1):
        name, target = rows[index]
        if target is None:
            continue
        where = position.get(target)
        if where is None:
            raise LabelError(f"event {name} undoes {target}, which no batch holds: restore the batch that held it")
        if readers[where] != readers[index]:
            raise LabelError(
                f"event {name} of {readers[index]} undoes {target} of {readers[where]}: readers undo only their own answers"
            )
        if where >= index:
            raise LabelError(f"event {name} undoes {target}, which is not older: check the clocks of the batches")
        if name not in undone:
            undone.add(target)
    return undone


def consensus(events: pl.DataFrame) -> pl.DataFrame:
    """Turn events into one label a cell, by the rule at the top of this module.

    Args:
        events: columns of `LABELS_SCHEMA`.

    Returns:
        Columns cell_id, patient, label, num_readers (readers with an answer that counts), agreement (share of them that gave
        the most frequent answer); sorted by cell_id.

    Raises:
        LabelError: as `active_events`; or one cell id with two patients.
    """
    answers = active_events(events)
    if answers.is_empty():
        return pl.DataFrame(schema=_CONSENSUS_TYPES)
    mixed = answers.group_by("cell_id").agg(pl.col("patient").n_unique()).filter(pl.col("patient") > 1)
    if mixed.height:
        raise LabelError(
            f"cell {mixed['cell_id'][0]} is labelled under two patients: one of the batches is of another cohort"
        )
    votes = answers.group_by("cell_id", "patient", "label").agg(votes=pl.len())
    return (
        votes.group_by("cell_id", "patient")
        .agg(
            num_readers=pl.col("votes").sum(),
            most=pl.col("votes").max(),
            winners=(pl.col("votes") == pl.col("votes").max()).sum(),
            first=pl.col("label").sort_by("votes", "label", descending=[True, False]).first(),
        )
        .select(
            "cell_id",
            "patient",
            label=pl.when(pl.col("winners") > 1).then(pl.lit("unsure")).otherwise(pl.col("first")),
            num_readers=pl.col("num_readers").cast(pl.Int64),
            agreement=pl.col("most") / pl.col("num_readers"),
        )
        .sort("cell_id")
    )


def read_labels(cohort: Cohort, patients: Collection[str] | None = None) -> pl.DataFrame:
    """Consensus labels of a cohort, of all or of some patients; columns as `consensus`."""
    labels = consensus(read_events(cohort))
    return labels if patients is None else labels.filter(pl.col("patient").is_in(list(patients)))


def with_class(labels: pl.DataFrame) -> pl.DataFrame:
    """Add `is_ctc` (0 or 1) and leave out cells without a class (`unsure`)."""
    return labels.filter(pl.col("label").is_in(list(CLASS_OF_LABEL))).with_columns(
        is_ctc=pl.col("label").replace_strict(CLASS_OF_LABEL, return_dtype=pl.Int8)
    )


def digest_labels(labels: pl.DataFrame) -> str:
    """Digest of cell ids and their labels, independent of row order."""
    return digest_of([list(row) for row in labels.select("cell_id", "label").sort("cell_id", "label").iter_rows()])


def labels_digest(cohort: Cohort, patients: Collection[str] | None = None) -> str:
    """Digest of the consensus labels of a cohort, of all or of some patients."""
    return digest_labels(read_labels(cohort, patients))


def one_per_physical_cell(cohort: Cohort, labels: pl.DataFrame) -> pl.DataFrame:
    """Keep one labelled detection of each physical cell.

    Args:
        cohort: its duplicates and cells tables are read, two columns each.
        labels: columns cell_id, patient and any others.

    Returns:
        The same columns and `physical_id`, sorted by cell_id. The detection with the highest StarDist probability stays
        (equal: the smaller cell_id), so that a cell on a field border does not count twice.

    Raises:
        MissingInputError: a labelled patient is not segmented.
        LabelError: a labelled cell is in no cells table of its patient.
    """
    frames = []
    for (patient,), group in labels.group_by("patient"):
        name = str(patient)
        cohort.require(cohort.cells(name), "segment")
        cells = pl.DataFrame(pl.from_arrow(cohort.read_columns(cohort.cells(name), ["cell_id", "prob"])))
        joined = group.join(cells, on="cell_id", how="left")
        lost = joined.filter(pl.col("prob").is_null())
        if lost.height:
            raise LabelError(
                f"patient {name}: {lost.height} labelled cells, the first {lost['cell_id'][0]}, are not in its cells: it was "
                f"segmented anew since. Run `ctc-ray labels relink {cohort.store.uri}`"
            )
        joined = joined.join(cohort.physical_ids(name), on="cell_id", how="left")
        frames.append(joined.with_columns(pl.coalesce("physical_id", "cell_id").alias("physical_id")))
    if not frames:
        return labels.with_columns(physical_id=pl.col("cell_id"))
    return (
        pl.concat(frames)
        .sort(["prob", "cell_id"], descending=[True, False])
        .unique(["patient", "physical_id"], keep="first", maintain_order=True)
        .drop("prob")
        .sort("cell_id")
    )
