"""CTRLPipeline: any diffusers pipeline whose call also takes `label=`.

`CTRLPipeline.from_pretrained` reads the base's class and returns an instance of a subclass made on the fly,
`CTRLStableDiffusionPipeline(CTRLPipeline, StableDiffusionPipeline)` for instance. Its `__call__` sets the label on the denoiser's
hooks and then calls the base's own, unmodified `__call__`.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from .adapters import (
    Adapter,
    AdapterConfig,
    check_base,
    collect_adapter,
    is_adapter,
    load_adapter,
    read_config,
    resolve_folder,
    save_adapter,
)
from .classifiers import Classifier
from .injection import (
    StrengthHook,
    add_label_hook,
    add_strength_hook,
    find_injection_site,
    load_lora_state_dict,
    remove_label_hook,
    remove_lora,
    remove_strength_hook,
    site_width,
)
from .labels import Label, LabelSpace
from .rollouts import Sampler
from .transitions import supported_schedulers


HUB_KWARGS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")


class CTRLPipeline(DiffusionPipeline):
    """A diffusers pipeline with a label. Never instantiated itself: `from_pretrained` gives the subclass for the base."""

    _ctrl_config: AdapterConfig | None = None
    _ctrl_hook: StrengthHook | None = None
    _ctrl_classifier: Classifier | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, adapter: str | os.PathLike | None = None, **kwargs: Any
    ) -> CTRLPipeline:
        """Loads a base, an adapter with the base it names, or a base and an adapter.

        Args:
            pretrained_model_name_or_path: a local folder, an embedded model's name, or a Hub id; of a base or of an adapter.
            adapter: the adapter, where the first argument is a base.
            kwargs: passed to the base class's `from_pretrained` (`torch_dtype`, `revision`, `token`, …).

        Raises:
            ValueError: if the adapter cannot be read or does not match the base.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        folder = _local_folder(name)
        if folder is None and adapter is None and _hub_has_adapter(name, hub):
            folder = resolve_folder(name, **hub)
        if folder is not None and is_adapter(folder) and adapter is None:
            adapter = folder
            if not (folder / "model_index.json").is_file():
                config = read_config(folder)
                name, folder = config.base["id"], _local_folder(config.base["id"])
                kwargs["revision"] = config.base["revision"]
        location = folder if folder is not None else name
        try:
            index = DiffusionPipeline.load_config(location, **hub | {"revision": kwargs.get("revision")})
        except OSError as error:
            raise ValueError(f"No pipeline could be loaded from {str(location)!r}: {error}") from error
        base_class = getattr(diffusers, str(index.get("_class_name")), None)
        if not (inspect.isclass(base_class) and issubclass(base_class, DiffusionPipeline)):
            raise ValueError(f"{location} names the pipeline class {index.get('_class_name')!r}, which diffusers does not have.")
        pipe = super(CTRLPipeline, ctrl_pipeline_class(base_class)).from_pretrained(location, **kwargs)
        if adapter is not None:
            pipe.load_ctrl_adapter(adapter, **hub)
        return pipe

    @property
    def _denoiser_name(self) -> str:
        for name in ("unet", "transformer"):
            if getattr(self, name, None) is not None:
                return name
        raise ValueError(f"{type(self).__name__} has neither a unet nor a transformer to control.")

    @property
    def denoiser(self) -> torch.nn.Module:
        """The unet or the transformer."""
        return getattr(self, self._denoiser_name)

    @property
    def label_space(self) -> LabelSpace | None:
        """What labels the loaded adapter understands; None without an adapter."""
        return None if self._ctrl_config is None else self.label_encoder.label_space

    @property
    def classifier(self) -> Classifier | None:
        """The adapter's calibrated classifier, where it brings one."""
        return self._ctrl_classifier

    def load_ctrl_adapter(self, adapter: str | os.PathLike | Adapter, adapter_name: str = "default", **hub_kwargs: Any) -> None:
        """Reads an adapter (folder, embedded name, Hub id, or in memory), checks it against this base, and puts it in.

        Raises:
            ValueError: if it cannot be read, does not match, or another one is loaded; the pipeline is then left as it was.
        """
        if self._ctrl_config is not None:
            raise ValueError("This pipeline already has a label adapter: call unload_ctrl_adapter() first.")
        if not isinstance(adapter, Adapter):
            adapter = load_adapter(resolve_folder(adapter, **hub_kwargs))
        denoiser, site = self.denoiser, adapter.config.injection_site
        check_base(adapter.config, type(self).__name__.removeprefix("CTRL"), self._denoiser_name, denoiser)
        width = site_width(find_injection_site(denoiser, site)[1])
        if adapter.label_encoder.config.embedding_dim != width:
            raise ValueError(
                f"The adapter's label encoder has embedding_dim {adapter.label_encoder.config.embedding_dim}, but {site} is {width} wide."
            )
        # whether a weight requires a gradient changes the bits of torch's products: the base keeps what it had
        trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        try:
            load_lora_state_dict(denoiser, adapter.lora, adapter_name)
            try:
                label_hook = add_label_hook(denoiser, site)
            except ValueError:
                remove_lora(denoiser, adapter_name)
                raise
            denoiser.requires_grad_(False)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        self._ctrl_hook = add_strength_hook(denoiser, label_hook, adapter_name)
        self._ctrl_config, self._ctrl_classifier, self._ctrl_name = adapter.config, adapter.classifier, adapter_name
        self.register_modules(label_encoder=adapter.label_encoder.to(denoiser.device))
        if adapter.classifier is not None:
            adapter.classifier.to(denoiser.device)

    def unload_ctrl_adapter(self) -> None:
        """Takes the adapter out: the denoiser is the base again, bit for bit."""
        if self._ctrl_config is None:
            return
        remove_strength_hook(self.denoiser)
        remove_label_hook(self.denoiser, self._ctrl_config.injection_site)
        remove_lora(self.denoiser, self._ctrl_name)
        self._ctrl_config = self._ctrl_hook = self._ctrl_classifier = None
        self.register_modules(label_encoder=None)

    def save_ctrl_adapter(self, folder: str | os.PathLike) -> Path:
        """Writes the loaded adapter into a folder that `from_pretrained` and `load_ctrl_adapter` read."""
        return save_adapter(folder, self._collect())

    def push_ctrl_adapter_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
        """Uploads the adapter folder to the Hub, creating the repository if need be; returns the commit's URL."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_ctrl_adapter(Path(temporary) / "adapter")
            api.create_repo(repo_id, exist_ok=True, private=private)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="CTRL adapter"))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the base as an ordinary diffusers folder (plain `DiffusionPipeline` loads it) with the adapter beside it."""
        if self._ctrl_config is None:
            super().save_pretrained(save_directory, **kwargs)
            _restore_class_name(Path(save_directory))
            return
        adapter, name = self._collect(), self._ctrl_name
        # a LoRA in place would be written into the denoiser's keys, which nothing could load
        self.unload_ctrl_adapter()
        try:
            super().save_pretrained(save_directory, **kwargs)
            _restore_class_name(Path(save_directory))
        finally:
            self.load_ctrl_adapter(adapter, name)
        save_adapter(save_directory, adapter)

    def _collect(self) -> Adapter:
        if self._ctrl_config is None:
            raise ValueError("This pipeline has no label adapter to save: load or train one first.")
        return collect_adapter(self._ctrl_config, self.denoiser, self.label_encoder, self._ctrl_classifier, self._ctrl_name)

    @torch.no_grad()
    def __call__(
        self, *args: Any, label: Label | list[Label] = None, gamma: float | None = None, strength: float = 1.0, **kwargs: Any
    ) -> Any:
        """The base's call, plus:

        Args:
            label: a name, an index, a dict {attribute: value}, a list of these (one a prompt), or None for the base, bit for bit.
            gamma: exponent of p̂(y | x); only for adapters trained with a range of gamma.
            strength: 0 = base, 1 = tuned, in between or beyond by interpolation of the two outputs (two forwards then).
            prompt: optional; the empty prompt if a text pipeline gets none.

        With a label, settings that are not given (num_inference_steps, guidance_scale, eta) are those the adapter was trained
        with; without, they are the base's own.

        Raises:
            ValueError: for an unknown label, a wrong number of labels, a label without an adapter, or a gamma that has no effect.
        """
        if label is None:
            return super().__call__(*args, **kwargs)
        if self._ctrl_config is None:
            raise ValueError(
                "label= was given, but this pipeline has no label adapter: load one with load_ctrl_adapter(), or pass "
                "label=None for the base."
            )
        gamma = self._check_gamma(gamma)
        parameters = inspect.signature(super().__call__).parameters
        given = dict(inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments)
        for name, parameter in parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        kwargs, rows, repeats = self._complete(given, parameters, label)
        labels = self.label_space.encode(label, rows).repeat_interleave(repeats, dim=0)
        hook = self._ctrl_hook
        hook.embedding = self.label_encoder(labels, gamma)
        hook.strength = float(strength)
        own_scheduler = self.scheduler
        self.scheduler = self._labelled_scheduler(self._ctrl_config.sampler)
        try:
            hook.base_timesteps = self._deterministic_timesteps(kwargs)
            return super().__call__(**kwargs)
        finally:
            self.scheduler = own_scheduler
            hook.embedding, hook.strength, hook.base_timesteps = None, 1.0, frozenset()

    def _labelled_scheduler(self, sampler: dict[str, Any]) -> Any:
        """The pipeline's scheduler, or, where that has no Gaussian step, the one that the adapter was trained with."""
        if type(self.scheduler).__name__ in supported_schedulers() or sampler["scheduler"] not in supported_schedulers():
            return self.scheduler
        return getattr(diffusers, sampler["scheduler"]).from_config(sampler["scheduler_config"])

    def _check_gamma(self, gamma: float | None) -> float | None:
        config = self._ctrl_config
        if gamma is None:
            return config.gamma
        if config.gamma_range is None:
            raise ValueError(
                f"This adapter was trained for gamma = {config.gamma} only and cannot take another: use strength= to weaken or "
                "strengthen the label."
            )
        low, high = config.gamma_range
        if not gamma > 0:
            raise ValueError(f"gamma must be positive, got {gamma}; this adapter was trained from {low} to {high}.")
        if not low <= gamma <= high:
            warnings.warn(f"gamma = {gamma} lies outside the trained range {low} to {high}.", stacklevel=3)
        return gamma

    def _complete(self, given: dict, parameters: Any, label: Any) -> tuple[dict, int, int]:
        """Fills in the adapter's settings, and counts prompts and images per prompt."""
        sampler = self._ctrl_config.sampler
        settings = {"num_inference_steps": sampler["num_inference_steps"], "guidance_scale": sampler["guidance_scale"]}
        settings |= sampler["options"]
        kwargs = given | {k: v for k, v in settings.items() if k in parameters and given.get(k) is None}
        if "batch_size" in parameters:  # an unconditional pipeline
            rows = given.get("batch_size") or (len(label) if isinstance(label, (list, tuple)) else 1)
            return kwargs | {"batch_size": rows}, rows, 1
        prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
        if embeds is not None:
            rows = len(embeds)
        elif prompt is None:
            rows = len(label) if isinstance(label, (list, tuple)) else 1
            kwargs = kwargs | {"prompt": [""] * rows if isinstance(label, (list, tuple)) else ""}
        else:
            rows = len(prompt) if isinstance(prompt, (list, tuple)) else 1
        return kwargs, rows, given.get("num_images_per_prompt") or 1

    def _deterministic_timesteps(self, arguments: dict) -> frozenset[int]:
        """Timesteps to leave to the base: those without noise, as in training. All of them act where none has noise (eta = 0)."""
        steps = arguments.get("num_inference_steps") or self._ctrl_config.sampler["num_inference_steps"]
        takes = inspect.signature(self.scheduler.step).parameters
        options = {k: arguments.get(k, v) for k, v in self._ctrl_config.sampler["options"].items() if k in takes}
        try:
            return Sampler(self.scheduler, steps, options).deterministic_timesteps
        except ValueError as error:
            warnings.warn(f"The label acts, but not as certified: {error}", stacklevel=4)
            return frozenset()


