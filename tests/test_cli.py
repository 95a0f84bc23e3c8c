"""The training command, from a YAML file to an adapter that a pipeline loads, at smoke size; and what it says of bad settings."""

import ast
import dataclasses
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image

import likelihood
import task as settings_of_a_run
import train_ctrl
from diffusers_ctrl import Continuous, CTRLConfig, CTRLPipeline, LabelSpace
from diffusers_ctrl.adapters import load_adapter
from digits_data import PROMPTS, label_attribute


pytestmark = pytest.mark.usefixtures("datasets_cache")

CONFIGS = Path(train_ctrl.__file__).parent / "configs"
LABELS = ("thin", "regular", "bold")


def settings(folder, output, **changes):
    """A run of two updates on the tiny base in `folder`."""
    return {
        "base": str(folder),
        "attribute": "stroke",
        "dataset": "digits:stroke",
        "num_labels": 40,
        "prompts": list(PROMPTS[:2]),
        "classifier_size": 8,
        "classifier_widths": [4, 4],
        "classifier_epochs": 2,
        "oracle": "digits_data:stroke_oracle",
        "prompt_oracle": "digits_data:prompt_oracle",
        "eval_samples": 6,
        "base_samples": 18,
        "output_dir": str(output),
        "num_inference_steps": 4,
        "lora_rank": 2,
        "batch_size": 4,
        "max_updates": 2,
        "checkpoint_every": 1,
        "sample_every": 2,
        "report_to": "none",
        **changes,
    }


