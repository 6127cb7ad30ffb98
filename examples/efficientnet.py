"""EfficientNet as transformers 5.23 builds it from its configuration: dead before its first step."""

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification


def build():
    model = EfficientNetForImageClassification(EfficientNetConfig(num_labels=10, image_size=64))
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    return model, lambda m: m(images, labels=labels).loss
