"""Rewards: functions (images, labels) -> log-likelihood in nats. Attributes that are independent given the image add
(`Classifier.log_prob` sums those that a label gives)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch

from .classifiers import Classifier
from .labels import LabelSpace


Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def classifier_reward(classifier: Classifier) -> Reward:
    """log p̂(y | x) of a calibrated classifier: images (B, C, H, W) in [0, 1], labels (B, A) -> (B,) nats."""
    classifier.eval().requires_grad_(False)
    return classifier.log_prob


def attribute_rewards(rewards: Mapping[str, Reward], space: LabelSpace) -> Reward:
    """The sum over a label space's attributes of each one's own reward, for attributes that are independent given the image.

    Any function of images and labels will do, a classifier's or a measurement's. The one of an attribute is called with the rows where
    that attribute is given, images (b, C, H, W) and their own column of labels (b, 1), and returns (b,) nats. A row where it is not given
    gets exactly 0 from it, and no gradient.

    If one of the rewards has no gradient, so has the sum: an objective that needs it must not take a part of it for the whole. A NaN
    stays in the sum, where training finds it (`checked`) and evaluation refuses it (`Environment.score`); a warning names the attribute.

    Raises:
        ValueError: if `rewards` and the space do not have the same attributes; when called, for labels or rewards of the wrong shape.
    """
    if set(rewards) != set(space.attributes):
        raise ValueError(f"Each attribute needs one reward: got {sorted(rewards)} for {sorted(space.attributes)}.")
    columns = [(name, rewards[name]) for name in space.attributes]

    def reward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.shape != (len(images), len(columns)):
            raise ValueError(f"labels must be ({len(images)}, {len(columns)}), got {tuple(labels.shape)}.")
        # an empty sum: zero, and part of the images' graph even if no row has a label
        total = images.flatten(1)[:, :0].sum(dim=1, dtype=torch.promote_types(images.dtype, torch.float32))
        differentiable = True
        for column, (name, own) in enumerate(columns):
            label = labels[:, column : column + 1].to(images.device)
            (rows,) = torch.nonzero(~label[:, 0].isnan(), as_tuple=True)
            if not len(rows):
                continue
            value = own(images[rows], label[rows])
            if value.shape != rows.shape:
                raise ValueError(f"The reward of attribute {name!r} must return ({len(rows)},), got {tuple(value.shape)}.")
            if value.isnan().any():  # the same words each time: they are shown once
                warnings.warn(f"The reward of attribute {name!r} is NaN for some images.", stacklevel=2)
            differentiable = differentiable and value.requires_grad
            total = total.index_add(0, rows, value.to(total))
        return total if differentiable else total.detach()

    return reward
