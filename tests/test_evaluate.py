"""The evaluation command: an adapter measured as it was trained, and where its figures go."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline

from diffusers_ctrl.evaluation import draw_samples
from evaluate import adapter_environment
from task import TaskConfig


TASK = TaskConfig(prompts=["one", "seven"])


def samples(policy, environment):
    return draw_samples(policy, environment, 2, torch.Generator().manual_seed(0), progress=False)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_the_scheduler_is_the_adapters_whatever_the_base_comes_with(adapter, sd_folder, tmp_path, scheduler):
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    other = replace(adapter, config=replace(adapter.config, base={**adapter.config.base, "id": str(tmp_path)}))
    policy, environment = adapter_environment(other, TASK)
    assert type(environment.sampler.scheduler) is DDIMScheduler
    expected = samples(*adapter_environment(adapter, TASK))
    assert torch.equal(samples(policy, environment).images, expected.images)


def test_an_adapters_scheduler_that_nobody_knows(adapter):
    sampler = {**adapter.config.sampler, "scheduler": "NoScheduler"}
    with pytest.raises(ValueError, match="no scheduler 'NoScheduler' with a known transition"):
        adapter_environment(replace(adapter, config=replace(adapter.config, sampler=sampler)), TASK)


def test_the_base_has_the_precision_that_is_asked_for(adapter):
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        policy, environment = adapter_environment(adapter, replace(TASK, dtype=name))
        frozen = {p.dtype for n, p in policy.denoiser.named_parameters() if "lora" not in n}
        assert frozen == {dtype} and environment.prompt_embeds.dtype == dtype
        with policy.merged():
            found = samples(policy, environment)
        assert found.log_likelihood.isfinite().all() and found.kl.isfinite().all() and found.kl.mean() > 0
