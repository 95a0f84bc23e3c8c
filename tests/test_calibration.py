"""Temperatures and what a report says, against laws that are known."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_ctrl.calibration import (
    CalibrationReport,
    CategoricalCalibration,
    calibration_of,
    coverage,
    distribution_function,
    expected_calibration_error,
    fit_temperature,
    log_likelihood,
)
from diffusers_ctrl.labels import Categorical, Continuous, LabelSpace
from likelihood import warnings_of


THREE = Categorical(("a", "b", "c"))
NUMBER = Continuous(-2.0, 6.0, "cm")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- classes --


def logits_and_labels(scale, n=2000, classes=3):
    """Labels drawn from softmax(z), and logits scale·z: the best temperature is `scale`."""
    z = 2 * torch.randn(n, classes, generator=generator(), dtype=torch.float64)
    labels = torch.multinomial(z.softmax(1), 1, generator=generator(1)).squeeze(1)
    return scale * z, labels


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_temperature_minimises_the_nll(scale):
    logits, labels = logits_and_labels(scale)
    found = fit_temperature(THREE, logits[None], labels)

    def nll(t):
        return F.cross_entropy(logits / t, labels).item()

    scan = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    best = min(scan.tolist(), key=nll)
    assert found == pytest.approx(best, rel=0.01)
    assert nll(found) <= nll(best) + 1e-9
    assert nll(found) <= nll(1.0) + 1e-12
    assert found == pytest.approx(scale, rel=0.1)


def test_the_temperature_of_predictions_that_are_all_right_or_all_wrong():
    """No temperature is the best one: the answer must still be a positive number."""
    logits = torch.tensor([[4.0, 0.0], [0.0, 5.0]]).repeat(10, 1)
    right = torch.tensor([0, 1]).repeat(10)
    for labels in (right, 1 - right):
        for scale in (0.1, 1.0, 10.0, 100.0):
            temperature = fit_temperature(THREE, scale * logits[None], labels)
            assert math.isfinite(temperature) and temperature > 0
            assert temperature <= 1 if labels is right else temperature > 1


def test_calibration_error_of_calibrated_predictions():
    confidence = torch.linspace(0.5, 1.0, 20000, dtype=torch.float64)
    labels = (torch.rand(20000, generator=generator(), dtype=torch.float64) > confidence).long()
    log_probs = torch.stack([confidence, 1 - confidence], dim=1).clamp_min(1e-12).log()
    assert expected_calibration_error(log_probs, labels) < 0.02


@pytest.mark.parametrize("confidence, accuracy", [(0.99, 0.6), (0.6, 0.9), (1.0, 0.5)])
def test_calibration_error_of_predictions_that_are_not(confidence, accuracy):
    log_probs = torch.tensor([[confidence, 1 - confidence]]).repeat(1000, 1).log()
    labels = (torch.arange(1000) >= 1000 * accuracy).long()
    assert expected_calibration_error(log_probs, labels) == pytest.approx(abs(confidence - accuracy), abs=1e-6)


def test_calibration_error_weights_bins_by_size():
    log_probs = torch.tensor([[0.95, 0.05]] * 300 + [[0.55, 0.45]] * 100).log()
    labels = torch.cat([torch.zeros(300), torch.ones(100)]).long()
    assert expected_calibration_error(log_probs, labels) == pytest.approx(0.75 * 0.05 + 0.25 * 0.55, abs=1e-6)


# -- numbers --


def outputs_and_labels(scale, n=4000, members=1):
    """Labels of normal laws whose variances are known, and outputs that say they are 1/scale of that: the best factor is `scale`."""
    mean = torch.randn(n, generator=generator(), dtype=torch.float64) / 2
    log_variance = torch.randn(n, generator=generator(1), dtype=torch.float64) - 2
    unit = mean + (0.5 * log_variance).exp() * torch.randn(n, generator=generator(2), dtype=torch.float64)
    outputs = torch.stack([mean, log_variance - math.log(scale)], dim=1).expand(members, -1, -1)
    return outputs, 2 + 4 * unit


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_factor_of_the_variance_minimises_the_nll(scale, members):
    """One member: in closed form. Two, here the same twice, so that the answer must be too: by search."""
    outputs, labels = outputs_and_labels(scale, members=members)
    found = fit_temperature(NUMBER, outputs, labels)

    def nll(t):
        return -log_likelihood(NUMBER, outputs, labels, t).mean().item()

    best = min(torch.logspace(-1.3, 1.3, 2001, dtype=torch.float64).tolist(), key=nll)
    assert found == pytest.approx(best, rel=0.005)
    assert nll(found) <= nll(best) + 1e-7
    assert found == pytest.approx(scale, rel=0.1)


def test_members_that_disagree_need_less():
    """The mean of two densities is wider than either: the factor of the members' mean is below the mean of theirs."""
    outputs, labels = outputs_and_labels(1.0, members=2)
    apart = outputs.clone()
    apart[0, :, 0] -= 0.3
    apart[1, :, 0] += 0.3
    together = fit_temperature(NUMBER, apart, labels)
    assert together < min(fit_temperature(NUMBER, member[None], labels) for member in apart)
    assert -log_likelihood(NUMBER, apart, labels, together).mean() < -log_likelihood(NUMBER, apart, labels, 1.0).mean()


