"""A calibrated p̂(y | x) of finished images: classes and numbers, fitted, calibrated on held-out data, differentiable.

Calibration is not cosmetic here: the tuned model samples from p_pre(x) p̂(y | x)^gamma, so an over-confident p̂ is a wrong target,
and its steep log p̂ is a hard one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from tqdm.auto import tqdm

from .calibration import CalibrationReport, calibrations, log_likelihood, log_mean_softmax
from .labels import Categorical, LabelSpace


Labelled = tuple[torch.Tensor, torch.Tensor]  # images (B, C, H, W) in [0, 1], labels (B, A)
MoreBatches = Callable[[torch.Tensor, int, int], Iterator[Labelled]]


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
    """One residual CNN: prepared images (B, C, S, S) in [-1, 1] -> raw outputs, one tensor (B, n) an attribute."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], outputs: list[int], coordinates: bool) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.stem = nn.Conv2d(in_channels + 2 * coordinates, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(_Residual(a, b) for a, b in zip(widths, (*widths[1:], widths[-1]), strict=True))
        # mean and mean square of each channel: global quantities such as the amount of ink survive the pooling exactly
        self.heads = nn.ModuleList(nn.Linear(2 * widths[-1], n) for n in outputs)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.stem(_with_coordinates(images) if self.coordinates else images)
        for stage in self.stages:
            hidden = stage(hidden)
        hidden = F.silu(hidden)
        pooled = torch.cat([hidden.mean(dim=(2, 3)), hidden.square().mean(dim=(2, 3)).add(1e-6).sqrt()], dim=1)
        return [head(pooled) for head in self.heads]


