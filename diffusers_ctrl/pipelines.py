"""CTRLPipeline: any diffusers pipeline whose call also takes `label=`.

`CTRLPipeline.from_pretrained` reads the base's class and returns an instance of a subclass made on the fly,
`CTRLStableDiffusionPipeline(CTRLPipeline, StableDiffusionPipeline)` for instance. Its `__call__` sets the label on the denoiser's
hooks and then calls the base's own, unmodified `__call__`. Adapters live on the denoiser, so pipelines that share one share them.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from .adapters import (
    Adapter,
    adapter_base,
    check_base,
    collect_adapter,
    find_adapter,
    load_adapter,
    local_folder,
    read_config,
    resolve_folder,
    save_adapter,
)
from .bases import denoiser_of
from .calls import Roles
from .cards import save_card
from .classifiers import Classifier
from .controls import Control, StrengthHook, add_control, check_lora, control_hook, remove_control
from .export import bake_label, check_exportable, check_has_lora, label_lora, plain_scheduler, write_lora
from .hub import advice, explained
from .injection import find_injection_site, other_lora, site_width
from .labels import Label, LabelSpace
from .sampling import (
    Strength,
    check_scheduler,
    complete,
    labelled_scheduler,
    requests,
    sample,
    sample_particles,
    sampler_settings,
    transition_options,
    union_space,
)
from .sharing import push_adapter, push_pipeline


AUTO_PIPELINES = "diffusers.pipelines.auto_pipeline"
HUB_KWARGS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")
PUSH_KWARGS = ("repo_id", "private", "token", "commit_message", "create_pr")


class CTRLPipeline(DiffusionPipeline):
    """A diffusers pipeline with a label. Never instantiated itself: `from_pretrained` gives the subclass for the base."""

    _ctrl_base: type[DiffusionPipeline] | None = None
    _ctrl_roles: Roles  # of each subclass: how its guidance uses the denoiser, as found at its first guided call

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

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, pipeline_class: type[DiffusionPipeline] | None = None, **kwargs: Any
    ) -> CTRLPipeline:
        """The pipeline's components in a pipeline with a label, adapters included, without copying a weight.

        Args:
            pipeline: any diffusers pipeline, with or without adapters.
            pipeline_class: the diffusers class to become, `StableDiffusionImg2ImgPipeline` for instance; the pipeline's own if None.
            kwargs: passed to diffusers' `from_pipe`: other components. The dtype stays what it is, unless `dtype` says otherwise.
        """
        base = pipeline_class or cls._ctrl_base or type(pipeline)
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", denoiser_of(pipeline)[1].dtype)
        return super(CTRLPipeline, ctrl_pipeline_class(getattr(base, "_ctrl_base", base))).from_pipe(pipeline, **kwargs)

    @property
    def config(self) -> Any:
        """As of any pipeline. AutoPipelines read it first of all: only where they are in use they are told of this class, since importing
        them imports every pipeline there is, a second that nobody else should wait for."""
        if AUTO_PIPELINES in sys.modules:
            _tell_auto_pipelines(self._ctrl_base)
        return super().config

    @property
    def denoiser(self) -> torch.nn.Module:
        """The unet or the transformer."""
        return denoiser_of(self)[1]

    @property
    def _ctrl_hook(self) -> StrengthHook | None:
        return control_hook(self.denoiser)

    @property
    def _ctrl_controls(self) -> dict[str, Control]:
        return {} if self._ctrl_hook is None else self._ctrl_hook.controls

    @property
    def ctrl_adapters(self) -> dict[str, Adapter]:
        """The loaded adapters by name, in the order of loading: config, label encoder and classifier (the LoRA is in the denoiser)."""
        return {name: control.adapter for name, control in self._ctrl_controls.items()}

    @property
    def label_space(self) -> LabelSpace | None:
        """What labels the loaded adapters understand, all attributes together; None without an adapter."""
        return union_space(self._ctrl_controls) if self._ctrl_controls else None

    @property
    def classifier(self) -> Classifier | None:
        """The only adapter's calibrated classifier, where it brings one. With several adapters see `ctrl_adapters`."""
        adapters = list(self.ctrl_adapters.values())
        return adapters[0].classifier if len(adapters) == 1 else None

    def load_ctrl_adapter(self, adapter: str | os.PathLike | Adapter, adapter_name: str = "default", **hub_kwargs: Any) -> None:
        """Reads an adapter (folder, embedded name, Hub id, or in memory), checks it against this base, and puts it in.

        Several adapters with different attributes may be in at once, each under its own `adapter_name`.

        Raises:
            ValueError: if it cannot be read, does not match, or its name or an attribute of it is taken; the pipeline is then left as
                it was.
        """
        if adapter_name in self._ctrl_controls:
            raise ValueError(
                f"This pipeline already has a label adapter named {adapter_name!r}: give this one another adapter_name, or call "
                "unload_ctrl_adapter() first."
            )
        if not isinstance(adapter, Adapter):
            adapter = load_adapter(resolve_folder(adapter, **hub_kwargs))
        denoiser, site = self.denoiser, adapter.config.injection_site
        check_base(adapter.config, type(self).__name__.removeprefix("CTRL"), denoiser_of(self)[0], denoiser)
        for name, other in self.ctrl_adapters.items():
            if shared := [
                a for a in adapter.label_encoder.label_space.attributes if a in other.label_encoder.label_space.attributes
            ]:
                raise ValueError(
                    f"The attribute {shared[0]!r} already belongs to the loaded adapter {name!r}: call unload_ctrl_adapter({name!r}) first."
                )
        width = site_width(find_injection_site(denoiser, site)[1])
        if adapter.label_encoder.config.embedding_dim != width:
            raise ValueError(
                f"The adapter's label encoder has embedding_dim {adapter.label_encoder.config.embedding_dim}, but {site} is {width} wide."
            )
        head, channels = adapter.label_encoder.control_head, getattr(denoiser.config, "in_channels", None)
        if head is not None and channels is not None and channels < head.grid[0]:
            raise ValueError(
                f"The adapter's control head is for states of {head.grid[0]} channels; this denoiser's have {channels}."
            )
        add_control(denoiser, adapter_name, site, adapter.lora, replace(adapter, lora={}), head)

    def unload_ctrl_adapter(self, adapter_name: str | None = None) -> None:
        """Takes one adapter out, or all of them; without any, the denoiser is the base again, bit for bit.

        Raises:
            ValueError: if no adapter of this name is loaded.
        """
        for name in list(self._ctrl_controls) if adapter_name is None else [self._loaded_name(adapter_name)]:
            remove_control(self.denoiser, name)

    def save_ctrl_adapter(self, folder: str | os.PathLike, adapter_name: str | None = None) -> Path:
        """Writes a loaded adapter into a folder that `from_pretrained` and `load_ctrl_adapter` read.

        Args:
            adapter_name: which one, where there are several.
        """
        return save_adapter(folder, self._collect(adapter_name))

    def push_ctrl_adapter_to_hub(self, repo_id: str, *, adapter_name: str | None = None, **kwargs: Any) -> str:
        """Uploads the adapter with its model card to the Hub as one commit, creating the repository if need be; returns the commit's URL.

        Args:
            adapter_name: which one, where there are several.
            kwargs: `base`, `base_revision`, `token`, `private`, `revision`, `subfolder`, `create_pr`, `commit_message`: see
                `sharing.push_adapter`.

        Raises:
            ValueError: if the adapter's base is a folder of this machine, or the upload fails; with what to do.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_ctrl_adapter(Path(temporary) / "adapter", adapter_name)
            save_card(folder, read_config(folder))
            return push_adapter(folder, repo_id, **kwargs)

    def export_label(
        self,
        label: Label,
        folder: str | os.PathLike,
        *,
        gamma: float | None = None,
        label_scale: float = 1.0,
        adapter_name: str | None = None,
    ) -> Path:
        """Writes an ordinary pipeline folder that draws this one label, for people without this package: see `export.bake_label`, also
        for what it does under classifier-free guidance, and `label_scale`. Its scheduler is the adapter's: see `export.plain_scheduler`.

        Raises:
            ValueError: for an unknown label, a time embedding into which no label can be baked, or a LoRA that is no label adapter's;
                nothing is written then.
        """
        adapter = self._collect(adapter_name)
        check_exportable(adapter)
        self._check_no_other_lora()
        name, denoiser = denoiser_of(self)
        with self._without_adapters():
            plain = copy.deepcopy(denoiser)
        scheduler = plain_scheduler(self, adapter)
        baked = self._ctrl_base.from_pipe(self, **{name: plain}, scheduler=scheduler, dtype=plain.dtype)
        bake_label(baked, adapter, label, gamma, label_scale)
        baked.save_pretrained(folder)
        return Path(folder)

    def export_lora(
        self,
        file: str | os.PathLike,
        label: Label | None = None,
        *,
        gamma: float | None = None,
        label_scale: float = 1.0,
        naming: str | None = None,
        call: dict[str, Any] | None = None,
        adapter_name: str | None = None,
    ) -> Path:
        """Writes an ordinary LoRA file, for diffusers without this package and for other user interfaces: with one label in it, see
        `export.label_lora`; without a label the adapter's LoRA alone, which then draws no label in particular.

        Args:
            naming: of the keys, "kohya" or "diffusers": see `export.write_lora`. call: see `export.label_lora`.

        Raises:
            ValueError: for an unknown label or naming, or a time embedding into which no label can be put; nothing is written then.
        """
        adapter = self._collect(adapter_name)
        if label is None:
            check_has_lora(adapter)
            return write_lora(file, adapter.lora, adapter.config.denoiser, naming)
        check_exportable(adapter)
        with self._without_adapters():
            plain = self._ctrl_base.from_pipe(self, dtype=self.denoiser.dtype)
            lora, errors = label_lora(plain, adapter, label, gamma, label_scale, call)
        return write_lora(file, lora, adapter.config.denoiser, naming, label=label, label_scale=label_scale, **errors)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """The base's own, for the user's own LoRA: the label adapters stay (it would take all LoRA out)."""
        with self._without_adapters():
            super().unload_lora_weights(*args, **kwargs)

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Within the block the denoiser is the plain base."""
        loaded = {name: self._collect(name) for name in self._ctrl_controls}
        self.unload_ctrl_adapter()
        try:
            yield
        finally:
            for name, adapter in loaded.items():
                self.load_ctrl_adapter(adapter, name)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the base as an ordinary diffusers folder (plain `DiffusionPipeline` loads it) with the adapter beside it.

        Args:
            push_to_hub: upload the folder then. With `repo_id` (by default the folder's name), `private`, `token`, `commit_message` and
                `create_pr`, as for any pipeline.
            kwargs: passed to the base class's `save_pretrained` (`variant`, `max_shard_size`, …).

        Raises:
            ValueError: with several adapters, of which a folder holds one: save those with `save_ctrl_adapter`; or with a LoRA that is
                no label adapter's. Nothing is written then. Also if the upload fails; with what to do.
        """
        self._check_no_other_lora()
        upload = {key: kwargs.pop(key) for key in PUSH_KWARGS if push_to_hub and key in kwargs}
        # the base class's own upload would come before the class's name is right and the adapter is there
        self._save_folder(Path(save_directory), **kwargs)
        if push_to_hub:
            push_pipeline(self, Path(save_directory), **upload)

    def _save_folder(self, folder: Path, **kwargs: Any) -> None:
        if not self._ctrl_controls:
            super().save_pretrained(folder, **kwargs)
            _restore_class_name(folder)
            return
        if len(self._ctrl_controls) > 1:
            raise ValueError(
                f"This pipeline has the adapters {list(self._ctrl_controls)}, and a pipeline's folder has place for one: save each "
                "with save_ctrl_adapter(folder, adapter_name)."
            )
        adapter = self._collect(None)
        # a LoRA in place would be written into the denoiser's keys, which nothing could load
        with self._without_adapters():
            super().save_pretrained(folder, **kwargs)
            _restore_class_name(folder)
        save_adapter(folder, adapter)

    def _check_no_other_lora(self) -> None:
        """Raises ValueError where a component has LoRA layers of the user's own: under their keys nothing would find its weights."""
        if self._ctrl_controls:
            check_lora(self.denoiser)  # what that finds is the matter then, and its layers may be all there is
        for name, component in self.components.items():
            if isinstance(component, torch.nn.Module) and other_lora(component, self._ctrl_controls):
                raise ValueError(
                    f"The {name} has a LoRA that is no label adapter's, and an ordinary pipeline folder has no place for one: call "
                    "unload_lora_weights() to leave it out, or first fuse_lora() and then unload_lora_weights() to keep it in the weights."
                )

    def _loaded_name(self, adapter_name: str | None) -> str:
        names = list(self._ctrl_controls)
        if not names:
            raise ValueError("This pipeline has no label adapter: load or train one first.")
        if adapter_name is None and len(names) == 1:
            return names[0]
        if adapter_name not in names:
            raise ValueError(f"adapter_name must be one of the loaded adapters {names}, got {adapter_name!r}.")
        return adapter_name

    def _collect(self, adapter_name: str | None) -> Adapter:
        name = self._loaded_name(adapter_name)
        check_lora(self.denoiser)
        adapter = self.ctrl_adapters[name]
        return collect_adapter(adapter.config, self.denoiser, adapter.label_encoder, adapter.classifier, name)

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        label: Label | list[Label] = None,
        gamma: float | None = None,
        strength: Strength | None = None,
        label_strength: Strength | None = None,
        num_particles: int = 1,
        particle_batch_size: int = 64,
        **kwargs: Any,
    ) -> Any:
        """The base's call, plus:

        Args:
            label: a name, an index, a dict {attribute: value}, a list of these (one a prompt), or None for the base, bit for bit;
                None in a list is the base for that prompt.
            gamma: exponent of p̂(y | x); only for adapters trained with a range of gamma.
            strength: 0 = base, 1 = tuned (the default), in between or beyond by interpolation of the two outputs (two forwards then).
            label_strength: the same under a name that no base has. Image-to-image pipelines have a `strength` of their own (how much
                of the image is drawn anew), which stays theirs: with them this is the only name.
            num_particles: with n > 1, exact sampling: each image is drawn from n trajectories of the tuned model by their importance
                weights, which tends to p(x | c) p̂(y | x)^gamma as n grows, whatever the training left over. The output then has
                `log_weights` (images, n) in nats and `ess` (images,), the effective sample size out of n.
            particle_batch_size: trajectories at a time, at most, so that they fit in memory (but at least one for each image).
            prompt: optional; the empty prompt if a text pipeline gets none.

        With a label, settings that are not given (num_inference_steps, guidance_scale, eta) are those the adapter was trained
        with; without, they are the base's own.

        With several adapters, `label` is a dict of their attributes, and an adapter whose attributes it leaves out does not act. The
        denoiser's output is base + Σ strength_i · (tuned_i − base), for one forward of the base and one an adapter; `strength` may be
        a dict {adapter name or attribute: number}, with one number an adapter. Settings are those of the acting adapter that was
        loaded first. gamma goes to the adapters that take one; the others keep theirs. Exact sampling then tends to
        p(x | c) Π p̂_i(y_i | x)^gamma_i.

        Raises:
            ValueError: for an unknown label, a wrong number of labels, a label without an adapter, a gamma that has no effect, or a
                gamma or strength without a label; where diffusers has taken an adapter's LoRA out, or fused it; for num_particles
                without a classifier in the adapter, without noise in the sampler, or with given latents.
        """
        parameters = inspect.signature(super().__call__).parameters
        if "strength" in parameters:
            kwargs |= {} if strength is None else {"strength": strength}
        elif strength is not None:
            if label_strength is not None:
                raise ValueError("strength and label_strength are the same here: give one of them.")
            label_strength = strength
        if num_particles < 1 or particle_batch_size < 1:
            raise ValueError(
                f"num_particles and particle_batch_size must be at least 1, got {num_particles}, {particle_batch_size}."
            )
        if label is None:
            if num_particles > 1:
                raise ValueError("num_particles weighs samples by how well they fit a label: pass label= as well.")
            named = "strength" if strength is not None and "strength" not in parameters else "label_strength"
            for name, value in (("gamma", gamma), (named, label_strength)):
                if value is not None:
                    raise ValueError(
                        f"{name} = {value} is of a label, and no label was given: pass label= as well, or leave {name} out."
                    )
            return super().__call__(*args, **kwargs)
        if not self._ctrl_controls:
            raise ValueError(
                "label= was given, but this pipeline has no label adapter: load one with load_ctrl_adapter(), or pass "
                "label=None for the base."
            )
        given = dict(inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments)
        for name, parameter in parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return self._call_labelled(
            super().__call__, parameters, given, label, gamma, label_strength, num_particles, particle_batch_size
        )

    def _call_labelled(self, call, parameters, given, label, gamma, strength, num_particles, particle_batch_size) -> Any:
        """`call`, the base's own with the arguments `given`, under a label."""
        controls = list(self._ctrl_controls.values())
        _, prompts, repeats = complete(given, parameters, label, controls[0].adapter.config.sampler)
        found = requests(self._ctrl_controls, label, prompts, gamma, 1.0 if strength is None else strength)
        settings = sampler_settings([request.control for request in found] or controls[:1], given)
        kwargs, _, _ = complete(given, parameters, label, settings)
        found = [request.repeated(repeats) for request in found]
        own_scheduler = self.scheduler
        self.scheduler = labelled_scheduler(own_scheduler, settings)
        if found:
            check_scheduler(self.scheduler, found[0].control)
        try:
            options = transition_options(self.scheduler, kwargs, settings)
            if num_particles == 1:
                return sample(self, call, kwargs, found, prompts * repeats, options)
            return sample_particles(
                self, call, kwargs, found, prompts * repeats, repeats, options, num_particles, particle_batch_size
            )
        finally:
            self.scheduler = own_scheduler


