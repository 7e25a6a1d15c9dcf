"""The latent map: PCA, UMAP and HDBSCAN, fitted once, saved as arrays and applied to every patient."""