def write_config(path, **values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


def smoke(base_folder, work, *arguments, **changes):
    """Runs the command with a YAML file in `work` and the arguments; returns the output folder."""
    work.mkdir(parents=True, exist_ok=True)
    config = write_config(work / "smoke.yaml", **settings(base_folder, work / "run", **changes))
    train_ctrl.main(["--config", config, *arguments])
    return work / "run"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the whole process; here each run is one of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(sd_folder, tmp_path_factory, datasets_cache):
    """A finished run of the default objective; to be read only."""
    return smoke(sd_folder, tmp_path_factory.mktemp("cli"), report_to="tensorboard")


def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images


# -- a whole run --


def test_what_a_run_writes(run):
    for name in (
        "pytorch_lora_weights.safetensors",
        "label_encoder/config.json",
        "label_encoder/diffusion_pytorch_model.safetensors",
        "classifier/config.json",
        "classifier/diffusion_pytorch_model.safetensors",
        "ctrl_config.json",
        "README.md",
        "samples.png",
        "metrics.json",
        "curves.png",
        "confusion.png",
        "history.json",
        "grids/update-000002.png",
        "checkpoints/checkpoint-000002/trainer_state.safetensors",
    ):
        assert (run / name).is_file(), name
    assert list(run.rglob("events.out.tfevents.*"))
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for picture in run.rglob("*.png"):
        with Image.open(picture) as image:
            assert len(image.convert("L").getcolors(10**6)) > 10  # something is drawn


def test_the_names_in_metrics_json(run):
    metrics = json.loads((run / "metrics.json").read_text())
    measured = ("accuracy", "macro_f1", "log_likelihood", "prompt_accuracy")
    for name in (*measured, "kl", "objective", "log_partition", "gap"):
        assert math.isfinite(metrics[name]), name
        assert metrics[f"{name}_se"] >= 0, name
    for name in (*measured, "log_partition"):
        assert math.isfinite(metrics[f"base_{name}"]), name
        assert metrics[f"base_{name}_se"] >= 0, name
    assert 0 <= metrics["exact_accuracy"] <= 1
    assert metrics["ess"] >= 1
    for label in LABELS:
        for name in ("accuracy", "kl", "log_likelihood", "objective", "log_partition", "gap"):
            assert math.isfinite(metrics[f"by_label.{label}.{name}"]), (label, name)
    for name in ("classifier", "train", "evaluate"):
        assert metrics[f"seconds_{name}"] > 0
    assert (metrics["updates"], metrics["num_labels"], metrics["seed"]) == (2, 40, 0)
    assert metrics["versions"]["diffusers"]
    nested = [name for name, value in metrics.items() if isinstance(value, (dict, list))]
    assert nested == ["versions"]
    assert metrics["gap"] == pytest.approx(metrics["log_partition"] - metrics["objective"])
    assert json.loads((run / "ctrl_config.json").read_text())["metrics"] == metrics


def test_the_config_of_the_adapter(run, sd_folder):
    adapter = load_adapter(run)
    assert adapter.config.base["id"] == str(sd_folder)
    assert adapter.label_encoder.label_space == LabelSpace(stroke=label_attribute("stroke"))
    assert adapter.config.sampler["num_inference_steps"] == 4
    assert adapter.config.sampler["options"] == {"eta": 1.0}
    assert all(value.any() for key, value in adapter.lora.items() if "lora_B" in key)  # it was trained
    assert adapter.label_encoder.tables[0].any()


def test_the_card(run):
    text = (run / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    data = yaml.safe_load(header)
    assert data["library_name"] == "diffusers"
    assert "gap" in body and "effective sample size" in body
    assert PROMPTS[1] in body and "'bold'" in body
    assert f"{json.loads((run / 'metrics.json').read_text())['gap']:.3f}" in body


def test_the_history(run):
    history = json.loads((run / "history.json").read_text())
    assert [row["update"] for row in history] == [1, 2]
    assert all(math.isfinite(row[name]) for row in history for name in ("objective", "reward", "kl", "grad_norm"))
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6)  # the first update still samples from the base


def test_a_pipeline_loads_the_run(run, sd_folder):
    pipe = CTRLPipeline.from_pretrained(run)
    assert list(pipe.label_space.attributes["stroke"].names) == list(LABELS)
    base = draw(CTRLPipeline.from_pretrained(sd_folder), num_inference_steps=4, eta=1.0, guidance_scale=1.0)
    assert torch.equal(draw(pipe, num_inference_steps=4, eta=1.0, guidance_scale=1.0), base)
    assert not torch.equal(draw(pipe, label="bold"), base)
    assert not torch.equal(draw(pipe, label="bold"), draw(pipe, label="thin"))


def test_it_says_what_to_type_next(sd_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "smoke.yaml", **settings(sd_folder, "runs/here", max_updates=1))
    metrics = train_ctrl.main([f"--config={config}"])
    out = capsys.readouterr().out
    assert "accuracy" in out and "gap" in out and f"{metrics['gap']:.3f}" in out
    code = out.split("python -c '")[1].split("'\n")[0]
    exec(code)
    assert Image.open(tmp_path / "labelled.png").size == (16, 16)


@pytest.mark.parametrize("prompt", ["one", "", 'a "one" for $HOME', "it's `one`!"])
def test_what_to_type_is_what_a_shell_reads(run, prompt):
    config = load_adapter(run).config
    config = dataclasses.replace(
        config, training={**config.training, "settings": {**config.training["settings"], "prompts": [prompt]}}
    )
    program = train_ctrl.first_picture(Path("runs/here"), config, {"a": "b"})
    (read,) = subprocess.run(["bash", "-c", f"printf '%s\\n' {program}"], capture_output=True, text=True).stdout.splitlines()
    call = ast.parse(read).body[2].value.func.value.value.value  # pipe(…).images[0].save(…)
    assert [argument.value for argument in call.args] == ([prompt] if prompt else [])
    classes = dataclasses.replace(config, pipeline_class="DiTPipeline", training={"settings": {"prompts": ["1", "2"]}})
    assert 'pipe([2], label="x")' in train_ctrl.first_picture(Path("here"), classes, "x")


def asked_too_late(images):
    raise ValueError("this oracle cannot read")


def test_an_oracle_that_fails_does_so_before_the_training(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ctrl.CTRLTrainer, "train", lambda self: pytest.fail("it had trained"))
    monkeypatch.setattr(train_ctrl, "attribute_oracle", lambda task: asked_too_late)
    with pytest.raises(ValueError, match="this oracle cannot read"):
        smoke(sd_folder, tmp_path)


# -- resume --


def test_the_launchers_one_thread_is_made_all_cores_and_other_threads_stay(monkeypatch):
    """In-process and without the launcher the number of threads is whoever's it is."""
    cpu = SimpleNamespace(device=torch.device("cpu"), num_processes=4)  # on four machines
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for launched, before, after in ((False, 1, 1), (True, 2, 2), (True, 1, 3)):
        if launched:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        torch.set_num_threads(before)
        train_ctrl.take_cores(cpu)
        assert torch.get_num_threads() == after
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    train_ctrl.take_cores(cpu)
    assert torch.get_num_threads() == 3


def test_resume_from_latest(run, sd_folder, tmp_path, capsys):
    whole = smoke(sd_folder, tmp_path / "whole", max_updates=4)
    first = tmp_path / "again"
    shutil.copytree(whole, first / "run")
    checkpoints = first / "run" / "checkpoints"
    shutil.move(checkpoints / "checkpoint-000004", checkpoints / "checkpoint-000004.tmp")  # half-written
    capsys.readouterr()
    resumed = smoke(sd_folder, first, "--resume_from", "latest", max_updates=4)
    assert "at update 3" in capsys.readouterr().out
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-000003", "checkpoint-000004"]
    metrics, history = (json.loads((resumed / name).read_text()) for name in ("metrics.json", "history.json"))
    assert metrics["updates"] == 4 and [row["update"] for row in history] == [1, 2, 3, 4]
    assert metrics["seconds_train"] == history[-1]["seconds"] > history[2]["seconds"] > 0  # with those before the resume
    ours, theirs = load_adapter(resumed), load_adapter(whole)
    assert all(torch.equal(ours.lora[key], theirs.lora[key]) for key in ours.lora)
    assert torch.equal(ours.label_encoder.tables[0], theirs.label_encoder.tables[0])


def test_resume_goes_on_to_more_updates(run, sd_folder, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    resumed = smoke(sd_folder, tmp_path, "--resume_from", "latest", "--max_updates", "3")
    assert json.loads((resumed / "metrics.json").read_text())["updates"] == 3
    assert sorted(path.name for path in (resumed / "checkpoints").iterdir()) == ["checkpoint-000002", "checkpoint-000003"]
    assert not all(
        torch.equal(a, b) for a, b in zip(load_adapter(resumed).lora.values(), load_adapter(run).lora.values(), strict=True)
    )


def test_resume_from_nothing_is_a_start(run, sd_folder, tmp_path, caplog, capsys):
    """So that a job may always be started with it. What is left of a classifier that was not finished is not used."""
    (tmp_path / "run" / "classifier").mkdir(parents=True)
    (tmp_path / "run" / "classifier" / "config.json").write_text("{")
    started = smoke(sd_folder, tmp_path, "--resume_from", "latest")
    assert "there is no checkpoint" in caplog.text and "starts from the beginning" in caplog.text
    assert (started / "pytorch_lora_weights.safetensors").read_bytes() == (run / "pytorch_lora_weights.safetensors").read_bytes()


def test_a_resumed_run_keeps_its_classifier_unless_it_is_another(run, sd_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(likelihood, "labelled_images", None)  # no dataset is read again, and nothing fitted
    smoke(sd_folder, tmp_path, "--resume_from", "latest")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"cannot be resumed: classifier = '.*' \('.*' in the checkpoint\)\. Give the same"):
        smoke(sd_folder, tmp_path, "--resume_from", "latest", "--classifier_epochs", "1")
    assert "made with other settings: classifier_epochs = 1 (2 then)" in capsys.readouterr().out


# -- other recipes --


@pytest.mark.parametrize(
    "arguments",
    [
        ["--objective", "direct_backprop", "--truncation", "2"],
        ["--objective", "direct_backprop", "--checkpointing", "true", "--guidance_scale", "2"],
        ["--num_regression_steps", "2", "--merge_lora", "true", "--gradient_accumulation_steps", "2"],
    ],
)
def test_recipes(sd_folder, tmp_path, arguments):
    output = smoke(sd_folder, tmp_path, *arguments, oracle=None, prompt_oracle=None)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["updates"] == 2 and math.isfinite(metrics["gap"])
    assert "accuracy" not in metrics and not (output / "confusion.png").exists()  # nothing that an oracle did not measure
    assert draw(CTRLPipeline.from_pretrained(output), label="thin").isfinite().all()


def test_an_unconditional_base(ddpm_folder, tmp_path):
    """DDPM pictures of 8x8, two attribute classes from a user's own folder of images."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i in range(40):
        Image.new("L", (8, 8), 20 * (i % 2) + 100).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "shade": ("light", "dark")[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    output = smoke(
        ddpm_folder,
        tmp_path,
        dataset=str(folder),
        attribute="shade",
        label_column="shade",
        label_names=["light", "dark"],
        prompts=[""],
        oracle=None,
        prompt_oracle=None,
        lora_targets=["to_q", "to_v"],
    )
    pipe = CTRLPipeline.from_pretrained(output)
    assert type(pipe).__name__ == "CTRLDDPMPipeline"
    assert list(pipe.label_space.attributes["shade"].names) == ["light", "dark"]
    assert pipe(label=["light", "dark"], output_type="np").images.shape == (2, 8, 8, 3)


def test_few_labels_get_more_epochs_of_the_classifier_unless_they_are_given(sd_folder, tmp_path, monkeypatch):
    seen, original = [], likelihood.fit_classifier

    def briefly(*args, max_epochs, patience=20, **kwargs):
        seen.append((max_epochs, patience))
        return original(*args, max_epochs=1, **kwargs)

    monkeypatch.setattr(likelihood, "fit_classifier", briefly)
    smoke(sd_folder, tmp_path / "default", classifier_epochs=None, max_updates=1)
    smoke(sd_folder, tmp_path / "given", classifier_epochs=3, max_updates=1)
    assert seen == [(1200, 300), (3, 20)]


@pytest.fixture(scope="module")
def gamma_run(sd_folder, tmp_path_factory, datasets_cache):
    return smoke(sd_folder, tmp_path_factory.mktemp("cli-gamma"), gamma_range=[0.5, 4.0])


def test_a_run_for_a_range_of_gamma(gamma_run):
    metrics = json.loads((gamma_run / "metrics.json").read_text())
    for gamma in ("0.5", "1", "2", "4"):
        for name in ("accuracy", "exact_accuracy", "kl", "gap", "gap_se", "gap_from_base", "ess"):
            assert math.isfinite(metrics[f"by_gamma.{gamma}.{name}"]), (gamma, name)
    assert load_adapter(gamma_run).config.gamma_range == [0.5, 4.0]
    card = (gamma_run / "README.md").read_text()
    assert "from 0.5 to 4" in card and all(f"\n| {gamma} | " in card for gamma in ("0.5", "1", "2", "4"))
    pipe = CTRLPipeline.from_pretrained(gamma_run)
    assert torch.equal(draw(pipe, label="bold"), draw(pipe, label="bold", gamma=1.0))
    assert not torch.equal(draw(pipe, label="bold"), draw(pipe, label="bold", gamma=4.0))


def test_a_control_head_alone_from_training_to_evaluation(sd_folder, tmp_path, datasets_cache, capsys):
    import evaluate

    head = {"lora_rank": 0, "control_head": 8, "critic_trajectories": 20, "critic_updates": 2, "merge_lora": True}
    folder = smoke(sd_folder, tmp_path, **head)
    adapter = load_adapter(folder)
    assert adapter.lora == {} and adapter.label_encoder.control_head.alone
    card = (folder / "README.md").read_text()
    assert "Its labels need it: it has a control head" in card and "\n- lora\n" not in card
    pipe = CTRLPipeline.from_pretrained(folder)
    plain, labelled = draw(pipe, eta=1.0), draw(pipe, label="bold")
    assert (plain - labelled).abs().max() > 1e-5
    again = evaluate.main(
        ["--adapter", str(folder), "--config", str(tmp_path / "smoke.yaml"), "--output_dir", str(tmp_path / "again")]
    )
    assert math.isfinite(again["gap"]) and math.isclose(again["kl"], adapter.config.metrics["kl"], rel_tol=1e-3, abs_tol=1e-6)
    smoke(sd_folder, tmp_path / "dry", "--dry_run", **head)
    assert " 0 parameters of LoRA" in capsys.readouterr().out


def test_evaluation_knows_the_range(gamma_run, sd_folder, tmp_path):
    import evaluate

    config = write_config(tmp_path / "smoke.yaml", **settings(sd_folder, tmp_path / "again"))
    own = ["--adapter", str(gamma_run), "--config", config, "--output_dir", str(tmp_path / "again")]
    metrics = evaluate.main(own)
    assert math.isfinite(metrics["by_gamma.4.gap"])
    # a few samples at a time: the same ones, to rounding
    few = ["--sample_batch_size", "3", "--reward_batch_size", "2"]
    again = evaluate.main([*own, *few])
    for name in ("kl", "log_likelihood", "gap", "base_log_partition", "by_gamma.4.gap"):
        assert math.isclose(again[name], metrics[name], rel_tol=1e-4, abs_tol=1e-5), name


def test_new_figures_leave_the_weights_as_they_are(gamma_run, sd_folder, tmp_path):
    import evaluate

    folder = tmp_path / "adapter"
    shutil.copytree(gamma_run, folder, ignore=shutil.ignore_patterns("checkpoints", "dataset", "grids"))
    weights = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    config = write_config(tmp_path / "smoke.yaml", **settings(sd_folder, tmp_path / "again", eval_samples=8))
    metrics = evaluate.main(["--adapter", str(folder), "--update_adapter", "true", "--config", config])
    assert len(weights) == 3 and all(path.read_bytes() == data for path, data in weights.items())
    assert (
        load_adapter(folder).config.metrics["gap"] == metrics["gap"] != json.loads((gamma_run / "metrics.json").read_text())["gap"]
    )
    assert not list(folder.rglob("*.tmp"))


def reddish(images, labels):
    """A scorer: log p(red | image), of the mean of one colour, through NumPy, so that no gradient passes."""
    share = torch.from_numpy(images.detach().mean(dim=(2, 3)).numpy())[:, 0].clamp(0.05, 0.95)
    return torch.where(labels[:, 0] == 1, share, 1 - share).log()


def test_a_scorer_in_place_of_labelled_images(sd_folder, tmp_path):
    changes = {"scorer": f"{__name__}:reddish", "label_names": ["plain", "red"], "oracle": None, "objective": "policy_gradient"}
    run = smoke(sd_folder, tmp_path, **changes)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_labels"] == 0 and math.isfinite(metrics["gap"]) and metrics["kl"] > 0
    assert not (run / "classifier").exists()
    import evaluate

    with pytest.raises(ValueError, match="no classifier, so no gap can be measured: give --attribute, --scorer"):
        evaluate.main(["--adapter", str(run), "--config", write_config(tmp_path / "none.yaml", **settings(sd_folder, tmp_path))])
    again = evaluate.main(
        ["--adapter", str(run), "--config", str(tmp_path / "smoke.yaml"), "--output_dir", str(tmp_path / "again")]
    )
    assert math.isfinite(again["gap"])
    pipe = CTRLPipeline.from_pretrained(run)
    assert pipe.classifier is None and list(pipe.label_space.attributes["stroke"].names) == ["plain", "red"]
    with pytest.raises(ValueError, match="needs the adapter's classifier"):
        draw(pipe, label="red", num_particles=2)


def test_a_scorer_without_a_gradient_needs_policy_gradient(sd_folder, tmp_path):
    with pytest.raises(ValueError, match="this scorer has none: use policy_gradient"):
        smoke(sd_folder, tmp_path, scorer=f"{__name__}:reddish", label_names=["plain", "red"], oracle=None)


def quarter_by_brightness(images):
    """A labeller: each batch's images in four classes of one size, the darkest first."""
    return images.mean(dim=(1, 2, 3)).argsort().argsort() * 4 // len(images)


@pytest.fixture(scope="module")
def sd15(sd_folder, tmp_path_factory):
    """The tiny base with the scheduler that Stable Diffusion v1.5 comes with."""
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd15"
    pipe.save_pretrained(folder)
    return folder


SMALL = {
    "num_labels": 40,
    "prompts": list(PROMPTS[:2]),
    "resolution": 16,
    "classifier_size": 8,
    "classifier_widths": [4, 4],
    "classifier_epochs": 2,
    "eval_samples": 4,
    "base_samples": 8,
    "num_inference_steps": 4,
    "num_regression_steps": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_updates": 2,
    "report_to": "none",
}


def test_the_compressibility_recipe(sd15, tmp_path):
    """The paper's own setting, at a size for tests: the base's samples labelled by a function, bf16, guidance, checkpointing."""
    recipe = yaml.safe_load((CONFIGS / "sd15_compressibility.yaml").read_text())
    own = {"base": str(sd15), "output_dir": str(tmp_path / "run"), "labeller": f"{__name__}:quarter_by_brightness", "oracle": None}
    train_ctrl.main(["--config", write_config(tmp_path / "small.yaml", **{**recipe, **SMALL, **own})])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["updates"] == 2 and metrics["num_labels"] == 40
    assert math.isfinite(metrics["gap"]) and math.isfinite(metrics["kl"])
    pipe = CTRLPipeline.from_pretrained(tmp_path / "run")
    assert list(pipe.label_space.attributes["compressibility"].names) == recipe["label_names"]
    images = [draw(pipe, label=label) for label in ("largest", "smallest")]
    assert images[0].isfinite().all() and not torch.equal(*images)
    # the base keeps the scheduler it came with, and without a label it is the base
    assert type(pipe.scheduler) is PNDMScheduler
    assert torch.equal(
        draw(pipe, num_inference_steps=4), draw(StableDiffusionPipeline.from_pretrained(sd15), num_inference_steps=4)
    )


def test_a_scheduler_without_a_gaussian_transition(sd15, tmp_path):
    with pytest.raises(ValueError, match="PNDMScheduler"):
        smoke(sd15, tmp_path)
    assert not (tmp_path / "run" / "ctrl_config.json").exists()


# -- bad settings: each is refused, and nothing is left that looks like an adapter --


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rat": 1.0}, r"smoke.yaml has unknown fields \['learning_rat'\]"),
        ({"objective": "reinforce"}, "Unknown objective 'reinforce'.*adjoint_matching.*direct_backprop"),
        ({"eta": 0.0}, "eta > 0"),
        ({"push_to_hub": True}, "--hub_model_id"),
        ({"base": "no/such-base"}, "no/such-base"),
        ({"dataset": "no/such-dataset"}, "no/such-dataset"),
        ({"dataset": "digits:colour"}, "colour.*slant.*stroke"),
        ({"label_column": "colour"}, "no column 'colour'"),
        (
            {"label_names": ["bold", "regular", "thin"]},
            r"'digits:stroke' has the classes \['thin', 'regular', 'bold'\], in this order",
        ),
        ({"label_names": ["thin", "bold"]}, "leave label_names out"),
        ({"label_names": ["left", "right"], "dataset": "digits:slant_value"}, "numbers for labels: leave label_names out"),
        ({"oracle": "digits_data:colour_oracle"}, "digits_data:colour_oracle"),
        ({"lora_targets": ["nowhere"]}, "nowhere"),
        ({"injection_site": "nowhere"}, "nowhere"),
        ({"gamma": -1.0}, "gamma must be positive"),
        ({"gamma_range": [2.0, 1.0]}, "gamma_range must be two numbers"),
        ({"gamma_range": [2.0, 4.0]}, "gamma = 1.0 lies outside gamma_range"),
        ({"scorer": "digits_data:stroke_oracle"}, "scorer needs label_names"),
        ({"max_updates": 0}, "max_updates must be at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be"),
        ({"dtype": "float8"}, "dtype"),
        ({"scheduler": "NoScheduler"}, "NoScheduler"),
        ({"dataset": "base-samples"}, "labeller"),
    ],
)
def test_bad_settings(sd_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        smoke(sd_folder, tmp_path, **changes)
    assert not (tmp_path / "run" / "ctrl_config.json").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_bad_arguments(sd_folder, tmp_path):
    config = write_config(tmp_path / "smoke.yaml", **settings(sd_folder, tmp_path / "run"))
    for arguments, message in (
        (["--objective", "reinforce"], "Unknown objective"),
        (["--eta", "0"], "eta > 0"),
        (["--push_to_hub"], "--hub_model_id"),
    ):
        with pytest.raises(ValueError, match=message):
            train_ctrl.main(["--config", config, *arguments])
    with pytest.raises((ValueError, SystemExit)):
        train_ctrl.main(["--config", config, "--learning_rat", "1"])


@pytest.mark.parametrize("text", ["base: [", "- a\n- b\n", "just text"])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match="bad.yaml"):
        settings_of_a_run.parse_arguments(["--config", str(tmp_path / "bad.yaml")])


