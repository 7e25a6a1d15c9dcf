"""Sections of words: how the numbers were made, and what the terms mean."""

from __future__ import annotations

from html import escape

import polars as pl

from ctc_ray.report.data import ReportData
from ctc_ray.report.markup import Section

GLOSSARY = {
    "AP@0.5": "Average precision of segmentation: true positives over the sum of true positives, false ones and misses, where an "
    "instance counts as found if it covers the true one with an intersection over union of at least 0.5.",
    "Area": "Mean height of the curve of test F1 over labels (or over the expert's minutes): how good a strategy is along the way.",
    "Background": "Cells of the latent map that belong to no cluster.",
    "Candidate": "A physical cell whose probability of being a CTC reaches the threshold; the expert reviews it.",
    "CD45": "Marker of leukocytes; absent on CTCs.",
    "CellSearch event": "An image that the CellSearch system shows its operator, because DAPI and CK lie close together.",
    "CK": "Cytokeratin, marker of epithelial and so of tumour cells.",
    "Cluster": "A dense region of the latent map. Quality is measured in each, to find where labels are needed.",
    "Consensus": "One label a cell from all readers: the latest answer of each reader counts, the majority wins, a tie is unsure.",
    "CTC": "Circulating tumour cell: round or oval, at least 4 µm, with DAPI and CK, without CD45.",
    "DAPI": "Stain of the nucleus.",
    "F1": "Harmonic mean of recall and precision of the class CTC; a dash where it is undefined.",
    "Latent map": "The encoder's view of each cell, brought to two dimensions; cells that look alike lie near each other.",
    "Loop": "One round of labelling: a strategy chooses cells, a reader labels them, the classifier is trained again.",
    "Physical cell": "What is really on the cartridge; adjacent fields can show one cell twice.",
    "PPV": "Positive predictive value: the share of what is shown to the expert that is a CTC.",
    "Roles": "Patients are kept apart: pretrain (encoder), train and validation (classifier), test (F1), final (candidates).",
    "Strategy": "How the next cells to label are chosen: random, or more from clusters with a low F1 (cluster-f1), or near the "
    "decision boundary (margin).",
}


def methods(data: ReportData) -> Section:
    """Settings in sentences, and versions of the libraries."""
    config = data.config
    sentences = [
        f"StarDist ({config.segment.weights or 'default weights'}, precision {config.segment.precision}) finds cells on the CK page; "
        f"each is cut out as 48 x 48 pixels in DAPI, CK and CD45 at {config.segment.pixel_size_um:g} µm a pixel.",
        f"The encoder {config.map.encoder} ({config.pretrain.architecture}, trained by DINO without labels, preset "
        f"{config.pretrain.preset}) turns every crop into a vector.",
        f"PCA keeps {config.map.pca_dim} components; UMAP ({config.map.umap_neighbors} neighbours, minimum distance "
        f"{config.map.umap_min_dist:g}, seed {config.map.umap_seed}) and HDBSCAN (smallest cluster {config.map.hdbscan_min_cluster_size}, "
        f"{config.map.hdbscan_min_samples} samples, {config.map.hdbscan_selection}) give the map and its clusters.",
        f"A support vector machine (radial kernel, C = {config.train.svm_c:g}, balanced classes) on the PCA scores, its probability "
        f"calibrated over {config.train.calibration_folds} folds, tells CTCs from the rest; duplicates of a physical cell count once.",
        f"The labelling simulation starts from {config.hil.initial} labels and adds {config.hil.per_loop} in each of "
        f"{config.hil.loops} loops ({config.hil.mode} mode, seeds {config.hil.seeds}).",
        f"Cells with a probability of at least {config.detect.threshold:g} are candidates. A candidate matches a CellSearch event of the "
        f"same field if their centres lie within {config.compare.tolerance_px:g} px in each axis and the cell's square of equivalent "
        f"diameter and the event's box overlap by more than {config.compare.min_overlap:g} of either; pairs are one to one.",
        _contrast(data),
    ]
    paragraph = f"<p>{escape(' '.join(s for s in sentences if s))}</p>"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(data.versions.items()))
    html = paragraph + f'<p class="note">Versions: {escape(versions)}.</p>'
    settings = escape(data.config.model_dump_json(indent=1))
    html += f"<details><summary>All settings</summary><pre>{settings}</pre></details>"
    return Section("methods", "Methods", html)


def _contrast(data: ReportData) -> str:
    if data.contrast.is_empty():
        return ""
    ranges = [
        f"{channel.upper()} {low} to {high}"
        for channel, low, high in data.contrast.select("channel", "low", "high").iter_rows()
    ]
    num_pixels = data.contrast.select(pl.col("num_pixels").max()).item()
    return f"Pictures of cells map these counts to black and white: {', '.join(ranges)} (from {num_pixels:,} pixels a channel)."


def glossary() -> Section:
    """What the terms mean."""
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in GLOSSARY.items())
    return Section("glossary", "Glossary", f'<dl class="glossary">{entries}</dl>')
