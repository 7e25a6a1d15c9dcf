"""Bringing single-cell images in that another program cut out: tables of image files, npz arrays, Parquet."""