def test_a_config_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml cannot be read"):
        settings_of_a_run.parse_arguments(["--config", str(tmp_path / "nowhere.yaml")])


# -- parsing --


def test_the_command_line_wins_over_the_file(tmp_path):
    config = write_config(tmp_path / "some.yaml", learning_rate=0.5, max_updates=7, prompts=["a", "b"], attribute="shade")
    task, train = settings_of_a_run.parse_arguments(["--config", config, "--max_updates", "9", "--prompts", "c", "d e"])
    assert (train.learning_rate, train.max_updates, task.prompts, task.attribute) == (0.5, 9, ["c", "d e"], ["shade"])
    assert train.batch_size == CTRLConfig().batch_size


def test_numbers_as_yaml_reads_them(tmp_path):
    (tmp_path / "some.yaml").write_text("learning_rate: 1e-3\nmax_grad_norm: 1\nnum_labels: null\n")  # 1e-3 is text to YAML 1.1
    task, train = settings_of_a_run.parse_arguments(["--config", str(tmp_path / "some.yaml")])
    assert train.learning_rate == 0.001 and isinstance(train.learning_rate, float)
    assert train.max_grad_norm == 1 and task.num_labels is None


@pytest.mark.parametrize(
    "values", [{"batch_size": "many"}, {"batch_size": [1]}, {"batch_size": 2.5}, {"prompts": "a"}, {"eta": None}]
)
def test_values_of_the_wrong_type(tmp_path, values):
    config = write_config(tmp_path / "some.yaml", **values)
    with pytest.raises((ValueError, SystemExit)):
        settings_of_a_run.parse_arguments(["--config", config])


