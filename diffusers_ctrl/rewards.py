"""Rewards: functions (images, labels) -> log-likelihood in nats. Conditionally independent attributes add."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .classifiers import Classifier


Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def classifier_reward(classifier: Classifier) -> Reward:
    """log p̂(y | x) of a calibrated classifier: images (B, C, H, W) in [0, 1], labels (B, A) -> (B,) nats."""
    classifier.eval().requires_grad_(False)
    return classifier.log_prob


def sum_of_rewards(rewards: Sequence[Reward], columns: Sequence[Sequence[int]]) -> Reward:
    """Adds rewards for attributes that are independent given the image; reward i reads label columns `columns[i]`."""

    def reward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sum(part(images, labels[:, list(which)]) for part, which in zip(rewards, columns, strict=True))

    return reward
