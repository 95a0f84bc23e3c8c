"""The aesthetic score with a tiny random CLIP and a head of the published layout, against an independent computation."""

import re
import subprocess
from collections import OrderedDict
from pathlib import Path
from pkgutil import resolve_name

import datasets
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import aesthetic_data
from aesthetic_data import (
    AESTHETIC_CLASSES,
    AESTHETIC_WIDTH,
    HEAD_LAYERS,
    AestheticScorer,
    aesthetic_class,
    aesthetic_log_likelihood,
    aesthetic_score,
    load_head,
    load_scorer,
)
from jpeg_data import BINARY_CLASSES, jpeg_binary_class
from sampled_data import label_image_folder


SIDE = 28  # what the tiny CLIP sees
PUBLISHED_NAMES = [f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]


def tiny_clip(folder, projection_dim=768):
    """A CLIPModel, as published: text and image encoder in one checkpoint."""
    torch.manual_seed(0)
    text = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    vision |= {"image_size": SIDE, "projection_dim": projection_dim}
    config = CLIPConfig(text_config=text | {"projection_dim": projection_dim}, vision_config=vision, projection_dim=projection_dim)
    CLIPModel(config).save_pretrained(folder)
    return folder


def random_head(seed=1):
    """Published names and shapes; scores of about 5.7 ± 1."""
    generator = torch.Generator().manual_seed(seed)
    head = OrderedDict()
    for name, (width_in, width_out) in HEAD_LAYERS.items():
        spread = 1.0 if name == "layers.0" else width_in**-0.5  # the embedding has norm 1
        head[f"{name}.weight"] = spread * torch.randn(width_out, width_in, generator=generator)
        head[f"{name}.bias"] = 0.1 * torch.randn(width_out, generator=generator)
    head["layers.7.bias"] += 5.7
    return head


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "aesthetic_head.safetensors"
    save_file(random_head(), path)
    return path


@pytest.fixture(autouse=True)
def environment(monkeypatch, clip_folder, head_file):
    monkeypatch.setenv("AESTHETIC_HEAD", str(head_file))
    monkeypatch.setenv("AESTHETIC_CLIP", str(clip_folder))


