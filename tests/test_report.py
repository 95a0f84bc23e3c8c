"""What a person sees of a run: the bar, trackers, the page at its end, a dry run before it, and settings for small GPUs."""

import base64
import importlib.util
import io
import json
import logging
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_ctrl
from diffusers_ctrl.tracking import number_log_lines, tracker_names
from figures import plot_curves
from task import parse_arguments


LABELS = ("<script>alert(1)</script>", 'b & "c"')


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, datasets_cache):
    """Forty grey pictures in two classes, with names that a page must not take for its own."""
    rows = {"image": [], "label": []}
    for i in range(40):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (200 if i % 2 else 40,) * 3).save(buffer, format="PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["label"].append(LABELS[i % 2])
    folder = tmp_path_factory.mktemp("labels") / "tones"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    return folder


def settings(sd_folder, dataset, **changes):
    return {
        "base": str(sd_folder),
        "attribute": "tone",
        "dataset": str(dataset),
        "num_labels": 40,
        "prompts": ["a <b>seven</b>"],
        "classifier_size": 8,
        "classifier_widths": [4, 4],
        "classifier_members": 1,
        "classifier_epochs": 1,
        "num_inference_steps": 4,
        "lora_rank": 2,
        "batch_size": 4,
        "max_updates": 2,
        "sample_every": 1,
        "eval_samples": 4,
        "base_samples": 8,
        "report_to": "tensorboard",
        **changes,
    }


def main(folder, *arguments, **values):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run")}))
    return train_ctrl.main(["--config", str(path), *arguments])


@pytest.fixture(scope="module")
def finished(sd_folder, dataset, tmp_path_factory):
    """(folder of a finished run, what it wrote to stderr); to be read only."""
    import contextlib

    folder, stderr = tmp_path_factory.mktemp("watched"), io.StringIO()
    with contextlib.redirect_stderr(stderr):
        main(folder, **settings(sd_folder, dataset))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run", stderr.getvalue()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.links, self.text = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "img":
            self.images[attrs["alt"]] = attrs["src"]
        self.links += [value for key, value in attrs.items() if key in ("href", "src") and not value.startswith("data:image/png;")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_page_with_all_that_the_run_found(finished):
    run, _ = finished
    page, metrics = Page((run / "report.html").read_text()), json.loads((run / "metrics.json").read_text())
    assert not page.links and "script" not in page.tags and "b" not in page.tags
    for label in LABELS:
        assert label in page.text
        assert metrics[f"by_label.{label}.gap_is_lower_bound"]
        assert f">= {metrics[f'by_label.{label}.gap']:.3f} ± {metrics[f'by_label.{label}.gap_se']:.3f}" in page.text
    assert f">= {metrics['gap']:.3f} ± {metrics['gap_se']:.3f}" in page.text
    for name in ("objective", "log_partition", "kl"):
        assert f"{metrics[name]:.3f} ± {metrics[f'{name}_se']:.3f}" in page.text
    assert f"{metrics['base_log_partition']:.3f} ± {metrics['base_log_partition_se']:.3f}" in page.text
    assert metrics["gap_is_lower_bound"] and any("only a lower bound" in text for text in page.text)
    for text in ("num_inference_steps", "['a <b>seven</b>']", metrics["versions"]["diffusers"]):
        assert text in page.text
    assert set(page.images) == {"curves", "samples"}
    for name, source in page.images.items():
        assert base64.b64decode(source.split(",", 1)[1]) == (run / f"{name}.png").read_bytes()
    assert not list(run.rglob("*.tmp*"))


def test_tensorboard_has_the_figures_and_the_sample_grids(finished):
    run, _ = finished
    event_file = min(run.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))  # that of the settings lies deeper
    events = EventAccumulator(str(event_file.parent), size_guidance={"images": 0}).Reload()
    history = json.loads((run / "history.json").read_text())
    for name in ("reward", "kl", "objective", "gap_estimate", "grad_norm"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["update"], pytest.approx(row[name], rel=1e-5)) for row in history]
    assert all(event.value > 0 for event in events.Scalars("samples_per_second"))
    grids = events.Images("samples/image/0") if "samples/image/0" in events.Tags()["images"] else events.Images("samples")
    assert [event.step for event in grids] == [1, 2]
    for event in grids:
        with (
            Image.open(io.BytesIO(event.encoded_image_string)) as logged,
            Image.open(run / "grids" / f"update-{event.step:06d}.png") as kept,
        ):
            assert logged.size == kept.size and logged.convert("RGB").tobytes() == kept.convert("RGB").tobytes()


def test_the_progress_bar_is_one_line_with_everything(finished):
    lines = [line for line in finished[1].replace("\r", "\n").splitlines() if line.startswith("training ")]
    assert lines[-1].startswith("training 2/2 |")
    for name in ("J=", "reward=", "KL=", "gap~=", "samples/s="):
        assert name in lines[-1]
    assert all("<" in line and len(line) < 120 for line in lines)


