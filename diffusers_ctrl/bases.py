"""What is asked of any diffusers pipeline: its denoiser, its autoencoder, and how it is told to draw a sample for each prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline


def denoiser_of(pipe: DiffusionPipeline) -> tuple[str, torch.nn.Module]:
    """("unet" or "transformer", the module). Raises ValueError for a pipeline with neither."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name, getattr(pipe, name)
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to control.")


def autoencoder_of(pipe: DiffusionPipeline) -> torch.nn.Module | None:
    """The component that encodes and decodes images; None for a pipeline whose states are images."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module) and hasattr(component, "encode") and hasattr(component, "decode"):
            return component
    return None


def call_parameters(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    """The parameters of the pipeline's own `__call__`, below whatever subclass passes arguments on to it."""
    for cls in type(pipe).__mro__:
        if "__call__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__call__"]).parameters
            if "num_inference_steps" in parameters:
                return {name: parameter for name, parameter in parameters.items() if name != "self"}
    raise ValueError(f"{type(pipe).__name__} has no __call__ with num_inference_steps.")


def row_arguments(pipe: DiffusionPipeline, prompts: Sequence[str | int]) -> dict[str, Any]:
    """The arguments with which the pipeline draws one sample for each of `prompts`.

    Args:
        prompts: texts; class names or numbers for a pipeline that takes `class_labels`; only their number counts for an
            unconditional pipeline.

    Raises:
        ValueError: for a pipeline that takes none of these, or a class that it does not know.
    """
    parameters = call_parameters(pipe)
    if "prompt" in parameters:
        return {"prompt": [str(prompt) for prompt in prompts]}
    if "class_labels" in parameters:
        names = getattr(pipe, "labels", None) or {}
        unknown = [prompt for prompt in prompts if not str(prompt).isdigit() and prompt not in names]
        if unknown:
            raise ValueError(f"{type(pipe).__name__} takes classes, by number or by name; it does not know {unknown[0]!r}.")
        return {"class_labels": [int(prompt) if str(prompt).isdigit() else names[prompt] for prompt in prompts]}
    if "batch_size" in parameters:
        return {"batch_size": len(prompts)}
    raise ValueError(f"{type(pipe).__name__} takes neither prompt nor class_labels nor batch_size, so no sample can be asked for.")


RESERVED = ("prompt", "class_labels", "batch_size", "num_inference_steps", "guidance_scale", "latents", "generator", "output_type")


def call_arguments(
    pipe: DiffusionPipeline,
    prompts: Sequence[str | int],
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All arguments of a watched call. `extra`: more of the pipeline's own (height, negative_prompt, …).

    Raises:
        ValueError: for an argument that the pipeline does not take, or that is fixed here.
    """
    parameters, extra = call_parameters(pipe), dict(extra or {})
    for name in extra:
        if name not in parameters or name in RESERVED:
            raise ValueError(
                f"{type(pipe).__name__} cannot be given {name!r} here; it takes {sorted(set(parameters) - set(RESERVED))}."
            )
    for name, value in extra.items():
        if name.startswith("negative_prompt") and isinstance(value, str):
            extra[name] = [value] * len(prompts)
    arguments = {**row_arguments(pipe, prompts), "num_inference_steps": num_inference_steps, **extra}
    if "guidance_scale" in parameters:
        arguments["guidance_scale"] = guidance_scale
    elif guidance_scale != 1.0:
        raise ValueError(f"{type(pipe).__name__} takes no guidance_scale, so it cannot be {guidance_scale}.")
    if "generator" in parameters:
        arguments["generator"] = torch.Generator().manual_seed(0)
    return arguments
