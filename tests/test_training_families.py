"""One update through the trainer on a real tiny pipeline of every family."""

import copy
import functools

import pytest
import torch

from diffusers_ctrl import CTRLConfig, CTRLTrainer
from diffusers_ctrl.decoding import decoder
from diffusers_ctrl.labels import Categorical, LabelSpace
from diffusers_ctrl.policy import Policy
from diffusers_ctrl.recording import record_conditions
from families import BUILDERS, build


SPACE = LabelSpace(stroke=Categorical(("thin", "regular", "bold")))
STEPS = 4
GUIDED = [name for name in BUILDERS if name not in ("flux", "ddpm")]
# flow schedulers with noise are not memoryless and DDIM of SD starts with some signal: the trainer says so
pytestmark = [pytest.mark.filterwarnings("ignore:.*memoryless"), pytest.mark.usefixtures("fresh_accelerate")]


def reward(images, labels):
    """(B,) nats: how near the mean brightness is to what the label asks for."""
    return -50 * (images.float().mean(dim=(1, 2, 3)) - labels[:, 0] / 2).square()


@functools.cache
def recording(name, guided, dtype):
    """(conditions, arguments of the call, guidance scale) of a family."""
    family = build(name)
    family.pipe.scheduler = family.noisy
    family.pipe.to(dtype)
    more = {**family.call, **(family.guided if guided else {})}
    prompts, scale = more.pop(family.samples), more.pop("guidance_scale", 1.0)
    prompts = prompts if isinstance(prompts, list) else [""]
    return record_conditions(family.pipe, prompts, num_inference_steps=STEPS, guidance_scale=scale, **more), scale


def trainer(name, tmp_path, guided=False, dtype=torch.float32, blocks=False, **settings):
    """A trainer of a fresh pipeline; `blocks` turns on the denoiser's own gradient checkpointing."""
    family = build(name)
    family.pipe.scheduler = family.noisy
    family.pipe.to(dtype)
    for component in family.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    conditions, scale = recording(name, guided, dtype)
    given = {key: value for key, value in family.call.items() if key not in (family.samples, "guidance_scale")}
    torch.manual_seed(0)
    config = CTRLConfig(
        output_dir=str(tmp_path / name),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        lora_rank=2,
        batch_size=3,
        max_updates=1,
        lr_warmup=0,
        checkpoint_every=0,
        sample_every=0,
        report_to="none",
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        **settings,
    )
    policy = Policy(
        family.denoiser,
        label_space=SPACE,
        lora_rank=2,
        guidance_scale=scale,
        checkpointing=settings.get("checkpointing", False),
        control_head=config.control_head,
        shape=conditions.shape,
    )
    if blocks:
        family.denoiser.enable_gradient_checkpointing()
    decode = decoder(family.pipe, **given)
    return CTRLTrainer(
        policy, family.pipe.scheduler, reward, config, shape=conditions.shape, decode=decode, prompt_embeds=conditions
    )


CHECKPOINTING = {"none": {}, "calls": {"checkpointing": True}, "blocks": {"blocks": True}}
BATTERY = [
    # objective, guided, dtype, checkpointing: each setting with each other one at least once
    ("adjoint_matching", False, torch.float32, "none"),
    ("adjoint_matching", True, torch.bfloat16, "calls"),
    ("direct_backprop", True, torch.float32, "blocks"),
    ("direct_backprop", False, torch.bfloat16, "blocks"),
    ("direct_backprop", True, torch.bfloat16, "none"),
]


@pytest.mark.parametrize(
    ("objective", "guided", "dtype", "checkpointing"), BATTERY, ids=lambda value: str(value).removeprefix("torch.")
)
@pytest.mark.parametrize("name", BUILDERS)
def test_one_update_moves_the_lora_and_the_label_encoder_and_nothing_else(
    name, objective, guided, dtype, checkpointing, tmp_path, monkeypatch
):
    guided = guided and name in GUIDED
    run = trainer(name, tmp_path, guided, dtype, objective=objective, **CHECKPOINTING[checkpointing])
    policy = run.policy
    before = {key: value.detach().clone() for key, value in policy.named_parameters()}
    gradients = {}
    optimize = run._optimize
    named = dict(policy.named_parameters())

    def looking(totals):
        gradients.update({key: None if p.grad is None else p.grad.detach().clone() for key, p in named.items()})
        return optimize(totals)

    monkeypatch.setattr(run, "_optimize", looking)
    (metrics,) = run.train()
    assert all(map(torch.isfinite, torch.tensor([metrics["objective"], metrics["kl"], metrics["grad_norm"]])))
    assert metrics["kl"] == 0 and metrics["reward"] < 0  # the first trajectories are the base's
    moved = {key for key, value in policy.named_parameters() if not torch.equal(value, before[key])}
    for key, gradient in gradients.items():
        if "lora_B" in key or key.startswith("label_encoder."):
            assert gradient.isfinite().all() and gradient.any(), key
            assert key in moved
        elif "lora_A" in key:  # times a B that is still zero
            assert not gradient.any() and key not in moved
        else:
            assert gradient is None and key not in moved, key
    assert any("lora_B" in key for key in moved) and any(key.startswith("label_encoder.") for key in moved)


