"""The adapter folder: what is in it, and how it is written and read. safetensors and JSON only.

    pytorch_lora_weights.safetensors   `unet.` or `transformer.` + layer + `.lora_A.weight`; plain diffusers loads it
    label_encoder/                     config.json, diffusion_pytorch_model.safetensors
    classifier/                        the same, optional: for evaluation and exact sampling
    ctrl_config.json                   everything else (`AdapterConfig`)

Nothing is half-written: files go to a temporary folder first and are then renamed, ctrl_config.json last; without it nothing else is
read. Nothing is half-read: an adapter is read and checked as a whole before any pipeline is touched. A stranger's adapter can name a
base and change the numbers that come out of it, and no more: see untrusted.py and docs/sharing.md.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from . import assets
from .classifiers import Classifier
from .hub import DISK_FULL, check_subfolder, download, explained, is_repo_id
from .injection import lora_state_dict
from .label_encoder import LabelEncoder
from .labels import LabelSpace
from .transitions import transition
from .untrusted import clip, hub_cache, is_number, member, read_json, read_tensors, shorten


FORMAT_VERSION = 1
CONFIG_NAME = "ctrl_config.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "model_index.json"
CLASSIFIER_FILES = ("classifier/config.json", f"classifier/{WEIGHTS_NAME}")
REQUIRED_FILES = (CONFIG_NAME, LORA_NAME, "label_encoder/config.json", f"label_encoder/{WEIGHTS_NAME}")
ADAPTER_FILES = (*REQUIRED_FILES, *CLASSIFIER_FILES)
CARD_FILES = ("README.md", "metrics.json")  # and the pictures beside them
MAX_STEPS = 10_000
MAX_NAME = 500  # characters
PACKAGES = ("diffusers", "transformers", "torch", "accelerate", "peft", "huggingface-hub", "datasets")


@dataclass(frozen=True)
class AdapterConfig:
    """ctrl_config.json.

    base: {"id", "revision", "denoiser_sha256"}. pipeline_class: the diffusers class of the base. denoiser: its component name.
    label_space: `LabelSpace.to_dict()`. gamma: the gamma it was trained for. gamma_range: [low, high], or None where gamma is fixed.
    sampler: {"scheduler": name, "scheduler_config", "num_inference_steps", "guidance_scale", "options"}, the base law's settings.
    injection_site: module path of the time embedding. versions: of the packages it was made with. metrics: flat, as in metrics.json.
    training: {} or, each optional, "data" [one object a dataset and attribute, of texts, numbers and counts], "settings" {field of a
        training config: value} and "compute" {name: text or number}: what the card tells. Nothing else reads it.
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
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Adapter:
    """A whole adapter in memory. lora: layer keys without the component prefix; empty where a control head is alone."""

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


def find_adapter(name: str | os.PathLike, *, subfolder: str | None = None, **hub_kwargs: Any) -> Path | None:
    """A local folder, an embedded model's name, or a Hub id -> the local folder of the adapter, or None if that is no adapter.

    Of a Hub repository only the adapter's own files are fetched (and model_index.json), all of one commit.

    Args:
        subfolder: where in the folder or repository the adapter is.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as everywhere.

    Raises:
        ValueError: if it is none of these, or cannot be downloaded.
    """
    hub_kwargs.pop("proxies", None)  # the Hub's client takes them from the environment
    inside = check_subfolder(subfolder)
    folder = local_folder(name)
    if folder is not None:
        return folder / inside if is_adapter(folder / inside) else None
    if not is_repo_id(str(name)):
        raise ValueError(
            f"{str(name)!r} is neither a local folder, nor an embedded model ({', '.join(assets.names())}), nor a Hub id, which is "
            "written USER/NAME."
        )
    try:
        names = (*ADAPTER_FILES, INDEX_NAME)
        return download(str(name), names, marker=CONFIG_NAME, required=REQUIRED_FILES, subfolder=subfolder, **hub_kwargs)
    except ValueError as error:
        raise ValueError(f"{str(name)!r} is neither a local folder nor an embedded model, and {error}") from error


