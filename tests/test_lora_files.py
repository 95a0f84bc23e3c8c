"""Adapters as ordinary LoRA files: plain diffusers reads them, in its own naming and in kohya's, and draws what the adapter draws."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from test_families import draw, fresh, make_adapter

from diffusers_ctrl import CTRLPipeline
from diffusers_ctrl.export import NAMINGS, bake_label, export_lora, label_lora, write_lora


KOHYA = re.compile(r"lora_unet_[a-z0-9_]+\.(lora_down\.weight|lora_up\.weight|alpha)")


@pytest.fixture(scope="module", params=["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def family(request):
    return fresh(request.param)


@pytest.fixture(scope="module")
def adapter(family):
    return make_adapter(family.name)


def with_lora(family, file):
    """A plain pipeline of diffusers' own with the file, and nothing of this package."""
    pipe = fresh(family.name).pipe
    pipe.load_lora_weights(file)
    return pipe


def namings(adapter):
    return NAMINGS if adapter.config.denoiser == "unet" else ("diffusers",)


def test_the_lora_alone(family, adapter, tmp_path):
    """In every naming the same images bit for bit; they are the adapter's for no label in particular."""
    images = [
        draw(
            with_lora(family, write_lora(tmp_path / f"{naming}.safetensors", adapter.lora, adapter.config.denoiser, naming)), family
        )
        for naming in namings(adapter)
    ]
    assert all(torch.equal(image, images[0]) for image in images)
    ours = fresh(family.name).pipe
    bake_label(ours, adapter, "bold", label_scale=0.0)
    assert (draw(ours, family) - images[0]).abs().max() < 1e-5
    assert (draw(fresh(family.name).pipe, family) - images[0]).abs().max() > 1e-3


def test_a_label_in_a_lora_file(family, adapter, tmp_path):
    """What the merged pipeline draws, from a LoRA file in plain diffusers; and the pipeline it was made with is as it was."""
    plain = fresh(family.name).pipe
    before = {key: value.clone() for key, value in plain.components[adapter.config.denoiser].state_dict().items()}
    drawn = {}
    for label in ("thin", "bold"):
        merged = fresh(family.name).pipe
        bake_label(merged, adapter, label)
        drawn[label] = expected = draw(merged, family)
        size = {
            name: family.call[name] for name in ("height", "width") if name in family.call
        }  # on which SD3's and Flux's times depend
        lora, errors = label_lora(plain, adapter, label, call=size)
        assert errors["own_timesteps"] < 1e-5
        assert len(lora) == len(adapter.lora) + 2
        for naming in namings(adapter):
            file = write_lora(tmp_path / f"{label}-{naming}.safetensors", lora, adapter.config.denoiser, naming)
            assert (draw(with_lora(family, file), family) - expected).abs().max() < 2e-5, naming
    assert (drawn["thin"] - drawn["bold"]).abs().max() > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in plain.components[adapter.config.denoiser].state_dict().items())
    assert torch.equal(draw(plain, family), draw(fresh(family.name).pipe, family))


def test_the_names(family, adapter, tmp_path):
    lora, _ = label_lora(fresh(family.name).pipe, adapter, "bold")
    state = load_file(write_lora(tmp_path / "x.safetensors", lora, adapter.config.denoiser))
    if adapter.config.denoiser == "transformer":
        assert all(re.fullmatch(r"transformer\.[\w.]+\.lora_[AB]\.weight", key) for key in state)
        assert "transformer.time_text_embed.timestep_embedder.linear_2.lora_A.weight" in state
        with pytest.raises(ValueError, match="'kohya' for a unet, got 'kohya' for a transformer"):
            write_lora(tmp_path / "y.safetensors", lora, "transformer", "kohya")
        return
    assert all(KOHYA.fullmatch(key) for key in state)
    assert {key.split(".")[1] for key in state if key.startswith("lora_unet_time_embed_2.")} == {"lora_down", "lora_up", "alpha"}
    # alpha is the rank, so that every reader's alpha / rank is 1, and all ranks are the same
    assert {int(value) for key, value in state.items() if key.endswith("alpha")} == {2}
    assert {len(value) for key, value in state.items() if "lora_down" in key} == {2}


# -- from a pipeline, and from an adapter's name --


def tiny(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False, timestep_spacing="leading")
    call = {"num_inference_steps": 4, "eta": 1.0, "guidance_scale": 1.0, "output_type": "pt"}
    return pipe(["seven", "one"], generator=torch.Generator().manual_seed(5), **call, **kwargs).images


