"""The paper's multi-task recipe end to end at a size for tests: the base's samples labelled by real JPEG sizes and by the aesthetic score
of a tiny CLIP, one adapter for both."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from test_aesthetic_data import random_head, tiny_clip
from test_cli import SMALL

import train_ctrl
from aesthetic_data import aesthetic_class
from diffusers_ctrl import CTRLPipeline
from digits_data import PROMPTS
from jpeg_data import jpeg_kilobytes
from labelled_data import load_labelled_images


pytestmark = pytest.mark.usefixtures("datasets_cache")

RECIPE = Path(train_ctrl.__file__).parent / "configs" / "sd15_compressibility_aesthetic.yaml"


def small_file(images):
    """`jpeg_binary_class` with a threshold for 16x16 pictures."""
    return (jpeg_kilobytes(images) <= 0.867).long()


@pytest.mark.slow
def test_the_multitask_recipe(sd_folder, tmp_path, monkeypatch):
    base = StableDiffusionPipeline.from_pretrained(sd_folder)
    base.scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    base.save_pretrained(tmp_path / "base")
    monkeypatch.setenv("AESTHETIC_CLIP", str(tiny_clip(tmp_path / "clip")))
    monkeypatch.setenv("AESTHETIC_HEAD", str(tmp_path / "head.safetensors"))
    save_file(random_head(), tmp_path / "head.safetensors")
    functions = [f"{__name__}:small_file", "aesthetic_data:aesthetic_class"]
    own = {"base": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"), "labeller": functions, "oracle": functions}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | SMALL | own))
    train_ctrl.main(["--config", str(tmp_path / "small.yaml")])

    (manifest,) = (tmp_path / "run").rglob("manifest.json")
    data = load_labelled_images(str(manifest.parent), 16, label_column=["compressibility", "aesthetic"])
    assert data.names == (("low", "high"), ("low", "high")) and len(data.labels) == 40
    assert torch.equal(data.labels, torch.stack([small_file(data.images), aesthetic_class(data.images)], dim=1).float())
    assert 0 < data.labels[:, 0].mean() < 1 and 0 < data.labels[:, 1].mean() < 1

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["updates"] == 2 and math.isfinite(metrics["gap"]) and math.isfinite(metrics["kl"])
    pipe = CTRLPipeline.from_pretrained(tmp_path / "run")
    assert list(pipe.label_space.attributes) == ["compressibility", "aesthetic"]

    def draw(label):
        return pipe(
            PROMPTS[0], label=label, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images

    images = [draw(label) for label in ({"compressibility": "high", "aesthetic": "high"}, {"aesthetic": "low"}, None)]
    assert all(image.isfinite().all() for image in images)
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
