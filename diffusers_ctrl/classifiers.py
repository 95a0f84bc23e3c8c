"""A calibrated classifier p̂(y | x) of finished images: fit, temperature, log-probabilities.

Calibration is not cosmetic here: the tuned model samples from p_pre(x) p̂(y | x)^gamma, so an over-confident p̂ is a wrong target,
and its steep log p̂ is a hard one. Temperature scaling: Guo et al., arXiv 1706.04599.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from tqdm.auto import tqdm

from .labels import Categorical, LabelSpace


class _Residual(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        groups = min(8, width_in)
        self.norm1, self.conv1 = nn.GroupNorm(groups, width_in), nn.Conv2d(width_in, width_out, 3, stride=2, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width_out), nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return hidden + self.skip(F.avg_pool2d(x, 2, ceil_mode=True))


class _Network(nn.Module):
    """One residual CNN: prepared images (B, C, S, S) in [-1, 1] -> raw logits, one tensor (B, classes) an attribute."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], classes: list[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(_Residual(a, b) for a, b in zip(widths, (*widths[1:], widths[-1]), strict=True))
        # mean and mean square of each channel: global quantities such as the amount of ink survive the pooling exactly
        self.heads = nn.ModuleList(nn.Linear(2 * widths[-1], n) for n in classes)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.stem(images)
        for stage in self.stages:
            hidden = stage(hidden)
        hidden = F.silu(hidden)
        pooled = torch.cat([hidden.mean(dim=(2, 3)), hidden.square().mean(dim=(2, 3)).add(1e-6).sqrt()], dim=1)
        return [head(pooled) for head in self.heads]


