"""The adapter folder: what is in it, and how it is written and read. safetensors and JSON only.

    pytorch_lora_weights.safetensors   `unet.` or `transformer.` + layer + `.lora_A.weight`; plain diffusers loads it
    label_encoder/                     config.json, diffusion_pytorch_model.safetensors
    classifier/                        the same, optional: for evaluation and exact sampling
    ctrl_config.json                   everything else (`AdapterConfig`)

Nothing is half-written: files go to a temporary folder first and are then renamed. Nothing is half-read: an adapter is read and
checked as a whole before any pipeline is touched.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from . import assets
from .classifiers import Classifier
from .injection import lora_state_dict
from .label_encoder import LabelEncoder
from .labels import LabelSpace


FORMAT_VERSION = 1
CONFIG_NAME = "ctrl_config.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PACKAGES = ("diffusers", "transformers", "torch", "accelerate", "peft", "huggingface-hub", "datasets")


@dataclass(frozen=True)
class AdapterConfig:
    """ctrl_config.json.

    base: {"id", "revision", "denoiser_sha256"}. pipeline_class: the diffusers class of the base. denoiser: its component name.
    label_space: `LabelSpace.to_dict()`. gamma: the gamma it was trained for. gamma_range: [low, high], or None where gamma is fixed.
    sampler: {"scheduler": name, "scheduler_config", "num_inference_steps", "guidance_scale", "options"}, the base law's settings.
    injection_site: module path of the time embedding. versions: of the packages it was made with. metrics: see DESIGN, metrics.json.
    """

    base: dict[str, Any]
    pipeline_class: str
    denoiser: str
    label_space: dict[str, Any]
    gamma: float
    gamma_range: list[float] | None
    sampler: dict[str, Any]
    injection_site: str
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Adapter:
    """A whole adapter in memory. lora: layer keys without the component prefix."""

    config: AdapterConfig
    lora: dict[str, torch.Tensor]
    label_encoder: LabelEncoder
    classifier: Classifier | None = None


def package_versions() -> dict[str, str]:
    """Installed versions of diffusers_ctrl and the packages it stands on."""
    found = {}
    for name in ("diffusers_ctrl", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=list))


def denoiser_sha256(denoiser: nn.Module) -> str:
    """Digest of the denoiser's architecture: its class and those of its config's values that are not the class's defaults.

    Private entries and paths are left out; defaults are, so that a new option in a later diffusers changes no digest.
    """
    defaults = {name: p.default for name, p in inspect.signature(type(denoiser).__init__).parameters.items()}
    config = {name: _plain(value) for name, value in dict(denoiser.config).items() if not name.startswith("_")}
    unusual = {
        name: value
        for name, value in config.items()
        if defaults.get(name, inspect.Parameter.empty) is inspect.Parameter.empty or value != _plain(defaults[name])
    }
    text = json.dumps([type(denoiser).__name__, unusual], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def resolve_folder(name: str | os.PathLike, **hub_kwargs: Any) -> Path:
    """A local folder, an embedded model's name, or a Hub id -> a local folder.

    Raises:
        ValueError: if it is none of these.
    """
    path = Path(name)
    if path.is_dir():
        return path
    embedded = assets.find(str(name))
    if embedded is not None:
        return embedded
    try:
        return Path(snapshot_download(str(name), **hub_kwargs))
    except Exception as error:
        raise ValueError(
            f"{str(name)!r} is neither a local folder, nor an embedded model ({', '.join(assets.names())}), nor could it be "
            f"downloaded from the Hub: {type(error).__name__}."
        ) from error


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def save_adapter(folder: str | os.PathLike, adapter: Adapter, dtype: torch.dtype | None = None) -> Path:
    """Writes the adapter into `folder`, which may hold other files. `dtype`: stored precision, as in memory if None."""
    folder = Path(folder).absolute()
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    def stored(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.detach().cpu().to(dtype or value.dtype).contiguous() for key, value in state.items()}

    prefix = adapter.config.denoiser
    # the metadata entry is what the Hub and other readers tell the framework by
    save_file(stored({f"{prefix}.{k}": v for k, v in adapter.lora.items()}), temporary / LORA_NAME, metadata={"format": "pt"})
    for name, model in (("label_encoder", adapter.label_encoder), ("classifier", adapter.classifier)):
        if model is not None:
            model.save_config(temporary / name)
            save_file(stored(model.state_dict()), temporary / name / WEIGHTS_NAME, metadata={"format": "pt"})
    save_config(temporary, adapter.config)
    if not folder.exists():
        os.replace(temporary, folder)
        return folder
    written = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
    for path in sorted(written, key=lambda p: p.name == CONFIG_NAME):  # the config last: it says that the adapter is there
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / path, folder / path)
    if adapter.classifier is None:
        shutil.rmtree(folder / "classifier", ignore_errors=True)
    shutil.rmtree(temporary)
    return folder


def save_config(folder: Path, config: AdapterConfig) -> None:
    """Writes ctrl_config.json alone: new metrics leave the weights' files as they are."""
    temporary = folder / f"{CONFIG_NAME}.tmp"
    temporary.write_text(json.dumps(asdict(config), indent=2) + "\n")
    os.replace(temporary, folder / CONFIG_NAME)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"The adapter has no {path.name} in {path.parent}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}.")
    return data


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"The adapter has no {path.name} in {path.parent}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}.") from error
    for key, value in tensors.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(f"{path} holds a tensor {key!r} that is not finite floating point.")
    return {key: value.float() for key, value in tensors.items()}


