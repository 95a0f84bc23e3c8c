"""What a classifier's raw outputs say of a label, how sure they may be, and how well that holds: likelihoods, temperatures, reports.

An attribute's outputs are (members, B, n). Categorical: n logits, one a class. Continuous: n = 2, the mean and the log-variance of a
normal law, in the unit in which [low, high] is [-1, 1]. The members' probabilities, or densities, are averaged.

One number an attribute is fitted afterwards, its temperature T: logits are divided by it (Guo et al., arXiv 1706.04599), variances
multiplied. It is the same number twice: the exponent of a normal law is -(y - mean)² / (2 variance), so that T divides it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .labels import Attribute, Categorical, Continuous, LabelSpace


# A standard deviation of 1 % of the interval is added (in squares) to every one that is learned. Without it the density at the mean has
# no upper bound: the reward could then be raised for ever by images of which the regression is sure, instead of right.
STD_FLOOR = 0.02
LOG_TEMPERATURES = (-3.0, 3.0)


def log_mean_softmax(logits: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """log of the members' mean probability: (members, B, classes) logits -> (B, classes) nats."""
    return (logits / temperature).log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def normal_parameters(outputs: torch.Tensor, temperature: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """(members, B, 2) outputs -> means and log-variances (members, B), where [low, high] is [-1, 1]."""
    mean, log_variance = outputs.unbind(dim=-1)
    floor = torch.full((), 2 * math.log(STD_FLOOR), dtype=outputs.dtype, device=outputs.device)
    return mean, torch.logaddexp(log_variance, floor) + torch.as_tensor(temperature, dtype=outputs.dtype).log()


def in_unit_interval(attribute: Continuous, labels: torch.Tensor) -> torch.Tensor:
    """Labels in [low, high] -> [-1, 1]."""
    return (labels - attribute.low) * (2 / (attribute.high - attribute.low)) - 1


def log_mean_normal(
    attribute: Continuous, outputs: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """log of the members' mean density at `labels` (B,), in nats, of the attribute's own unit: (B,)."""
    mean, log_variance = normal_parameters(outputs, temperature)
    deviation = in_unit_interval(attribute, labels.to(outputs.dtype)) - mean
    log_density = -0.5 * (deviation.square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
    return log_density.logsumexp(dim=0) - math.log(len(outputs)) + math.log(2 / (attribute.high - attribute.low))


def log_likelihood(
    attribute: Attribute, outputs: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """log p̂(y | x) of the attribute alone, (B,) nats. outputs: (members, B, n). labels: (B,), all of them given."""
    if isinstance(attribute, Categorical):
        return log_mean_softmax(outputs, temperature).gather(1, labels.long().unsqueeze(1)).squeeze(1)
    return log_mean_normal(attribute, outputs, labels, temperature)


def fit_temperature(attribute: Attribute, outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that minimises the NLL of `labels` (B,) under the members' mean, (members, B, n) outputs; from e⁻³ to e³.

    For one member of a continuous attribute it is the mean of (y - mean)² / variance; otherwise it is searched for.
    """
    outputs = outputs.double()
    if isinstance(attribute, Continuous) and len(outputs) == 1:
        mean, log_variance = normal_parameters(outputs, 1.0)
        ratio = (in_unit_interval(attribute, labels.double()) - mean).square() * (-log_variance).exp()
        return float(ratio.mean().clamp_min(1e-12).log().clamp(*LOG_TEMPERATURES).exp())
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], lr=0.1, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -log_likelihood(attribute, outputs, labels, log_t.exp()).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float(log_t.detach().clamp(*LOG_TEMPERATURES).exp())


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


def distribution_function(
    attribute: Continuous, outputs: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """P̂(Y <= y | x) at `labels`, (B,), of the members' mean. It is uniform on [0, 1] where the regression is calibrated."""
    mean, log_variance = normal_parameters(outputs, temperature)
    return torch.special.ndtr((in_unit_interval(attribute, labels.to(outputs.dtype)) - mean) * (-0.5 * log_variance).exp()).mean(0)


def coverage(probabilities: torch.Tensor, level: float) -> float:
    """Share of the labels inside the central interval of probability `level`; from `distribution_function` at them."""
    return ((probabilities - 0.5).abs() <= level / 2).double().mean().item()


@dataclass(frozen=True)
class CategoricalCalibration:
    """Accuracy, negative log-likelihood (nats) and expected calibration error on held-out labels, before and after temperature."""

    accuracy: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    temperature: float
    num_labels: int
    kind: str = "categorical"

    def line(self) -> str:
        return (
            f"accuracy {self.accuracy:.3f} on {self.num_labels} held-out labels; NLL {self.nll_before:.3f} -> {self.nll_after:.3f} "
            f"nats, ECE {self.ece_before:.3f} -> {self.ece_after:.3f} at temperature {self.temperature:.2f}"
        )


@dataclass(frozen=True)
class ContinuousCalibration:
    """Negative log-likelihood (nats, of a density in the attribute's unit: it may be below 0) and the share of held-out labels inside
    the central 50 and 90 % intervals, before and after the variances are multiplied by the temperature; how near the predicted means
    are: correlation, R² (share of the variance explained) and root mean square error in the attribute's unit."""

    correlation: float
    r2: float
    rmse: float
    nll_before: float
    nll_after: float
    coverage_50_before: float
    coverage_50_after: float
    coverage_90_before: float
    coverage_90_after: float
    temperature: float
    num_labels: int
    kind: str = "continuous"

    def line(self) -> str:
        return (
            f"correlation {self.correlation:.3f}, R² {self.r2:.3f}, error {self.rmse:.3g} on {self.num_labels} held-out labels; NLL "
            f"{self.nll_before:.3f} -> {self.nll_after:.3f} nats, 50 % intervals hold {self.coverage_50_before:.3f} -> "
            f"{self.coverage_50_after:.3f}, 90 % {self.coverage_90_before:.3f} -> {self.coverage_90_after:.3f} at variance × "
            f"{self.temperature:.2f}"
        )


@dataclass(frozen=True)
class CalibrationReport:
    """What held-out data say, an attribute at a time.

    Of cross-fitted members these are the figures of single members, each on its own held-out part; their mean is a little better,
    and a little less confident than the temperature makes a member.
    """

    attributes: dict[str, CategoricalCalibration | ContinuousCalibration]
    num_train: int
    num_validation: int
    epochs: int

    def lines(self) -> str:
        head = f"classifier: {self.num_train} images for training, {self.num_validation} held out, {self.epochs} epochs"
        return "\n".join([head, *(f"  {name}: {found.line()}" for name, found in self.attributes.items())])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, nested as the fields are."""
        return asdict(self)

    def metrics(self) -> dict[str, float | int | str]:
        """JSON-ready and flat: the figures of the only attribute under their own names, of several as `ATTRIBUTE.NAME`."""
        flat = {"num_train": self.num_train, "num_validation": self.num_validation, "epochs": self.epochs}
        for name, found in self.attributes.items():
            flat |= {key if len(self.attributes) == 1 else f"{name}.{key}": value for key, value in asdict(found).items()}
        return flat


@torch.no_grad()
def calibration_of(
    attribute: Attribute, outputs: torch.Tensor, labels: torch.Tensor
) -> CategoricalCalibration | ContinuousCalibration:
    """Fits the temperature to held-out data and says what it does. outputs: (members, N, n). labels: (N,), all of them given."""
    outputs, labels = outputs.double(), labels.double()
    temperature = fit_temperature(attribute, outputs, labels)
    nll = [-log_likelihood(attribute, outputs, labels, t).mean().item() for t in (1.0, temperature)]
    if isinstance(attribute, Categorical):
        before, after = (log_mean_softmax(outputs, t) for t in (1.0, temperature))
        return CategoricalCalibration(
            accuracy=(after.argmax(1) == labels).double().mean().item(),
            nll_before=nll[0],
            nll_after=nll[1],
            ece_before=expected_calibration_error(before, labels),
            ece_after=expected_calibration_error(after, labels),
            temperature=temperature,
            num_labels=len(labels),
        )
    half = (attribute.high - attribute.low) / 2
    predicted = (outputs[..., 0].mean(dim=0) + 1) * half + attribute.low
    before, after = (distribution_function(attribute, outputs, labels, t) for t in (1.0, temperature))
    mse = (predicted - labels).square().mean()
    return ContinuousCalibration(
        correlation=torch.corrcoef(torch.stack([predicted, labels]))[0, 1].nan_to_num().item(),
        r2=(1 - mse / labels.var(correction=0)).item(),
        rmse=mse.sqrt().item(),
        nll_before=nll[0],
        nll_after=nll[1],
        coverage_50_before=coverage(before, 0.5),
        coverage_50_after=coverage(after, 0.5),
        coverage_90_before=coverage(before, 0.9),
        coverage_90_after=coverage(after, 0.9),
        temperature=temperature,
        num_labels=len(labels),
    )


def calibrations(
    space: LabelSpace, outputs: list[torch.Tensor], labels: torch.Tensor
) -> dict[str, CategoricalCalibration | ContinuousCalibration]:
    """`calibration_of` each attribute, on the rows where it is given. outputs: one (members, N, n) an attribute; labels: (N, A).

    Raises:
        ValueError: if an attribute is given nowhere.
    """
    found = {}
    for column, (name, attribute) in enumerate(space.attributes.items()):
        given = ~labels[:, column].isnan()
        if not given.any():
            raise ValueError(f"No held-out image has a label of attribute {name!r}: it cannot be calibrated.")
        found[name] = calibration_of(attribute, outputs[column][:, given], labels[given, column])
    return found
