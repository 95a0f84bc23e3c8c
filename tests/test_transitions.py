"""Transitions: mean and std held to `scheduler.step` over the grid of settings; KL and log-probability to torch.distributions.

Tolerance of the parity. The transition computes its coefficients in double precision from the scheduler's float32
`alphas_cumprod` (written a, and p for the previous step's); `step` computes them in float32, with unit roundoff u =
2^-24 = 6e-8. Products and square roots keep a relative error of a few u. Two differences cancel: 1 - a/p, which is at
least 0.01 for 25 steps or fewer, so it is good to u / 0.01 = 6e-6 relative, and 1 - p - std^2 under the square root.
RTOL = 1e-5, relative to the largest entry, covers both wherever 1 - p - std^2 is not itself of the order of u. It is
at a = 0 (zero terminal SNR) with eta = 1: exactly 0 there, but in float32 +-u, whose square root is 2.4e-4 (or NaN,
where it is negative), times a direction of a few units. Neighbouring timesteps near the clean sample are the other
exception: there 1 - a/p is as small as betas[1], so that it is good to u / betas[1] only.

The schedulers of sigmas take float32 states and give float64 means for a float64 output, so here all states are exact in float32. Where the
step itself ends in float32 (flow), each entry carries u times the largest term; SDE-DPM-Solver subtracts terms much larger than their
difference. Both are covered by 1e-5 of the largest term, the state's and the clean sample's.
"""

import copy
import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch.distributions import Independent, Normal, kl_divergence

from diffusers_ctrl import MemorylessFlowMatchScheduler
from diffusers_ctrl.rollouts import Sampler
from diffusers_ctrl.transitions import (
    Transition,
    is_supported,
    model_input,
    scheduler_class,
    start_snr,
    supported_schedulers,
    transition,
)


RTOL = 1e-5
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SPACINGS = ["leading", "trailing", "linspace"]
CLIPS = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
]
SHAPE = (2, 3, 4, 4)


def neighbour_rtol(scheduler):
    return 2**-24 / scheduler.betas[1].item()