def test_what_is_about_something_else_does_not_get_the_digits_prompts_and_oracles():
    for own in (["--dataset", "somewhere", "--attribute", "mood"], ["--attribute=mood"]):
        task, train = settings_of_a_run.parse_arguments(own)
        assert task.prompts == [""] and task.oracle is None and task.prompt_oracle is None
        assert (train.max_updates, train.output_dir) == (CTRLConfig.max_updates, CTRLConfig.output_dir)
    assert settings_of_a_run.parse_arguments(["--base", "mine"])[0].prompts == list(PROMPTS)


def test_no_arguments_are_the_digits_recipe():
    task, train = settings_of_a_run.parse_arguments([])
    assert (task.base, task.dataset, task.num_labels) == ("digits-base", ["digits:stroke"], 600)
    assert train.output_dir == "runs/digits-stroke"
    assert train.guidance_scale == 1 and train.gamma == 1 and train.eta == 1
    assert task.prompts == list(PROMPTS)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_parse(path):
    task, train = settings_of_a_run.parse_arguments(["--config", str(path), "--seed", "3"])
    assert train.seed == 3 and task.prompts
    attributes = task.attributes()
    if path.stem.startswith("digits_"):
        assert [attribute.name for attribute in attributes] == [n for n in ("stroke", "slant", "jpeg") if n in path.stem]
        assert all(a.scorer or a.dataset.startswith(f"digits:{a.name}") for a in attributes)
        assert task.base == "digits-base"
    for attribute in attributes:
        for name in (attribute.oracle, attribute.scorer, attribute.labeller):
            assert name is None or callable(settings_of_a_run.import_function(name))
    assert task.prompt_oracle is None or callable(settings_of_a_run.import_function(task.prompt_oracle))