def _with_coordinates(images: torch.Tensor) -> torch.Tensor:
    """(B, C, S, S) -> (B, C + 2, S, S): each pixel's x and y in [-1, 1] beside it (CoordConv, arXiv 1807.03247)."""
    rows, columns = (torch.linspace(-1, 1, n, dtype=images.dtype, device=images.device) for n in images.shape[-2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([images, torch.stack([x, y]).expand(len(images), -1, -1, -1)], dim=1)


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, size, size), differentiable; the same tensor where it has this size."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


class Classifier(ModelMixin, ConfigMixin):
    """Small residual CNNs whose probabilities are averaged, with a calibrated head an attribute.

    A categorical attribute has a softmax, a continuous one a normal law whose mean and variance depend on the image; the members'
    probabilities, or densities, are averaged, so that where members disagree about a number the law is wide and not wrong.

    A density is not bounded by 1, and its log depends on the unit of y: in other units, every log p̂(y | x) is shifted by one constant.
    log Z and J shift by gamma times it together, so that the gap, and what is learned, do not depend on the unit.

    Args:
        label_space: `LabelSpace.to_dict()`.
        image_size: images are resized to this before the first layer.
        widths: channels of the stages, each of which halves the resolution.
        members: how many networks; each is fitted on its own share of the data (`fit_classifier`).
        temperatures: one an attribute, set by `fit_classifier` or `calibrate`: logits are divided by it, variances multiplied.
        coordinates: whether the networks see where a pixel is. Without it nothing before the pooling knows, and an attribute such as
            slant, a moment of the picture, is hard to learn.
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
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        self.label_space = LabelSpace.from_dict(label_space)
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
        outputs = [len(a.names) if isinstance(a, Categorical) else 2 for a in self.label_space.attributes.values()]
        self.networks = nn.ModuleList(_Network(in_channels, tuple(widths), outputs, coordinates) for _ in range(members))

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images in [0, 1] as the networks take them: resized, in [-1, 1]."""
        return resized(images.to(self.networks[0].stem.weight.dtype), self.config.image_size) * 2 - 1

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) images in [0, 1] -> raw outputs, one tensor (members, B, n) an attribute (see calibration.py)."""
        prepared = self.prepare(images)
        return [torch.stack(outputs) for outputs in zip(*(member(prepared) for member in self.networks), strict=True)]

    def log_probs(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Calibrated log p̂ of every class: one (B, classes) tensor an attribute, nats. All attributes must be categorical."""
        for name, attribute in self.label_space.attributes.items():
            if not isinstance(attribute, Categorical):
                raise ValueError(f"log_probs lists classes, and attribute {name!r} is a number: use log_prob(images, labels).")
        return [log_mean_softmax(z, t) for z, t in zip(self(images), self.config.temperatures, strict=True)]

    def log_prob(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """log p̂(y | x), (B,) nats: summed over the attributes that are given (conditionally independent given x).

        images: (B, C, H, W) in [0, 1]. labels: (B, A), NaN where not given. A continuous attribute contributes a log-density in its
        own unit.
        """
        total = torch.zeros(len(images), dtype=self.networks[0].stem.weight.dtype, device=images.device)
        attributes = self.label_space.attributes.values()
        for column, (attribute, outputs) in enumerate(zip(attributes, self(images), strict=True)):
            label = labels[:, column].to(images.device)
            given = ~label.isnan()
            chosen = log_likelihood(attribute, outputs, label.nan_to_num(0.0), self.config.temperatures[column])
            total = total + torch.where(given, chosen, torch.zeros_like(chosen))
        return total


def _shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random shifts of up to 1/16 of the width, the border repeated: an augmentation that no attribute of a picture minds much."""
    reach = max(1, images.shape[-1] // 16)
    dx, dy = (torch.randint(-reach, reach + 1, (1,), generator=generator).item() for _ in range(2))
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return padded[..., reach + dy : reach + dy + images.shape[-2], reach + dx : reach + dx + images.shape[-1]]


def epochs_for(labels: int, epochs: int = 80, enough: int = 600) -> dict[str, int]:
    """`fit_classifier`'s max_epochs and patience for so many labels: `epochs` where there are `enough`; with fewer as many optimizer steps.

    80 epochs of 600 labels fit a classifier of the digits. Of 100 labels they are 160 steps, and leave it at chance.
    """
    found = max(epochs, round(epochs * enough / labels))
    return {"max_epochs": found, "patience": max(1, found // 4)}


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
    noise: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    more: MoreBatches | None = None,
    epoch_batches: int = 150,
) -> CalibrationReport:
    """Maximum likelihood with early stopping on held-out data, then one temperature an attribute on the held-out predictions.

    One network holds out `validation_fraction`. Several are cross-fitted: member m learns without the m-th part of the data and
    stops early on it, so that every label serves the calibration with a prediction of a network that was not fitted to it. That
    temperature is far steadier than one of a single split, which a split where all is right drives to zero.

    Datasets with different attributes are concatenated, with NaN for what is not known: each part holds its share of the images that
    have the same attributes given, and an attribute's loss is averaged over the labels that it has.

    Args:
        images: (N, C, H, W) in [0, 1], as the reward will see them (decoded).
        labels: (N, A) class indices and numbers, NaN where unknown. Images without any label are left out.
        noise: standard deviation of the Gaussian noise that is added to the training images.
        more: where the images above are only the head of a larger dataset, the batches to learn from: more(held, batch_size, seed) gives
            endless (images, labels) without the images `held` (rows of `images`), which the member stops early and is calibrated on.
        epoch_batches: with `more`, how many batches are an epoch.

    Raises:
        ValueError: for labels of another shape, that are no class or outside the interval; if a training split lacks one of an
            attribute's classes, or a held-out part an attribute.
    """
    _check_labels(classifier.label_space, images, labels)
    generator = torch.Generator().manual_seed(seed)
    count = len(classifier.networks)
    order, parts = _split(labels, count, validation_fraction, generator)
    for validation in parts:
        _check_split(classifier.label_space, labels[order[~torch.isin(order, validation)]], labels[validation])
    device = next(classifier.parameters()).device
    bar = tqdm(total=count * max_epochs, desc="classifier", unit="epoch", disable=not progress)
    held, epochs = [], 0
    for member, (network, validation) in enumerate(zip(classifier.networks, parts, strict=True)):
        if more is None:
            batches = _epochs(images, labels, order[~torch.isin(order, validation)], batch_size, generator)
        else:
            batches = _checked_epochs(classifier.label_space, more(validation, batch_size, seed + 1 + member), epoch_batches)
        options = {"max_epochs": max_epochs, "patience": patience, "noise": noise, "bar": bar}
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        epochs += _fit_network(classifier, network, optimizer, batches, images, labels, validation, generator, **options)
        held.append(_outputs(lambda chunk, network=network: network(classifier.prepare(chunk.to(device))), images, validation))
    bar.close()
    classifier.eval().requires_grad_(False)
    outputs = [torch.cat(chunk).unsqueeze(0) for chunk in zip(*held, strict=True)]
    found = calibrations(classifier.label_space, outputs, labels[torch.cat(parts)])
    classifier.register_to_config(temperatures=tuple(row.temperature for row in found.values()))
    num_train = len(order) - len(parts[0])
    if more is not None:
        num_train = round(epochs / count) * epoch_batches * batch_size
    return CalibrationReport(found, num_train, num_validation=sum(map(len, parts)), epochs=round(epochs / count))


def calibrate(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> CalibrationReport:
    """Sets the temperatures from data that no member has seen, and reports on the members' mean. Labels as in `fit_classifier`."""
    _check_labels(classifier.label_space, images, labels)
    device = next(classifier.parameters()).device
    rows = torch.arange(len(images))
    outputs = _outputs(lambda chunk: classifier(chunk.to(device)), images, rows, dim=1)
    found = calibrations(classifier.label_space, outputs, labels)
    classifier.register_to_config(temperatures=tuple(row.temperature for row in found.values()))
    return CalibrationReport(found, num_train=0, num_validation=len(labels), epochs=0)


@torch.no_grad()
def _outputs(
    call: Callable[[torch.Tensor], list[torch.Tensor]], images: torch.Tensor, rows: torch.Tensor, dim: int = 0
) -> list[torch.Tensor]:
    chunks = [call(images[chunk]) for chunk in rows.split(256)]
    return [torch.cat(chunk, dim=dim).cpu() for chunk in zip(*chunks, strict=True)]


def _split(
    labels: torch.Tensor, count: int, validation_fraction: float, generator: torch.Generator
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """All rows with a label, shuffled, and those that each member holds out.

    Rows with the same attributes given are dealt out by themselves: a random split could leave a member's held-out part, or what it
    learns from, without an attribute that few images have.
    """
    order = torch.randperm(len(labels), generator=generator)
    order = order[~labels[order].isnan().all(dim=1)]
    _, group = labels[order].isnan().unique(dim=0, return_inverse=True)
    groups = [order[group == g] for g in group.unique()]
    if count == 1:
        return order, [torch.cat([rows[: max(1, round(validation_fraction * len(rows)))] for rows in groups])]
    parts: list[list[torch.Tensor]] = [[] for _ in range(count)]
    for g, rows in enumerate(groups):
        for m, part in enumerate(rows.tensor_split(count)):
            parts[(m + g) % count].append(part)  # tensor_split gives the first parts more: not always to the same member
    return order, [torch.cat(part) for part in parts]


def _check_labels(space: LabelSpace, images: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.shape != (len(images), len(space)):
        raise ValueError(
            f"labels must be ({len(images)}, {len(space)}), one row an image and one column an attribute, got {tuple(labels.shape)}."
        )
    for column, (name, attribute) in enumerate(space.attributes.items()):
        given = labels[~labels[:, column].isnan(), column]
        if isinstance(attribute, Categorical):
            wrong = (given < 0) | (given >= len(attribute.names)) | (given != given.floor())
            allowed = f"a class index from 0 to {len(attribute.names) - 1}"
        else:
            wrong = (given < attribute.low) | (given > attribute.high)
            allowed = f"a number from {attribute.low} to {attribute.high}"
        if wrong.any():
            raise ValueError(f"Label {given[wrong][0].item():g} of attribute {name!r} is not allowed: use {allowed}, or NaN.")


def _check_split(space: LabelSpace, train: torch.Tensor, held_out: torch.Tensor) -> None:
    for column, (name, attribute) in enumerate(space.attributes.items()):
        present = set(train[:, column][~train[:, column].isnan()].tolist())
        if isinstance(attribute, Categorical):
            missing = [n for i, n in enumerate(attribute.names) if i not in present]
            if missing:
                raise ValueError(
                    f"No training image has label {missing[0]!r} of attribute {name!r}: the classifier cannot learn it."
                )
        elif len(present) < 2:
            raise ValueError(f"Attribute {name!r} needs training images with different labels, got {sorted(present) or 'none'}.")
        if held_out[:, column].isnan().all():
            raise ValueError(f"Too few images have a label of attribute {name!r}: each of the members must hold out one or more.")


def _epochs(
    images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[Iterable[Labelled]]:
    """Endless epochs over these rows, each in another order."""
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield ((images[part], labels[part]) for part in order.split(batch_size))


def _checked_epochs(space: LabelSpace, batches: Iterator[Labelled], count: int) -> Iterator[Iterable[Labelled]]:
    """Endless epochs of `count` batches each, whose labels are looked at as they come."""

    def checked() -> Iterator[Labelled]:
        for images, labels in islice(batches, count):
            _check_labels(space, images, labels)
            yield images, labels

    while True:
        yield checked()


def _fit_network(
    classifier: Classifier,
    network: _Network,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Iterable[Labelled]],
    images: torch.Tensor,
    labels: torch.Tensor,
    validation: torch.Tensor,
    generator: torch.Generator,
    *,
    max_epochs: int,
    patience: int,
    noise: float,
    bar: tqdm,
) -> int:
    """Trains one member and leaves it as it was at its best on `validation`; returns the epochs it took. batches: of each epoch."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_epochs)
    device = next(network.parameters()).device

    def nll(outputs: list[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Summed over the attributes, each averaged over the rows where it is given."""
        total = torch.zeros((), device=label.device)
        for column, attribute in enumerate(classifier.label_space.attributes.values()):
            given = ~label[:, column].isnan()
            if given.any():
                chosen = log_likelihood(attribute, outputs[column][None, given], label[given, column], 1.0)
                total = total - chosen.mean()
        return total

    best, best_state, best_epoch, epochs = float("inf"), None, 0, 0
    for epoch in range(max_epochs):
        network.train()
        for batch, label in next(batches):
            batch = _shift(batch, generator)
            if noise:
                batch = batch + noise * torch.randn(batch.shape, generator=generator)
            loss = nll(network(classifier.prepare(batch.to(device))), label.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        network.eval()
        outputs = _outputs(lambda chunk: network(classifier.prepare(chunk.to(device))), images, validation)
        held = nll(outputs, labels[validation]).item()
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