def tensors(seed, channels=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return x, torch.randn((2, channels, 4, 4), generator=generator, dtype=torch.float64)


MODULES = (
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_euler_ancestral_discrete",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "diffusers_ctrl.schedulers",
)


def read_step(scheduler, monkeypatch, output, t, x, **kwargs):
    """(mean, std, clean estimate or None) of `scheduler.step`, by replacing the noise it draws with zeros, then with ones."""
    results = []
    for value in (0.0, 1.0):
        for module in MODULES:
            monkeypatch.setattr(
                f"{module}.randn_tensor",
                lambda shape, value=value, dtype=None, **_: torch.full(tuple(shape), value, dtype=dtype),
            )
        taken = copy.copy(scheduler)
        if hasattr(scheduler, "_step_index"):
            taken._step_index = taken._begin_index = None  # found from t, so that steps can be asked for in any order
        results.append(taken.step(output, t, x, **kwargs))
    low, high = (result.prev_sample for result in results)
    return low, high - low, getattr(results[0], "pred_original_sample", None)


def assert_parity(scheduler, monkeypatch, output, t, x, rtol=RTOL, atol=0.0, std_atol=0.0, **kwargs):
    mean, std, clean = read_step(scheduler, monkeypatch, output, t, x, **kwargs)
    ours = transition(scheduler, output, t, x, **kwargs)
    assert ours.mean.dtype == ours.std.dtype == torch.float64 and ours.denoised is not None
    where = f"t={float(t)} {kwargs} {dict(scheduler.config)}"
    ok = torch.isfinite(mean) & torch.isfinite(std)
    for name, theirs, mine in (("mean", mean, ours.mean), ("std", std, ours.std.expand_as(mean)), ("clean", clean, ours.denoised)):
        if theirs is not None and ok.any():
            # 2e-10: diffusers clamps DDPM's variance of 0 to 1e-20; 1e-12: std is a difference of numbers of the mean's size
            bound = rtol * theirs[ok].abs().max() + atol + 2e-10 + 1e-12 * mean[ok].abs().max() + (name == "std") * std_atol
            assert (mine - theirs)[ok].abs().max() <= bound, f"{name} {where}"
    return ok


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_the_schedulers_step(monkeypatch, prediction, spacing, eta):
    compared = total = 0
    for clip, to_one, (zero_snr, steps) in itertools.product(CLIPS, (True, False), ((True, 10), (False, 10), (False, 7))):
        scheduler = DDIMScheduler(
            prediction_type=prediction,
            timestep_spacing=spacing,
            set_alpha_to_one=to_one,
            rescale_betas_zero_snr=zero_snr,
            **clip,
        )
        scheduler.set_timesteps(steps)
        for t, clipped in itertools.product(scheduler.timesteps, (False, True) if clip != CLIPS[0] else (False,)):
            output, x = tensors(int(t))
            atol = 2e-3 if scheduler.alphas_cumprod[t] == 0 else 0.0
            options = {"eta": eta, "use_clipped_model_output": clipped}
            ok = assert_parity(scheduler, monkeypatch, output, t, x, atol=atol, **options)
            compared += ok.sum().item()
            total += ok.numel()
    assert compared > 0.9 * total  # only the first step at zero terminal SNR may be NaN in diffusers


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_ddim_with_the_settings_of_stable_diffusion(monkeypatch, schedule, steps):
    scheduler = DDIMScheduler(
        beta_schedule=schedule,
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output, x = tensors(int(t))
        rtol = neighbour_rtol(scheduler) if int(t) == 1 else RTOL
        assert assert_parity(scheduler, monkeypatch, output, t, x, rtol=rtol, eta=1.0).all()
        assert assert_parity(scheduler, monkeypatch, output, int(t), x, rtol=rtol, eta=1.0).all()


def test_ddim_eta_is_one_unless_given():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    output, x = tensors(0)
    default, one = transition(scheduler, output, 500, x), transition(scheduler, output, 500, x, eta=1.0)
    assert torch.equal(default.mean, one.mean) and torch.equal(default.std, one.std)
    assert transition(scheduler, output, 500, x, eta=0.0).is_deterministic
    assert not one.is_deterministic


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_zero_terminal_snr_is_finite(kind, prediction):
    scheduler = kind(rescale_betas_zero_snr=True, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    assert scheduler.alphas_cumprod[t] == 0
    output, x = tensors(0)
    ours = transition(scheduler, output, t, x)
    previous = scheduler.alphas_cumprod[t - 100].double()
    clean = output if prediction == "sample" else -output
    torch.testing.assert_close(ours.mean, previous.sqrt() * clean, rtol=1e-12, atol=1e-7)
    torch.testing.assert_close(ours.std, (1 - previous).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_is_the_schedulers_step(monkeypatch, prediction, spacing, variance):
    compared = total = 0
    for clip, offset, (zero_snr, steps) in itertools.product(CLIPS, (0, 1), ((True, 10), (False, 10), (False, 7))):
        if offset and spacing != "leading":
            continue
        scheduler = DDPMScheduler(
            prediction_type=prediction,
            timestep_spacing=spacing,
            variance_type=variance,
            steps_offset=offset,
            rescale_betas_zero_snr=zero_snr,
            **clip,
        )
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x, output = tensors(int(t), channels=6 if "learned" in variance else 3)
            if variance == "learned":
                output[:, 3:].abs_()  # a variance
            rtol = neighbour_rtol(scheduler) if int(t) == 1 else RTOL
            ok = assert_parity(scheduler, monkeypatch, output, t, x, rtol=rtol)
            compared += ok.sum().item()
            total += ok.numel()
    assert compared > 0.95 * total


def test_ddpm_on_its_whole_training_schedule_and_on_custom_timesteps(monkeypatch):
    for timesteps in (None, [900, 850, 300, 20, 0]):
        scheduler = DDPMScheduler(variance_type="fixed_large")
        if timesteps is not None:
            scheduler.set_timesteps(timesteps=timesteps)
        for t in timesteps or [999, 500, 10, 1, 0]:
            output, x = tensors(t)
            assert assert_parity(scheduler, monkeypatch, output, t, x, rtol=neighbour_rtol(scheduler)).all()


def test_ddpm_learned_std_is_one_a_pixel():
    scheduler = DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(10)
    x, output = tensors(0, channels=6)
    result = transition(scheduler, output, 500, x)
    assert result.std.shape == x.shape and result.mean.shape == x.shape
    small = transition(scheduler, torch.cat([output[:, :3], -torch.ones_like(x)], 1), 500, x).std
    large = transition(scheduler, torch.cat([output[:, :3], torch.ones_like(x)], 1), 500, x).std
    assert (small < large).all()


@pytest.mark.parametrize(("variance", "channels"), [("fixed_large_log", 3), ("learned", 3), ("learned_range", 3)])
def test_ddpm_without_a_standard_deviation_is_an_error(variance, channels):
    # `step` takes the square root of fixed_large_log's (negative) log variance: there is no law to restate
    scheduler = DDPMScheduler(variance_type=variance)
    scheduler.set_timesteps(10)
    x, output = tensors(0, channels=channels)
    with pytest.raises(ValueError, match=f"(?s){variance}.*fixed_small.*fixed_large"):
        transition(scheduler, output, 500, x)


BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def ready(scheduler, steps, **grid):
    scheduler.set_timesteps(steps, **grid)
    return scheduler


def assert_grid_parity(scheduler, monkeypatch):
    """Every step in turn, but for those that share a timestep. Returns (steps compared, steps shared, entries NaN in diffusers)."""
    compared = shared = nan = 0
    for k, t in enumerate(scheduler.timesteps):
        if (scheduler.timesteps == t).sum() > 1:
            with pytest.raises(ValueError, match="share the timestep"):
                transition(scheduler, torch.zeros(SHAPE), t, torch.zeros(SHAPE))
            shared += 1
            continue
        output, x = (value.float().double() for value in tensors(k))
        clean = transition(scheduler, output, t, x).denoised
        size = max(x.abs().max().item(), clean.abs().max().item())
        ok = assert_parity(scheduler, monkeypatch, output, t, x, atol=1e-5 * size)
        compared, nan = compared + 1, nan + (~ok).sum().item()
    return compared, shared, nan


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral_is_the_schedulers_step(monkeypatch, spacing, prediction):
    compared = 0
    for betas, zero_snr, offset, steps in itertools.product(BETAS, (False, True), (0, 1), (1, 2, 7, 25)):
        if offset and spacing != "leading":
            continue
        scheduler = EulerAncestralDiscreteScheduler(
            prediction_type=prediction,
            timestep_spacing=spacing,
            beta_schedule=betas,
            rescale_betas_zero_snr=zero_snr,
            steps_offset=offset,
        )
        found, shared, nan = assert_grid_parity(ready(scheduler, steps), monkeypatch)
        assert shared == nan == 0
        assert transition(scheduler, *last(scheduler)).is_deterministic
        compared += found
    assert compared == (2 if spacing == "leading" else 1) * 6 * 35


def last(scheduler):
    """Arguments of a transition at the last timestep."""
    output, x = tensors(0)
    return output, scheduler.timesteps[-1], x


SIGMAS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0},
]


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("sigmas", SIGMAS, ids=lambda value: "-".join(map(str, value.values())) + "-" + next(iter(value)))
def test_dpm_solver_is_the_schedulers_step(monkeypatch, sigmas, algorithm):
    both = algorithm == "sde-dpmsolver++"
    predictions = [*PREDICTIONS, *(["flow_prediction"] if both else [])]
    threshold = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    schedules = [
        ("linear", False, 10, {}),
        ("scaled_linear", True, 7, threshold),
        ("squaredcos_cap_v2", False, 16, {}),
        ("linear", False, 1, threshold),
        ("linear", True, 2, {}),
    ]
    compared = shared = nan = 0
    for prediction, final, (betas, zero_snr, steps, threshold) in itertools.product(
        predictions, ["zero", "sigma_min"] if both else ["sigma_min"], schedules
    ):
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type=algorithm,
            solver_order=1,
            prediction_type=prediction,
            final_sigmas_type=final,
            beta_schedule=betas,
            rescale_betas_zero_snr=zero_snr,
            lambda_min_clipped=-5.1 if betas == "squaredcos_cap_v2" else -float("inf"),
            **sigmas,
            **threshold,
        )
        found = assert_grid_parity(ready(scheduler, steps), monkeypatch)
        compared, shared, nan = compared + found[0], shared + found[1], nan + found[2] / 96
        assert transition(scheduler, *last(scheduler)).is_deterministic or final == "sigma_min"
    # where the last sigma is repeated, up to rounding, diffusers may take the root of a number just below 0; timesteps, rounded, may collide
    assert compared >= shared and nan < 0.05 * compared


def test_learned_variances_are_cut_off_as_diffusers_cuts_them(monkeypatch):
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, variance_type="learned_range")
    x, output = tensors(0, channels=6)
    x, t = x.float().double(), ready(scheduler, 8).timesteps[3]
    assert assert_parity(scheduler, monkeypatch, output, t, x).all()
    assert Sampler(scheduler, 8).noisy_steps == tuple(range(7))
    with pytest.raises(ValueError, match=r"learned_range.*\(2, 3, 4, 4\).*\(2, 4, 4, 4\).*epsilon and 3 channels"):
        transition(scheduler, torch.zeros(2, 8, 4, 4), t, torch.zeros(2, 4, 4, 4))


