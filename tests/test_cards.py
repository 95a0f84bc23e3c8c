"""Model cards: current, runnable, and not to be broken out of by a name in them."""

import re
from dataclasses import replace

import pytest
import yaml

import render_cards
from diffusers_ctrl import assets
from diffusers_ctrl.adapters import read_config
from diffusers_ctrl.cards import save_card
from diffusers_ctrl.labels import Categorical, LabelSpace


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
    exec(code.replace("path/or/hub-id/of/this/adapter", "digits-stroke"), found)
    assert found["image"].size == (32, 32)


def test_the_metadata(config, tmp_path):
    head = save_card(tmp_path, config, prompts=[]).read_text().split("---")[1]
    data = yaml.safe_load(head)
    assert data["base_model"] == "digits-base" and data["base_model_relation"] == "adapter"
    names = {metric["type"]: metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]}
    assert names["gap"] == round(config.metrics["gap"], 4)
    local = replace(config, base={**config.base, "id": "/a/folder of mine"})
    assert "base_model" not in yaml.safe_load(save_card(tmp_path, local, prompts=[]).read_text().split("---")[1])


@pytest.mark.parametrize(
    "name", ["a|b", "`code`", "x\n# Heading", "<script>alert(1)</script>", "[z](http://e.example)", "![p](http://e)"]
)
def test_names_cannot_break_out_of_a_card(config, tmp_path, name):
    space = LabelSpace({"stroke": Categorical((name, "thin"), (0.5,), name)})
    text = save_card(tmp_path, replace(config, label_space=space.to_dict()), prompts=[]).read_text()
    body = re.sub(r"```python\n.*?```", "", text.split("---\n", 2)[2], flags=re.S)
    assert name not in body and "<script" not in body and "](http://e" not in body and "\n# Heading" not in body
    assert len(re.findall(r"^# ", body, re.M)) == 1
    code = re.search(r"```python\n(.*?)\n```", text, re.S).group(1)
    compile(code, "card", "exec")
