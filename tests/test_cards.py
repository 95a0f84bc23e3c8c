"""Model cards: current, runnable, and not to be broken out of by a name in them."""

import ast
import re
from dataclasses import replace

import pytest
import torch
import yaml

import render_cards
from diffusers_ctrl import assets
from diffusers_ctrl.adapters import read_config, save_config
from diffusers_ctrl.cards import UNKNOWN_ID, card_text, save_card, settings_text, shared_card
from diffusers_ctrl.labels import Categorical, LabelSpace
from provenance import UNTOLD, data_record, settings_record, shareable_name
from report import print_table
from task import parse_arguments


@pytest.fixture(scope="module")
def config():
    return read_config(assets.find("digits-stroke"))


def test_the_shipped_cards_are_current():
    assert render_cards.stale() == []


def test_a_card_that_is_not_current_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(render_cards, "CARDS", tmp_path)
    assert render_cards.stale() == [tmp_path / "digits-stroke.md"]


def test_the_snippet_runs(config):
    code = re.search(r"```python\n(.*?)```", render_cards.rendered()[render_cards.CARDS / "digits-stroke.md"], re.S).group(1)
    found = {}
    exec(code.replace(UNKNOWN_ID, "digits-stroke"), found)
    assert found["image"].size == (32, 32)


def first_argument(config, pipeline_class, prompt):
    training = {**config.training, "settings": {**config.training["settings"], "prompts": ["x", prompt]}}
    text = card_text(replace(config, pipeline_class=pipeline_class, training=training))
    call = re.search(r"```python\n.*?^image = pipe\((.*?)\)\.images\[0\]$", text, re.S | re.M).group(1)
    arguments = ast.parse(f"f({call})").body[0].value
    assert [keyword.arg for keyword in arguments.keywords] == ["label"]
    return [ast.unparse(argument) for argument in arguments.args]


@pytest.mark.parametrize("prompt", ['it\'s a "cat" in \\tmp', "two\nlines {of} $HOME", "\u2028 😀 \x1b ```"])
def test_the_snippet_has_the_very_prompt(config, prompt):
    for pipeline in ("StableDiffusionPipeline", "AnUnknownPipeline"):
        (argument,) = first_argument(config, pipeline, prompt)
        assert ast.literal_eval(argument) == prompt


def test_the_snippet_gives_classes_where_the_pipeline_takes_them(config):
    assert first_argument(config, "DiTPipeline", "207") == ["[207]"]
    assert first_argument(config, "DiTPipeline", "chow's") == ['[pipe.labels["chow\'s"]]']
    assert first_argument(config, "DDPMPipeline", "2") == []


def test_attributes_with_dots_in_their_names_have_their_rows(config, capsys):
    figures = {"kl": 0.125, "kl_se": 0.01, "gap": 0.25, "gap_se": 0.01, "gap_is_lower_bound": False}
    given = {f"by_given.{name}.{key}": v for name in ("size.v2", "v1.5+size.v2") for key, v in figures.items()}
    metrics = config.metrics | given | {"by_attribute.v1.5.correlation": 0.75}
    card = card_text(replace(config, metrics=metrics))
    for name in ("size.v2", "v1.5 and size.v2"):
        assert f"\n| {name} | – | – | 0.125 ± 0.010 | 0.250 ± 0.010 | – |" in card
    print_table(metrics, [])
    rows = [re.sub(" +", " ", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert "labels giving size.v2 kl 0.125 gap 0.250" in rows and "labels giving v1.5+size.v2 kl 0.125 gap 0.250" in rows
    assert "v1.5 correlation 0.750" in rows


def test_the_metadata(config, tmp_path):
    head = save_card(tmp_path, config).read_text().split("---")[1]
    data = yaml.safe_load(head)
    assert data["base_model"] == "digits-base" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image" and data["license"] and data["tags"]
    names = {metric["type"]: metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]}
    assert names["gap"] == round(config.metrics["gap"], 4)
    local = replace(config, base={**config.base, "id": "/a/folder of mine"})
    assert "base_model" not in yaml.safe_load(save_card(tmp_path, local).read_text().split("---")[1])


HOSTILE = [
    "a|b",
    "`code`",
    "x\n# Heading",
    "<script>alert(1)</script>",
    "[z](http://e.example)",
    "![p](http://e)",
    "x\n```\n# Heading",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_break_out_of_a_card(config, tmp_path, name):
    space = LabelSpace({"stroke": Categorical((name, "thin"), (0.5,), name)})
    text = save_card(tmp_path, replace(config, label_space=space.to_dict())).read_text()
    body = re.sub(r"```python\n.*?```", "", text.split("---\n", 2)[2], flags=re.S)
    assert name not in body and "<script" not in body and "](http://e" not in body and "\n# Heading" not in body
    assert len(re.findall(r"^# ", body, re.M)) == 1
    code = re.search(r"```python\n(.*?)\n```", text, re.S).group(1)
    compile(code, "card", "exec")


def outside_code(text):
    return re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.S | re.M)


@pytest.mark.parametrize("text", [*HOSTILE, "\u2028# Heading", "\u202e\x1b[31m", "---\nlicense: x"])
def test_what_is_told_of_training_cannot_break_out_of_a_card(config, tmp_path, text):
    training = {
        "data": [{"attribute": text, "dataset": text, "source": text, text: 1, "images": 3, "labels": {text: 3}}],
        "settings": {"prompts": [text, "a" * 200], "objective": text},
        "compute": {"device": text, text: 1},
    }
    hostile = replace(config, training=training, versions={text: text}, sampler={**config.sampler, "scheduler": text})
    card = save_card(tmp_path, hostile).read_text()
    body = outside_code(card.split("---\n", 2)[2])
    assert "```" not in body and text not in body and "<script" not in body and "](http://e" not in body
    assert re.findall(r"^# .*", body, re.M) == ["# stroke for digits-base"]
    assert yaml.safe_load(settings_text(hostile))["prompts"] == [text, "a" * 200]
    assert re.search(r"^```yaml\n(.*?)^```$", card, re.S | re.M).group(1) == settings_text(hostile)
    code = re.search(r"```python\n(.*?)\n```", card, re.S).group(1)
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    "training",
    [
        {"more": 1},
        {"data": {}},
        {"data": ["x"]},
        {"data": [{"labels": {"a": {"b": 1}}}]},
        {"settings": {"prompts": "x"}},
        {"settings": {"prompts": [1]}},
        {"settings": {"a\nb": 1}},
        {"compute": {"device": []}},
    ],
)
def test_training_of_another_shape_is_refused(config, tmp_path, training):
    save_config(tmp_path, replace(config, training=training))
    with pytest.raises(ValueError, match="ctrl_config.json: training may hold"):
        read_config(tmp_path)


