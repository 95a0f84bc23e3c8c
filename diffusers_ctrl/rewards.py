"""Rewards: functions (images, labels) -> log-likelihood in nats. Attributes that are independent given the image add
(`Classifier.log_prob` sums those that a label gives)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .classifiers import Classifier


Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def classifier_reward(classifier: Classifier) -> Reward:
    """log p̂(y | x) of a calibrated classifier: images (B, C, H, W) in [0, 1], labels (B, A) -> (B,) nats."""
    classifier.eval().requires_grad_(False)
    return classifier.log_prob