# -- several attributes --

TWO = {"attribute": ["stroke", "slant"], "dataset": ["digits:stroke", "digits:slant"]}


def test_each_attribute_has_its_own_settings():
    task = settings_of_a_run.TaskConfig(
        **TWO, label_names=["thin|regular|bold", "-"], oracle=["digits_data:stroke_oracle", "-"], label_column=["label"]
    )
    first, second = task.attributes()
    assert (first.name, first.dataset, first.names, first.oracle) == (
        "stroke",
        "digits:stroke",
        LABELS,
        "digits_data:stroke_oracle",
    )
    assert (second.names, second.oracle, second.scorer, second.label_column) == (None, None, None, "label")
    assert settings_of_a_run.attribute_oracle(task) is None  # not every attribute has one
    task = settings_of_a_run.TaskConfig(**TWO, continuous=["slant:-2:2:sd"])
    assert task.attributes()[1].interval == Continuous(-2, 2, "sd") and task.attributes()[0].interval is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": ["a", "b", "c"]}, "dataset has 3 entries for 2 attributes"),
        ({"label_names": ["thin|regular|bold"]}, "label_names has 1 entries for 2 attributes"),
        ({"attribute": ["stroke", "stroke"]}, "different names"),
        ({"continuous": ["slant"]}, "NAME:LOW:HIGH"),
        ({"continuous": ["slant:2:1"]}, "NAME:LOW:HIGH"),
        ({"continuous": ["height:0:1"]}, "height"),
        ({"scorer": ["-", "jpeg_data:digit_jpeg_score"]}, "scorer needs label_names"),
    ],
)
def test_settings_of_several_attributes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of_a_run.TaskConfig(**{**TWO, **changes})