def test_figures_that_are_none_are_shown_as_none(config, tmp_path):
    metrics = {"gap": "<b>", "gap_se": None, "seconds_train": float("nan"), "ess": True, "updates": [], "by_gamma.1.kl": "x"}
    text = card_text(replace(config, metrics=metrics))
    assert "<b>" not in text and "nan" not in text and "| **gap = log Z − J, nats** | – |" in text
    save_config(tmp_path, replace(config, metrics=metrics))
    with pytest.raises(ValueError, match="ctrl_config.json: versions and metrics may hold numbers"):
        read_config(tmp_path)


def test_the_cards_settings_are_the_runs(tmp_path, config):
    """The recipe of the shipped adapter, and one with a dataset, a base and an output folder of this machine."""
    shipped = render_cards.CARDS.parent / "training" / "configs" / "digits_stroke_gamma.yaml"
    data = tmp_path / "secret place" / "faces"
    data.mkdir(parents=True)
    own = ["--dataset", str(data), "--base", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--prompts", "a: b", "#", "é"]
    for arguments in ([], own):
        task, train = parse_arguments(["--config", str(shipped), *arguments])
        told = replace(config, base={**config.base, "id": "user/base"}, training={"settings": settings_record(task, train)})
        assert "secret" not in settings_text(told) and str(tmp_path) not in settings_text(told)
        (tmp_path / "settings.yaml").write_text(settings_text(told))
        again = parse_arguments(["--config", str(tmp_path / "settings.yaml"), "--seed", str(train.seed)])
        for before, after in zip((task, train), again, strict=True):
            for name in vars(before).keys() - UNTOLD - {"dataset"}:
                assert getattr(after, name) == getattr(before, name), name
        assert (again[0].base, again[0].dataset) == ("user/base", ["faces"] if arguments else ["digits:stroke"])
    record = data_record(task.attributes()[0], Categorical(("thin", "bold")), torch.tensor([0.0, 1.0, 1.0, torch.nan]))
    assert record == {"attribute": "stroke", "dataset": "faces (not public)", "images": 3, "labels": {"thin": 1, "bold": 2}}
    assert shareable_name("user/name") == "user/name" and shareable_name("/not/here") == "here"


def test_the_shipped_adapter_tells_of_its_own_recipe(config):
    task, train = parse_arguments(
        ["--config", str(render_cards.CARDS.parent / "training" / "configs" / "digits_stroke_gamma.yaml")]
    )
    assert config.training["settings"] == settings_record(task, train)
    (data,) = config.training["data"]
    assert data["images"] == config.metrics["num_labels"] == sum(data["labels"].values())
    assert (config.metrics["updates"], config.metrics["seed"]) == (train.max_updates, train.seed)


def test_a_card_names_the_base_that_it_is_pushed_with(config, tmp_path):
    """Also where its author has written into it."""
    local = replace(config, base={**config.base, "id": "/home/me (and you)/base_1", "revision": None})
    shared = replace(config, base={**config.base, "id": "user/base", "revision": "v1"})
    path = save_card(tmp_path, local)
    path.write_text(path.read_text().replace("## Training data", "A remark of mine.\n\n## Training data"))
    text = shared_card(path.read_text(), local, shared, "user/adapter", "sets/a")
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["base_model"], data["base_model_relation"]) == ("user/base", "adapter")
    assert data["model-index"][0]["name"] == "stroke for user/base" and len(data["model-index"][0]["results"][0]["metrics"]) == 3
    assert "home/me" not in text and "A remark of mine." in text and "# stroke for user/base\n" in text
    assert 'from_pretrained("user/adapter", subfolder="sets/a")  # with its base, "user/base"\n' in text
    assert 'base: "user/base"\nbase_revision: "v1"\n' in text and UNKNOWN_ID not in text
    assert "--adapter user/adapter --config" in text
    moved = replace(config, base={**config.base, "revision": "v2"})
    again = shared_card(save_card(tmp_path, config).read_text(), config, moved, "user/adapter")
    assert 'base: "digits-base"\nbase_revision: "v2"\n' in again
    own = "---\ntitle: [\n---\n"
    assert shared_card(own, local, local, "user/adapter") == own
    with pytest.raises(ValueError, match="README.md has metadata that cannot be read"):
        shared_card(own, local, shared, "user/adapter")
