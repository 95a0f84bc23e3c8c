"""A label baked into a plain pipeline: the tuned model to rounding without guidance, and how far from it with."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from test_families import controlled, make_adapter

from diffusers_ctrl import CTRLPipeline
from diffusers_ctrl.adapters import save_adapter
from diffusers_ctrl.export import bake_label, export_label


LABELS = ["thin", "regular", "bold"]


def draw(pipe, guidance_scale=1.0, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    # a final alpha below 1 and "leading" spacing: every step has noise, so none is left to the base
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False, timestep_spacing="leading")
    generator = torch.Generator().manual_seed(5)
    call = {"num_inference_steps": 4, "eta": 1.0, "guidance_scale": guidance_scale, "output_type": "pt", "generator": generator}
    return pipe(["seven", "one"], **call, **kwargs).images


@pytest.fixture(scope="module")
def labelled(sd_adapter):
    return CTRLPipeline.from_pretrained(sd_adapter)


@pytest.mark.parametrize("label", LABELS)
def test_plain_diffusers_draws_the_label(labelled, sd_adapter, sd_folder, tmp_path, label):
    folder = export_label(sd_adapter, label, tmp_path / "baked")
    plain = DiffusionPipeline.from_pretrained(folder)
    assert type(plain) is StableDiffusionPipeline and not (folder / "ctrl_config.json").exists()
    expected = draw(labelled, label=label)
    assert (draw(plain) - expected).abs().max() < 1e-5
    base = draw(StableDiffusionPipeline.from_pretrained(sd_folder))
    assert (expected - base).abs().max() > 1e-2  # the label does something here


def test_under_guidance_it_differs(labelled, sd_folder, adapter):
    """Measured, not hidden: root mean square over the images, of which the label itself moves so much."""
    plain = StableDiffusionPipeline.from_pretrained(sd_folder)
    base = draw(plain, guidance_scale=5.0)
    bake_label(plain, adapter, "bold")
    for scale in (1.0, 5.0):
        expected, baked = draw(labelled, scale, label="bold"), draw(plain, scale)
        difference, effect = (baked - expected).square().mean().sqrt(), (expected - base).square().mean().sqrt()
        print(f"guidance scale {scale}: baked differs by {difference:.2g}, label moves by {effect:.2g}")
        assert (difference < 1e-5) == (scale == 1.0)


def test_gamma_is_baked_too(sd_folder, sd_gamma_adapter):
    images = []
    for gamma in (0.5, 8.0):
        plain = StableDiffusionPipeline.from_pretrained(sd_folder)
        bake_label(plain, sd_gamma_adapter, "bold", gamma)
        images.append(draw(plain))
    assert (images[0] - images[1]).abs().max() > 1e-4


def test_refusals_leave_the_pipeline_as_it_was(sd_folder, adapter, tmp_path):
    plain = StableDiffusionPipeline.from_pretrained(sd_folder)
    before = {key: value.clone() for key, value in plain.unet.state_dict().items()}
    key = next(key for key in adapter.lora if key.endswith("lora_A.weight"))
    for case, label, gamma, message in (
        (adapter, "fat", None, "Unknown label"),
        (adapter, "bold", 2.0, "gamma"),
        (replace(adapter, lora={**adapter.lora, key: torch.ones(2, 3)}), "bold", None, "does not fit"),
        (replace(adapter, config=replace(adapter.config, injection_site="conv_out")), "bold", None, "linear"),
    ):
        with pytest.raises(ValueError, match=message):
            bake_label(plain, case, label, gamma)
        assert all(torch.equal(value, before[key]) for key, value in plain.unet.state_dict().items())
    with pytest.raises(ValueError, match="no label adapter"):
        export_label(sd_folder, "bold", tmp_path / "baked")


def test_a_pipeline_exports_a_label_of_its_own(labelled, sd_adapter, tmp_path):
    expected = draw(labelled, label="bold")
    folder = labelled.export_label("bold", tmp_path / "baked")
    plain = DiffusionPipeline.from_pretrained(folder)
    assert type(plain) is StableDiffusionPipeline
    assert (draw(plain) - expected).abs().max() < 1e-5
    # the pipeline itself goes on as it was
    assert list(labelled.ctrl_adapters) == ["default"] and torch.equal(draw(labelled, label="bold"), expected)
    with pytest.raises(ValueError, match="Unknown label"):
        labelled.export_label("fat", tmp_path / "none")
    assert not (tmp_path / "none").exists() and torch.equal(draw(labelled, label="bold"), expected)


def test_the_adapters_scheduler_is_exported(sd_folder, adapter, tmp_path):
    """Not the base's, if it was trained with another one that also has noise."""
    base = StableDiffusionPipeline.from_pretrained(sd_folder)
    base.scheduler = DDPMScheduler.from_config(base.scheduler.config)
    base.save_pretrained(tmp_path / "base")
    config = replace(adapter.config, base={**adapter.config.base, "id": str(tmp_path / "base")})
    trained = save_adapter(tmp_path / "adapter", replace(adapter, config=config))
    pipe = CTRLPipeline.from_pretrained(trained)
    for folder in (export_label(trained, "bold", tmp_path / "a"), pipe.export_label("bold", tmp_path / "b")):
        scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
        assert type(scheduler) is DDIMScheduler
        assert {key: scheduler.config[key] for key in config.sampler["scheduler_config"]} == config.sampler["scheduler_config"]
    assert type(pipe.scheduler) is DDPMScheduler


def test_a_flow_is_exported_with_a_scheduler_of_diffusers_own(tmp_path):
    """MemorylessFlowMatchScheduler is this package's, which who runs the folder does not have."""
    trained = make_adapter("stable_diffusion_3", scheduler="MemorylessFlowMatchScheduler", scheduler_config={"shift": 2.0})
    pipe = controlled("stable_diffusion_3", trained)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    folder = pipe.export_label("bold", tmp_path / "baked")
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
    assert scheduler.config.shift == 2.0 and not scheduler.config.stochastic_sampling


def test_an_eta_that_the_plain_call_cannot_be_given_is_told(tmp_path):
    pipe = controlled("dit", make_adapter("dit", scheduler="DDIMScheduler", options={"eta": 1.0}))
    with pytest.warns(
        UserWarning, match="trained with eta = 1.0, which the call of a plain DiTPipeline does not take.*DDIMScheduler.step"
    ):
        pipe.export_label("bold", tmp_path / "baked")