@cache
def _tell_auto_pipelines(base: type[DiffusionPipeline]) -> None:
    """Tells diffusers' AutoPipelines of a CTRL pipeline and of its relatives for other tasks, so that `AutoPipelineForImage2Image.from_pipe`
    turns a text-to-image pipeline with adapters into an image-to-image pipeline with the same adapters."""
    from diffusers.pipelines.auto_pipeline import SUPPORTED_TASKS_MAPPINGS as TASKS

    families = {name for task in TASKS for name, cls in task.items() if cls is base}
    for task in TASKS:
        task.update({f"ctrl-{name}": ctrl_pipeline_class(task[name]) for name in families if name in task})


@cache
def ctrl_pipeline_class(base: type[DiffusionPipeline]) -> type[CTRLPipeline]:
    """`CTRL` + the base's name: CTRLPipeline before the base, whose `__init__` it keeps."""
    doc = f"{base.__name__} with a label: see CTRLPipeline."
    namespace = {"__module__": __name__, "__doc__": doc, "_ctrl_base": base, "_ctrl_roles": {}}
    return type("CTRL" + base.__name__, (CTRLPipeline, base), namespace)


def _restore_class_name(folder: Path) -> None:
    """model_index.json names the base's class, so that plain diffusers loads the folder."""
    import json

    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"] = index["_class_name"].removeprefix("CTRL")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(temporary, path)