FLOW_SHIFTS = [
    ({"shift": 1.0}, {}),
    ({"shift": 3.0}, {}),
    ({"use_dynamic_shifting": True}, {"mu": 1.15}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.15}),
]
FLOW_SIGMAS = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"shift_terminal": 0.1},
]


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, MemorylessFlowMatchScheduler])
@pytest.mark.parametrize(("shift", "grid"), FLOW_SHIFTS)
def test_flow_is_the_schedulers_step(monkeypatch, shift, grid, kind):
    stochastic = {"stochastic_sampling": True} if kind is FlowMatchEulerDiscreteScheduler else {}
    for sigmas, steps in itertools.product(FLOW_SIGMAS, (1, 2, 7, 25)):
        if steps == 1 and "shift_terminal" in sigmas:
            continue  # diffusers divides 0 by 0
        scheduler = ready(kind(**shift, **sigmas, **stochastic), steps, **grid)
        assert assert_grid_parity(scheduler, monkeypatch) == (steps, 0, 0)
        assert transition(scheduler, *last(scheduler)).is_deterministic
    scheduler = kind(**shift, **stochastic)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], **grid)  # as FluxPipeline gives them
    assert assert_grid_parity(scheduler, monkeypatch) == (3, 0, 0)
    assert Sampler(scheduler, 3, grid={"sigmas": [1.0, 0.6, 0.2], **grid}).noisy_steps == (0, 1)


def test_euler_ancestral_is_ddim_at_eta_one_in_other_units():
    settings = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    ddim = ready(DDIMScheduler(clip_sample=False, **settings), 10)
    euler = ready(EulerAncestralDiscreteScheduler(**settings), 10)
    assert ddim.timesteps.tolist() == euler.timesteps.tolist()
    for k, t in enumerate(euler.timesteps):
        output, x = tensors(k)
        now, following = ((1 + sigma.double() ** 2).sqrt() for sigma in euler.sigmas[k : k + 2])
        theirs, ours = transition(ddim, output, t, x), transition(euler, output, t, x * now)
        torch.testing.assert_close(ours.mean / following, theirs.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.std / following, theirs.std, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours.denoised, theirs.denoised, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model_input(euler, t, x * now), x, rtol=1e-6, atol=1e-6)


def test_sde_dpm_solver_of_order_one_is_ddim_at_eta_one():
    ddim = ready(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), 10)
    dpm = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, timestep_spacing="trailing")
    for k, t in enumerate(ready(dpm, 10).timesteps):
        output, x = tensors(k)
        theirs, ours = transition(ddim, output, t, x), transition(dpm, output, t, x)
        for name in ("mean", "std", "denoised"):
            one, other = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * theirs.denoised.abs().max().item())


# -- a transition is only a question --


def supported():
    """One scheduler of each class with a transition, after set_timesteps, and whether its states are scaled for the denoiser."""
    sde = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
    kinds = {
        "DDIMScheduler": DDIMScheduler(),
        "DDPMScheduler": DDPMScheduler(),
        "EulerAncestralDiscreteScheduler": EulerAncestralDiscreteScheduler(),
        "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler(**sde),
        "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        "MemorylessFlowMatchScheduler": MemorylessFlowMatchScheduler(),
    }
    assert list(kinds) == supported_schedulers()
    return [ready(scheduler, 4) for scheduler in kinds.values()]


@pytest.mark.parametrize("scheduler", supported(), ids=lambda value: type(value).__name__)
def test_nothing_waits_for_the_device(scheduler):
    """On the meta device a number that is asked of a tensor is an error: all that decides how a step goes on is on the host."""
    output, x = torch.ones(2, 3, 4, 4, device="meta"), torch.ones(2, 3, 4, 4, device="meta")
    for t in scheduler.timesteps:
        tuned, base = transition(scheduler, output, t, x), transition(scheduler, output, t, x)
        following = tuned.mean if tuned.is_deterministic else tuned.sample(noise=torch.ones_like(x))
        kl = tuned.kl(base)
        assert following.device.type == kl.device.type == "meta" and kl.shape == (2,)
        if not tuned.is_deterministic:
            assert tuned.log_prob(following).shape == tuned.log_ratio(base, following).shape == (2,)
        model_input(scheduler, t, x)


@pytest.mark.parametrize("scheduler", supported(), ids=lambda value: type(value).__name__)
def test_a_transition_between_the_steps_of_a_pipeline_changes_nothing(scheduler):
    def loop(ask):
        scheduler.set_timesteps(4)
        generator, (output, x) = torch.Generator().manual_seed(0), (value.float() for value in tensors(0))
        asked = []
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            before = {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)}
            for other in scheduler.timesteps.flip(0) if ask else ():
                asked.append(transition(scheduler, output, other, x))
                model_input(scheduler, other, x)
            assert {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)} == before
            x = scheduler.step(output + 0.1 * x_in, t, x, generator=generator, return_dict=False)[0]
        return x, asked

    plain, (watched, asked) = loop(False)[0], loop(True)
    assert torch.equal(plain, watched)
    assert [law.is_deterministic for law in asked[:4]] == [True, False, False, False]  # asked from the last to the first


@pytest.mark.parametrize("scheduler", supported(), ids=lambda value: type(value).__name__)
def test_the_denoiser_gets_what_the_pipeline_gives_it(scheduler):
    _, x = tensors(0)
    for t in scheduler.timesteps:
        fresh = copy.copy(scheduler)
        if hasattr(fresh, "_step_index"):
            fresh._step_index = None
        theirs = fresh.scale_model_input(x, t) if hasattr(fresh, "scale_model_input") else x
        assert torch.equal(model_input(scheduler, t, x), theirs)


@pytest.mark.parametrize("scheduler", supported()[2:], ids=lambda value: type(value).__name__)
def test_a_timestep_that_is_none_is_named(scheduler):
    with pytest.raises(ValueError, match=r"t = 123\.5 is none of the 4 timesteps.*" + type(scheduler).__name__):
        transition(scheduler, torch.zeros(SHAPE), 123.5, torch.zeros(SHAPE))
    fresh = type(scheduler).from_config(scheduler.config)
    with pytest.raises(ValueError, match=f"set_timesteps.*{type(scheduler).__name__}"):
        transition(fresh, torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))


def test_every_name_has_its_class():
    for scheduler in supported():
        assert is_supported(scheduler) and scheduler_class(type(scheduler).__name__) is type(scheduler)
    with pytest.raises(ValueError, match="no scheduler 'PNDMScheduler'.*MemorylessFlowMatchScheduler"):
        scheduler_class("PNDMScheduler")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler takes steps without noise.*use DDIMScheduler.*eta > 0.*from_config"),
        (PNDMScheduler(), "PNDMScheduler takes steps that depend on earlier outputs.*use DDIMScheduler.*from_config"),
        (HeunDiscreteScheduler(), "HeunDiscreteScheduler takes steps that depend on earlier outputs"),
        (UniPCMultistepScheduler(), "UniPCMultistepScheduler takes steps that depend on earlier outputs"),
        (LCMScheduler(), "LCMScheduler has no Gaussian transition that is known here.*use DDIMScheduler"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler .*use MemorylessFlowMatchScheduler.*from_config"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "use MemorylessFlowMatchScheduler"),
        (
            FlowMatchEulerDiscreteScheduler(),
            "stochastic_sampling=False takes steps without noise: use Memoryless.*stochastic_sampling=True",
        ),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, invert_sigmas=True), "invert_sigmas=True ends on noise.*False"),
        (MemorylessFlowMatchScheduler(invert_sigmas=True), "invert_sigmas=True ends on noise.*False"),
        (
            DPMSolverMultistepScheduler(),
            "algorithm_type='dpmsolver\\+\\+' takes steps without noise: use algorithm_type='sde-dpmsolver",
        ),
        (
            DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
            "solver_order=2 takes steps that depend.*use solver_order=1",
        ),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3), "solver_order=3 .*use solver_order=1"),
        (EulerAncestralDiscreteScheduler(prediction_type="sample"), "prediction_type='sample'; epsilon and v_prediction are known"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__,
)
def test_a_step_that_is_not_gaussian_is_refused_with_what_to_change(scheduler, message):
    scheduler.set_timesteps(4)
    assert not is_supported(scheduler)
    with pytest.raises(ValueError, match=message) as error:
        transition(scheduler, torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        Sampler(scheduler, 4)


# -- grids of one's own, and what is left in the start --


@pytest.mark.parametrize(
    ("scheduler", "grid"),
    [
        (DDPMScheduler(), {"timesteps": [900, 500, 20, 0]}),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1), {"timesteps": [999, 400, 100, 20]}),
        (MemorylessFlowMatchScheduler(), {"sigmas": [1.0, 0.9, 0.4, 0.1]}),
        (MemorylessFlowMatchScheduler(shift=2.0), {"timesteps": [1000.0, 800.0, 500.0, 200.0]}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else next(iter(value)),
)
def test_timesteps_may_be_a_subset(monkeypatch, scheduler, grid):
    sampler = Sampler(scheduler, 4, grid=grid)
    assert sampler.noisy_steps == (0, 1, 2) and len(sampler.timesteps) == 4
    if "timesteps" in grid:
        assert sampler.timesteps.tolist() == grid["timesteps"]
    for k, t in enumerate(sampler.timesteps):
        output, x = (value.float().double() for value in tensors(k))
        assert assert_parity(scheduler, monkeypatch, output, t, x, atol=1e-5 * x.abs().max().item()).all()


@pytest.mark.parametrize(
    ("scheduler", "steps", "grid", "message"),
    [
        (
            DDIMScheduler(),
            3,
            {"timesteps": [900, 500, 0]},
            "DDIMScheduler.set_timesteps does not take timesteps: its grid is fixed",
        ),
        (MemorylessFlowMatchScheduler(), 4, {"sigmas": [1.0, 0.5]}, "2 sigmas for num_inference_steps = 4"),
        (MemorylessFlowMatchScheduler(use_dynamic_shifting=True), 4, {}, "use_dynamic_shifting=True: give grid={'mu'"),
    ],
)
def test_a_grid_that_does_not_fit_is_named(scheduler, steps, grid, message):
    with pytest.raises(ValueError, match=message):
        Sampler(scheduler, steps, grid=grid)


def test_the_signal_in_the_start_is_the_same_in_all_units():
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}
    ddim, euler = ready(DDIMScheduler(**betas), 10), ready(EulerAncestralDiscreteScheduler(**betas), 10)
    alpha = ddim.alphas_cumprod[900].item()
    for scheduler in (ddim, euler):
        assert scheduler.timesteps[0] == 900
        assert start_snr(scheduler) == pytest.approx(alpha / (1 - alpha), rel=1e-5)
    flow = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert start_snr(ready(DPMSolverMultistepScheduler(**flow), 10)) == pytest.approx((0.001 / 0.999) ** 2, rel=1e-3)
    assert start_snr(ready(MemorylessFlowMatchScheduler(shift=3.0), 10)) == 0.0
    half = MemorylessFlowMatchScheduler()
    half.set_timesteps(sigmas=[0.5, 0.25])
    assert start_snr(half) == 1.0


def test_missing_set_timesteps_is_named():
    with pytest.raises(ValueError, match="set_timesteps.*DDIMScheduler"):
        transition(DDIMScheduler(), torch.zeros(SHAPE), 500, torch.zeros(SHAPE))


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_an_unknown_prediction_type_is_named(kind):
    scheduler = kind(prediction_type="flow")
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="flow.*epsilon, sample and v_prediction"):
        transition(scheduler, torch.zeros(SHAPE), 500, torch.zeros(SHAPE))


def normal(value):
    return Independent(Normal(value.mean, value.std.expand_as(value.mean)), value.mean.ndim - 1)