def test_from_a_pipeline_and_from_a_folder(sd_adapter, sd_folder, tmp_path):
    """The same file either way; with the label's own sampler it draws what `pipe(label=…)` draws. Names and notes are in the file."""
    pipe = CTRLPipeline.from_pretrained(sd_adapter)
    # every step has noise, so none is left to the base
    noisy = {
        **pipe.ctrl_adapters["default"].config.sampler["scheduler_config"],
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }
    config = pipe.ctrl_adapters["default"].config
    adapter = replace(pipe._collect(None), config=replace(config, sampler={**config.sampler, "scheduler_config": noisy}))
    pipe.unload_ctrl_adapter()
    pipe.load_ctrl_adapter(adapter)
    expected = tiny(pipe, label="bold")
    file = pipe.export_lora(tmp_path / "deep" / "bold.safetensors", "bold")
    assert torch.equal(tiny(pipe, label="bold"), expected) and list(pipe.ctrl_adapters) == ["default"]
    plain = StableDiffusionPipeline.from_pretrained(sd_folder)
    plain.load_lora_weights(file)
    assert (tiny(plain) - expected).abs().max() < 1e-5
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["label"] == "bold" and float(opened.metadata()["own_timesteps"]) < 1e-5
    for label in (None, "bold"):
        ours = load_file(CTRLPipeline.from_pretrained(sd_adapter).export_lora(tmp_path / "a.safetensors", label))
        theirs = load_file(export_lora(sd_adapter, tmp_path / "b.safetensors", label))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not list(tmp_path.rglob(".*"))


def test_refusals(sd_adapter, tmp_path):
    pipe = CTRLPipeline.from_pretrained(sd_adapter)
    expected = tiny(pipe, label="bold")
    for label, more, message in (
        ("fat", {}, "Unknown label"),
        ("bold", {"gamma": 2.0}, "gamma"),
        ("bold", {"naming": "webui"}, "naming must be 'diffusers', or 'kohya'"),
        (None, {"naming": "webui"}, "naming must be 'diffusers', or 'kohya'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.export_lora(tmp_path / "x.safetensors", label, **more)
    assert not list(tmp_path.iterdir()) and torch.equal(tiny(pipe, label="bold"), expected)
    with pytest.raises(ValueError, match="embeds the time in 2 places.*use export_label"):
        label_lora(fresh("dit").pipe, make_adapter("dit"), "bold")


def test_more_timesteps_than_the_time_embedding_is_wide(sd_adapter, sd_folder, adapter, tmp_path):
    pipe = CTRLPipeline.from_pretrained(sd_adapter)
    own = pipe._collect(None)
    many = replace(own, config=replace(own.config, sampler={**own.config.sampler, "num_inference_steps": 200}))
    with pytest.raises(ValueError, match="32 wide, cannot hold a constant at 200 timesteps.*use export_label"):
        label_lora(StableDiffusionPipeline.from_pretrained(sd_folder), many, "bold")


def test_a_lora_that_is_already_on_that_layer(sd_adapter, sd_folder, tmp_path):
    """Both are in the file, as one of twice the rank."""
    adapter = CTRLPipeline.from_pretrained(sd_adapter)._collect(None)
    plain = StableDiffusionPipeline.from_pretrained(sd_folder)
    generator, name = torch.Generator().manual_seed(0), "time_embedding.linear_2"
    pair = {
        f"{name}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{name}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    both = replace(adapter, lora={**adapter.lora, **pair})
    merged = StableDiffusionPipeline.from_pretrained(sd_folder)
    bake_label(merged, both, "bold")
    lora, _ = label_lora(plain, both, "bold")
    assert lora[f"{name}.lora_A.weight"].shape == (4, 32)
    for naming in NAMINGS:
        loaded = StableDiffusionPipeline.from_pretrained(sd_folder)
        loaded.load_lora_weights(write_lora(tmp_path / f"{naming}.safetensors", lora, "unet", naming))
        for pipe in (merged, loaded):
            pipe.set_progress_bar_config(disable=True)
        images = [
            pipe(
                "seven",
                num_inference_steps=4,
                eta=1.0,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(1),
                output_type="pt",
            ).images
            for pipe in (merged, loaded)
        ]
        assert (images[0] - images[1]).abs().max() < 2e-5, naming