def _read_model(folder: Path, cls: type) -> Any:
    config = {k: v for k, v in _read_json(folder / "config.json").items() if not k.startswith("_")}
    state = _read_tensors(folder / WEIGHTS_NAME)
    try:
        model = cls(**config)
        model.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder} does not hold a {cls.__name__}: {str(error).strip().splitlines()[-1].strip()}") from error
    return model.eval()


def read_config(folder: Path) -> AdapterConfig:
    """Reads and checks ctrl_config.json. Raises ValueError naming the file and the key that is wrong."""
    path = folder / CONFIG_NAME
    data = _read_json(path)
    found = data.get("format_version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{path} has format_version {found!r}; a positive integer is needed.")
    if found > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {found}, newer than the {FORMAT_VERSION} known here: upgrade diffusers_ctrl.")
    known = {f.name for f in fields(AdapterConfig)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{path} has unknown keys {unknown}; known are {sorted(known)}.")
    required = known - {"versions", "metrics"}
    if missing := sorted(required - set(data)):
        raise ValueError(f"{path} lacks {missing}.")
    kinds = {
        "base": dict,
        "pipeline_class": str,
        "denoiser": str,
        "label_space": dict,
        "gamma": (int, float),
        "gamma_range": (list, type(None)),
        "sampler": dict,
        "injection_site": str,
        "versions": dict,
        "metrics": dict,
    }
    for key, kind in kinds.items():
        if key in data and (not isinstance(data[key], kind) or isinstance(data[key], bool)):
            raise ValueError(f"{path}: {key} has the wrong type, {type(data[key]).__name__}.")
    for key, needed in (
        ("base", ("id", "revision", "denoiser_sha256")),
        ("sampler", ("scheduler", "scheduler_config", "num_inference_steps", "guidance_scale", "options")),
    ):
        if lacking := [name for name in needed if name not in data[key]]:
            raise ValueError(f"{path}: {key} lacks {lacking}.")
    base, sampler, gamma_range = data["base"], data["sampler"], data["gamma_range"]
    numbers = [sampler["guidance_scale"], data["gamma"], *(gamma_range or [])]
    checks = {
        "base.id must be a string": isinstance(base["id"], str),
        "base.revision must be a string or null": isinstance(base["revision"], (str, type(None))),
        "base.denoiser_sha256 must be a string": isinstance(base["denoiser_sha256"], str),
        "sampler.scheduler must be a string": isinstance(sampler["scheduler"], str),
        "sampler.scheduler_config and sampler.options must be objects": isinstance(sampler["scheduler_config"], dict)
        and isinstance(sampler["options"], dict),
        "sampler.num_inference_steps must be a positive integer": type(sampler["num_inference_steps"]) is int
        and sampler["num_inference_steps"] > 0,
        "gamma, gamma_range and sampler.guidance_scale must be numbers": all(type(n) in (int, float) for n in numbers),
        "gamma must be positive, gamma_range null or 0 < low < high": type(data["gamma"]) in (int, float)
        and data["gamma"] > 0
        and (
            gamma_range is None
            or (len(gamma_range) == 2 and all(type(n) in (int, float) for n in gamma_range) and 0 < gamma_range[0] < gamma_range[1])
        ),
    }
    for message, holds in checks.items():
        if not holds:
            raise ValueError(f"{path}: {message}.")
    return AdapterConfig(**data)


def load_adapter(folder: Path) -> Adapter:
    """Reads and checks a whole adapter folder.

    Raises:
        ValueError: for a missing, truncated or foreign file, an unknown key, or a newer format; the message names the file.
    """
    config = read_config(folder)
    prefix = f"{config.denoiser}."
    lora = _read_tensors(folder / LORA_NAME)
    if foreign := [key for key in lora if not key.startswith(prefix)]:
        raise ValueError(f"{folder / LORA_NAME} has keys that do not start with {prefix!r}: {foreign[:3]}.")
    label_encoder = _read_model(folder / "label_encoder", LabelEncoder)
    classifier = _read_model(folder / "classifier", Classifier) if (folder / "classifier").is_dir() else None
    try:
        space = LabelSpace.from_dict(config.label_space)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    for name, model in (("label_encoder", label_encoder), ("classifier", classifier)):
        if model is not None and model.label_space != space:
            raise ValueError(f"{folder}: the label space of {CONFIG_NAME} is not that of {name}/config.json.")
    if list(label_encoder.config.gamma_range or []) != list(config.gamma_range or []):
        raise ValueError(f"{folder}: the gamma_range of {CONFIG_NAME} is not that of label_encoder/config.json.")
    return Adapter(config, {key.removeprefix(prefix): value for key, value in lora.items()}, label_encoder, classifier)


def check_base(config: AdapterConfig, pipeline_class: str, denoiser_name: str, denoiser: nn.Module) -> None:
    """Raises ValueError unless the adapter was trained for a denoiser of this architecture."""
    found = denoiser_sha256(denoiser)
    if denoiser_name != config.denoiser or found != config.base["denoiser_sha256"]:
        raise ValueError(
            f"This adapter was trained for base {config.base['id']!r} ({config.pipeline_class}, {config.denoiser} config "
            f"{config.base['denoiser_sha256'][:12]}), which does not match this pipeline ({pipeline_class}, {denoiser_name} config "
            f"{found[:12]}). Load the adapter with its own base: CTRLPipeline.from_pretrained(adapter)."
        )


def collect_adapter(
    config: AdapterConfig,
    denoiser: nn.Module,
    label_encoder: LabelEncoder,
    classifier: Classifier | None = None,
    adapter_name: str = "default",
) -> Adapter:
    """The adapter that a denoiser and a label encoder now hold."""
    return Adapter(config, lora_state_dict(denoiser, adapter_name), label_encoder, classifier)
