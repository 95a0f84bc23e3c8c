"""Rollouts on real, tiny denoisers: diffusers' own loop, the deterministic step, KL, log-ratio, and where the graph is."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch.distributions import Normal

from diffusers_ctrl import MemorylessFlowMatchScheduler
from diffusers_ctrl.labels import Categorical, LabelSpace
from diffusers_ctrl.policy import Policy
from diffusers_ctrl.rollouts import Batch, Rollout, Sampler, base_transition, rollout, start_noise, tuned_transition


SPACE = LabelSpace(stroke=Categorical(("thin", "regular", "bold")))
COMMON = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


# frozen, as the policy freezes it: torch's matmul rounds differently for weights that require a gradient
def conditional():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**COMMON, **blocks, cross_attention_dim=8).double().eval().requires_grad_(False)


def unconditional(**kwargs):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    return UNet2DModel(**{**COMMON, **blocks, **kwargs}).double().eval().requires_grad_(False)


def policy_of(denoiser, perturbed=True, size=0.5, **kwargs):
    policy = Policy(denoiser, label_space=SPACE, lora_rank=2, **kwargs).double()
    generator = torch.Generator().manual_seed(4)
    for group in policy.trainable_parameters().values():
        for parameter in group:
            if perturbed:
                parameter.data.normal_(0.0, size, generator=generator)
    return policy


def sampler_of(num_inference_steps=4, eta=1.0, **kwargs):
    return Sampler(DDIMScheduler(**{"clip_sample": False, **kwargs}), num_inference_steps, {"eta": eta})


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def batch_of(size=2, prompts=False):
    generator = seeded(1)
    return Batch(
        noise=torch.randn(size, 2, 8, 8, generator=generator, dtype=torch.float64),
        labels=torch.arange(size).remainder(3).unsqueeze(1).float(),
        gamma=torch.ones(size),
        prompt_embeds=torch.randn(size, 3, 8, generator=generator, dtype=torch.float64) if prompts else None,
        null_embeds=torch.randn(1, 3, 8, generator=generator, dtype=torch.float64).expand(size, 3, 8) if prompts else None,
    )


def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Sampler


def memoryless_pairs():
    """(a scheduler, its settings of 20 steps, its settings of 4, five of which each stretches over)."""
    trailing = {"timestep_spacing": "trailing", "clip_sample": False, "prediction_type": "v_prediction"}
    sigmas = [1 - i / 20 for i in range(20)]
    yield DDIMScheduler(**trailing), {"options": {"eta": 1.0}}, {"options": {"eta": 1.0}}
    yield DDIMScheduler(**{**trailing, "prediction_type": "epsilon"}), {"options": {"eta": 1.0}}, {"options": {"eta": 1.0}}
    yield DDPMScheduler(**{**trailing, "prediction_type": "sample"}), {}, {}
    yield MemorylessFlowMatchScheduler(shift=3.0), {"grid": {"sigmas": sigmas}}, {"grid": {"sigmas": sigmas[::5]}}


@pytest.mark.parametrize("scheduler, many, few", memoryless_pairs(), ids=lambda value: type(value).__name__)
def test_holding_the_clean_sample_over_several_steps_is_the_step_of_a_coarser_sampler(scheduler, many, few):
    fine = Sampler(copy.deepcopy(scheduler), 20, **many)
    coarse = Sampler(copy.deepcopy(scheduler), 4, **few)
    for place, t in enumerate(coarse.timesteps):
        k = 5 * place
        assert float(fine.timesteps[k]) == pytest.approx(float(t), rel=1e-6)
        x, output = torch.randn(2, 2, 3, 3, 3, generator=seeded(), dtype=torch.float64)
        base = fine.transition(output, fine.timesteps[k], x)
        assert_close(fine.held(base, k, k + 5), coarse.transition(output, t, x).mean, 1e-6)  # sigmas are of single precision
        assert fine.held(base, k, k + 1) is base.mean


def test_a_transition_that_does_not_say_its_clean_sample_cannot_be_held(monkeypatch):
    sampler = sampler_of(4)
    base = sampler.transition(torch.ones(1, 1, 2, 2), sampler.timesteps[0], torch.zeros(1, 1, 2, 2))
    monkeypatch.setattr("diffusers_ctrl.rollouts.transition", lambda *args, **kwargs: replace(base, denoised=None))
    with pytest.raises(ValueError, match="The transition of DDIMScheduler has no `denoised`.*coarse_adjoint: false"):
        sampler.held(base, 0, 2)


def test_eta_zero_is_refused():
    with pytest.raises(ValueError, match=r"(?s)DDIMScheduler.*'eta': 0.0.*no noise.*eta > 0"):
        sampler_of(eta=0.0)


def test_a_scheduler_without_a_transition_is_refused():
    with pytest.raises(ValueError, match="EulerDiscreteScheduler.*DDIMScheduler"):
        Sampler(EulerDiscreteScheduler(), 4)


def test_at_least_one_step_is_needed():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        sampler_of(0)


def test_one_step_only_is_deterministic_and_refused():
    with pytest.raises(ValueError, match="no noise"):
        sampler_of(1)


def test_the_last_step_of_ddim_is_deterministic():
    sampler = sampler_of(4)
    assert sampler.timesteps.tolist() == [750, 500, 250, 0]
    assert sampler.noisy_steps == (0, 1, 2)
    assert sampler.deterministic_timesteps == frozenset({0})
    trailing = sampler_of(4, timestep_spacing="trailing")
    assert trailing.noisy_steps == (0, 1, 2) and trailing.deterministic_timesteps == frozenset({249})


def test_with_an_offset_and_no_alpha_of_one_every_step_has_noise():
    sampler = sampler_of(4, set_alpha_to_one=False, steps_offset=1)
    assert sampler.noisy_steps == (0, 1, 2, 3) and sampler.deterministic_timesteps == frozenset()
    without_offset = sampler_of(4, set_alpha_to_one=False)  # alpha to itself
    assert without_offset.deterministic_timesteps == frozenset({0})


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
def test_the_last_step_of_ddpm_is_deterministic(variance):
    sampler = Sampler(DDPMScheduler(variance_type=variance), 4)
    assert sampler.noisy_steps == (0, 1, 2) and sampler.deterministic_timesteps == frozenset({0})


@pytest.mark.parametrize("settings", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
def test_ddpm_to_the_clean_sample_adds_no_noise_worth_a_kl(settings):
    # the posterior variance of this step is 0, which diffusers clamps to 1e-20 for its logarithm: a KL over it would be x 1e20
    sampler = Sampler(DDPMScheduler(**settings), 4)
    assert sampler.noisy_steps == (0, 1, 2)


def test_a_learned_variance_rolls_out():
    policy = policy_of(unconditional(out_channels=4))
    sampler = Sampler(DDPMScheduler(variance_type="learned_range", clip_sample=False), 4)
    batch = batch_of()
    result = rollout(policy, sampler, batch, seeded())
    assert result.sample.shape == batch.noise.shape
    assert result.stds[0].shape == batch.noise.shape
    assert (result.kl > 0).all() and torch.isfinite(result.kl).all()


# The base law


def diffusers_loop(denoiser, scheduler, steps, batch, generator, guidance_scale=None, **kwargs):
    """StableDiffusionPipeline's loop."""
    scheduler.set_timesteps(steps)
    states = [batch.noise * getattr(scheduler, "init_noise_sigma", 1.0)]
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        if guidance_scale is None:
            prompts = () if batch.prompt_embeds is None else (batch.prompt_embeds,)
            output = denoiser(scaled(states[-1], t), t, *prompts).sample
        else:
            model_input = scaled(torch.cat([states[-1]] * 2), t)
            output = denoiser(model_input, t, torch.cat([batch.null_embeds, batch.prompt_embeds])).sample
            without, with_prompt = output.chunk(2)
            output = without + guidance_scale * (with_prompt - without)
        states.append(scheduler.step(output, t, states[-1], generator=generator, **kwargs).prev_sample)
    return states


