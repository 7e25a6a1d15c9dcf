"""FAISS index over all embeddings of one encoder, and the search for look-alikes."""