def gradient(name, tmp_path, **settings):
    """Of direct_backprop's loss at a policy that is away from the base, by parameter."""
    run = trainer(name, tmp_path, name in GUIDED, objective="direct_backprop", **settings)
    generator = torch.Generator().manual_seed(4)
    for group in run.policy.trainable_parameters().values():
        for parameter in group:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    found = {}
    run._optimize = lambda totals: found.update(totals, **{n: p.grad.clone() for n, p in run._named.items()})
    run._step()
    return found


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("checkpointing", ["calls", "blocks"])
def test_checkpointing_changes_no_gradient(name, checkpointing, tmp_path):
    expected = gradient(name, tmp_path)
    found = gradient(name, tmp_path, **CHECKPOINTING[checkpointing])
    assert expected["kl"] > 0 and found["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.any()
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * value.abs().max().item())


@pytest.mark.parametrize("name", ["stable_diffusion", "dit"])
def test_blocks_that_are_checkpointed_by_torch_alone_would_give_another_gradient(name, tmp_path):
    """What the policy's own function is for: without it the label and the LoRA's bypass are lost in backward."""
    run = trainer(name, tmp_path, objective="direct_backprop", blocks=True)
    run.policy._checkpointed_modules = list  # so that the denoiser keeps its own function
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        run._step()


@pytest.mark.parametrize("name", BUILDERS)
def test_the_rollout_is_the_pipeline_s_own_trajectory(name, tmp_path):
    """From the same x_0, with the same noise, training's loop ends where the pipeline ends."""
    run = trainer(name, tmp_path, name in GUIDED)
    environment, family = run.environment, build(name)
    scheduler = copy.deepcopy(family.noisy)
    family.pipe.scheduler, states, step = scheduler, [], scheduler.step

    @functools.wraps(step)
    def watching(model_output, t, sample, *args, **kwargs):
        states.append((float(t), sample[:1]))
        return step(model_output, t, sample, *args, **kwargs)

    scheduler.step = watching
    call = {**family.one(0), **family.options, **(family.guided if name in GUIDED else {})}
    if isinstance(call.get("negative_prompt"), list):
        call["negative_prompt"] = call["negative_prompt"][0]
    if name not in ("ddpm", "flux_true_cfg"):
        call.setdefault("guidance_scale", 1.0)
    torch.manual_seed(3)
    family.pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5), output_type="pt")
    batch = environment.grid(1, None)[:1]
    sampler = environment.sampler
    assert [t for t, _ in states] == [float(t) for t in sampler.timesteps]
    assert len(sampler.noisy_steps) in (STEPS - 1, STEPS)
    for k, (_, x) in enumerate(states[:-1]):
        with torch.no_grad():
            t = sampler.timesteps[k]
            output = run.policy.reference(sampler.model_input(t, x), t, batch.prompt_embeds)
            law = sampler.transition(output, t, x)
            z = (states[k + 1][1] - law.mean) / law.std
        # what is left of the pipeline's own step is a standard normal
        assert abs(z.mean()) < 5 / z.numel() ** 0.5 and abs(z.std() - 1) < 5 / (2 * z.numel()) ** 0.5


def test_a_coarse_start_needs_a_grid_that_follows_from_the_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="coarse_updates cannot be had here: the pipeline sets .'mu', 'sigmas'. of its own"):
        trainer("flux", tmp_path, coarse_updates=1, coarse_steps=2)
    run = trainer("stable_diffusion", tmp_path, coarse_updates=1, coarse_steps=2)
    assert run.train()[0]["kl"] == 0  # on timesteps that were not recorded
