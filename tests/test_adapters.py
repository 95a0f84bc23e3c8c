"""The adapter folder: its format pinned, the round trip, and one clear error for each way in which a folder can be bad."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_ctrl import CTRLPipeline
from diffusers_ctrl.adapters import (
    FORMAT_VERSION,
    check_base,
    denoiser_sha256,
    is_adapter,
    load_adapter,
    read_config,
    resolve_folder,
    save_adapter,
)


LORA = "pytorch_lora_weights.safetensors"
ENCODER = "label_encoder/diffusion_pytorch_model.safetensors"
CLASSIFIER = "classifier/diffusion_pytorch_model.safetensors"
CONFIG = "ctrl_config.json"
SPACE = {"stroke": {"type": "categorical", "names": ["thin", "regular", "bold"], "column": 0}}
FILES = {CONFIG, LORA, ENCODER, CLASSIFIER, "label_encoder/config.json", "classifier/config.json"}


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(sd_adapter, tmp_path):
    """A copy of the adapter folder, to be spoilt."""
    return shutil.copytree(sd_adapter, tmp_path / "adapter")


@pytest.fixture(scope="module")
def pipe(sd_folder):
    """A pipeline that never gets an adapter: every load in this file fails."""
    pipe = CTRLPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v is not ...}))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refuse(folder, message, pipe=None):
    """load_adapter raises, the message matches, and a pipeline told to load it is as it was."""
    with pytest.raises(ValueError, match=message):
        load_adapter(folder)
    if pipe is not None:
        before = [(name, type(module)) for name, module in pipe.unet.named_modules()]
        with pytest.raises(ValueError, match=message):
            pipe.load_ctrl_adapter(folder)
        assert [(name, type(module)) for name, module in pipe.unet.named_modules()] == before
        assert pipe.label_space is None


# -- the format: other people's files depend on it --


def test_the_files(folder):
    assert files(folder) == FILES


def test_the_config_file(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert FORMAT_VERSION == 1
    assert list(config) == [
        "base",
        "pipeline_class",
        "denoiser",
        "label_space",
        "gamma",
        "gamma_range",
        "sampler",
        "injection_site",
        "versions",
        "metrics",
        "training",
        "format_version",
    ]
    assert list(config["base"]) == ["id", "revision", "denoiser_sha256"]
    assert len(config["base"]["denoiser_sha256"]) == 64
    assert config["base"]["id"].endswith("tiny-sd") and config["base"]["revision"] is None
    assert config["pipeline_class"] == "StableDiffusionPipeline"
    assert config["denoiser"] == "unet"
    assert config["label_space"] == SPACE
    assert config["gamma"] == 1.0 and config["gamma_range"] is None
    assert list(config["sampler"]) == ["scheduler", "scheduler_config", "num_inference_steps", "guidance_scale", "options"]
    assert config["sampler"]["scheduler"] == "DDIMScheduler"
    assert config["sampler"]["scheduler_config"]["prediction_type"] == "v_prediction"
    assert config["sampler"]["num_inference_steps"] == 4 and config["sampler"]["guidance_scale"] == 1.0
    assert config["sampler"]["options"] == {"eta": 1.0}
    assert config["injection_site"] == "time_embedding"
    assert {"diffusers_ctrl", "diffusers", "torch", "peft"} <= set(config["versions"])
    assert config["metrics"] == {"gap": 0.25, "gap_se": 0.01}
    assert config["format_version"] == 1


def test_the_lora_file(folder):
    tensors = load_file(folder / LORA)
    blocks = ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "mid_block.attentions.0")
    assert set(tensors) == {
        f"unet.{block}.transformer_blocks.0.{attention}.{layer}.lora_{matrix}.weight"
        for block in blocks
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
        for matrix in "AB"
    }
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # from the text, 16 wide, to 8 channels
    assert tensors[f"{layer}.lora_A.weight"].shape == (2, 16)
    assert tensors[f"{layer}.lora_B.weight"].shape == (8, 2)
    assert all(value.dtype == torch.float32 for value in tensors.values())
    with safe_open(folder / LORA, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_label_encoder_files(folder):
    tensors = load_file(folder / ENCODER)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {"tables.0": (3, 32)}
    config = json.loads((folder / "label_encoder/config.json").read_text())
    assert {key: value for key, value in config.items() if not key.startswith("_")} == {
        "label_space": SPACE,
        "embedding_dim": 32,
        "gamma_range": None,
    }
    assert config["_class_name"] == "LabelEncoder"


def test_the_classifier_files(folder):
    config = json.loads((folder / "classifier/config.json").read_text())
    assert {key: value for key, value in config.items() if not key.startswith("_")} == {
        "coordinates": False,
        "label_space": SPACE,
        "image_size": 8,
        "in_channels": 3,
        "widths": [4, 8],
        "members": 1,
        "temperatures": [1.5],
    }
    assert config["_class_name"] == "Classifier"
    tensors = load_file(folder / "classifier/diffusion_pytorch_model.safetensors")
    assert {key.split(".")[2] for key in tensors} == {"stem", "stages", "heads"}
    assert all(key.startswith("networks.0.") for key in tensors)


def test_the_digest_is_of_the_architecture_alone(pipe):
    before = denoiser_sha256(pipe.unet)
    path = pipe.unet.config["_name_or_path"]
    try:
        pipe.unet.register_to_config(_name_or_path="somewhere/else")
        assert denoiser_sha256(pipe.unet) == before
        pipe.unet.register_to_config(sample_size=16)
        assert denoiser_sha256(pipe.unet) != before
    finally:
        pipe.unet.register_to_config(_name_or_path=path, sample_size=8)
    assert denoiser_sha256(pipe.unet) == before


class Denoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 4, blocks: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()


class NewerDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 4, blocks: tuple[int, ...] = (8, 16), something_new: str | None = None) -> None:
        super().__init__()


NewerDenoiser.__name__ = "Denoiser"  # what it is called in the newer diffusers too


def test_the_digest_outlives_an_option_that_a_newer_diffusers_adds():
    """Every release gives some model a new option, whose default is what the model did before: adapters must keep their base."""
    assert denoiser_sha256(Denoiser(blocks=[8, 16])) == denoiser_sha256(Denoiser())
    assert denoiser_sha256(Denoiser(width=5)) != denoiser_sha256(Denoiser())
    assert denoiser_sha256(NewerDenoiser()) == denoiser_sha256(Denoiser())
    assert denoiser_sha256(NewerDenoiser(something_new="other")) != denoiser_sha256(Denoiser())


# -- the round trip --


def test_load_gives_back_what_save_was_given(adapter, tmp_path):
    again = load_adapter(save_adapter(tmp_path / "again", adapter))
    assert again.config == adapter.config
    assert again.lora.keys() == adapter.lora.keys()
    assert all(torch.equal(again.lora[key], adapter.lora[key]) for key in adapter.lora)
    for name in ("label_encoder", "classifier"):
        ours, theirs = getattr(again, name), getattr(adapter, name)
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
        assert ours.label_space == theirs.label_space and not ours.training
    assert list(again.classifier.config.temperatures) == [1.5]
    assert all(value.any() for value in again.lora.values())  # the comparison is not of zeros


def test_saving_in_half_precision(adapter, tmp_path):
    folder = save_adapter(tmp_path / "half", adapter, dtype=torch.float16)
    for name in (LORA, ENCODER, CLASSIFIER):
        assert all(value.dtype == torch.float16 for value in load_file(folder / name).values())
    again = load_adapter(folder)
    for key, value in adapter.lora.items():
        assert again.lora[key].dtype == torch.float32
        assert torch.equal(again.lora[key], value.half().float())


def test_without_a_classifier(adapter, folder):
    save_adapter(folder, replace(adapter, classifier=None))
    assert files(folder) == FILES - {CLASSIFIER, "classifier/config.json"}
    assert load_adapter(folder).classifier is None


def test_other_files_in_the_folder_stay(adapter, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "classifier").mkdir()
    others = {"notes.txt", "checkpoints/state.json", "classifier/calibration.json"}
    for name in others:
        (folder / name).write_text(f"{name}")
    for _ in range(2):  # the second time over the first
        assert save_adapter(folder, adapter) == folder
        assert files(folder) == FILES | others
        assert all((folder / name).read_text() == name for name in others)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_temporary_files_stay(adapter, tmp_path):
    (tmp_path / ".new.saving").mkdir()  # as an interrupted save leaves it
    (tmp_path / ".new.saving" / "half.safetensors").write_bytes(b"half")
    save_adapter(tmp_path / "deep" / "er" / "new", adapter)
    save_adapter(tmp_path / "new", adapter)
    assert files(tmp_path / "new") == FILES == files(tmp_path / "deep" / "er" / "new")
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.saving")]


def test_is_adapter(folder, sd_folder):
    assert is_adapter(folder) and not is_adapter(sd_folder)


def test_check_base(adapter, pipe):
    check_base(adapter.config, "StableDiffusionPipeline", "unet", pipe.unet)
    with pytest.raises(ValueError, match="tiny-sd.*does not match"):
        check_base(adapter.config, "StableDiffusionPipeline", "transformer", pipe.unet)


# -- bad folders --


@pytest.mark.parametrize("name", [LORA, ENCODER, CLASSIFIER])
@pytest.mark.parametrize("kept", [0, 5, 60, -20])
def test_truncated(folder, pipe, name, kept):
    path = folder / name
    path.write_bytes(path.read_bytes()[:kept])
    refuse(folder, path.name, pipe)


@pytest.mark.parametrize("name", [LORA, ENCODER, CLASSIFIER])
def test_a_file_that_is_no_safetensors(folder, pipe, name):
    torch.save({"a": torch.ones(3)}, folder / name)  # a pickle: never read
    refuse(folder, f"{(folder / name).name} is truncated or not a safetensors file", pipe)


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing(folder, pipe, name):
    (folder / name).unlink()
    refuse(folder, (folder / name).name, pipe)


def test_no_label_encoder(folder, pipe):
    shutil.rmtree(folder / "label_encoder")
    refuse(folder, "label_encoder", pipe)


def test_a_folder_that_is_no_adapter(pipe, tmp_path):
    refuse(tmp_path, CONFIG, pipe)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1,}', "\x00", "null", "[]", '"text"'])
@pytest.mark.parametrize("name", [CONFIG, "label_encoder/config.json", "classifier/config.json"])
def test_invalid_json(folder, name, text):
    (folder / name).write_text(text)
    refuse(folder, "config.json")


def test_json_that_is_no_text(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00{")
    refuse(folder, CONFIG)


def test_unknown_keys(folder, pipe):
    edit_json(folder / CONFIG, extra=1, another=2)
    refuse(folder, r"ctrl_config.json has unknown keys \['another', 'extra'\]", pipe)


@pytest.mark.parametrize("key", ["base", "pipeline_class", "label_space", "sampler", "gamma", "injection_site"])
def test_missing_keys(folder, key):
    edit_json(folder / CONFIG, **{key: ...})
    refuse(folder, f"ctrl_config.json lacks .*{key}")


def test_keys_with_a_default_may_be_missing(folder):
    edit_json(folder / CONFIG, versions=..., metrics=...)
    assert load_adapter(folder).config.metrics == {}


def test_a_newer_format(folder, pipe):
    edit_json(folder / CONFIG, format_version=2, something_new=True)
    refuse(folder, "ctrl_config.json has format version 2, newer than the 1.*upgrade", pipe)


@pytest.mark.parametrize("version", [..., None, 0, -1, 1.0, "1", True, [1]])
def test_a_format_version_that_is_none(folder, version):
    edit_json(folder / CONFIG, format_version=version)
    refuse(folder, "ctrl_config.json has format_version")


@pytest.mark.parametrize(
    "key, value",
    [
        ("base", "digits-base"),
        ("base", {"id": "digits-base"}),
        ("pipeline_class", None),
        ("denoiser", 3),
        ("label_space", ["thin", "bold"]),
        ("gamma", "1"),
        ("gamma", True),
        ("gamma", None),
        ("gamma_range", 2.0),
        ("sampler", []),
        ("sampler", {"scheduler": "DDIMScheduler"}),
        ("injection_site", None),
        ("versions", "1"),
        ("metrics", []),
    ],
)
def test_bad_types(folder, key, value):
    edit_json(folder / CONFIG, **{key: value})
    refuse(folder, f"{CONFIG}: {key}")


@pytest.mark.parametrize(
    "key, change",
    [
        ("base", {"id": 3}),
        ("base", {"denoiser_sha256": None}),
        ("sampler", {"num_inference_steps": "4"}),
        ("sampler", {"num_inference_steps": 0}),
        ("sampler", {"guidance_scale": "1"}),
        ("sampler", {"options": [1]}),
    ],
)
def test_bad_types_further_in(folder, key, change):
    config = json.loads((folder / CONFIG).read_text())
    edit_json(folder / CONFIG, **{key: {**config[key], **change}})
    refuse(folder, CONFIG)


@pytest.mark.parametrize("gamma_range", [[1.0], ["low", "high"], [2.0, 1.0], [0.0, 1.0]])
def test_a_gamma_range_that_is_none(folder, gamma_range):
    edit_json(folder / CONFIG, gamma_range=gamma_range)
    refuse(folder, CONFIG)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [LORA, ENCODER, CLASSIFIER])
def test_weights_that_are_not_finite(folder, pipe, name, bad):
    edit_tensors(folder / name, lambda tensors: next(iter(tensors.values())).flatten()[:1].fill_(bad))
    refuse(folder, f"{(folder / name).name} holds a tensor .* not finite", pipe)


def test_weights_that_are_integers(folder, pipe):
    edit_tensors(folder / LORA, lambda tensors: tensors.update({k: v.long() for k, v in tensors.items()}))
    refuse(folder, LORA, pipe)


def test_a_lora_of_another_component(folder, pipe):
    edit_tensors(folder / LORA, lambda tensors: tensors.update({"text_encoder.layer.lora_A.weight": torch.ones(2, 2)}))
    refuse(folder, f"{LORA} has keys that do not start with 'unet.'", pipe)


def fails_on_the_pipeline(folder, pipe, message):
    """The folder is whole in itself, but does not fit this denoiser."""
    load_adapter(folder)
    before = [(name, type(module)) for name, module in pipe.unet.named_modules()]
    with pytest.raises(ValueError, match=message):
        pipe.load_ctrl_adapter(folder)
    assert [(name, type(module)) for name, module in pipe.unet.named_modules()] == before
    assert pipe.label_space is None


def test_a_lora_of_a_layer_that_does_not_exist(folder, pipe):
    def rename(tensors):
        for key in [key for key in tensors if "mid_block" in key]:
            tensors[key.replace("mid_block", "mid_blocks.7")] = tensors.pop(key)

    edit_tensors(folder / LORA, rename)
    fails_on_the_pipeline(folder, pipe, "mid_blocks.7.*UNet2DConditionModel does not have")


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_a_lora_of_the_wrong_shape(folder, pipe, matrix):
    def widen(tensors):
        key = next(key for key in tensors if key.endswith(f"lora_{matrix}.weight"))
        tensors[key] = torch.ones(*(size + (1 if size != 2 else 0) for size in tensors[key].shape))  # 2 is the rank

    edit_tensors(folder / LORA, widen)
    fails_on_the_pipeline(folder, pipe, "does not fit UNet2DConditionModel")


def test_label_encoder_weights_of_the_wrong_shape(folder, pipe):
    edit_tensors(folder / ENCODER, lambda tensors: tensors.update({"tables.0": torch.ones(3, 31)}))
    refuse(folder, "label_encoder does not hold a LabelEncoder", pipe)


def test_label_encoder_settings_that_are_unknown(folder, pipe):
    edit_json(folder / "label_encoder/config.json", colour="blue")
    refuse(folder, "label_encoder does not hold a LabelEncoder: .*colour", pipe)


@pytest.mark.parametrize(
    "space",
    [
        {"stroke": {"type": "categorical", "names": ["bold", "regular", "thin"]}},
        {"slant": {"type": "categorical", "names": ["thin", "regular", "bold"]}},
        {},
        {"stroke": "thin"},
    ],
)
def test_label_spaces_that_disagree(folder, pipe, space):
    edit_json(folder / CONFIG, label_space=space)
    refuse(
        folder,
        "label space of ctrl_config.json is not that of label_encoder/config.json|ctrl_config.json: .*(label space|attribute)",
        pipe,
    )


def test_a_classifier_of_another_label_space(folder, pipe):
    space = {"stroke": {"type": "categorical", "names": ["bold", "regular", "thin"]}}
    edit_json(folder / "classifier/config.json", label_space=space)
    refuse(folder, "classifier", pipe)


def test_a_gamma_range_that_the_label_encoder_does_not_have(folder, pipe):
    edit_json(folder / CONFIG, gamma_range=[0.5, 8.0])
    refuse(folder, "gamma_range", pipe)


@pytest.mark.parametrize("space", [[], {"stroke": {"type": "colour"}}, {"stroke": {"type": "categorical", "names": ["one"]}}])
def test_a_label_encoder_with_no_label_space(folder, pipe, space):
    edit_json(folder / "label_encoder/config.json", label_space=space)
    refuse(folder, "label_encoder", pipe)


def test_read_config_reads_the_config_alone(folder, adapter):
    (folder / LORA).unlink()
    assert asdict(read_config(folder)) == asdict(adapter.config)


# -- where folders come from --


def test_resolve_folder(folder, monkeypatch):
    assert resolve_folder(folder) == folder
    assert resolve_folder(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_folder(folder.name).resolve() == folder.resolve()


@pytest.mark.parametrize("name", ["no/such-model", "no-such-model", "a/b/c", "no such model!", "../nowhere"])
def test_resolve_folder_of_nonsense(name):
    with pytest.raises(ValueError, match="neither a local folder"):
        resolve_folder(name)
