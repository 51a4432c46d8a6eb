"""A tiny random checkpoint of GenEval's detector.

It has the classes, file names and configuration fields of
facebook/mask2former-swin-small-coco-instance.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from tafs.rewards import detector

LABELS = [  # as spelled on the hub, partly like Pascal VOC
    {name: label for label, name in detector.SPELLINGS.items()}.get(name, name)
    for name in detector.CLASSES
]


def mask2former(folder: Path, seed: int = 0) -> Path:
    """A Mask2Former of COCO's 80 classes and 100 queries."""
    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=224,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=100,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # confident predictions, and most queries find nothing: about ten objects
        model.class_predictor.weight.normal_(std=3.0)
        model.class_predictor.bias[-1] = 40.0
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder
