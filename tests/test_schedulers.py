"""The memoryless flow scheduler: Bayes' rule, its SDE, what it forgets, its law, and diffusers' own pipelines with it."""

import math

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from diffusers_ctrl import MemorylessFlowMatchScheduler
from diffusers_ctrl.schedulers import posterior_coefficients
from diffusers_ctrl.transitions import transition


WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)
STDS = torch.tensor([0.15, 0.25, 0.1], dtype=torch.float64)


def velocity(x, s):
    """The exact velocity of a flow to a mixture of three Gaussians, (N,) -> (N,)."""
    a = 1 - s
    variance = a**2 * STDS**2 + s**2
    away = x.unsqueeze(1) - a * MEANS
    share = (WEIGHTS.log() - away**2 / (2 * variance) - variance.log() / 2).softmax(1)
    clean = (share * (MEANS + a * STDS**2 / variance * away)).sum(1)
    return (x - clean) / s


def ready(steps, **settings):
    scheduler = MemorylessFlowMatchScheduler(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler, count=40_000, seed=0):
    """(x_0, x_K) of the flow to the mixture, by the scheduler's own steps."""
    generator = torch.Generator().manual_seed(seed)
    start = x = torch.randn(count, 1, generator=generator)
    for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        output = velocity(x[:, 0].double(), s.item()).float().unsqueeze(1)
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return start[:, 0].double(), x[:, 0].double()


def distance(x, count=200_000):
    """Wasserstein distance to the mixture in one dimension."""
    generator = torch.Generator().manual_seed(1)
    modes = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    exact = MEANS[modes] + STDS[modes] * torch.randn(count, generator=generator, dtype=torch.float64)
    place = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    return (x.sort().values - exact.quantile(place)).abs().mean().item()


# -- the step --


@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.9), (0.9, 0.5), (0.5, 0.01), (0.3, 0.0)])
def test_the_step_is_bayes_rule(s, s_next):
    """Of the pair (x_{k+1}, x_k) given the clean sample, whose covariance is that of a Markov noising process."""
    a, a_next = 1 - s, 1 - s_next
    keep = a / a_next  # x_k = keep · x_{k+1} + fresh noise
    gain = keep * s_next**2 / s**2
    clean_weight, state_weight, std = posterior_coefficients((a, s), (a_next, s_next))
    assert math.isclose(state_weight, gain, rel_tol=1e-12, abs_tol=1e-15)
    assert math.isclose(clean_weight, a_next - gain * a, rel_tol=1e-12)
    assert math.isclose(std**2, s_next**2 - gain * keep * s_next**2, rel_tol=1e-9, abs_tol=1e-15)
    # so that the next state has its own law given the clean sample: mean a', variance s'²
    assert math.isclose(clean_weight + state_weight * a, a_next, rel_tol=1e-12)
    assert math.isclose((state_weight * s) ** 2 + std**2, s_next**2, rel_tol=1e-12, abs_tol=1e-15)


@pytest.mark.parametrize("s", [0.95, 0.5, 0.1])
def test_short_steps_are_the_memoryless_sde(s):
    """dx = (−2v − x/t) dt + sqrt(2 (1 − t)/t) dB, t = 1 − s: arXiv 2409.08861, with v from data to noise."""
    h, t = 1e-6, 1 - s
    clean_weight, state_weight, std = posterior_coefficients((1 - s, s), (1 - s + h, s - h))
    x, v = 0.7, -0.4
    drift = (clean_weight * (x - s * v) + state_weight * x - x) / h
    assert math.isclose(drift, -2 * v - x / t, rel_tol=1e-4, abs_tol=1e-4)
    assert math.isclose(std**2 / h, 2 * (1 - t) / t, rel_tol=1e-4)


def test_no_change_of_signal_is_no_step():
    assert posterior_coefficients((0.4, 0.6), (0.4, 0.6)) == (0.0, 1.0, 0.0)
    assert posterior_coefficients((0.4, 0.6), (0.4 + 1e-9, 0.6 - 1e-9)) == (0.0, 1.0, 0.0)
    assert posterior_coefficients((0.0, 1.0), (0.0, 1.0)) == (0.0, 1.0, 0.0)


def test_it_is_sde_dpm_solver_on_the_flows_sigmas():
    dpm = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=1, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    dpm.set_timesteps(8)
    ours = MemorylessFlowMatchScheduler()
    ours.set_timesteps(sigmas=dpm.sigmas[:-1].tolist())
    generator = torch.Generator().manual_seed(0)
    for theirs, mine in zip(dpm.timesteps, ours.timesteps, strict=True):
        output, x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        one, other = transition(dpm, output, theirs, x), transition(ours, output, mine, x)
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.std, other.std, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}])
def test_it_starts_from_noise_ends_on_the_sample_and_is_finite_in_between(settings):
    scheduler = ready(16, **settings)
    assert scheduler.sigmas[0] == 1.0 and scheduler.sigmas[-1] == 0.0
    assert scheduler.timesteps.tolist() == (1000 * scheduler.sigmas[:-1]).tolist()
    assert min(a - b for a, b in zip(scheduler.sigmas, scheduler.sigmas[1:], strict=False)) > 0.015
    x, output = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    laws = [transition(scheduler, output, t, x) for t in scheduler.timesteps]
    assert all(torch.isfinite(law.mean).all() and torch.isfinite(law.std) for law in laws)
    # the first step knows x_0 only by what it says of the clean sample, the last one is that sample
    assert torch.equal(laws[0].mean, (1 - scheduler.sigmas[1]).double().float() * laws[0].denoised)
    assert laws[-1].is_deterministic and torch.equal(laws[-1].mean, x - scheduler.sigmas[-2] * output)
    assert not any(law.is_deterministic for law in laws[:-1])


