"""Exact sampling: the draw follows the weights, the weights are those of the path, and the pipeline is left as it was."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import SPACE
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils import BaseOutput
from PIL import Image
from test_schedulers import tiny_sd3

from diffusers_ctrl import Classifier, CTRLPipeline, MemorylessFlowMatchScheduler, Policy
from diffusers_ctrl.adapters import AdapterConfig, collect_adapter, denoiser_sha256, load_adapter, package_versions
from diffusers_ctrl.particles import ParticlePool, effective_sample_size
from diffusers_ctrl.pipelines import ctrl_pipeline_class
from diffusers_ctrl.transitions import model_input, transition


PROMPT = "a handwritten seven"
GAMMA_8 = {"gamma": 8.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@dataclass
class Output(BaseOutput):
    images: torch.Tensor
    note: list | None = None


@pytest.fixture(scope="module")
def pipe(sd_adapter):
    pipe = CTRLPipeline.from_pretrained(sd_adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ddpm(ddpm_adapter):
    pipe = CTRLPipeline.from_pretrained(ddpm_adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def particles(pipe, n, prompt=PROMPT, seed=0, **kwargs):
    return pipe(prompt, generator=generator(seed), num_particles=n, **{"label": "bold", "output_type": "pt", **kwargs})


# -- the draw --


def test_effective_sample_size():
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(effective_sample_size(weights.log() + 700), torch.tensor([4.0, 1.0, 1.6], dtype=torch.float64))


@pytest.mark.parametrize("share", [1, 4])
def test_the_draw_follows_the_weights(share):
    """10,000 images with the same four particles: each is drawn in proportion to its weight, in chunks or at once."""
    weights, images = torch.tensor([1.0, 2.0, 3.0, 4.0]), 10_000
    pool = ParticlePool(images, generator())
    for part in torch.arange(4).split(share):
        values = part.float().repeat(images)
        pool.add(values.view(-1, 1), weights[part].log().double().repeat(images), Output(values, note=values.tolist()))
    assert pool.count == 4
    output = pool.output("pt", True, None)
    found = torch.bincount(output.images.flatten().long(), minlength=4) / images
    error = (weights / 10 * (1 - weights / 10) / images).sqrt()
    assert ((found - weights / 10).abs() < 4 * error).all()
    assert output.note == output.images.flatten().tolist()  # what belongs to an image goes with it
    torch.testing.assert_close(output.ess, torch.full((images,), 100 / 30, dtype=torch.float64))


def test_a_weight_that_is_not_finite_is_an_error():
    pool = ParticlePool(1, None)
    with pytest.raises(ValueError, match="NaN or infinite"):
        pool.add(torch.zeros(2, 1), torch.tensor([0.0, math.nan]), Output(torch.zeros(2, 1)))


# -- the weights --


@pytest.mark.parametrize(
    "kwargs",
    [
        {"strength": 0.2},
        {"strength": 0.05, "guidance_scale": 3.0},
        {"strength": 0.2, "eta": 0.7},
        {"strength": 0.1, "num_inference_steps": 8},
    ],
)
def test_the_weights_have_the_mean_z_whatever_the_model(pipe, kwargs):
    """E_theta[w] = Z = E_pre[p̂]: the same from the tuned model as from the base (strength 0), where w = p̂.

    The adapter's weights are random and large, so a fraction of its strength is a model near enough for 400 samples.
    """
    tuned = particles(pipe, 400, particle_batch_size=200, **kwargs).log_weights
    base = particles(pipe, 400, seed=1, particle_batch_size=200, **{**kwargs, "strength": 0.0}).log_weights
    assert tuned.shape == (1, 400) and tuned.std() > 0.1 > 2 * base.std()  # the path's ratio is in them
    means = [w.exp().mean().item() for w in (tuned, base)]
    errors = [w.exp().std().item() / 20 for w in (tuned, base)]
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    assert errors[0] < 0.2 * means[0]


@pytest.fixture(
    params=[
        EulerAncestralDiscreteScheduler,
        functools.partial(DPMSolverMultistepScheduler.from_config, algorithm_type="sde-dpmsolver++", solver_order=1),
        DDPMScheduler,
    ],
    ids=["euler", "dpm", "ddpm"],
)
def other(request, pipe):
    """The pipeline with another scheduler that has noise: its states may be scaled for the denoiser."""
    own, kind = pipe.scheduler, request.param
    pipe.scheduler = kind.from_config(own.config) if isinstance(kind, type) else kind(own.config)
    yield pipe
    pipe.scheduler = own


@pytest.mark.filterwarnings("ignore:This pipeline has")
def test_the_weights_have_the_mean_z_with_every_scheduler(other):
    tuned = particles(other, 240, strength=0.1, particle_batch_size=120).log_weights
    base = particles(other, 240, seed=1, particle_batch_size=120, strength=0.0).log_weights
    assert tuned.std() > 2 * base.std() and torch.isfinite(tuned).all()  # the path's ratio is in them
    means = [w.exp().mean().item() for w in (tuned, base)]
    errors = [w.exp().std().item() / 240**0.5 for w in (tuned, base)]
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    assert errors[0] < 0.2 * means[0]


@pytest.mark.filterwarnings("ignore:This pipeline has")
def test_the_step_without_noise_is_the_bases_with_every_scheduler(other):
    states = []
    call = {
        "label": "bold",
        "output_type": "latent",
        "callback_on_step_end": lambda pipe, k, t, kept: states.append(kept["latents"]) or kept,
    }
    other(PROMPT, generator=generator(), **call)
    scheduler = type(other.scheduler).from_config(other.scheduler.config)
    scheduler.set_timesteps(len(states))
    t, embeds = scheduler.timesteps[-1], other.encode_prompt(PROMPT, "cpu", 1, False)[0]
    with torch.no_grad():
        output = other.unet(model_input(scheduler, t, states[-2]), t, encoder_hidden_states=embeds).sample  # no label: the base
    law = transition(scheduler, output, t, states[-2])
    assert len(states) == 4 and law.is_deterministic
    torch.testing.assert_close(states[-1], law.mean, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["shift", "dynamic shift"])
def flow_pipe(request):
    """A tiny StableDiffusion3Pipeline with an adapter of random weights, trained, as it were, with the memoryless scheduler."""
    shifting = {
        "shift": 3.0,
        "use_dynamic_shifting": request.param,
    }  # the latter: by the size of the picture, in the pipeline's call
    plain, same = (tiny_sd3(FlowMatchEulerDiscreteScheduler(**shifting)) for _ in range(2))
    sha256 = denoiser_sha256(same.transformer)
    policy = Policy(same.transformer, label_space=SPACE, lora_rank=2)
    for parameters in policy.trainable_parameters().values():
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.3)
    config = AdapterConfig(
        base={"id": "tiny-sd3", "revision": None, "denoiser_sha256": sha256},
        pipeline_class=type(plain).__name__,
        denoiser="transformer",
        label_space=SPACE.to_dict(),
        gamma=1.0,
        gamma_range=None,
        sampler={
            "scheduler": "MemorylessFlowMatchScheduler",
            "scheduler_config": shifting,
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            "options": {},
        },
        injection_site=policy.injection_site,
        versions=package_versions(),
        metrics={},
    )
    classifier = Classifier(SPACE.to_dict(), image_size=8, widths=(4, 8), temperatures=(1.5,)).eval()
    pipe = ctrl_pipeline_class(type(plain))(**plain.components)
    pipe.load_ctrl_adapter(collect_adapter(config, same.transformer, policy.label_encoder, classifier))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_flow_pipeline_is_sampled_with_the_memoryless_scheduler(flow_pipe):
    """Its own takes steps without noise: the adapter's takes over, by its name and configuration, for the labelled call only."""
    torch.manual_seed(0)
    embeds = torch.randn(1, 3, 16)
    inputs = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0], "height": 8, "width": 8, "output_type": "pt"}

    def call(**kwargs):
        torch.manual_seed(1)  # the pipeline gives its scheduler no generator
        return flow_pipe(label="bold", **inputs, **kwargs)

    own, images = flow_pipe.scheduler, call().images
    found = [call(num_particles=300, particle_batch_size=150, strength=strength).log_weights for strength in (0.2, 0.0)]
    assert flow_pipe.scheduler is own and type(own) is FlowMatchEulerDiscreteScheduler
    flow_pipe.scheduler = MemorylessFlowMatchScheduler.from_config(own.config)
    assert torch.equal(call().images, images)
    flow_pipe.scheduler = own
    assert found[0].std() > 0.1 > 2 * found[1].std()
    means = [w.exp().mean().item() for w in found]
    errors = [w.exp().std().item() / 300**0.5 for w in found]
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors) and errors[0] < 0.2 * means[0]