@cache
def ctrl_pipeline_class(base: type[DiffusionPipeline]) -> type[CTRLPipeline]:
    """`CTRL` + the base's name: CTRLPipeline before the base, whose `__init__` signature it keeps, plus a label encoder."""

    def __init__(self, *args: Any, label_encoder: Any = None, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_modules(label_encoder=label_encoder)

    signature = inspect.signature(base.__init__)
    extra = inspect.Parameter("label_encoder", inspect.Parameter.KEYWORD_ONLY, default=None)
    variadic = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    plain = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    __init__.__signature__ = signature.replace(parameters=[*plain, extra, *variadic])
    namespace = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"{base.__name__} with a label: see CTRLPipeline.",
        "_optional_components": [*base._optional_components, "label_encoder"],
    }
    return type("CTRL" + base.__name__, (CTRLPipeline, base), namespace)


def _local_folder(name: str | os.PathLike) -> Path | None:
    from .assets import find

    return Path(name) if Path(name).is_dir() else find(str(name))


def _hub_has_adapter(name: str | os.PathLike, hub: dict[str, Any]) -> bool:
    """Whether the Hub repository is an adapter: asked by its one small file, so that a base's weights are not fetched twice."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from .adapters import CONFIG_NAME

    try:
        hf_hub_download(str(name), CONFIG_NAME, **{k: v for k, v in hub.items() if k != "proxies"})
    except EntryNotFoundError:
        return False
    except Exception as error:
        raise ValueError(
            f"{str(name)!r} is neither a local folder nor an embedded model, and the Hub did not have it: {type(error).__name__}."
        ) from error
    return True


def _restore_class_name(folder: Path) -> None:
    """model_index.json names the base's class and no label encoder, so that plain diffusers loads the folder."""
    import json

    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"] = index["_class_name"].removeprefix("CTRL")
    index.pop("label_encoder", None)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(temporary, path)


