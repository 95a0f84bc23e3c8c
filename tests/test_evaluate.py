"""The evaluation command: an adapter measured as it was trained, and where its figures go."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline

import evaluate
from diffusers_ctrl import assets
from diffusers_ctrl.evaluation import draw_samples
from evaluate import EvaluateConfig, adapter_environment
from task import TaskConfig


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

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


# -- where the figures go --


def measure(folder, tmp_path, *arguments, oracle=True):
    """The command at its smallest."""
    config = tmp_path / "settings.yaml"
    config.write_text("output_dir: runs/digits-stroke\nprompts: [one, seven]\n" + "oracle: digits_data:stroke_oracle\n" * oracle)
    few = ["--eval_samples", "1", "--base_samples", "3"]
    return evaluate.main(["--adapter", str(folder), "--config", str(config), *few, *arguments])


def test_without_an_output_dir_no_other_run_is_written_over(sd_adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "runs" / "digits-stroke"
    other.mkdir(parents=True)
    (other / "metrics.json").write_text("mine")
    measure(sd_adapter, tmp_path)
    own = tmp_path / "runs" / "tiny-stroke-evaluation"
    assert {path.name for path in own.iterdir()} == {"metrics.json", "samples.png", "confusion.png"}
    assert [path.name for path in other.iterdir()] == ["metrics.json"] and (other / "metrics.json").read_text() == "mine"
    assert "Written to runs/tiny-stroke-evaluation/." in capsys.readouterr().out


def test_pictures_of_an_earlier_evaluation_are_not_shown_beside_new_figures(sd_adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(sd_adapter, folder)
    (folder / "confusion-slant.png").touch()  # of a run with other attributes
    measure(folder, tmp_path, "--update_adapter", "true")
    assert [path.name for path in folder.glob("confusion*")] == ["confusion.png"]
    assert "(confusion.png)" in (folder / "README.md").read_text()
    assert "accuracy" not in measure(folder, tmp_path, "--update_adapter", "true", oracle=False)
    assert not list(folder.glob("confusion*")) and "confusion" not in (folder / "README.md").read_text()


def test_an_adapter_is_not_written_into_unless_it_is_ones_own_and_one_says_so(sd_adapter, tmp_path, monkeypatch):
    own = str(sd_adapter)
    monkeypatch.chdir(sd_adapter)
    for adapter, output in ((own, f"{own}/../{sd_adapter.name}"), (".", own), ("digits-stroke", str(assets.find("digits-stroke")))):
        with pytest.raises(ValueError, match="is the adapter itself: give another, or --update_adapter true"):
            EvaluateConfig(adapter, output_dir=output).output()
    snapshot = tmp_path / "models--user--name" / "snapshots" / "0123"
    shutil.copytree(sd_adapter, snapshot)
    for adapter in ("digits-stroke", str(assets.find("digits-stroke")), "user/name", str(snapshot)):
        with pytest.raises(ValueError, match=f"'{adapter}' is in the package or on the Hub: give a folder of your own"):
            evaluate.main(["--adapter", adapter, "--update_adapter", "true"])
    with pytest.raises(ValueError, match="not to --output_dir elsewhere: leave one of the two out"):
        EvaluateConfig(own, update_adapter=True, output_dir="elsewhere").output()
    assert EvaluateConfig(own, update_adapter=True, output_dir=".").output().samefile(own)
    for adapter in (own, ".", f"{own}/"):
        assert str(EvaluateConfig(adapter).output()) == "runs/tiny-stroke-evaluation"
    assert str(EvaluateConfig("user/name").output()) == "runs/name-evaluation"
    assert str(EvaluateConfig("user/name", output_dir="here").output()) == "here"