def test_the_base_has_the_classifiers_probability_as_weight(pipe):
    output = particles(pipe, 2, strength=0.0)
    same = pipe(PROMPT, label="bold", strength=0.0, num_images_per_prompt=2, generator=generator(), output_type="pt").images
    expected = pipe.classifier.log_prob(same, pipe.label_space.encode("bold", 1).expand(2, -1))
    torch.testing.assert_close(output.log_weights[0], expected.double())
    assert any(torch.equal(output.images[0], image) for image in same)


def test_gamma_is_the_weights_exponent(sd_folder, sd_gamma_adapter):
    pipe = CTRLPipeline.from_pretrained(sd_folder)
    pipe.load_ctrl_adapter(sd_gamma_adapter)
    pipe.set_progress_bar_config(disable=True)
    one, eight = (particles(pipe, 3, strength=0.0, **kwargs).log_weights for kwargs in ({}, GAMMA_8))
    torch.testing.assert_close(eight, 8 * one)


def test_more_particles_fit_the_label_better(pipe):
    """With the base as proposal, log p̂ of what is drawn rises with n."""
    encoded = pipe.label_space.encode("bold", 1)
    means = []
    for n in (1, 32):
        images = particles(pipe, n, num_images_per_prompt=24, strength=0.0, particle_batch_size=256).images
        means.append(pipe.classifier.log_prob(images, encoded.expand(24, -1)).mean().item())
    assert means[1] > means[0]


