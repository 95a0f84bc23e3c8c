"""One call of a pipeline with a label: whose adapters act and how strongly, with which settings, and the base's own call under them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from .bases import denoiser_of
from .calls import CallWatch, GuidanceFound
from .controls import Active, Control, check_lora, control_hook
from .labels import Label, LabelSpace
from .particles import ParticlePool, PathRecorder
from .transitions import is_supported, scheduler_class, supported_schedulers


Strength = float | Mapping[str, float]


@dataclass(frozen=True)
class Request:
    """What one adapter is to do in a call. labels: (n, A), its own columns. strength: one number, or (n,) where samples differ."""

    control: Control
    labels: torch.Tensor
    gamma: float
    strength: float | torch.Tensor

    def repeated(self, times: int) -> Request:
        """Each sample `times` times, side by side."""
        differs = isinstance(self.strength, torch.Tensor)
        strength = self.strength.repeat_interleave(times) if differs else self.strength
        return replace(self, labels=self.labels.repeat_interleave(times, dim=0), strength=strength)

    def active(self, device: torch.device) -> Active:
        encoder = self.control.adapter.label_encoder.to(device)
        return Active(self.control, encoder(self.labels, self.gamma), self.strength)


def union_space(controls: Mapping[str, Control]) -> LabelSpace:
    """The attributes of all adapters, in the order in which they were loaded."""
    return LabelSpace({name: a for c in controls.values() for name, a in c.adapter.label_encoder.label_space.attributes.items()})


def requests(
    controls: Mapping[str, Control], label: Label | Sequence[Label], prompts: int, gamma: float | None, strength: Strength
) -> list[Request]:
    """Labels for `prompts` prompts -> what each adapter does.

    An adapter acts on the samples whose label names one of its attributes; a sample on which none acts is the base's. Of several
    adapters, one of strength 0 has no part in the call.

    Raises:
        ValueError: for labels that the adapters do not know, a strength for an adapter that is not there, two strengths for one adapter, or
            a gamma that none takes.
    """
    labels, strengths, found, column = union_space(controls).encode(label, prompts), _strengths(controls, strength), [], 0
    for name, control in controls.items():
        own = labels[:, column : column + len(control.adapter.label_encoder.label_space)]
        column += own.shape[1]
        given = ~own.isnan().all(dim=1)
        if given.any() and (len(controls) == 1 or strengths[name] != 0.0):
            weight = strengths[name] if given.all() else strengths[name] * given.float()
            found.append(Request(control, own, control.adapter.config.gamma, weight))
    if gamma is None:
        return found
    takes = [request for request in found if request.control.adapter.config.gamma_range is not None]
    if found and not takes:
        trained = ", ".join(str(request.gamma) for request in found)
        raise ValueError(
            f"This adapter was trained for gamma = {trained} only and cannot take another: use strength= to weaken or strengthen "
            "the label."
        )
    return [replace(request, gamma=_gamma(request.control, gamma)) if request in takes else request for request in found]


def _strengths(controls: Mapping[str, Control], strength: Strength) -> dict[str, float]:
    if not isinstance(strength, Mapping):
        return dict.fromkeys(controls, float(strength))
    owners = {attribute: name for name, c in controls.items() for attribute in c.adapter.label_encoder.label_space.attributes}
    owners |= {name: name for name in controls}
    if unknown := [key for key in strength if key not in owners]:
        raise ValueError(
            f"strength names {unknown[0]!r}, which is neither a loaded adapter nor its attribute: use {sorted(owners)}."
        )
    found: dict[str, float] = {}
    for key, value in strength.items():
        if found.setdefault(owners[key], float(value)) != float(value):
            keys = [other for other in strength if owners[other] == owners[key]]
            raise ValueError(
                f"strength has different numbers for {', '.join(map(repr, keys))}, which are of one adapter, {owners[key]!r}: it has one strength "
                "for all its attributes."
            )
    return dict.fromkeys(controls, 1.0) | found


def _gamma(control: Control, gamma: float) -> float:
    low, high = control.adapter.config.gamma_range
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}; this adapter was trained from {low} to {high}.")
    if not low <= gamma <= high:
        warnings.warn(f"gamma = {gamma} lies outside the trained range {low} to {high}.", stacklevel=5)
    return gamma


def sampler_settings(controls: Sequence[Control], given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler of the first adapter's training; a warning where another acts that was trained with a different one."""
    first = controls[0].adapter.config.sampler
    for control in controls[1:]:
        other = control.adapter.config.sampler
        differing = [key for key in first if first[key] != other.get(key) and given.get(key) is None]
        if differing:
            warnings.warn(
                f"The adapters {controls[0].name!r} and {control.name!r} were trained with different samplers ({', '.join(differing)}): "
                f"this call uses that of {controls[0].name!r}, which was loaded first.",
                stacklevel=4,
            )
    return first