# -- what training and evaluation need to know of a pipeline --


def latent_shape(pipe: DiffusionPipeline) -> tuple[int, int, int]:
    """(C, H, W) of the states that the pipeline's denoiser works on at its native size."""
    config = (getattr(pipe, "unet", None) or pipe.transformer).config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def decoder(pipe: DiffusionPipeline) -> Callable[[torch.Tensor], torch.Tensor]:
    """States (B, C, H, W) -> images (B, 3, H', W') in [0, 1] as the pipeline would return them; differentiable."""
    vae = getattr(pipe, "vae", None)

    def decode(states: torch.Tensor) -> torch.Tensor:
        if vae is not None:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            states = vae.decode((states / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0]
        return (states / 2 + 0.5).clamp(0, 1)

    return decode


@torch.no_grad()
def round_trip(pipe: DiffusionPipeline, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] encoded and decoded by the pipeline's autoencoder: what its samples look like."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return images
    decode = decoder(pipe)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    done = []
    for chunk in images.split(batch_size):
        mean = vae.encode((chunk * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
        done.append(decode((mean - shift) * vae.config.scaling_factor).float().cpu())
    return torch.cat(done)


@torch.no_grad()
def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Text embeddings (P, L, D) of the prompts, and (1, L, D) of the empty one; (None, None) for a pipeline without text."""
    if not hasattr(pipe, "encode_prompt"):
        return None, None
    device = pipe.denoiser.device if isinstance(pipe, CTRLPipeline) else pipe.device
    embeds, _ = pipe.encode_prompt(list(prompts), device, 1, False)
    null, _ = pipe.encode_prompt([""], device, 1, False)
    return embeds, null
