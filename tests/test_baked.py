"""What a baked label loses under guidance, measured in the policy, is what a baked pipeline does."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ctrl.adapters import read_config, save_config
from diffusers_ctrl.baked import _label_everywhere, by_label_scale, label_scales, measure_baked
from diffusers_ctrl.cards import card_text
from diffusers_ctrl.export import bake_label
from evaluate import adapter_environment
from task import TaskConfig


TASK = TaskConfig(prompts=["one", "seven"])
BOLD = 2


def judged(adapter, guidance_scale):
    sampler = {**adapter.config.sampler, "guidance_scale": guidance_scale}
    return adapter_environment(replace(adapter, config=replace(adapter.config, sampler=sampler)), TASK)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_denoiser_is_the_baked_one(adapter, sd_folder, scale):
    policy, environment = judged(adapter, 3.0)
    plain = StableDiffusionPipeline.from_pretrained(sd_folder)
    bake_label(plain, adapter, "bold", label_scale=scale)
    batch = environment.batch(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    x, base = batch.noise, policy.reference(batch.noise, 500, batch.prompt_embeds)
    nothing, bold = torch.full((2, 1), torch.nan), torch.full((2, 1), float(BOLD))
    with _label_everywhere(policy, scale * policy.label_encoder(bold[:1])):
        measured = policy(x, 500, nothing, None, batch.prompt_embeds)
        assert torch.equal(policy.reference(x, 500, batch.prompt_embeds), base)
    embeds = [plain.encode_prompt(prompt, "cpu", 1, True)[index] for prompt in ("one", "seven") for index in (0, 1)]
    conditional, unconditional = torch.cat(embeds[::2]), torch.cat(embeds[1::2])
    c, u = (plain.unet(x, 500, encoder_hidden_states=e).sample for e in (conditional, unconditional))
    assert (measured - (u + 3.0 * (c - u))).abs().max() < 1e-4
    assert (policy(x, 500, bold, None, batch.prompt_embeds) - measured).abs().max() > 1e-2  # guidance tells them apart
    # and the hooks are gone
    assert "_tuned" not in vars(policy) and not any(module._forward_hooks for module in policy.denoiser.modules())


def test_without_guidance_nothing_is_lost(adapter):
    policy, environment = judged(adapter, 1.0)
    found = measure_baked(policy, environment, 4, 0, (1.0, 2.0))
    rows = by_label_scale(found)
    assert found["baked_samples"] == 12 and found["baked_label_rms"] > 1e-2
    assert rows[1.0]["rms"] < 1e-5 and rows[2.0]["rms"] > 1e-3
    assert rows[1.0]["log_likelihood"] == pytest.approx(found["baked_label_log_likelihood"], abs=1e-4)


def test_under_guidance_it_is_measured_and_on_the_card(adapter, tmp_path):
    policy, environment = judged(adapter, 3.0)
    assert label_scales(3.0) == (1.0, 1.667, 2.333, 3.0) and label_scales(1.0) == (1.0,) * 4
    found = measure_baked(policy, environment, 4, 0, label_scales(3.0))
    assert found == measure_baked(policy, environment, 4, 0, label_scales(3.0))
    rows = by_label_scale(found)
    assert list(rows) == [1.0, 1.667, 2.333, 3.0] and all(row["rms"] > 1e-3 for row in rows.values())
    config = replace(adapter.config, metrics=found, sampler={**adapter.config.sampler, "guidance_scale": 3.0})
    text = card_text(config)
    for scale, row in rows.items():
        assert f"| baked, label_scale {scale:g} | {row['rms']:.3f} | {row['log_likelihood']:.3f} ± " in text
    assert "not measured" in card_text(replace(config, metrics={})) and "label_scale" not in card_text(adapter.config)
    save_config(tmp_path, config)
    assert read_config(tmp_path) == config