def complete(given: dict[str, Any], parameters: Mapping[str, Any], label: Any, sampler: dict[str, Any]) -> tuple[dict, int, int]:
    """The call's arguments with the sampler's settings filled in; how many prompts there are, and how many images of each."""
    settings = {"num_inference_steps": sampler["num_inference_steps"], "guidance_scale": sampler["guidance_scale"]}
    settings |= sampler["options"]
    kwargs = given | {k: v for k, v in settings.items() if k in parameters and given.get(k) is None}
    one_each = isinstance(label, (list, tuple))
    if "batch_size" in parameters:  # an unconditional pipeline
        rows = given.get("batch_size") or (len(label) if one_each else 1)
        return kwargs | {"batch_size": rows}, rows, 1
    for name in ("prompt_embeds", "prompt", "class_labels"):
        if given.get(name) is not None:
            rows = 1 if isinstance(given[name], str) else len(given[name])
            break
    else:
        rows = len(label) if one_each else 1
        if "prompt" in parameters:
            kwargs = kwargs | {"prompt": [""] * rows if one_each else ""}
    return kwargs, rows, given.get("num_images_per_prompt") or 1


def trained_scheduler(scheduler: Any, sampler: dict[str, Any]) -> Any:
    """The scheduler that the adapter was trained with; the pipeline's, where it is of no known class."""
    if sampler["scheduler"] not in supported_schedulers():
        return scheduler
    return scheduler_class(sampler["scheduler"]).from_config(sampler["scheduler_config"])


def labelled_scheduler(scheduler: Any, sampler: dict[str, Any]) -> Any:
    """The pipeline's scheduler, or, where that has no Gaussian step, the one that the adapter was trained with."""
    return scheduler if is_supported(scheduler) else trained_scheduler(scheduler, sampler)


def check_scheduler(scheduler: Any, control: Control) -> None:
    """Warns where labels are drawn with a scheduler of another class than the adapter was trained with: the law is another then."""
    own, trained = type(scheduler).__name__, control.adapter.config.sampler["scheduler"]
    if own != trained and trained in supported_schedulers():
        warnings.warn(
            f"This pipeline has {own}, and the adapter {control.name!r} was trained and measured with {trained}: its labels are drawn from another law. For "
            f"the adapter's: `pipe.scheduler = {trained}.from_config(pipe.ctrl_adapters[{control.name!r}].config.sampler['scheduler_config'])`.",
            stacklevel=5,
        )


def transition_options(scheduler: Any, arguments: Mapping[str, Any], sampler: dict[str, Any]) -> dict[str, Any]:
    """Options of the scheduler's transition in a call with these arguments."""
    takes = inspect.signature(scheduler.step).parameters
    options = {k: arguments.get(k, v) for k, v in sampler["options"].items() if k in takes}
    if "eta" in takes and "eta" not in options:  # an adapter of another scheduler: eta is the call's
        options["eta"] = arguments.get("eta", 0.0)
    return options


def sample(
    pipe: DiffusionPipeline, call: Callable, kwargs: dict, found: Sequence[Request], samples: int, options: dict[str, Any]
) -> Any:
    """`call`, the base's own, with these labels on the denoiser's hooks."""
    denoiser, roles = denoiser_of(pipe)[1], dict(pipe._ctrl_roles)
    check_lora(denoiser)
    hook = control_hook(denoiser)
    active = tuple(request.active(pipe._execution_device) for request in found)
    while True:
        restore = _random_states(kwargs.get("generator"))
        with CallWatch(pipe.scheduler, samples, options, roles) as watch:
            hook.begin(active, watch)
            try:
                output = call(**kwargs)
            except GuidanceFound:
                pipe.maybe_free_model_hooks()  # as the call itself does at its end
                restore()
                continue
            finally:
                hook.end()
        if roles.get((0, 1), (True,)) == (True,):  # a first call without the condition has that meaning only if a second follows
            pipe._ctrl_roles.update(roles)
        return output


