"""CTRLPipeline: any diffusers pipeline whose call also takes `label=`.

`CTRLPipeline.from_pretrained` reads the base's class and returns an instance of a subclass made on the fly,
`CTRLStableDiffusionPipeline(CTRLPipeline, StableDiffusionPipeline)` for instance. Its `__call__` sets the label on the denoiser's
hooks and then calls the base's own, unmodified `__call__`.
"""

from __future__ import annotations

import inspect
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from .adapters import (
    Adapter,
    AdapterConfig,
    adapter_base,
    check_base,
    collect_adapter,
    find_adapter,
    load_adapter,
    local_folder,
    push_adapter,
    read_config,
    resolve_folder,
    save_adapter,
)
from .bases import denoiser_of
from .classifiers import Classifier
from .hub import advice, explained
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
from .particles import ParticlePool, PathRecorder
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
            subfolder: where in its folder or repository the adapter is.
            kwargs: passed to the base class's `from_pretrained` (`torch_dtype`, `token`, `cache_dir`, `local_files_only`, …). `revision`
                is that of the first argument; an adapter brings the revision of its base, whose weights must be safetensors.

        Raises:
            ValueError: if the adapter cannot be read or does not match the base.
        """
        name = pretrained_model_name_or_path
        subfolder = kwargs.pop("subfolder", None)
        hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        own = find_adapter(name, subfolder=subfolder, **hub) if adapter is None else None
        if own is not None and not (own / "model_index.json").is_file():
            name, chosen = adapter_base(read_config(own), from_hub=local_folder(name) is None, given=kwargs)
            kwargs |= chosen
        elif own is not None and subfolder is not None:
            name = own
        location = local_folder(name) or name
        with explained(f"The pipeline {str(location)!r} could not be loaded"):
            try:
                index = DiffusionPipeline.load_config(location, **hub | {"revision": kwargs.get("revision")})
            except OSError as error:
                if advice(error) is not None:
                    raise
                raise ValueError(f"No pipeline could be loaded from {str(location)!r}: {error}") from error
        base_class = getattr(diffusers, str(index.get("_class_name")), None)
        if not (inspect.isclass(base_class) and issubclass(base_class, DiffusionPipeline)):
            raise ValueError(f"{location} names the pipeline class {index.get('_class_name')!r}, which diffusers does not have.")
        with explained(f"The pipeline {str(location)!r} could not be loaded"):
            pipe = super(CTRLPipeline, ctrl_pipeline_class(base_class)).from_pretrained(location, **kwargs)
        if own is not None:
            pipe.load_ctrl_adapter(own)
        elif adapter is not None:
            pipe.load_ctrl_adapter(adapter, subfolder=subfolder, **{key: hub[key] for key in hub if key != "revision"})
        return pipe

    @property
    def denoiser(self) -> torch.nn.Module:
        """The unet or the transformer."""
        return denoiser_of(self)[1]

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
        check_base(adapter.config, type(self).__name__.removeprefix("CTRL"), denoiser_of(self)[0], denoiser)
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

    def push_ctrl_adapter_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads the adapter to the Hub as one commit, creating the repository if need be; returns the commit's URL.

        Args:
            kwargs: `base`, `base_revision`, `token`, `private`, `revision`, `subfolder`, `create_pr`, `commit_message`: see
                `adapters.push_adapter`.

        Raises:
            ValueError: if the adapter's base is a folder of this machine, or the upload fails; with what to do.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as temporary:
            return push_adapter(self.save_ctrl_adapter(Path(temporary) / "adapter"), repo_id, **kwargs)

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
        self,
        *args: Any,
        label: Label | list[Label] = None,
        gamma: float | None = None,
        strength: float = 1.0,
        num_particles: int = 1,
        particle_batch_size: int = 64,
        **kwargs: Any,
    ) -> Any:
        """The base's call, plus:

        Args:
            label: a name, an index, a dict {attribute: value}, a list of these (one a prompt), or None for the base, bit for bit.
            gamma: exponent of p̂(y | x); only for adapters trained with a range of gamma.
            strength: 0 = base, 1 = tuned, in between or beyond by interpolation of the two outputs (two forwards then).
            num_particles: with n > 1, exact sampling: each image is drawn from n trajectories of the tuned model by their importance
                weights, which tends to p(x | c) p̂(y | x)^gamma as n grows, whatever the training left over. The output then has
                `log_weights` (images, n) in nats and `ess` (images,), the effective sample size out of n.
            particle_batch_size: trajectories at a time, at most, so that they fit in memory (but at least one for each image).
            prompt: optional; the empty prompt if a text pipeline gets none.

        With a label, settings that are not given (num_inference_steps, guidance_scale, eta) are those the adapter was trained
        with; without, they are the base's own.

        Raises:
            ValueError: for an unknown label, a wrong number of labels, a label without an adapter, or a gamma that has no effect;
                for num_particles without a classifier in the adapter, without noise in the sampler, or with given latents.
        """
        if num_particles < 1 or particle_batch_size < 1:
            raise ValueError(
                f"num_particles and particle_batch_size must be at least 1, got {num_particles}, {particle_batch_size}."
            )
        if label is None:
            if num_particles > 1:
                raise ValueError("num_particles weighs samples by how well they fit a label: pass label= as well.")
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
        own_scheduler = self.scheduler
        self.scheduler = self._labelled_scheduler(self._ctrl_config.sampler)
        try:
            if num_particles > 1:
                return self._sample_particles(kwargs, labels, repeats, gamma, float(strength), num_particles, particle_batch_size)
            return self._sample_labelled(kwargs, labels, gamma, float(strength), self._deterministic_timesteps(kwargs))
        finally:
            self.scheduler = own_scheduler

    def _sample_labelled(
        self, kwargs: dict, labels: torch.Tensor, gamma: float, strength: float, base_timesteps: frozenset[int]
    ) -> Any:
        """The base's own call with these labels, one an image, on the denoiser's hooks."""
        hook = self._ctrl_hook
        hook.embedding, hook.strength, hook.base_timesteps = self.label_encoder(labels, gamma), strength, base_timesteps
        try:
            return super().__call__(**kwargs)
        finally:
            hook.embedding, hook.strength, hook.base_timesteps = None, 1.0, frozenset()

    def _sample_particles(
        self, kwargs: dict, labels: torch.Tensor, repeats: int, gamma: float, strength: float, count: int, batch_size: int
    ) -> Any:
        """Exact sampling: `count` trajectories of each of the len(labels) images, weighed, one drawn."""
        if self._ctrl_classifier is None:
            raise ValueError(
                "num_particles needs the adapter's classifier, and this adapter brings none: its folder has no classifier/."
            )
        if kwargs.get("latents") is not None:
            raise ValueError("num_particles cannot be combined with latents: the trajectories need starts of their own.")
        if given := [name for name in ("timesteps", "sigmas") if kwargs.get(name) is not None]:
            raise ValueError(f"num_particles cannot be combined with {given[0]}: the adapter's number of steps fixes the grid.")
        if kwargs.get("guidance_rescale"):
            raise ValueError("num_particles cannot be combined with guidance_rescale: the weights know plain guidance only.")
        if kwargs.get("output_type") == "latent":
            raise ValueError("num_particles weighs finished images: output_type must not be 'latent'.")
        sampler, images, generator = self._sampler(kwargs), len(labels), kwargs.get("generator")
        pool = ParticlePool(images, generator)
        quiet, own = dict(getattr(self, "_progress_bar_config", {})), self.scheduler
        bar = self.progress_bar(total=images * count)
        try:
            self.set_progress_bar_config(**quiet | {"disable": True})
            with PathRecorder(self._ctrl_hook, sampler, kwargs.get("guidance_scale")) as recorder:
                self.scheduler = recorder.watched(own)
                while pool.count < count:
                    share = min(max(1, batch_size // images), count - pool.count)
                    call = dict(kwargs, return_dict=True, output_type="pt")
                    call |= {"batch_size": images * share} if "batch_size" in kwargs else {"num_images_per_prompt": repeats * share}
                    if isinstance(generator, list):
                        call["generator"] = [g for g in generator for _ in range(share)]
                    recorder.reset()
                    rows = labels.repeat_interleave(share, dim=0)
                    output = self._sample_labelled(call, rows, gamma, strength, sampler.deterministic_timesteps)
                    drawn = torch.as_tensor(output.images)
                    if isinstance(output.images, np.ndarray):  # a pipeline that does not know output_type="pt"
                        drawn = drawn.permute(0, 3, 1, 2)
                    fit = self._ctrl_classifier.to(drawn.device).log_prob(drawn, rows)
                    pool.add(drawn.cpu(), gamma * fit.double().cpu() - recorder.log_ratio.cpu(), output)
                    bar.update(images * share)
        finally:
            bar.close()
            self.scheduler = own
            self.set_progress_bar_config(**quiet)
        return pool.output(kwargs.get("output_type", "pil"), kwargs.get("return_dict", True), self.numpy_to_pil)

    def _labelled_scheduler(self, sampler: dict[str, Any]) -> Any:
        """The pipeline's scheduler, or, where that has no Gaussian step, the one that the adapter was trained with."""
        if type(self.scheduler).__name__ in supported_schedulers() or sampler["scheduler"] not in supported_schedulers():
            return self.scheduler
        return getattr(diffusers, sampler["scheduler"]).from_config(sampler["scheduler_config"])

    def _check_gamma(self, gamma: float | None) -> float:
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

    def _sampler(self, arguments: dict) -> Sampler:
        """The law that a call with these arguments samples. Raises ValueError where no step has noise."""
        steps = arguments.get("num_inference_steps") or self._ctrl_config.sampler["num_inference_steps"]
        takes = inspect.signature(self.scheduler.step).parameters
        options = {k: arguments.get(k, v) for k, v in self._ctrl_config.sampler["options"].items() if k in takes}
        if "eta" in takes and "eta" not in options:  # an adapter of another scheduler: eta is the call's
            options["eta"] = arguments.get("eta", 0.0)
        return Sampler(self.scheduler, steps, options)

    def _deterministic_timesteps(self, arguments: dict) -> frozenset[int]:
        """Timesteps to leave to the base: those without noise, as in training. All of them act where none has noise (eta = 0)."""
        try:
            return self._sampler(arguments).deterministic_timesteps
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