# diffusers keeps its coefficients in float32: 1e-5 at most in each of a handful of steps, see test_transitions
@pytest.mark.parametrize("settings", [{}, {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}])
def test_the_untuned_rollout_is_stable_diffusions_loop(settings):
    batch = batch_of(prompts=True)
    sampler = sampler_of(5, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **settings)
    expected = diffusers_loop(conditional(), sampler.scheduler, 5, batch, seeded(), guidance_scale=3.0, eta=1.0)
    policy = policy_of(conditional(), guidance_scale=3.0)
    result = rollout(policy, sampler, batch, seeded(), tuned=False)
    assert len(result.states) == 6 and len(result.stds) == 5
    for ours, theirs in zip(result.states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert not result.kl.any() and not result.log_ratio.any()


def test_the_untuned_rollout_is_the_loop_of_ddpm():
    batch = batch_of()
    sampler = Sampler(DDPMScheduler(clip_sample=False, variance_type="fixed_large"), 5)
    expected = diffusers_loop(unconditional(), sampler.scheduler, 5, batch, seeded())
    result = rollout(policy_of(unconditional()), sampler, batch, seeded(), tuned=False)
    for ours, theirs in zip(result.states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerAncestralDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        EulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(**SDE, use_karras_sigmas=True),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0),
        MemorylessFlowMatchScheduler(shift=3.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_untuned_rollout_is_the_loop_of_every_scheduler(scheduler):
    """The states are the pipeline's, unscaled; the denoiser sees them scaled."""
    batch, sampler = batch_of(prompts=True), Sampler(scheduler, 5)
    # these schedulers step in single precision; a start as large as theirs
    batch = replace(batch, noise=start_noise(batch.noise.shape, sampler, seeded(1)))
    denoiser = conditional().float()
    batch = replace(batch, prompt_embeds=batch.prompt_embeds.float(), null_embeds=batch.null_embeds.float())
    scale = getattr(sampler.scheduler, "init_noise_sigma", 1.0)
    expected = diffusers_loop(denoiser, scheduler, 5, replace(batch, noise=batch.noise / scale), seeded())
    assert sampler.noisy_steps == (0, 1, 2, 3)
    result = rollout(policy_of(conditional()).float(), sampler, batch, seeded(), tuned=False)
    for ours, theirs in zip(result.states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    tuned = rollout(policy_of(conditional()).float(), sampler, batch, seeded())
    assert (tuned.kl > 0).all() and torch.isfinite(tuned.kl).all() and not torch.equal(tuned.sample, result.sample)


def test_a_fresh_policy_rolls_out_the_base_at_no_cost():
    policy, sampler, batch = (
        policy_of(conditional(), perturbed=False, guidance_scale=3.0),
        sampler_of(),
        batch_of(prompts=True),
    )
    tuned, base = rollout(policy, sampler, batch, seeded()), rollout(policy, sampler, batch, seeded(), tuned=False)
    for a, b in zip(tuned.states, base.states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tuned.kl, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(tuned.log_ratio, torch.zeros(2, dtype=torch.float64))


# The tuned law


def test_the_deterministic_step_is_taken_with_the_base():
    denoiser = unconditional()
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of()
    for grad_steps in (0, 4):
        result = rollout(policy, sampler, batch, seeded(), grad_steps=grad_steps)
        before, t = result.states[-2].detach(), sampler.timesteps[-1]
        base = sampler.transition(denoiser(before, t).sample, t, before)
        tuned = sampler.transition(policy(before, t, batch.labels), t, before)
        assert base.is_deterministic
        assert torch.equal(result.sample.detach(), base.mean)
        assert not torch.allclose(result.sample.detach(), tuned.mean, atol=1e-4)


def test_noisy_steps_are_taken_with_the_tuned_model_and_the_generators_noise():
    policy, sampler, batch = policy_of(conditional(), guidance_scale=3.0), sampler_of(), batch_of(prompts=True)
    result, generator = rollout(policy, sampler, batch, seeded()), seeded()
    for k in range(3):
        x = result.states[k]
        noise = randn_tensor(x.shape, generator=generator, dtype=x.dtype)
        t = sampler.timesteps[k]
        output = policy(x, t, batch.labels, batch.gamma, batch.prompt_embeds, batch.null_embeds)
        law = sampler.transition(output, t, x)
        assert_close(result.states[k + 1], law.mean + law.std * noise)
        assert torch.equal(result.stds[k], law.std)
    assert result.stds[3] == 0


def test_kl_and_log_ratio_are_sums_over_the_noisy_steps():
    policy, sampler, batch = policy_of(unconditional()), sampler_of(5), batch_of(3)
    result = rollout(policy, sampler, batch, seeded())
    kl, log_ratio = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for k in sampler.noisy_steps:
        x, following = result.states[k], result.states[k + 1]
        tuned, base = tuned_transition(policy, sampler, batch, k, x), base_transition(policy, sampler, batch, k, x)
        kl += ((tuned.mean - base.mean) ** 2).flatten(1).sum(1) / (2 * tuned.std**2)
        densities = [Normal(law.mean, law.std).log_prob(following).flatten(1).sum(1) for law in (tuned, base)]
        log_ratio += densities[0] - densities[1]
    assert len(sampler.noisy_steps) == 4 and (kl > 1e-3).all()
    assert_close(result.kl, kl.detach())
    assert_close(result.log_ratio, log_ratio.detach())


def test_the_log_ratio_is_the_kl_on_average():
    policy, sampler, batch = policy_of(unconditional(), size=0.4), sampler_of(), batch_of(256)
    result = rollout(policy, sampler, batch, seeded())
    difference = result.log_ratio - result.kl
    error = difference.std() / len(batch) ** 0.5
    assert difference.mean().abs() < 4 * error
    assert result.kl.mean() > 16 * error  # so that 0, twice the KL or its negative would be seen


def test_rows_do_not_see_each_other():
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of(3)
    together = rollout(policy, sampler, batch, seeded())
    relabelled = Batch(batch.noise, torch.tensor([[0.0], [1.0], [0.0]]), batch.gamma)
    other = rollout(policy, sampler, relabelled, seeded())
    assert_close(other.sample[:2], together.sample[:2])
    assert_close(other.kl[:2], together.kl[:2])
    assert (other.sample[2] - together.sample[2]).abs().max() > 1e-4


def test_the_generator_decides_the_trajectory():
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of()
    first, same, other = (rollout(policy, sampler, batch, seeded(seed)).sample for seed in (7, 7, 8))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)


# Graphs


@pytest.mark.parametrize("grad_steps", [0, 1, 2, 4])
def test_the_graph_is_over_the_last_steps_only(grad_steps):
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of()
    full = rollout(policy, sampler, batch, seeded(), grad_steps=4)
    result = rollout(policy, sampler, batch, seeded(), grad_steps=grad_steps)
    first = 4 - grad_steps
    # the last step is the base's: alone it has no parameter to give a gradient to
    has_graph = [first < k <= 4 and first < 3 for k in range(5)]
    assert [state.requires_grad for state in result.states] == has_graph
    assert result.kl.requires_grad == (first < 3)
    assert not result.log_ratio.requires_grad
    # the values do not depend on it
    for a, b in zip(result.states, full.states, strict=True):
        assert_close(a.detach(), b.detach())
    assert_close(result.kl.detach(), full.kl.detach())
    assert_close(result.log_ratio, full.log_ratio)


def gradient_of(policy, loss):
    parameters = [parameter for group in policy.trainable_parameters().values() for parameter in group]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("grad_steps", [2, 3, 4])
def test_the_gradient_is_that_of_the_last_steps_from_a_fixed_state(grad_steps):
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of()
    result = rollout(policy, sampler, batch, seeded(), grad_steps=grad_steps)
    ours = gradient_of(policy, result.sample.square().sum() + result.kl.sum())

    generator = seeded()
    noises = [randn_tensor(batch.noise.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    first = 4 - grad_steps
    x, kl, pretrained = result.states[first].detach(), 0.0, unconditional()
    for k in range(first, 4):
        t = sampler.timesteps[k]
        base = sampler.transition(pretrained(x, t).sample, t, x)
        if k == 3:
            x = base.mean
            continue
        tuned = sampler.transition(policy(x, t, batch.labels), t, x)
        kl = kl + ((tuned.mean - base.mean) ** 2).sum() / (2 * tuned.std**2)
        x = tuned.mean + tuned.std * noises[k]
    by_hand = gradient_of(policy, x.square().sum() + kl)
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(ours, by_hand, rtol=1e-8, atol=1e-10)


def test_earlier_steps_and_the_noise_get_no_gradient():
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of()
    for grad_steps, reached in ((3, False), (4, True)):
        noise = batch.noise.clone().requires_grad_()
        result = rollout(policy, sampler, Batch(noise, batch.labels, batch.gamma), seeded(), grad_steps=grad_steps)
        (result.sample.sum() + result.kl.sum()).backward()
        assert (noise.grad is not None) == reached


def test_without_the_reference_steps_without_a_graph_count_zero():
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of()
    plain = rollout(policy, sampler, batch, seeded(), reference=False)
    assert not plain.kl.any() and not plain.log_ratio.any()
    full = rollout(policy, sampler, batch, seeded())
    assert torch.equal(plain.sample, full.sample)
    last = rollout(policy, sampler, batch, seeded(), grad_steps=2, reference=False)
    k = 2
    step = tuned_transition(policy, sampler, batch, k, full.states[k]).kl(
        base_transition(policy, sampler, batch, k, full.states[k])
    )
    assert_close(last.kl.detach(), step.detach())


def test_a_rollout_leaves_gradient_mode_and_base_as_they_were():
    policy, sampler, batch = policy_of(unconditional()), sampler_of(), batch_of()
    rollout(policy, sampler, batch, seeded())
    assert torch.is_grad_enabled()
    with torch.no_grad():
        rollout(policy, sampler, batch, seeded(), grad_steps=2)
        assert not torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in policy.parameters())


# Small things


def test_start_noise_is_the_pipelines():
    sampler = sampler_of()
    noise = start_noise((2, 2, 8, 8), sampler, seeded())
    assert torch.equal(noise, randn_tensor((2, 2, 8, 8), generator=seeded()) * sampler.scheduler.init_noise_sigma)


def test_rows_of_a_batch_are_taken_from_every_field():
    batch = batch_of(4, prompts=True)
    part = batch[1:3]
    assert len(batch) == 4 and len(part) == 2
    for name in ("noise", "labels", "gamma", "prompt_embeds", "null_embeds"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[1:3])
    assert part.prompts is None
    picked = batch[torch.tensor([3, 0])]
    assert torch.equal(picked.labels, batch.labels[[3, 0]])


def test_a_rollout_is_frozen():
    result = rollout(policy_of(unconditional()), sampler_of(), batch_of(), seeded())
    assert isinstance(result, Rollout) and result.sample is result.states[-1]
    with pytest.raises(AttributeError):
        result.kl = None