@pytest.mark.parametrize(
    "report_to, message",
    [
        ("tensorbord", "no tracker 'tensorbord': use none, or one or more of .*tensorboard.*wandb"),
        ("tensorboard,mlflo", "no tracker 'mlflo'"),
        ("all", "no tracker 'all'"),
    ],
)
def test_an_unknown_tracker_is_refused(report_to, message):
    with pytest.raises(ValueError, match=message):
        tracker_names(report_to)


def test_trackers_by_name():
    assert tracker_names("none") == [] and tracker_names("tensorboard, tensorboard") == ["tensorboard"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="W&B is installed")
def test_a_tracker_that_is_not_installed_is_said_at_once(sd_folder, dataset, tmp_path):
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        main(tmp_path, **settings(sd_folder, dataset, report_to="wandb"))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs W&B")
def test_wandb_offline(sd_folder, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    main(tmp_path, **settings(sd_folder, dataset, report_to="tensorboard,wandb"))
    assert list(tmp_path.rglob("offline-run-*"))


def test_log_lines_say_which_process_they_are_from(capsys):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        number_log_lines(SimpleNamespace(num_processes=1, process_index=0))
        assert root.handlers == handlers
        number_log_lines(SimpleNamespace(num_processes=4, process_index=1))
        logging.getLogger("diffusers_ctrl.trainer").warning("J is falling")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)  # as number_log_lines did, but for this block's own list of warnings
            warnings.warn("eta is small", stacklevel=1)
    finally:
        logging.captureWarnings(False)
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert "[process 2 of 4] WARNING diffusers_ctrl.trainer: J is falling" in lines[0]
    assert any("[process 2 of 4]" in line and "eta is small" in line for line in lines)


# -- a dry run --


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "coarse_updates": 100,
            "coarse_steps": 2,
            "low_vram": True,
            "objective": "direct_backprop",
            "kl_limit": 4.0,
            "eval_every": 50,
        },
    ],
)
def test_a_dry_run_measures_and_leaves_nothing(sd_folder, dataset, tmp_path, monkeypatch, capsys, changes):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    found = main(tmp_path, "--dry_run", "true", **settings(sd_folder, dataset, max_updates=300, **changes))
    assert not (tmp_path / "run").exists() and not list(scratch.iterdir())
    said = capsys.readouterr().out
    assert found["parameters"]["lora"] > 0 and f"{found['parameters']['lora']:,} parameters of LoRA" in said
    assert "an update      4 trajectories of 4 steps" in said  # low_vram makes micro-batches, not a smaller batch
    assert found["peak_bytes"] > 2**27 and f"{found['peak_bytes'] / 2**30:.2f} GiB" in said
    coarse, fine = (100 * found["seconds_per_coarse_update"], 200) if changes else (0, 300)
    assert found["seconds_train"] == pytest.approx(coarse + fine * found["seconds_per_update"]) and found["seconds_train"] > 0
    assert found["seconds_samples"] > 0 and "for 300 updates" in said and "Nothing was kept" in said


def test_a_dry_run_fails_where_the_run_would(sd_folder, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(ValueError, match="no/such-dataset"):
        main(tmp_path, "--dry_run", **settings(sd_folder, "no/such-dataset"))
    assert not (tmp_path / "run").exists() and not list(scratch.iterdir())


# -- a run without a good update --


def test_there_are_no_curves_of_no_update(tmp_path):
    """Else a run of few updates, all skipped, would end in an error after the adapter is written."""
    history = [{"seconds": float(i), "objective": -1.0, "kl": 0.1, "reward": -0.9} for i in range(3)]
    plot_curves(history, -0.5, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
    plot_curves([], -0.5, tmp_path / "curves.png")  # nor those of an earlier run
    assert not (tmp_path / "curves.png").exists()


# -- small GPUs --


def test_low_vram_keeps_the_batch_and_changes_what_costs_memory():
    task, config = parse_arguments(["--low_vram", "true", "--batch_size", "16", "--gradient_accumulation_steps", "3"])
    assert (config.batch_size, config.gradient_accumulation_steps) == (1, 48)
    assert config.checkpointing and config.reward_batch_size == 1 and not config.merge_lora and task.sample_batch_size == 8
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    assert (task.dtype, config.mixed_precision) == (("bfloat16", "bf16") if half else ("float32", "no"))
    _, config = parse_arguments(["--low_vram", "true", "--batch_size", "16", "--global_batch_size", "64"])
    assert (config.batch_size, config.global_batch_size, config.gradient_accumulation_steps) == (1, 64, 1)
    task, config = parse_arguments([])
    assert config.batch_size == 32 and config.reward_batch_size is None and task.sample_batch_size == 100
