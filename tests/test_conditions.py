"""What is recorded of a pipeline against the pipeline itself, on real tiny ones of every family."""

import functools
import inspect

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)

import families
from diffusers_ctrl import CTRLPipeline
from diffusers_ctrl.bases import call_arguments
from diffusers_ctrl.conditions import Condition, Repeated, Rows, fill
from diffusers_ctrl.labels import Categorical, LabelSpace
from diffusers_ctrl.policy import Policy
from diffusers_ctrl.recording import _template, record_conditions
from diffusers_ctrl.replay import replay
from families import BUILDERS, build


SPACE = LabelSpace(stroke=Categorical(("thin", "regular", "bold")))
STEPS = 4
GUIDED = [name for name in BUILDERS if name not in ("flux", "ddpm")]
CASES = [(name, False) for name in BUILDERS] + [(name, True) for name in GUIDED]
NAN = float("nan")


def prepared(name, dtype=torch.float32):
    """The family with its noisy scheduler and frozen weights (whether a weight requires a gradient changes the bits of products)."""
    family = build(name)
    family.pipe.scheduler = family.noisy
    family.pipe.to(dtype)
    for component in family.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    return family


def settings(family, guided):
    """(prompts, guidance_scale, more arguments of the call)."""
    more = {**family.call, **(family.guided if guided else {})}
    prompts = more.pop(family.samples)
    return prompts if isinstance(prompts, list) else [""], more.pop("guidance_scale", 1.0), more


def recorded(family, guided=False, **changes):
    prompts, scale, more = settings(family, guided)
    given = {"num_inference_steps": STEPS, "guidance_scale": scale, **more, **changes}
    return record_conditions(family.pipe, given.pop("prompts", prompts), **given)


def perturbed_policy(family, guidance_scale=1.0, **kwargs):
    """Random LoRA and label encoder, as after training, large enough to matter."""
    policy = Policy(family.denoiser, label_space=SPACE, lora_rank=2, guidance_scale=guidance_scale, **kwargs)
    generator = torch.Generator().manual_seed(4)
    for group in policy.trainable_parameters().values():
        for parameter in group:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return policy