def _random_states(generator: torch.Generator | list[torch.Generator] | None) -> Callable[[], None]:
    """A function that puts torch's random state, and the call's generators, back to where they are now."""
    generators = {id(g): g for g in (generator if isinstance(generator, (list, tuple)) else [generator]) if g is not None}
    states = [(g, g.get_state()) for g in generators.values()]
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for g, state in states:
            g.set_state(state)

    return restore


def sample_particles(
    pipe: DiffusionPipeline,
    call: Callable,
    kwargs: dict,
    found: Sequence[Request],
    images: int,
    repeats: int,
    options: dict[str, Any],
    count: int,
    batch_size: int,
) -> Any:
    """Exact sampling: `count` trajectories of each of the `images` images, weighed by all the adapters' classifiers, one drawn."""
    if not found:
        raise ValueError("num_particles weighs samples by how well they fit a label: the label names no attribute.")
    if [request for request in found if request.control.adapter.classifier is None]:
        raise ValueError(
            "num_particles needs the adapter's classifier, and this adapter brings none: its folder has no classifier/."
        )
    if kwargs.get("latents") is not None:
        raise ValueError("num_particles cannot be combined with latents: the trajectories need starts of their own.")
    if given := [name for name in ("timesteps", "sigmas") if kwargs.get(name) is not None]:
        raise ValueError(f"num_particles cannot be combined with {given[0]}: the adapter's number of steps fixes the grid.")
    if kwargs.get("image") is not None:
        raise ValueError("num_particles cannot be combined with an image to start from: the weights are for whole trajectories.")
    if kwargs.get("guidance_rescale"):
        raise ValueError("num_particles cannot be combined with guidance_rescale: the weights know plain guidance only.")
    if kwargs.get("output_type") == "latent":
        raise ValueError("num_particles weighs finished images: output_type must not be 'latent'.")
    generator, hook, own = kwargs.get("generator"), control_hook(denoiser_of(pipe)[1]), pipe.scheduler
    pool = ParticlePool(images, generator)
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    bar = pipe.progress_bar(total=images * count)
    try:
        pipe.set_progress_bar_config(**quiet | {"disable": True})
        with PathRecorder(hook, options, kwargs.get("guidance_scale")) as recorder:
            pipe.scheduler = recorder.watched(own)
            while pool.count < count:
                share = min(max(1, batch_size // images), count - pool.count)
                arguments = dict(kwargs, return_dict=True, output_type="pt")
                if "batch_size" in kwargs:
                    arguments["batch_size"] = images * share
                elif "class_labels" in kwargs:
                    arguments["class_labels"] = [given for given in kwargs["class_labels"] for _ in range(share)]
                else:
                    arguments["num_images_per_prompt"] = repeats * share
                if isinstance(generator, list):
                    arguments["generator"] = [g for g in generator for _ in range(share)]
                recorder.reset()
                rows = [request.repeated(share) for request in found]
                output = sample(pipe, call, arguments, rows, images * share, options)
                drawn = torch.as_tensor(output.images)
                if isinstance(output.images, np.ndarray):  # a pipeline that does not know output_type="pt"
                    drawn = drawn.permute(0, 3, 1, 2)
                fit = sum(
                    r.gamma * r.control.adapter.classifier.to(drawn.device).log_prob(drawn, r.labels).double().cpu() for r in rows
                )
                pool.add(drawn.cpu(), fit - recorder.log_ratio.cpu(), output)
                bar.update(images * share)
    finally:
        bar.close()
        pipe.scheduler = own
        pipe.set_progress_bar_config(**quiet)
    return pool.output(kwargs.get("output_type", "pil"), kwargs.get("return_dict", True), pipe.numpy_to_pil)