def test_two_attributes_from_disjoint_datasets(sd_folder, tmp_path):
    """A class and a number, each known of its own half of the digits: one classifier, one adapter, any subset at the call."""
    changes = {
        "attribute": ["stroke", "slant"],
        "dataset": ["digits:stroke@0/2", "digits:slant_value@1/2"],
        "oracle": ["digits_data:stroke_oracle", "digits_data:slant_value"],
        "gamma": 0.05,
        "gamma_range": [0.01, 0.05],
        "label_bins": 2,
        "batch_size": 11,
    }
    run = smoke(sd_folder, tmp_path, **changes)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_labels"] == 80  # 40 of each half
    assert {key.split(".")[1] for key in metrics if key.startswith("by_given.")} == {"stroke", "slant", "stroke+slant"}
    for name in ("stroke", "slant", "stroke+slant"):
        assert math.isfinite(metrics[f"by_given.{name}.gap"]) and math.isfinite(metrics[f"by_given.{name}.gap_from_base"])
        assert math.isfinite(metrics[f"by_gamma.0.01.by_given.{name}.gap"])
    assert -1 <= metrics["by_attribute.slant.correlation"] <= 1 and metrics["by_attribute.slant.correlation_se"] > 0
    assert metrics["classifier_stroke.temperature"] > 0 and "classifier_slant.coverage_90_after" in metrics
    assert {path.name for path in run.glob("*.png")} == {"samples.png", "curves.png", "confusion-stroke.png", "confusion-slant.png"}
    card = (run / "README.md").read_text()
    assert "stroke and slant" in card and "| stroke and slant |" in card and "cut at 0.246" in card and "from -2.5 to 2.5" in card
    assert "`slant`, regression: held-out correlation" in card and "`stroke`, classifier: held-out accuracy" in card
    pipe = CTRLPipeline.from_pretrained(run)
    labels = [{"stroke": "bold"}, {"slant": 1.5}, {"stroke": "bold", "slant": 1.5}, {"stroke": "thin", "slant": -1.5}]
    images = [draw(pipe, label=label) for label in labels]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    assert torch.equal(draw(pipe, label={"stroke": "bold", "slant": None}), images[0])
    with pytest.raises(ValueError, match="use a number from -2.5 to 2.5"):
        draw(pipe, label={"slant": 3})
    import evaluate

    config = str(tmp_path / "smoke.yaml")
    again = evaluate.main(["--adapter", str(run), "--config", config, "--output_dir", str(tmp_path / "again")])
    assert math.isfinite(again["by_given.stroke.gap"])
    with pytest.raises(ValueError, match=r"about \['stroke'\], the adapter about \['stroke', 'slant'\]"):
        evaluate.main(["--adapter", str(run), "--output_dir", str(tmp_path / "wrong")])


def test_a_scorer_for_one_attribute_and_a_classifier_for_another(sd_folder, tmp_path):
    changes = {
        "attribute": ["stroke", "colour"],
        "scorer": ["-", f"{__name__}:reddish"],
        "label_names": ["-", "plain|red"],
        "oracle": None,
        "objective": "policy_gradient",
    }
    run = smoke(sd_folder, tmp_path, **changes)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_labels"] == 40 and math.isfinite(metrics["by_given.stroke+colour.gap"])
    # the classifier knows one of two attributes only: it is no p(y | x) of the adapter's
    pipe = CTRLPipeline.from_pretrained(run)
    assert pipe.classifier is None and pipe.label_space.attributes["colour"].names == ("plain", "red")
    parts = [metrics[f"by_given.{name}.log_likelihood"] for name in ("stroke", "colour", "stroke+colour")]
    assert all(part < 0 for part in parts)