def real_steps(family, guided=False, only=None):
    """(t, state as the denoiser gets it, model output) of every scheduler step of a plain call of the pipeline; of its two samples, or
    of sample `only` drawn alone."""
    seen, scheduler, step = [], family.pipe.scheduler, family.pipe.scheduler.step
    call = {**(family.call if only is None else family.one(only)), **family.options, **(family.guided if guided else {})}
    if only is not None and isinstance(call.get("negative_prompt"), list):
        call["negative_prompt"] = call["negative_prompt"][only]
    if "guidance_scale" in inspect.signature(family.pipe.__call__).parameters:
        call.setdefault("guidance_scale", 1.0)
    rows = 2 if only is None else 1

    @functools.wraps(step)
    def watching(model_output, t, sample, *args, **kwargs):
        given = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        seen.append((t, given[:rows], model_output[:rows]))
        return step(model_output, t, sample, *args, **kwargs)

    scheduler.step = watching
    try:
        family.pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5), output_type="pt")
    finally:
        del scheduler.step
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "guided"), CASES)
def test_the_reference_is_what_the_pipeline_gives_its_scheduler_bit_for_bit(name, guided, dtype):
    family = prepared(name, dtype)
    conditions = recorded(family, guided)
    # a sample drawn alone: text encoders round a prompt otherwise in company
    steps = real_steps(family, guided, only=len(conditions) - 1)
    assert len(steps) == STEPS
    policy = perturbed_policy(family, conditions.plan.guidance_scale)
    for t, state, output in steps:
        assert state.shape[1:] == conditions.shape and state.dtype == conditions.dtype
        with torch.no_grad():
            assert torch.equal(policy.reference(state, t, conditions[-1:]), output)


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_is_by_hand_with_the_label_on_the_conditional_part_alone(name):
    family = prepared(name)
    other = {} if name == "dit" else {"negative_prompt": "nil"}  # the same for both prompts
    guided = recorded(family, True, **other)
    alone = recorded(family)
    null = recorded(family, prompts=[1000] if name == "dit" else ["nil"])
    t, state, _ = real_steps(family)[1]
    policy = perturbed_policy(family, alone.plan.guidance_scale)
    with torch.no_grad():
        labels = torch.tensor([[0.0], [2.0]])
        conditional = policy(state, t, labels, None, alone)
        unconditional = policy(state, t, torch.full_like(labels, NAN), None, null[[0, 0]])
        labelled = policy(state, t, labels, None, null[[0, 0]])
        policy.guidance_scale = guided.plan.guidance_scale
        found = policy(state, t, labels, None, guided)
    expected = unconditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    wrong = labelled + 3.0 * (conditional - labelled)
    assert (found - wrong).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_are_the_prompts_and_a_batch_takes_any_of_them(name):
    family = prepared(name)
    prompts = settings(family, False)[0]
    conditions = recorded(family, name in GUIDED)
    assert isinstance(conditions, Condition) and len(conditions) == len(prompts)
    rows = torch.tensor([0, len(prompts) - 1, 0])
    batch = conditions[rows]
    assert len(batch) == 3 and batch.index.tolist() == rows.tolist()
    policy = perturbed_policy(family, conditions.plan.guidance_scale)
    t = float(family.pipe.scheduler.timesteps[1])
    x = torch.randn(3, *conditions.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0.0], [1.0], [2.0]])
    with torch.no_grad():
        together = policy(x, t, labels, None, batch)
        parts = torch.cat([policy(x[i : i + 1], t, labels[i : i + 1], None, batch[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, parts, rtol=1e-3, atol=1e-5 * parts.abs().max().item())
        other = policy(x, t, torch.tensor([[0.0], [1.0], [NAN]]), None, batch)
    assert ((other - together).flatten(1).abs().amax(1) > 1e-4).tolist() == [False, False, True]
    if len(prompts) > 1:
        with torch.no_grad():
            swapped = policy(x, t, labels, None, conditions[torch.tensor([1, 1, 0])])
        assert ((swapped - together).flatten(1).abs().amax(1) > 1e-4).tolist() == [True, False, False]


def test_what_all_prompts_share_is_kept_once_and_moves_as_one():
    family = prepared("stable_diffusion")
    conditions = recorded(family, True, prompts=["one", "two", "three"]).to("meta")
    (null, text), *_ = conditions.tensors
    assert null.shape == text.shape == (3, 8, 16)
    assert null.stride(0) == 0 and text.stride(0) > 0
    assert {tensor.device.type for tensor in (null, text, conditions.index)} == {"meta"}
    shared = recorded(prepared("flux")).to("meta").plan.calls[0].kwargs
    assert shared["img_ids"].device.type == shared["txt_ids"].device.type == "meta"


@pytest.mark.parametrize("name", ["stable_diffusion", "sana", "flux", "dit"])
def test_the_pipeline_is_left_as_it_was(name):
    family = prepared(name)
    pipe, before = family.pipe, dict(vars(family.denoiser))
    scheduler, random = pipe.scheduler, torch.get_rng_state()
    inside = dict(vars(scheduler))
    recorded(family)
    with pytest.raises(ValueError):
        recorded(family, nonsense=1)
    assert pipe.scheduler is scheduler and vars(scheduler).keys() == inside.keys()
    # diffusers' own cache_context leaves an empty registry of hooks behind
    assert "decode" not in vars(pipe.vae) and vars(family.denoiser).keys() - {"_diffusers_hook"} == before.keys()
    assert torch.equal(torch.get_rng_state(), random)
    assert pipe._progress_bar_config == {"disable": True}


def test_a_scheduler_that_scales_its_states_is_recorded_with_the_scaling():
    family = prepared("stable_diffusion_xl")
    family.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(family.pipe.scheduler.config)
    conditions, steps = recorded(family), real_steps(family, only=1)
    policy = perturbed_policy(family)
    for t, scaled, output in steps:
        with torch.no_grad():
            assert torch.equal(policy.reference(scaled, t, conditions[1:]), output)


def test_the_start_is_as_wide_as_the_scheduler_asks_at_this_number_of_steps():
    family = prepared("stable_diffusion")
    family.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(family.pipe.scheduler.config, timestep_spacing="leading")
    seen = replay(family.pipe, call_arguments(family.pipe, ["one"] * 64, STEPS), max_steps=1)
    assert seen.start_std == pytest.approx(seen.steps[0].state.std().item(), rel=0.03)
    assert abs(seen.start_std / float(family.pipe.scheduler.init_noise_sigma) - 1) > 0.1  # at all of its 1,000


def test_what_the_denoiser_is_told_of_t():
    flux = recorded(prepared("flux"))
    assert flux.grid["sigmas"].tolist() == [1.0, 0.75, 0.5, 0.25] and flux.grid["mu"] > 0
    times = flux.plan.times
    assert times(times.grid[1]) == times.values[1]
    torch.testing.assert_close(times(500.0), torch.tensor(0.5))  # not a step of the recording
    family = prepared("sana")
    family.denoiser.register_to_config(timestep_scale=0.25)
    torch.testing.assert_close(recorded(family).plan.times(400.0), torch.tensor(100.0))
    unknown = recorded(prepared("ddpm")).plan.times
    assert unknown(7) == 7 and unknown(7).dtype == torch.int64


def lumina():
    """A family that none of this was written for: it is told 1 - t / 1000, calls twice, and turns the sign around."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, encoder = families._gemma()
        transformer = Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(128, 32, 32),
            cap_feat_dim=16,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        pipe = Lumina2Pipeline(transformer, scheduler, families.tiny_vae(shift_factor=0.1), encoder, tokenizer)
        for module in (transformer, pipe.vae, encoder):
            families._spread(module)
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": list(families.PROMPTS), "height": 32, "width": 32, "max_sequence_length": 24, "cfg_normalization": False}
    return families.Family("lumina2", pipe, call, "prompt", scheduler, {"guidance_scale": 3.0})


def test_a_family_that_nobody_thought_of():
    family = lumina()
    conditions, steps = recorded(family, True), real_steps(family, True, only=1)
    plan = conditions.plan
    assert (plan.sign, plan.conditional, plan.cfg_scale, len(plan.calls)) == (-1, 0, 3.0, 2)
    torch.testing.assert_close(plan.times(250.0), torch.tensor(0.75))
    policy = perturbed_policy(family, 3.0, injection_site="time_caption_embed.timestep_embedder")
    for t, state, output in steps:
        with torch.no_grad():
            assert torch.equal(policy.reference(state, t, conditions[1:]), output)


def test_guidance_that_is_normalised_is_refused():
    with pytest.raises(ValueError, match="Lumina2Pipeline .*more than classifier-free guidance"):
        recorded(lumina(), True, cfg_normalization=True)


def test_a_pipeline_with_an_adapter_at_rest_is_recorded_as_its_base(sd_folder, sd_adapter):
    base = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe = CTRLPipeline.from_pretrained(sd_folder, adapter=sd_adapter)
    given = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    expected, found = record_conditions(base, ["one", "two"], **given), record_conditions(pipe, ["one", "two"], **given)
    assert found.plan.pipeline == "StableDiffusionPipeline" and found.plan.calls == expected.plan.calls
    for a, b in zip(expected.tensors, found.tensors, strict=True):
        assert all(map(torch.equal, a, b))
    assert pipe("one", label="bold", num_inference_steps=STEPS, output_type="pt").images.isfinite().all()


def test_lists_with_an_entry_a_row_are_repeated():
    """As pipelines give sizes, (height, width) a sample."""
    leaves = []
    one, two = {"sizes": [(4, 8)], "text": torch.zeros(1, 3)}, {"sizes": [(4, 8)] * 2, "text": torch.zeros(2, 3)}
    template = _template("Pipeline", one, two, 1, leaves)
    assert template == {"sizes": Repeated((4, 8)), "text": Rows(0)} and len(leaves) == 1
    filled = fill(template, ((torch.ones(5, 3),),), torch.zeros(5, 2), torch.tensor(1))
    assert filled["sizes"] == [(4, 8)] * 5 and filled["text"].shape == (5, 3)
    for other in ({"sizes": [(4, 8), (8, 4)]}, {"sizes": [(4, 8)] * 3}, {"sizes": None}):
        with pytest.raises(ValueError, match="Pipeline gives its denoiser sizes"):
            _template("Pipeline", {"sizes": [(4, 8)]}, other, 1, [])
    with pytest.raises(ValueError, match=r"Pipeline gives its denoiser text of shape \(1, 3\) for one prompt and \(2, 4\) for two"):
        _template("Pipeline", {"text": torch.zeros(1, 3)}, {"text": torch.zeros(2, 4)}, 1, [])


def test_a_batch_may_have_a_timestep_for_each_sample():
    family = prepared("stable_diffusion")
    conditions, policy = recorded(family, True), perturbed_policy(family, 3.0)
    x = torch.randn(2, *conditions.shape)
    with torch.no_grad():
        both = policy.reference(x, torch.tensor([701, 301]), conditions)
        first, second = policy.reference(x, 701, conditions), policy.reference(x, 301, conditions)
    torch.testing.assert_close(both, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-5)


# -- what cannot be restated is refused --


def test_guidance_that_is_more_than_a_difference_is_refused():
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline .*another output.*more than classifier-free guidance"):
        recorded(prepared("stable_diffusion_xl"), True, guidance_rescale=0.5)


def test_a_third_call_of_the_denoiser_is_refused():
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline"):
        recorded(
            prepared("stable_diffusion_3"),
            True,
            skip_guidance_layers=[1],
            skip_layer_guidance_start=-1.0,
            skip_layer_guidance_stop=1.0,
        )


def test_guidance_that_stops_halfway_is_refused():
    family = prepared("stable_diffusion")
    pipe, calls = family.pipe, []

    class Halfway(type(pipe)):
        """Guidance on the first two steps only, by the pipeline's own means."""

        @property
        def guidance_scale(self):
            calls.append(None)
            return self._guidance_scale if self.scheduler.step_is_early() else 2.0

    class Early(DDIMScheduler):
        count = 0

        def step_is_early(self):
            return self.count < 2

        def step(self, *args, **kwargs):
            self.count += 1
            return super().step(*args, **kwargs)

    pipe.scheduler = Early.from_config(pipe.scheduler.config)
    pipe.__class__ = Halfway
    with pytest.raises(ValueError, match="another output than was restated"):
        recorded(family, True)
    assert calls


def test_an_image_to_start_from_is_refused():
    family = prepared("stable_diffusion")
    family.pipe.__class__ = type("ImageToImage", (type(family.pipe),), {"prepare_latents": _from_an_image})
    with pytest.raises(ValueError, match="ImageToImage starts from states of mean .* not from noise"):
        recorded(family)


def _from_an_image(self, batch_size, *args, **kwargs):
    return torch.full((batch_size, 4, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("stable_diffusion", {"prompts": []}, "No prompt"),
        ("stable_diffusion", {"heigth": 16}, "'heigth'.*height"),
        ("stable_diffusion", {"latents": torch.zeros(1)}, "'latents'"),
        ("ddpm", {"guidance_scale": 3.0}, "DDPMPipeline takes no guidance_scale"),
        ("dit", {"prompts": ["a cat"]}, "does not know 'a cat'"),
        ("sana", {"negative_prompt": ["one"]}, "1 negative_prompt for 2 prompts"),
    ],
)
def test_bad_arguments_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        recorded(prepared(name), **changes)


def test_classes_can_be_given_by_name():
    family = prepared("dit")
    by_name, by_number = recorded(family, prompts=["seven", "zero"]), recorded(family, prompts=["7", 0])
    assert by_name.tensors[0][0].tolist() == by_number.tensors[0][0].tolist() == [7, 0]


def test_the_policy_must_have_the_guidance_that_was_recorded():
    family = prepared("stable_diffusion")
    conditions, policy = recorded(family, True), perturbed_policy(family, 5.0)
    with pytest.raises(ValueError, match="guidance_scale is 5.0.*recorded with 3.0"):
        policy.reference(torch.zeros(2, 4, 8, 8), 701, conditions)


def test_numbers_of_rows_and_of_timesteps_are_checked():
    family = prepared("stable_diffusion")
    conditions, policy = recorded(family), perturbed_policy(family)
    with pytest.raises(ValueError, match="conditions of 2 prompts for 3 samples"):
        policy.reference(torch.zeros(3, 4, 8, 8), 701, conditions)
    with pytest.raises(ValueError, match="3 timesteps for 2 samples"):
        policy.reference(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2, 3]), conditions)


def test_a_scheduler_with_other_steps_than_asked_for_is_refused():
    family = prepared("stable_diffusion")
    family.pipe.scheduler = diffusers.PNDMScheduler.from_config(family.pipe.scheduler.config, skip_prk_steps=True)
    with pytest.raises(ValueError, match="takes 5 steps with its PNDMScheduler for num_inference_steps = 4"):
        recorded(family)