def pictures(n=40, height=SIDE, width=SIDE, seed=0):
    """Smooth random pictures on the 1/255 grid, (n, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (images.clamp(0, 1) * 255).round() / 255


def independent_score(clip_folder, head, pixel_values):
    """CLIPModel's own image features, normalised, through the five layers multiplied out to one, in float64."""
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip_folder).double().eval().get_image_features(pixel_values=pixel_values.double())
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    weight, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for i in (0, 2, 4, 6, 7):
        layer = head[f"layers.{i}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + head[f"layers.{i}.bias"].double()
    return features / features.square().sum(1, keepdim=True).sqrt() @ weight[0] + bias[0]


def normalised(images):
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (images - mean[:, None, None]) / std[:, None, None]


# -- the score --


def test_the_score_is_the_published_computation(clip_folder):
    images = pictures()
    wanted = independent_score(clip_folder, random_head(), normalised(images))
    assert wanted.std() > 0.1  # the pictures do differ
    score = aesthetic_score(images)
    assert score.shape == (40,) and score.dtype == torch.float32
    torch.testing.assert_close(score.double(), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("height, width", [(64, 64), (40, 56), (61, 33), (20, 20)])
def test_other_sizes_are_prepared_as_clip_prepares_pictures(clip_folder, head_file, height, width):
    images = pictures(4, height, width)
    scorer = load_scorer(str(head_file), str(clip_folder))
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    files = [Image.fromarray(image) for image in (images * 255).byte().permute(0, 2, 3, 1).numpy()]
    wanted = processor(files, return_tensors="pt")["pixel_values"]
    prepared = scorer.prepare(images)
    assert prepared.shape == wanted.shape
    assert (prepared - wanted).abs().max() < 2 / 255 / 0.26  # PIL rounds to 1/255, once a direction
    assert (aesthetic_score(images) - independent_score(clip_folder, random_head(), wanted)).abs().max() < 0.02


def test_dropout_is_not_active_and_batches_do_not_matter():
    images = pictures(70)
    together = aesthetic_score(images)
    assert torch.equal(together, aesthetic_score(images))
    singly = torch.cat([aesthetic_score(image[None]) for image in images[::10]])
    torch.testing.assert_close(together[::10], singly, atol=1e-5, rtol=0)


def test_the_models_are_loaded_once(clip_folder, head_file):
    assert load_scorer(str(head_file), str(clip_folder)) is load_scorer(str(head_file), str(clip_folder))
    assert not any(parameter.requires_grad for parameter in load_scorer(str(head_file), str(clip_folder)).parameters())


# -- classes and likelihood --


def test_the_classes_are_in_the_order_of_the_score(tmp_path, monkeypatch):
    images = pictures()
    score, classes = aesthetic_score(images), aesthetic_class(images)
    assert classes.dtype == torch.int64 and set(classes.tolist()) == {0, 1}
    assert AESTHETIC_CLASSES == ("low", "high")
    assert score[classes == 0].max() < 5.7 <= score[classes == 1].min()
    for bias, wanted in ((5.6999, 0), (5.7, 1), (5.7001, 1)):
        head = {name: torch.zeros_like(weight) for name, weight in random_head().items()}
        head["layers.7.bias"] += bias
        save_file(head, tmp_path / f"{bias}.safetensors")
        monkeypatch.setenv("AESTHETIC_HEAD", str(tmp_path / f"{bias}.safetensors"))
        assert aesthetic_class(images[:2]).tolist() == [wanted, wanted]


def test_the_likelihood_is_a_distribution_whose_mode_is_the_class():
    images = pictures()
    log_probs = torch.stack([aesthetic_log_likelihood(images, torch.full((40, 1), float(y))) for y in (0, 1)], dim=1)
    assert log_probs.isfinite().all()
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(40))
    assert torch.equal(log_probs.argmax(1), aesthetic_class(images))
    odds = (aesthetic_score(images) - 5.7) / AESTHETIC_WIDTH
    torch.testing.assert_close(log_probs[:, 1] - log_probs[:, 0], odds, atol=1e-4, rtol=1e-4)


def test_a_label_that_is_not_given_adds_nothing():
    images = pictures(3).requires_grad_()
    value = aesthetic_log_likelihood(images, torch.tensor([[1.0], [float("nan")], [0.0]]))
    assert value[1] == 0 and (value[[0, 2]] < 0).all()
    value.sum().backward()
    assert (images.grad[1] == 0).all() and images.grad[[0, 2]].abs().amax(dim=(1, 2, 3)).min() > 0


def test_the_gradient_is_that_of_finite_differences(clip_folder, head_file):
    scorer = AestheticScorer(load_scorer(str(head_file), str(clip_folder)).clip, load_head(head_file)).double()
    images = (0.1 + 0.8 * pictures(2, 40, 40).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(images).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-6
    with torch.no_grad():
        slope = (scorer(images + step * direction) - scorer(images - step * direction)).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=0)
    scorer.float()  # the module's CLIP is the cached one


def test_the_score_does_not_depend_on_autocast():
    images = pictures(4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = aesthetic_score(images)
    assert score.dtype == torch.float32 and torch.equal(score, aesthetic_score(images))


# -- as a labeller --


def test_both_attributes_of_the_paper_in_one_dataset(tmp_path, datasets_cache):
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(4)
    for i, amount in enumerate((0.0, 0.01, 0.3, 0.9)):
        noise = torch.rand(512, 512, 3, generator=generator) - 0.5
        picture = (pictures(1, 512, 512, seed=i)[0].permute(1, 2, 0) + amount * noise).clamp(0, 1)
        Image.fromarray((picture * 255).byte().numpy()).save(tmp_path / "images" / f"{i}.png")
    labellers = {"compressibility": jpeg_binary_class, "aesthetic": aesthetic_class, "score": aesthetic_score}
    names = {"compressibility": BINARY_CLASSES, "aesthetic": AESTHETIC_CLASSES}
    out = label_image_folder(tmp_path / "images", tmp_path / "out", labellers, names, 512)
    table = datasets.Dataset.from_parquet([str(path) for path in sorted(out.glob("*.parquet"))])
    assert table["compressibility"][:] == [1, 1, 0, 0]
    assert table["aesthetic"][:] == [int(score >= 5.7) for score in table["score"][:]]


# -- what is said of bad files --


def test_the_head_is_not_named(monkeypatch):
    monkeypatch.delenv("AESTHETIC_HEAD")
    for function in (aesthetic_score, aesthetic_class):
        with pytest.raises(ValueError, match="AESTHETIC_HEAD.*docs/paper_tasks.md"):
            function(pictures(1))


def without(name):
    return lambda head: {key: value for key, value in head.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("layers.4.bias"), r"'layers.4.bias' of shape None, where \(64,\) is wanted"),
        (lambda head: {**head, "layers.8.weight": torch.zeros(1)}, "'layers.8.weight'.*and nothing else"),
        (lambda head: {**head, "layers.0.weight": torch.zeros(1024, 512)}, r"\(1024, 512\), where \(1024, 768\)"),
        (lambda head: {key.removeprefix("layers."): value for key, value in head.items()}, "'0.bias'"),
    ],
)
def test_a_head_of_another_layout(tmp_path, change, message):
    save_file(change(random_head()), tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path / "head.safetensors")


