"""The embedded models: size, prompts obeyed, and what the shipped adapter does, by the exact oracles."""

import time

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ctrl import CTRLPipeline, assets
from digits_data import PROMPTS, prompt_oracle, stroke_oracle


def test_all_assets_are_small_and_hold_no_pickle():
    files = [path for path in assets.ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} <= {".py", ".json", ".safetensors", ".md", ".png"}


def draw(pipe, per_prompt: int, **kwargs) -> tuple[torch.Tensor, list[str]]:
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in PROMPTS for _ in range(per_prompt)]
    generator = torch.Generator().manual_seed(1)
    return pipe(prompts, generator=generator, output_type="pt", **kwargs).images, prompts


def test_a_plain_pipeline_loads_the_base_and_obeys_the_prompt():
    pipe = StableDiffusionPipeline.from_pretrained(assets.find("digits-base"))
    images, prompts = draw(pipe, 10, num_inference_steps=20, eta=1.0, guidance_scale=1.0)
    assert images.shape == (100, 3, 32, 32)
    assert prompt_oracle(images, prompts).double().mean() >= 0.93


@pytest.mark.slow
def test_the_base_obeys_the_prompt_in_95_of_100():
    pipe = StableDiffusionPipeline.from_pretrained(assets.find("digits-base"))
    images, prompts = draw(pipe, 50, num_inference_steps=20, eta=1.0, guidance_scale=1.0)
    assert prompt_oracle(images, prompts).double().mean() >= 0.95


def test_the_shipped_adapter_draws_what_the_label_says():
    started = time.perf_counter()
    pipe = CTRLPipeline.from_pretrained("digits-stroke")
    pipe(["a handwritten seven"] * 4, label=["thin", "regular", "bold", "bold"])
    print(f"loading and four labelled images: {time.perf_counter() - started:.1f} s")
    for index, name in enumerate(("thin", "regular", "bold")):
        images, prompts = draw(pipe, 6, label=name)
        assert (stroke_oracle(images) == index).double().mean() > 0.6, name
        assert prompt_oracle(images, prompts).double().mean() > 0.85, name
    assert pipe.classifier is not None
