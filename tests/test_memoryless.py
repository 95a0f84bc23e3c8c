"""The optimum of the control problem is p_pre(x) p(y|x) / Z where sampling is memoryless (eta = 1), and is not below."""

import functools
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

from diffusers_ctrl.config import CTRLConfig, make_sampler
from diffusers_ctrl.rollouts import Sampler
from diffusers_ctrl.transitions import start_snr
from problems import affine_steps, base_moments, cosine_scheduler, posterior_moments


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from memoryless import NAMES, Laws, Mixture, compare, continuations, known_laws, measure, three_modes  # noqa: E402


STEPS, STARTS, CONTINUATIONS, TOP = 20, 1000, 256, NAMES.index("top")
PRIOR, OBSERVATION, NOISE = (0.3, 0.8), 1.0, 0.6  # of the problem with a closed form


@functools.cache
def laws(eta: float) -> Laws:
    """The three laws on the mixture of three modes: under two seconds each."""
    return measure(three_modes(), eta, STEPS, STARTS, CONTINUATIONS, seed=0)


def gaussian_sampler(eta: float) -> Sampler:
    return Sampler(cosine_scheduler(), STEPS, {"eta": eta})


def optimal_mean_of(steps) -> float:
    """Mean of x_K under p*, for a Gaussian prior and likelihood: x_K = slope · x_0 + shift + noise, with x_0 ~ N(0, 1) untouched."""
    slope, shift, variance = 1.0, 0.0, 0.0
    for a, b, sigma in steps:
        slope, shift, variance = a * slope, a * shift + b, a**2 * variance + sigma**2
    gain = variance / (variance + NOISE**2)  # within one start, so without the variance slope² that x_0 brings
    return (1 - gain) * shift + gain * OBSERVATION


def optimal_mean(eta: float) -> float:
    return optimal_mean_of(affine_steps(*PRIOR, gaussian_sampler(eta)))


def best_controlled_mean(eta: float) -> float:
    """Mean of x_K where J is largest among controls, by dynamic programming on V_k(x) = p_k x²/2 + q_k x, as in `best_objective`."""
    steps = affine_steps(*PRIOR, gaussian_sampler(eta))
    p, q, controls = -1 / NOISE**2, OBSERVATION / NOISE**2, []
    for a, b, sigma in reversed(steps):
        controls.append((p, q))
        gain = 1 / (1 - p * sigma**2)
        p, q = a**2 * gain * p, a * gain * (q + p * b)
    mean = 0.0
    for (a, b, sigma), (p, q) in zip(steps, reversed(controls), strict=True):
        moved = a * mean + b
        mean = moved + sigma**2 * (q + p * moved) / (1 - p * sigma**2)
    return mean


def test_the_base_is_the_mixture_and_its_posterior_the_known_one():
    base, posterior = known_laws(three_modes())
    found = laws(1.0)
    # K = 20 is not ∞: that costs about 0.01, and 0.05 in the mean along the label, where the modes come out narrower and closer to 0
    assert torch.allclose(found.base, base, atol=0.02)
    allowed = torch.tensor([0.07 if name == "x2" else 0.02 for name in NAMES])
    assert ((found.exact - posterior).abs() < allowed).all(), found.exact - posterior
    # so the label asks for a large move, and a control that does nothing is far from it
    assert abs(posterior[TOP] - base[TOP]) > 0.4


def test_at_eta_one_the_optimum_is_the_exact_posterior():
    found = laws(1.0)
    assert (found.bias.abs() < 4 * found.bias_se).all(), (found.bias, found.bias_se)
    # sharp enough to see the bias of eta = 0.8, which is 0.006
    assert found.bias_se[TOP] < 0.0005


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.8])
def test_below_eta_one_the_optimum_is_biased_towards_the_base(eta):
    found = laws(eta)
    along = [row for row, name in enumerate(NAMES) if name != "x1"]  # the label hardly moves x1
    assert (found.bias.abs() > 8 * found.bias_se)[along].all(), (found.bias, found.bias_se)
    # towards the base in every coordinate, and not beyond it
    share = found.bias / (found.base - found.exact)
    assert (share > 0).all() and (share < 1).all()


def test_the_less_noise_the_larger_the_bias():
    sizes = [laws(eta).bias[TOP].abs().item() for eta in (1.0, 0.8, 0.5, 0.2)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 0.2


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_estimate_of_the_bias_is_the_one_known_for_a_gaussian(eta):
    one = Mixture(torch.ones(1, dtype=torch.float64), torch.full((1, 2), PRIOR[0], dtype=torch.float64), PRIOR[1])
    sampler = gaussian_sampler(eta)
    ends = continuations(one, sampler, STARTS, CONTINUATIONS, torch.Generator().manual_seed(0))
    log_likelihood = -0.5 * ((ends[..., 0] - OBSERVATION) / NOISE) ** 2
    found = compare(ends, log_likelihood)
    steps = affine_steps(*PRIOR, sampler)
    exact, _ = posterior_moments(steps, OBSERVATION, NOISE)
    known = torch.tensor([optimal_mean(eta) - exact, 0.0], dtype=torch.float64)  # the label does not see x2
    assert ((found.bias - known).abs() < 4 * found.bias_se).all(), (found.bias, known, found.bias_se)
    assert abs(found.exact[0] - exact) < 4 * found.exact_se[0]
    assert abs(found.base[0] - base_moments(steps)[0]) < 0.06


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.9, 1.0])
def test_the_best_control_has_the_bias_of_the_optimal_path_law(eta):
    """Not only an unreachable ideal is biased: Gaussian steps with the base's variance, tuned as well as they can be, are."""
    assert math.isclose(best_controlled_mean(eta), optimal_mean(eta), rel_tol=1e-9)
    exact, _ = posterior_moments(affine_steps(*PRIOR, gaussian_sampler(eta)), OBSERVATION, NOISE)
    bias = best_controlled_mean(eta) - exact
    if eta == 1.0:
        assert abs(bias) < 1e-6
    else:
        assert abs(bias) > {0.2: 0.1, 0.5: 0.01, 0.9: 1e-4}[eta]


def test_only_eta_below_one_is_warned_of():
    with pytest.warns(UserWarning, match="not memoryless"):
        make_sampler(cosine_scheduler(), CTRLConfig(eta=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_sampler(cosine_scheduler(), CTRLConfig(eta=1.0)).options == {"eta": 1.0}


@pytest.mark.parametrize(("steps", "warned"), [(4, True), (10, True), (20, False)])
def test_a_start_that_should_hold_signal_is_warned_of_from_a_percent_of_bias_on(steps, warned):
    """DDIM at eta = 1 with leading timesteps starts at 1000 − 1000 / K: what that costs, and when the trainer says so."""
    scheduler = cosine_scheduler(timestep_spacing="leading")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = make_sampler(scheduler, CTRLConfig(num_inference_steps=steps))
    assert [
        str(w.message) for w in caught if "signal-to-noise" in str(w.message) and "not memoryless" in str(w.message)
    ] != [] or not warned
    assert warned or not caught
    path = affine_steps(*PRIOR, sampler)
    exact, _ = posterior_moments(path, OBSERVATION, NOISE)
    lost = (exact - optimal_mean_of(path)) / (exact - base_moments(path)[0])
    assert (lost > 0.01) == warned and 0.3 * start_snr(scheduler) < lost < 1.2 * start_snr(scheduler)