def test_heads_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="nowhere.safetensors.*does not exist"):
        load_head(tmp_path / "nowhere.safetensors")
    torch.save(random_head(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="pickle, which is not read.*docs/paper_tasks.md"):
        load_head(tmp_path / "head.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="broken.safetensors.*cannot be read"):
        load_head(tmp_path / "broken.safetensors")


def test_clip_models_that_do_not_fit(tmp_path, monkeypatch):
    tiny_clip(tmp_path / "base-size", projection_dim=512)
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    for name, message in (
        (str(tmp_path / "base-size"), "768 dimensions.*512"),
        (str(tmp_path / "bert"), "not a CLIP model with an image encoder"),
        (str(tmp_path / "nowhere"), "nowhere.*cannot be loaded.*AESTHETIC_CLIP"),
    ):
        monkeypatch.setenv("AESTHETIC_CLIP", name)
        with pytest.raises(ValueError, match=message):
            aesthetic_score(pictures(1))


# -- the published file --


def test_the_names_are_the_published_ones():
    assert list(random_head()) == PUBLISHED_NAMES


def test_the_conversion_in_the_docs(tmp_path):
    """The line of docs/paper_tasks.md, run as it stands on a pickle of the published layout."""
    page = (Path(aesthetic_data.__file__).parents[1] / "docs" / "paper_tasks.md").read_text()
    (line,) = re.findall(r"^python -c .*weights_only=True.*$", page, flags=re.MULTILINE)
    torch.save(random_head(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, capture_output=True)
    (converted,) = tmp_path.glob("*.safetensors")
    head = load_head(converted)
    assert all(torch.equal(head[name], weight) for name, weight in random_head().items())
    assert load_file(converted).keys() == set(PUBLISHED_NAMES)


def test_the_configuration_has_a_labeller_and_an_oracle_for_each_attribute():
    path = Path(aesthetic_data.__file__).parent / "configs" / "sd15_compressibility_aesthetic.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert recipe["attribute"] == ["compressibility", "aesthetic"]
    names = [tuple(entry.split("|")) for entry in recipe["label_names"]]
    assert names == [BINARY_CLASSES, AESTHETIC_CLASSES]
    for setting in ("labeller", "oracle"):
        assert [resolve_name(entry) for entry in recipe[setting]] == [jpeg_binary_class, aesthetic_class]
    assert recipe["batch_size"] * recipe["gradient_accumulation_steps"] * 4 == 512  # the authors', on four GPUs
