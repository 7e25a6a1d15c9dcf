"""Pretraining: the encoder, DINO and its views, training on Ray Train, import of published weights."""
