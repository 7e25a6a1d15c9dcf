"""From fields to cells and their vectors in one streaming plan: segmentation and embedding side by side."""
