"""Settings of pretraining runs that take seconds."""

from __future__ import annotations

SMALL = [
    "pretrain.architecture=test_resnet",  # timm's smallest backbone with batch statistics
    "pretrain.init=random",
    "pretrain.image_size_px=32",
    "pretrain.local_size_px=16",
    "pretrain.num_local_views=1",
    "pretrain.batch_size=4",
    "pretrain.prototypes=32",
    "pretrain.head_hidden=16",
    "pretrain.head_bottleneck=8",
    "pretrain.precision=fp32",
    "pretrain.checkpoint_every=2",
]