# -- the call --


def test_one_particle_is_the_plain_call(pipe):
    plain = pipe(PROMPT, label="bold", generator=generator(), output_type="pt").images
    assert torch.equal(particles(pipe, 1).images, plain)


def test_shapes_types_and_batches(pipe):
    prompts = [PROMPT, "a handwritten one"]
    output = particles(pipe, 5, prompts, label=["bold", "thin"], num_images_per_prompt=2, particle_batch_size=8)
    assert output.images.shape == (4, 3, 16, 16)
    assert output.log_weights.shape == (4, 5) and output.ess.shape == (4,)
    assert ((output.ess >= 1) & (output.ess <= 5)).all()
    assert output.nsfw_content_detected is None
    pictures = particles(pipe, 2, output_type="pil").images
    assert isinstance(pictures[0], Image.Image)
    array = particles(pipe, 2, output_type="np").images
    assert isinstance(array, np.ndarray) and array.shape == (1, 16, 16, 3)
    assert np.abs(np.asarray(pictures[0]) / 255 - array[0]).max() < 1 / 255
    images, nsfw = particles(pipe, 2, output_type="np", return_dict=False)
    assert np.array_equal(images, array) and nsfw is None


def test_a_generator_for_each_image_makes_each_image_its_own(pipe):
    def call(seeds):
        rows = len(seeds)
        return pipe([PROMPT] * rows, label="bold", generator=[generator(s) for s in seeds], num_particles=3, output_type="pt")

    both, first = call([5, 6]), call([5])
    torch.testing.assert_close(both.log_weights[:1], first.log_weights, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.images[:1], first.images, rtol=1e-3, atol=1e-3)


def test_an_unconditional_pipeline(ddpm):
    output = ddpm(label=["bold", "thin"], num_particles=4, generator=generator(), output_type="np", particle_batch_size=4)
    assert output.images.shape == (2, 8, 8, 3) and output.log_weights.shape == (2, 4)
    assert output.log_weights.isfinite().all() and output.log_weights.std() > 1e-3


def test_nothing_is_left_behind(pipe):
    before, scheduler = pipe(PROMPT, generator=generator(), output_type="pt").images, pipe.scheduler
    particles(pipe, 3)
    assert pipe.scheduler is scheduler and "step" not in vars(scheduler)
    assert not pipe._ctrl_hook.keeps_base and pipe._ctrl_hook.base_output is None
    assert torch.equal(pipe(PROMPT, generator=generator(), output_type="pt").images, before)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"label": None}, "pass label= as well"),
        ({"eta": 0.0}, "adds no noise at any step"),
        ({"output_type": "latent"}, "output_type must not be 'latent'"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "cannot be combined with latents"),
        ({"timesteps": [900, 500, 100]}, "cannot be combined with timesteps"),
        ({"guidance_rescale": 0.5}, "cannot be combined with guidance_rescale"),
        ({"num_particles": 0}, "must be at least 1"),
        ({"particle_batch_size": 0}, "must be at least 1"),
    ],
)
def test_bad_input(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{"label": "bold", "num_particles": 2, **kwargs})
    assert not pipe._ctrl_hook.keeps_base


def test_an_error_in_the_middle_leaves_nothing_behind(pipe, monkeypatch):
    before, scheduler = pipe(PROMPT, generator=generator(), output_type="pt").images, pipe.scheduler
    monkeypatch.setattr(type(pipe.classifier), "log_prob", lambda *_: torch.full((64,), math.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        particles(pipe, 64)
    assert pipe.scheduler is scheduler and not pipe._ctrl_hook.keeps_base and pipe._ctrl_hook.base_output is None
    assert pipe._progress_bar_config == {"disable": True}
    assert torch.equal(pipe(PROMPT, generator=generator(), output_type="pt").images, before)


def test_weights_in_half_precision(sd_folder, sd_adapter, pipe):
    """In bfloat16 the states are rough, but the weights are not those of sums rounded to whole nats."""
    half = CTRLPipeline.from_pretrained(sd_folder, torch_dtype=torch.bfloat16)
    half.load_ctrl_adapter(sd_adapter)
    half.set_progress_bar_config(disable=True)
    rough, fine = (particles(p, 60, strength=0.2).log_weights for p in (half, pipe))
    assert rough.dtype == torch.float64 and rough.isfinite().all()
    assert len(rough.unique()) == 60
    assert abs(rough.mean() - fine.mean()) < 5 * (fine.std() + rough.std()) / 60**0.5


def test_an_adapter_without_a_classifier(sd_folder, sd_adapter):
    from dataclasses import replace

    pipe = CTRLPipeline.from_pretrained(sd_folder)
    pipe.load_ctrl_adapter(replace(load_adapter(sd_adapter), classifier=None))
    with pytest.raises(ValueError, match="needs the adapter's classifier"):
        pipe(PROMPT, label="bold", num_particles=2)