def pair(std_a, std_b):
    a, b = tensors(1)
    return Transition(a, std_a), Transition(b, std_b)


def std_of(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "same"),
    [
        ((), (), True),
        ((), (), False),
        (SHAPE, SHAPE, True),
        (SHAPE, SHAPE, False),
        ((), SHAPE, False),
        (SHAPE, (), False),
        ((2, 1, 1, 1), (2, 1, 1, 1), False),
        ((2, 1, 1, 1), (2, 1, 1, 1), True),
        ((1, 3, 1, 1), (2, 1, 1, 1), False),
    ],
)
def test_kl_and_log_prob_are_those_of_torch_distributions(shape_a, shape_b, same):
    a, b = pair(std_of(shape_a, 2), std_of(shape_b, 2 if same else 3))
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(a.kl(b), kl_divergence(normal(a), normal(b)), **exact)
    torch.testing.assert_close(a.log_prob(b.mean), normal(a).log_prob(b.mean), **exact)
    assert a.kl(b).shape == a.log_prob(b.mean).shape == (2,)
    assert torch.equal(a.kl(a), torch.zeros(2, dtype=torch.float64))


def test_kl_is_of_any_sample_shape():
    a, b = Transition(torch.zeros(4, 2), torch.tensor(0.5)), Transition(torch.ones(4, 2), torch.tensor(0.5))
    assert torch.equal(a.kl(b), torch.full((4,), 2 * 1 / (2 * 0.25)))


def test_kl_gradient_is_the_difference_over_the_variance():
    a, b = pair(std_of((), 2), std_of((), 2))
    mean = a.mean.clone().requires_grad_()
    Transition(mean, a.std).kl(b).sum().backward()
    torch.testing.assert_close(mean.grad, (a.mean - b.mean) / a.std**2, rtol=1e-12, atol=1e-12)


def test_a_sample_carries_gradients_to_mean_and_std():
    mean, noise = tensors(4)
    mean.requires_grad_()
    std = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sample = Transition(mean, std).sample(noise=noise)
    assert torch.equal(sample, mean + 0.7 * noise)
    weights = torch.arange(sample.numel(), dtype=torch.float64).reshape(SHAPE)
    (weights * sample).sum().backward()
    assert torch.equal(mean.grad, weights)
    torch.testing.assert_close(std.grad, (weights * noise).sum(), rtol=1e-12, atol=0)


def test_a_sample_follows_its_generator_and_its_law():
    law = Transition(torch.full((1000, 8), 3.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    draws = [law.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    count = draws[0].numel()
    assert abs(draws[0].mean() - 3.0) < 4 * 0.5 / count**0.5
    assert abs(draws[0].std() - 0.5) < 4 * 0.5 / (2 * count) ** 0.5


def test_a_deterministic_step_has_no_density_and_no_kl():
    a, b = pair(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    assert a.is_deterministic
    assert torch.equal(a.kl(b), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(a.sample(torch.Generator().manual_seed(0)), a.mean)
    with pytest.raises(ValueError, match="no density"):
        a.log_prob(a.mean)


def test_gradients_flow_through_a_transition_to_output_and_state():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    output, x = tensors(5)
    output.requires_grad_()
    x.requires_grad_()
    inputs = (output[:1, :1, :2, :2], x[:1, :1, :2, :2])
    assert torch.autograd.gradcheck(lambda output, x: transition(scheduler, output, 500, x).mean, inputs)


def test_single_precision_stays_single():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    output, x = (value.float() for value in tensors(6))
    result = transition(scheduler, output, scheduler.timesteps[2], x)
    assert result.mean.dtype == result.std.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("other_std", [0.01, 0.02])
def test_the_kl_of_states_in_half_precision_is_that_of_the_same_numbers(dtype, other_std):
    """A shift of 300 standard deviations, whose square float16 does not hold."""
    mean, std = torch.full((2, 3), 3.0, dtype=dtype), torch.tensor(0.01, dtype=dtype)
    one, other = Transition(mean, std), Transition(torch.zeros_like(mean), torch.tensor(other_std, dtype=dtype))
    wide = [Transition(part.mean.double(), part.std.double()) for part in (one, other)]
    found = one.kl(other)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide[0].kl(wide[1]), rtol=1e-5, atol=0)