def resolve_folder(name: str | os.PathLike, *, subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """A local folder, an embedded model's name, or a Hub id, of an adapter or of a pipeline -> a local folder.

    Raises:
        ValueError: if it is none of these, or cannot be downloaded.
    """
    folder = find_adapter(name, subfolder=subfolder, **hub_kwargs)
    if folder is not None:
        return folder
    folder = local_folder(name)
    if folder is not None:
        return folder / check_subfolder(subfolder)
    if subfolder:
        raise ValueError(f"The Hub repository {str(name)!r} has no adapter in its folder {subfolder!r}.")
    with explained(f"The pipeline {str(name)!r} could not be downloaded from the Hub"):
        # only what diffusers would load: repositories of popular models hold each weight several times
        return Path(DiffusionPipeline.download(str(name), **hub_kwargs))


def local_folder(name: str | os.PathLike) -> Path | None:
    """The folder that `name` is, or the embedded model of that name, or None."""
    return Path(name) if Path(name).is_dir() else assets.find(str(name))


def adapter_base(config: AdapterConfig, *, from_hub: bool, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Id of the base that an adapter names, and the keywords to load it with: its revision, and safetensors only.

    Args:
        from_hub: the adapter was downloaded: its base is then a Hub id or an embedded model, never a path.
        given: the caller's own keywords.

    Raises:
        ValueError: for such a path, or for keywords that would run a program chosen by the adapter.
    """
    base = config.base["id"]
    if from_hub and assets.find(base) is None and not is_repo_id(base):
        raise ValueError(
            f"The adapter names the base {shorten(base)}, which is no Hub id: load the base yourself and pass adapter=."
        )
    if program := [name for name in ("trust_remote_code", "custom_pipeline") if given.get(name)]:
        raise ValueError(f"{program[0]} is not taken for a base that an adapter names: load the base yourself and pass adapter=.")
    if given.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False is not taken for a base that an adapter names: load the base yourself and pass adapter=."
        )
    return base, {"revision": config.base["revision"], "use_safetensors": True}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def save_adapter(folder: str | os.PathLike, adapter: Adapter, dtype: torch.dtype | None = None) -> Path:
    """Writes the adapter into `folder`, which may hold other files. `dtype`: stored precision, as in memory if None.

    Raises:
        OSError: if it cannot be written (disk full, no permission); what was in the folder before is then untouched.
    """
    folder = Path(folder).absolute()
    temporary = _temporary(folder)
    try:
        _write(temporary, adapter, dtype)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = (isinstance(error, OSError) and error.errno in DISK_FULL) or any(f"os error {n}" in str(error) for n in DISK_FULL)
        reason = "the disk is full: free some space and save again" if full else str(error)
        raise OSError(f"The adapter could not be written to {folder}, which is as it was: {reason}.") from error
    if not folder.exists():
        os.replace(temporary, folder)
        return folder
    # without its config the folder is no adapter: a process that ends here leaves none, rather than one with weights of two
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    written = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
    for path in sorted(written, key=lambda p: p.as_posix() == CONFIG_NAME):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.as_posix() == CONFIG_NAME and adapter.classifier is None:
            shutil.rmtree(folder / "classifier", ignore_errors=True)
        os.replace(temporary / path, folder / path)
    shutil.rmtree(temporary)
    return folder


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.saving")


def _write(folder: Path, adapter: Adapter, dtype: torch.dtype | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def stored(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.detach().cpu().to(dtype or value.dtype).contiguous() for key, value in state.items()}

    prefix = adapter.config.denoiser
    # the metadata entry is what the Hub and other readers tell the framework by
    save_file(stored({f"{prefix}.{k}": v for k, v in adapter.lora.items()}), folder / LORA_NAME, metadata={"format": "pt"})
    for name, model in (("label_encoder", adapter.label_encoder), ("classifier", adapter.classifier)):
        if model is not None:
            config = json.loads(model.to_json_string())
            config.pop("_name_or_path", None)  # where it was read from: a folder of this machine, and nobody's business
            if config.get("head", 0) is None:
                del config["head"]  # without a head the file is what it was before there were any, and older versions read it
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_file(stored(model.state_dict()), folder / name / WEIGHTS_NAME, metadata={"format": "pt"})
    save_config(folder, adapter.config)


def config_text(config: AdapterConfig) -> str:
    """ctrl_config.json."""
    return json.dumps(asdict(config), indent=2) + "\n"


def save_config(folder: Path, config: AdapterConfig) -> None:
    """Writes ctrl_config.json alone: new metrics leave the weights' files as they are."""
    temporary = folder / f"{CONFIG_NAME}.tmp"
    temporary.write_text(config_text(config))
    os.replace(temporary, folder / CONFIG_NAME)


def _read_model(folder: Path, name: str, cls: type) -> Any:
    """A LabelEncoder or a Classifier. It is built without storage first, so that only what the file holds is ever allocated."""
    state = read_tensors(member(folder, f"{name}/{WEIGHTS_NAME}"))
    path = member(folder, f"{name}/config.json")
    config = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    for key in ("members", "widths", "temperatures"):  # which decide how long building takes, and have a tensor or more each
        value = config.get(key)
        count = len(value) if isinstance(value, (list, str)) else value if type(value) is int else 0
        if count > len(state):
            raise ValueError(f"{path} has {key} {shorten(value)}, more than its weights' file has tensors.")
    try:
        with torch.device("meta"):
            model = cls(**config)
        model.load_state_dict(state, assign=True)
        return model.eval()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = clip(lines[-1].strip())
        raise ValueError(f"{folder / name} does not hold a {cls.__name__}: {reason}") from error


def read_config(folder: Path) -> AdapterConfig:
    """Reads and checks ctrl_config.json. Raises ValueError naming the file and the key that is wrong."""
    if not (folder / CONFIG_NAME).exists() and (_temporary(folder.absolute()) / CONFIG_NAME).exists():
        raise ValueError(
            f"The adapter has no {CONFIG_NAME} in {folder}: the process that was saving it there was ended. Save it again."
        )
    path = member(folder, CONFIG_NAME)
    data = read_json(path)
    found = data.get("format_version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{path} has format_version {shorten(found)}; a positive integer is needed.")
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {shorten(found)}, newer than the {FORMAT_VERSION} known here: upgrade diffusers_ctrl."
        )
    known = {f.name for f in fields(AdapterConfig)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{path} has unknown keys {shorten(unknown)}; known are {sorted(known)}.")
    required = known - {"versions", "metrics", "training"}
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
        "training": dict,
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
    steps, scheduler, options = sampler["num_inference_steps"], sampler["scheduler_config"], sampler["options"]
    known_options = _sampler_options()
    names = [
        base["id"],
        base["revision"] or "",
        sampler["scheduler"],
        *(data[k] for k in ("pipeline_class", "denoiser", "injection_site")),
    ]
    checks = {
        "base.id must be a string": isinstance(base["id"], str),
        "base.revision must be a string or null": isinstance(base["revision"], (str, type(None))),
        "base.denoiser_sha256 must be a string": isinstance(base["denoiser_sha256"], str),
        "sampler.scheduler must be a string": isinstance(sampler["scheduler"], str),
        f"names may have {MAX_NAME} characters": all(len(name) <= MAX_NAME for name in names if isinstance(name, str)),
        "sampler.scheduler_config and sampler.options must be objects": isinstance(scheduler, dict) and isinstance(options, dict),
        f"sampler.num_inference_steps must be a positive integer, at most {MAX_STEPS}": type(steps) is int
        and 0 < steps <= MAX_STEPS,
        "gamma, gamma_range and sampler.guidance_scale must be numbers": all(map(is_number, numbers)),
        "gamma must be positive, gamma_range null or 0 < low < high": is_number(data["gamma"])
        and data["gamma"] > 0
        and (
            gamma_range is None
            or (len(gamma_range) == 2 and all(map(is_number, gamma_range)) and 0 < gamma_range[0] < gamma_range[1])
        ),
        # they become arguments of the pipeline's call: a stranger's adapter must not choose others
        f"sampler.options may hold numbers under {known_options} only": isinstance(options, dict)
        and all(name in known_options and is_number(value) for name, value in options.items()),
        f"sampler.scheduler_config.num_train_timesteps must be an integer from 1 to {MAX_STEPS}": isinstance(scheduler, dict)
        and type(trained := scheduler.get("num_train_timesteps", 1000)) is int
        and 0 < trained <= MAX_STEPS,
        "versions and metrics may hold numbers, texts, true, false and null, and no more than versions beside them": _is_flat(
            data.get("versions", {})
        )
        and _is_flat({k: v for k, v in data.get("metrics", {}).items() if k != "versions"})
        and _is_flat(data.get("metrics", {}).get("versions", {})),
        "training may hold data (objects), settings (their prompts are texts) and compute, without further nesting": _is_training(
            data.get("training", {})
        ),
    }
    for message, holds in checks.items():
        if not holds:
            raise ValueError(f"{path}: {message}.")
    return AdapterConfig(**data)


def _is_flat(value: Any, depth: int = 0) -> bool:
    """Whether it is an object of numbers, texts, true, false and null; `depth`: levels of lists and objects that these may be in."""
    if not isinstance(value, dict):
        return False
    nested = [v for v in value.values() if isinstance(v, (dict, list))]
    inner = [v if isinstance(v, dict) else dict(enumerate(v)) for v in nested]
    return not nested or (depth > 0 and all(_is_flat(v, depth - 1) for v in inner))


def _is_training(training: dict[str, Any]) -> bool:
    data, settings = training.get("data", []), training.get("settings", {})
    return (
        set(training) <= {"data", "settings", "compute"}
        and isinstance(data, list)
        and all(_is_flat(part, 1) for part in data)
        and _is_flat(settings, 1)
        and all(name.isidentifier() for name in settings)
        and isinstance(prompts := settings.get("prompts", []), list)
        and all(isinstance(prompt, str) for prompt in prompts)
        and _is_flat(training.get("compute", {}))
    )


def _sampler_options() -> list[str]:
    """Names of the transitions' own settings, such as DDIM's eta."""
    parameters = [p for law in transition.registry.values() for p in inspect.signature(law).parameters.values()]
    return sorted({p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY})


def load_adapter(folder: Path) -> Adapter:
    """Reads and checks a whole adapter folder.

    Raises:
        ValueError: for a missing, truncated or foreign file, an unknown key, or a newer format; the message names the file.
    """
    folder = Path(folder)
    try:
        return _load_adapter(folder)
    except ValueError as error:
        if hub_cache(folder) is None:
            raise
        raise ValueError(f"{error} It was downloaded: force_download=True fetches it again.") from error


def _load_adapter(folder: Path) -> Adapter:
    config = read_config(folder)
    prefix = f"{config.denoiser}."
    lora = read_tensors(member(folder, LORA_NAME))
    if foreign := [key for key in lora if not key.startswith(prefix)]:
        raise ValueError(f"{folder / LORA_NAME} has keys that do not start with {shorten(prefix)}: {shorten(foreign[:3])}.")
    label_encoder = _read_model(folder, "label_encoder", LabelEncoder)
    if label_encoder.is_alone == bool(lora):
        has, what = (
            ("has", "though the control head of label_encoder/ is alone")
            if lora
            else ("has no", "and no control head that is alone")
        )
        raise ValueError(f"{folder / LORA_NAME} {has} LoRA weights, {what}: they are not of one adapter.")
    classifier = _read_model(folder, "classifier", Classifier) if (folder / "classifier").is_dir() else None
    try:
        space = LabelSpace.from_dict(config.label_space)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {clip(str(error))}") from error
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
    return Adapter(config, {} if label_encoder.is_alone else lora_state_dict(denoiser, adapter_name), label_encoder, classifier)
