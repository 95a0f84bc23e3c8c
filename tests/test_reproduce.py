"""From one command to another over the Hub: the trainer pushes, and whoever has the adapter's name and its card gets the card's figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_client import BASE, TOKEN, contents, environment
from test_cli import settings

from diffusers_ctrl import assets
from diffusers_ctrl.adapters import ADAPTER_FILES, load_adapter


ROOT = Path(__file__).resolve().parents[1]
REPO = "user/trained-stroke"
pytestmark = pytest.mark.slow  # two commands from their imports to their end
NAMES = ("accuracy", "macro_f1", "prompt_accuracy", "log_likelihood", "kl", "objective", "log_partition", "gap", "gap_from_base")
NAMES += tuple(f"base_{name}" for name in ("accuracy", "log_likelihood", "log_partition"))


def run(hub, home, script, *arguments, **variables):
    """A command in a process of its own, as a user types it; what it printed and logged, at the highest level."""
    env = environment(hub.url, home, HF_HUB_VERBOSITY="debug", DIFFUSERS_VERBOSITY="debug", TQDM_DISABLE="1", **variables)
    command = [sys.executable, str(ROOT / "training" / script), *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=home.parent, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert TOKEN not in text
    assert done.returncode == 0, text[-3000:]
    return text


@pytest.fixture(scope="module")
def trained_and_pushed(hub, tmp_path_factory):
    """The output folder of a run on the Hub's base that pushed itself."""
    work = tmp_path_factory.mktemp("trainer")
    at = next(sha for sha, commit in hub.repos[BASE].commits.items() if "model_index.json" in commit.files)
    sizes = {"eval_samples": 60, "base_samples": 180, "num_labels": 200, "classifier_epochs": 20}
    sizes |= {
        "max_updates": 12,
        "batch_size": 12,
        "learning_rate": 0.01,
        "label_learning_rate": 0.1,
        "sample_every": 0,
    }  # so that it learns something
    values = settings(BASE, work / "run", base_revision=at, **sizes)
    (work / "smoke.yaml").write_text(yaml.safe_dump(values))
    push = ("--config", work / "smoke.yaml", "--push_to_hub", "--hub_model_id", REPO)
    said = run(hub, work / "home", "train_ctrl.py", *push, HF_TOKEN=TOKEN)
    assert f"Pushed: {hub.url}/{REPO}/commit/" in said
    return work / "run"


def test_the_trainer_pushes_its_adapter_and_no_token(hub, trained_and_pushed):
    files = hub.files(REPO)
    assert set(files) == {
        *ADAPTER_FILES,
        "README.md",
        "metrics.json",
        "samples.png",
        "curves.png",
        "confusion.png",
        ".gitattributes",
    }
    assert files["pytorch_lora_weights.safetensors"] == (trained_and_pushed / "pytorch_lora_weights.safetensors").read_bytes()
    everywhere = [path for path in trained_and_pushed.parent.rglob("*") if path.is_file()]
    assert len(everywhere) > 20 and not [path for path in everywhere if TOKEN.encode() in path.read_bytes()]
    assert not [name for name, data in files.items() if TOKEN.encode() in data or str(trained_and_pushed.parent).encode() in data]
    card = files["README.md"].decode()
    assert f'from_pretrained("{REPO}")' in card and f'with its base, "{BASE}"' in card
    assert "handwritten digits of 43 people" in card and "200 labelled images in all" in card and "device cpu" in card
    record = load_adapter(trained_and_pushed).config.training
    assert sum(record["data"][0]["labels"].values()) == record["data"][0]["images"] == 200
    assert record["compute"]["processes"] == 1 and record["settings"]["max_updates"] == 12


def test_the_cards_figures_are_found_again(hub, trained_and_pushed, tmp_path):
    """By its name, with the card's own settings, another seed, in a new process with an empty cache."""
    card = hub.files(REPO)["README.md"].decode()
    (tmp_path / "settings.yaml").write_text(re.search(r"^```yaml\n(.*?)^```$", card, re.S | re.M).group(1))
    command = re.search(r"`python training/evaluate.py (.*?)`", card).group(1).split()
    assert command == ["--adapter", REPO, "--config", "settings.yaml"]
    out = tmp_path / "again"
    run(hub, tmp_path / "home", "evaluate.py", *command[:3], tmp_path / "settings.yaml", "--seed", 7, "--output_dir", out)
    compare(json.loads(hub.files(REPO)["ctrl_config.json"])["metrics"], json.loads((out / "metrics.json").read_text()), card)


def test_the_shipped_cards_figures_are_found_again(hub, tmp_path):
    """The shipped adapter, pushed and judged by its name as anyone would: fewer samples than the card's, and others."""
    shipped = assets.find("digits-stroke")
    hub.create("user/digits-stroke", contents(shipped))
    config = ROOT / "training" / "configs" / "digits_stroke_gamma.yaml"
    few = ("--eval_samples", 100, "--base_samples", 600, "--seed", 7, "--output_dir", tmp_path / "again")
    run(hub, tmp_path / "home", "evaluate.py", "--adapter", "user/digits-stroke", "--config", config, *few)
    theirs, ours = load_adapter(shipped).config.metrics, json.loads((tmp_path / "again" / "metrics.json").read_text())
    compare(theirs, ours, (shipped / "README.md").read_text())
    rows = [key for key in theirs if re.fullmatch(r"by_gamma\..*\.(accuracy|kl|gap)", key)]
    assert len(rows) == 12 and all(
        abs(ours[k] - theirs[k]) <= 4 * (ours[f"{k}_se"] ** 2 + theirs[f"{k}_se"] ** 2) ** 0.5 for k in rows
    )


def compare(theirs, ours, card):
    """Both are of the same quantities, within four standard errors; the former are on the card."""
    different = 0
    for name in NAMES:
        error = (ours[f"{name}_se"] ** 2 + theirs[f"{name}_se"] ** 2) ** 0.5
        print(
            f"{name}: {theirs[name]:.4f} and {ours[name]:.4f}, {abs(ours[name] - theirs[name]) / max(error, 1e-12):.1f} standard errors"
        )
        assert abs(ours[name] - theirs[name]) <= 4 * error + 1e-9, name
        assert f" {theirs[name]:.3f} ± {theirs[f'{name}_se']:.3f} " in card, name
        different += ours[name] != theirs[name]
    assert different > 6  # they are other samples