class Classifier(ModelMixin, ConfigMixin):
    """Small residual CNNs whose probabilities are averaged, one softmax head a categorical attribute, each with its temperature.

    Args:
        label_space: `LabelSpace.to_dict()`; every attribute must be categorical.
        image_size: images are resized to this before the first layer.
        widths: channels of the stages, each of which halves the resolution.
        members: how many networks; each is fitted on its own share of the data (`fit_classifier`).
        temperatures: one an attribute, set by `fit_classifier` or `calibrate`.
    """

    @register_to_config
    def __init__(
        self,
        label_space: dict[str, Any],
        image_size: int = 32,
        in_channels: int = 3,
        widths: tuple[int, ...] = (16, 32, 48),
        members: int = 1,
        temperatures: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.label_space = LabelSpace.from_dict(label_space)
        for name, attribute in self.label_space.attributes.items():
            if not isinstance(attribute, Categorical):
                raise ValueError(f"Classifier handles categorical attributes only; {name!r} is {type(attribute).__name__}.")
        if members < 1:
            raise ValueError(f"members must be at least 1, got {members}.")
        if not 1 <= image_size <= 4096:
            raise ValueError(f"image_size must be from 1 to 4096, got {image_size}.")
        if temperatures is None:
            self.register_to_config(temperatures=(1.0,) * len(self.label_space))
        elif len(temperatures) != len(self.label_space) or not all(1e-6 < t < 1e6 for t in temperatures):
            raise ValueError(
                f"temperatures must be {len(self.label_space)} positive numbers, one an attribute, got {temperatures}."
            )
        classes = [len(a.names) for a in self.label_space.attributes.values()]
        self.networks = nn.ModuleList(_Network(in_channels, tuple(widths), classes) for _ in range(members))

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images in [0, 1] as the networks take them: resized, in [-1, 1]."""
        size, dtype = self.config.image_size, self.networks[0].stem.weight.dtype
        images = images.to(dtype)
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        return images * 2 - 1

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) images in [0, 1] -> raw logits, one tensor (members, B, classes) an attribute, before temperature."""
        prepared = self.prepare(images)
        return [torch.stack(logits) for logits in zip(*(member(prepared) for member in self.networks), strict=True)]

    def log_probs(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Calibrated log p̂ of every class: one (B, classes) tensor an attribute, nats."""
        return [_log_mean_softmax(z, t) for z, t in zip(self(images), self.config.temperatures, strict=True)]

    def log_prob(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """log p̂(y | x), (B,) nats: summed over the attributes that are given (conditionally independent given x).

        images: (B, C, H, W) in [0, 1]. labels: (B, A), NaN where not given.
        """
        total = torch.zeros(len(images), dtype=self.networks[0].stem.weight.dtype, device=images.device)
        for column, log_probs in enumerate(self.log_probs(images)):
            label = labels[:, column].to(images.device)
            given = ~label.isnan()
            chosen = log_probs.gather(1, label.nan_to_num(0.0).long().unsqueeze(1)).squeeze(1)
            total = total + torch.where(given, chosen, torch.zeros_like(chosen))
        return total


@dataclass(frozen=True)
class CalibrationReport:
    """Accuracy, negative log-likelihood (nats) and expected calibration error on held-out data, before and after temperature.

    Of cross-fitted members these are the figures of single members, each on its own held-out part; their mean is a little better,
    and a little less confident than the temperature makes a member.
    """

    accuracy: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    temperature: float
    num_train: int
    num_validation: int
    epochs: int

    def lines(self) -> str:
        return (
            f"classifier: accuracy {self.accuracy:.3f} on {self.num_validation} held-out labels ({self.num_train} for training, "
            f"{self.epochs} epochs); NLL {self.nll_before:.3f} -> {self.nll_after:.3f} nats, ECE {self.ece_before:.3f} -> "
            f"{self.ece_after:.3f} at temperature {self.temperature:.2f}"
        )


def expected_calibration_error(log_probs: torch.Tensor, labels: torch.Tensor, bins: int = 10) -> float:
    """Mean |confidence − accuracy| over equal-width confidence bins, weighted by their size."""
    confidence, predicted = log_probs.exp().max(dim=1)
    correct = (predicted == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            gap = confidence[inside].double().mean() - correct[inside].mean()
            error += inside.double().mean().item() * abs(gap.item())
    return error


def _log_mean_softmax(logits: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """log of the members' mean probability: (members, B, classes) logits -> (B, classes) nats."""
    return (logits / temperature).log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that minimises the NLL of `labels` (B,) under the members' mean softmax(logits / T).

    logits: (members, B, classes), or (B, classes) for one.
    """
    logits = (logits if logits.ndim == 3 else logits.unsqueeze(0)).double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], lr=0.1, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(_log_mean_softmax(logits, log_t.exp()), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().clamp(-3, 3).exp())


def _shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random shifts of up to 1/16 of the width, the border repeated: an augmentation that no attribute of a picture minds much."""
    reach = max(1, images.shape[-1] // 16)
    dx, dy = (torch.randint(-reach, reach + 1, (1,), generator=generator).item() for _ in range(2))
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return padded[..., reach + dy : reach + dy + images.shape[-2], reach + dx : reach + dx + images.shape[-1]]


def fit_classifier(
    classifier: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    validation_fraction: float = 0.2,
    max_epochs: int = 120,
    patience: int = 20,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """Cross-entropy with early stopping on held-out data, then one temperature an attribute on the held-out predictions.

    One network holds out `validation_fraction`. Several are cross-fitted: member m learns without the m-th part of the data and
    stops early on it, so that every label serves the calibration with a prediction of a network that was not fitted to it. That
    temperature is far steadier than one of a single split, which a split where all is right drives to zero.

    Args:
        images: (N, C, H, W) in [0, 1], as the reward will see them (decoded). labels: (N, A) class indices, NaN where unknown.

    Raises:
        ValueError: if a training split lacks one of an attribute's classes.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    count = len(classifier.networks)
    held_out = max(1, int(round(validation_fraction * len(images))))
    parts = [order[:held_out]] if count == 1 else list(order.tensor_split(count))
    device = next(classifier.parameters()).device
    bar = tqdm(total=count * max_epochs, desc="classifier", unit="epoch", disable=not progress)
    logits, epochs = [], 0
    for network, validation in zip(classifier.networks, parts, strict=True):
        train = order[~torch.isin(order, validation)]
        _check_classes(classifier.label_space, labels[train])
        options = {"max_epochs": max_epochs, "patience": patience, "batch_size": batch_size, "bar": bar}
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        epochs += _fit_network(classifier, network, optimizer, images, labels, train, validation, generator, **options)
        with torch.no_grad():
            chunks = [network(classifier.prepare(images[rows].to(device))) for rows in validation.split(256)]
        logits.append([torch.cat(chunk).cpu() for chunk in zip(*chunks, strict=True)])
    bar.close()
    classifier.eval().requires_grad_(False)
    seen = torch.cat(parts)
    held = [torch.cat(chunk).unsqueeze(0) for chunk in zip(*logits, strict=True)]
    num_train = len(images) - len(parts[0])
    return _set_temperatures(classifier, held, labels[seen], num_train=num_train, epochs=round(epochs / count))


def _check_classes(space: LabelSpace, labels: torch.Tensor) -> None:
    for column, (name, attribute) in enumerate(space.attributes.items()):
        present = set(labels[:, column][~labels[:, column].isnan()].long().tolist())
        missing = [n for i, n in enumerate(attribute.names) if i not in present]
        if missing:
            raise ValueError(f"No training image has label {missing[0]!r} of attribute {name!r}: the classifier cannot learn it.")


def _fit_network(
    classifier: Classifier,
    network: _Network,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    train: torch.Tensor,
    validation: torch.Tensor,
    generator: torch.Generator,
    *,
    max_epochs: int,
    patience: int,
    batch_size: int,
    bar: tqdm,
) -> int:
    """Trains one member and leaves it as it was at its best on `validation`; returns the epochs it took."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_epochs)
    device = next(network.parameters()).device

    def loss_of(rows: torch.Tensor, augment: bool) -> torch.Tensor:
        batch = images[rows].to(device)
        batch = _shift(batch, generator) if augment else batch
        total = torch.zeros((), device=device)
        for column, logits in enumerate(network(classifier.prepare(batch))):
            label = labels[rows, column].to(device)
            given = ~label.isnan()
            if given.any():
                total = total + F.cross_entropy(logits[given], label[given].long())
        return total

    best, best_state, best_epoch, epochs = float("inf"), None, 0, 0
    for epoch in range(max_epochs):
        network.train()
        for rows in train[torch.randperm(len(train), generator=generator)].split(batch_size):
            loss = loss_of(rows, augment=True)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        network.eval()
        with torch.no_grad():
            held = sum(loss_of(rows, augment=False).item() * len(rows) for rows in validation.split(256)) / len(validation)
        bar.set_postfix(validation_nll=f"{held:.3f}", best=f"{min(best, held):.3f}", refresh=False)
        bar.update()
        epochs = epoch + 1
        if held < best:
            best, best_epoch = held, epoch
            best_state = {key: value.detach().clone() for key, value in network.state_dict().items()}
        elif epoch - best_epoch >= patience:
            break
    bar.update(max_epochs - epochs)
    network.load_state_dict(best_state)
    return epochs


@torch.no_grad()
def calibrate(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> CalibrationReport:
    """Sets the temperatures from data that no member has seen, and reports accuracy, NLL and ECE averaged over the attributes."""
    device = next(classifier.parameters()).device
    chunks = [classifier(chunk.to(device)) for chunk in images.split(256)]
    logits = [torch.cat(chunk, dim=1).cpu() for chunk in zip(*chunks, strict=True)]
    return _set_temperatures(classifier, logits, labels, num_train=0, epochs=0)


def _set_temperatures(
    classifier: Classifier, logits: list[torch.Tensor], labels: torch.Tensor, *, num_train: int, epochs: int
) -> CalibrationReport:
    """logits: (members, N, classes) an attribute, of data that was held out."""
    rows, temperatures = [], []
    for column, z in enumerate(logits):
        given = ~labels[:, column].isnan()
        z, label = z[:, given].double(), labels[given, column].long()
        with torch.enable_grad():
            temperature = fit_temperature(z, label)
        temperatures.append(temperature)
        before, after = _log_mean_softmax(z, 1.0), _log_mean_softmax(z, temperature)
        rows.append(
            (
                (after.argmax(1) == label).double().mean().item(),
                F.nll_loss(before, label).item(),
                F.nll_loss(after, label).item(),
                expected_calibration_error(before, label),
                expected_calibration_error(after, label),
                temperature,
            )
        )
    classifier.register_to_config(temperatures=tuple(temperatures))
    means = [sum(values) / len(values) for values in zip(*rows, strict=True)]
    return CalibrationReport(*means, num_train=num_train, num_validation=len(labels), epochs=epochs)