def test_states_carry_the_noise_that_the_model_expects():
    """With a known clean sample the std of every state is that of the schedule, whatever the steps."""
    scheduler, std = ready(8), 1.0
    for k, t in enumerate(scheduler.timesteps):
        s = scheduler.sigmas[k].item()
        points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        law = transition(scheduler, points / s, t, points)  # the velocity to a clean sample at 0
        std = math.hypot((law.mean[1] - law.mean[0]).item() * std, law.std.item())
        assert math.isclose(std, scheduler.sigmas[k + 1].item(), rel_tol=1e-6, abs_tol=1e-7)


# -- the law --


def test_the_end_does_not_remember_the_start():
    start, end = run(ready(16))
    assert abs(torch.corrcoef(torch.stack([start, end]))[0, 1]) < 4 / len(start) ** 0.5
    ode = FlowMatchEulerDiscreteScheduler()
    ode.set_timesteps(16)
    start, end = run(ode)
    assert torch.corrcoef(torch.stack([start, end]))[0, 1] > 0.9


def test_the_law_tends_to_the_flows_as_steps_are_added():
    found = [distance(run(ready(steps))[1]) for steps in (8, 16, 32)]
    assert found[0] < 0.15 and found[2] < 0.045
    assert all(0.35 < after / before < 0.65 for before, after in zip(found, found[1:], strict=False)), found  # first order
    # diffusers' stochastic sampling, which throws the noise away at each step, does not
    renoised = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    renoised.set_timesteps(32)
    assert distance(run(renoised)[1]) > 3 * found[2]


# -- as a diffusers scheduler --


def test_a_step_counts_and_follows_its_generator():
    scheduler = ready(4)
    x, output = torch.zeros(2, 3), torch.ones(2, 3)
    first = scheduler.step(output, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(3))
    assert scheduler.step_index == 1
    again = ready(4)
    same = again.step(output, again.timesteps[0], x, generator=torch.Generator().manual_seed(3), return_dict=False)[0]
    assert torch.equal(first.prev_sample, same)
    again = ready(4)
    assert not torch.equal(same, again.step(output, again.timesteps[0], x, generator=torch.Generator().manual_seed(4)).prev_sample)


def test_half_precision_is_stepped_in_single():
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = ready(4)
        scheduler.set_begin_index(2)
        x = torch.full((1, 4), 0.5, dtype=dtype)
        results.append(scheduler.step(x, scheduler.timesteps[2], x, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert results[1].dtype == torch.bfloat16 and torch.equal(results[0].bfloat16(), results[1])


@pytest.mark.parametrize(
    ("timestep", "kwargs", "message"),
    [
        (3, {}, "needs one of scheduler.timesteps, not an index; got 3"),
        (torch.tensor(3), {}, "needs one of scheduler.timesteps"),
        (None, {"per_token_timesteps": torch.zeros(1, 3)}, "per_token_timesteps is not supported"),
    ],
)
def test_what_it_cannot_step_is_named(timestep, kwargs, message):
    scheduler = ready(4)
    t = scheduler.timesteps[0] if timestep is None else timestep
    with pytest.raises(ValueError, match=message):
        scheduler.step(torch.zeros(1, 3), t, torch.zeros(1, 3), **kwargs)
    assert scheduler.step_index is None


def test_its_configuration_is_the_flow_schedulers(tmp_path):
    base = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.3)
    ours = MemorylessFlowMatchScheduler.from_config(base.config)
    ours.save_pretrained(tmp_path)
    loaded = MemorylessFlowMatchScheduler.from_pretrained(tmp_path)
    back = FlowMatchEulerDiscreteScheduler.from_config(loaded.config)
    settings = [{k: v for k, v in one.config.items() if not k.startswith("_")} for one in (base, ours, loaded, back)]
    assert settings[0]["max_shift"] == 1.3 and all(one == settings[0] for one in settings[1:])


def tiny_vae(channels):
    return AutoencoderKL(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        mid_block_add_attention=False,
    )


def tiny_sd3(scheduler):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=tiny_vae(4), **none)


def tiny_flux(scheduler):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=transformer, scheduler=scheduler, vae=tiny_vae(4), **none)


def call(pipe, steps=4):
    """The pipeline's latents. Its own calls give the scheduler no generator, so the global one decides."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    embeds = torch.randn(1, 3, 16)
    inputs = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0], "guidance_scale": 1.0, "height": 8, "width": 8}
    return pipe(**inputs, num_inference_steps=steps, output_type="latent").images


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("dynamic", [False, True])
def test_diffusers_pipelines_take_it_by_from_config(tmp_path, build, dynamic):
    pipe = build(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic))
    plain = call(pipe)
    pipe.scheduler = MemorylessFlowMatchScheduler.from_config(pipe.scheduler.config)
    first = call(pipe)
    assert torch.isfinite(first).all() and not torch.equal(first, plain)
    assert pipe.scheduler.step_index == 4 and pipe.scheduler.sigmas[0] == 1.0
    assert torch.equal(call(pipe), first)
    pipe.save_pretrained(tmp_path)
    left_out = {name: None for name, value in pipe.components.items() if value is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **left_out)
    assert type(loaded.scheduler) is MemorylessFlowMatchScheduler
    torch.testing.assert_close(call(loaded), first)