@pytest.mark.parametrize("right", [True, False])
def test_the_factor_of_regressions_that_are_all_right_or_all_wrong(right):
    outputs, labels = outputs_and_labels(1.0, n=20)
    outputs, labels = outputs.clone(), 2 + 4 * outputs[0, :, 0]
    if not right:
        outputs[..., 0] += 1e3
    found = fit_temperature(NUMBER, outputs, labels)
    assert found == pytest.approx(math.exp(-3 if right else 3))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_intervals_hold_what_they_should(scale):
    outputs, labels = outputs_and_labels(scale)
    found = calibration_of(NUMBER, outputs, labels)
    assert found.coverage_50_after == pytest.approx(0.5, abs=0.03)
    assert found.coverage_90_after == pytest.approx(0.9, abs=0.02)
    assert found.coverage_50_before == pytest.approx(math.erf(0.67449 / math.sqrt(2 * scale)), abs=0.03)
    assert found.coverage_90_before == pytest.approx(math.erf(1.64485 / math.sqrt(2 * scale)), abs=0.03)
    assert found.nll_after <= found.nll_before


def test_the_interval_is_that_of_the_mixture():
    """Two members far apart: the central half of their mean lies between them, and neither's own half is it."""
    outputs = torch.tensor([[[-0.5, -6.0]], [[0.5, -6.0]]], dtype=torch.float64)
    places = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    probabilities = distribution_function(NUMBER, outputs.expand(2, 3, 2), 2 + 4 * places, 1.0)
    torch.testing.assert_close(probabilities, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), rtol=0, atol=1e-6)
    grid = torch.linspace(-10, 14, 20001, dtype=torch.float64)
    law = outputs.expand(2, len(grid), 2)
    density = log_likelihood(NUMBER, law, grid, 1.0).exp()
    numeric = torch.cumulative_trapezoid(density, grid)
    torch.testing.assert_close(distribution_function(NUMBER, law, grid, 1.0)[1:], numeric, rtol=0, atol=1e-5)
    inside = coverage(distribution_function(NUMBER, law, grid, 1.0), 0.5)
    assert inside == pytest.approx(4 / 24, abs=0.001)  # from -0.5 to 0.5 of the half-interval of 4, on a grid of 24


def test_how_near_the_means_are():
    outputs, labels = outputs_and_labels(1.0)
    found = calibration_of(NUMBER, outputs, labels)
    predicted = 2 + 4 * outputs[0, :, 0]
    assert found.correlation == pytest.approx(torch.corrcoef(torch.stack([predicted, labels]))[0, 1].item())
    assert found.r2 == pytest.approx(1 - ((predicted - labels) ** 2).sum().item() / ((labels - labels.mean()) ** 2).sum().item())
    assert found.rmse == pytest.approx((predicted - labels).square().mean().sqrt().item())
    assert (found.kind, found.num_labels) == ("continuous", 4000)


# -- the report --


def test_a_report_of_two_kinds():
    logits, classes = logits_and_labels(1.0)
    parts = {"shade": calibration_of(THREE, logits[None], classes), "size": calibration_of(NUMBER, *outputs_and_labels(1.0))}
    report = CalibrationReport(parts, num_train=1, num_validation=2, epochs=3)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["attributes"]["shade"]["kind"] == "categorical" and data["attributes"]["size"]["kind"] == "continuous"
    first, shade, size = report.lines().splitlines()
    assert "3 epochs" in first and "shade: accuracy" in shade and "ECE" in shade and "size: correlation" in size and "90 %" in size
    flat = report.metrics()
    assert flat["shade.accuracy"] == parts["shade"].accuracy and flat["size.r2"] == parts["size"].r2 and flat["epochs"] == 3
    alone = CalibrationReport({"shade": parts["shade"]}, num_train=1, num_validation=2, epochs=3).metrics()
    assert alone["accuracy"] == parts["shade"].accuracy


def test_a_classifier_that_guesses_is_told_of():
    """Three equally frequent classes cost ln 3 = 1.10 nats to guess; an attribute that is known, and a number, are not named."""
    labels = torch.tensor([[0.0, 0.0, 0.1], [1.0, 1.0, 0.2], [2.0, 0.0, 0.3], [torch.nan, 1.0, 0.4]])
    space = LabelSpace(shade=Categorical(("a", "b", "c")), form=Categorical(("d", "e")), size=Continuous(0, 1))

    def found(nll):
        return CategoricalCalibration(0.4, nll, nll, 0.1, 0.1, 1.0, 30)

    report = CalibrationReport({"shade": found(1.05), "form": found(0.3), "size": None}, num_train=1, num_validation=2, epochs=3)
    (sentence,) = warnings_of(report, space, labels, epochs=80)
    assert "'shade'" in sentence and "1.05 nats" in sentence and "costs 1.10" in sentence and "With 3 labels, 80 epochs" in sentence
