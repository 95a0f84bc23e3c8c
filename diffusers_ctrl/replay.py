"""Watching a pipeline at work: its own `__call__`, with the denoiser, the scheduler's step and the autoencoder looked at.

What a pipeline gives its denoiser, and what it makes of the answer, is written in its `__call__` and nowhere else. So it is run, with
stand-ins where the real networks would cost something, and what passes between the parts is kept.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .bases import autoencoder_of, denoiser_of


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: what it was given, and its answer (a tensor, a tuple, or an object with `sample`)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Step:
    """One step of the scheduler, and the calls of the denoiser before it.

    t, state, model_output: what `scheduler.step` was given. model_input: the state as `scheduler.scale_model_input` scales it.
    """

    calls: tuple[Call, ...]
    t: Any
    state: torch.Tensor
    model_input: torch.Tensor
    model_output: torch.Tensor


@dataclass(frozen=True)
class Decode:
    """The call of the autoencoder's `decode`: its input (B, C, *), its other arguments, and the dtype it then had."""

    latents: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype


@dataclass(frozen=True)
class Replay:
    """What a watched call did.

    grid: the arguments of `set_timesteps`. start_std: of the states that it calls for. images: (B, C, H, W), None where the call was
    stopped before.
    """

    steps: tuple[Step, ...]
    grid: dict[str, Any]
    start_std: float
    decode: Decode | None
    images: torch.Tensor | None


class _EnoughError(Exception):
    """Ends a call from inside, when all that is wanted was seen."""


def first(output: Any) -> torch.Tensor:
    """The tensor of a denoiser's or an autoencoder's answer."""
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """`output`, such an answer in any of its forms, with `tensor` in that place."""
    if isinstance(output, torch.Tensor):
        return tensor
    return (tensor, *output[1:]) if isinstance(output, tuple) else type(output)(sample=tensor)


def stand_in(step: Step, seed: int = 0) -> Callable[[int, int], Any]:
    """A denoiser that answers with random numbers, of the shapes and types that the real one gave in `step`.

    The function takes the number of the call within its step, and the batch size of the call.
    """
    generator = torch.Generator().manual_seed(seed)

    def answer(number: int, size: int) -> Any:
        known = step.calls[number % len(step.calls)].output
        like = first(known)
        noise = torch.randn(size, *like.shape[1:], generator=generator).to(like)
        return with_first(known, noise)

    return answer


@torch.no_grad()
def replay(
    pipe: DiffusionPipeline,
    arguments: dict[str, Any],
    *,
    answer: Callable[[int, int], Any] | None = None,
    max_steps: int | None = None,
    final: torch.Tensor | None = None,
    decodes: bool = False,
) -> Replay:
    """Runs `pipe(**arguments)` and watches it. The pipeline is left as it was, whatever happens.

    Args:
        answer: stands in for the denoiser, see `stand_in`; the real one by default.
        max_steps: the call is stopped after so many steps; else it goes on to the autoencoder.
        final: (n, *) for n samples; put in the place of every step's result, so that this is what the pipeline decodes.
        decodes: whether to let the autoencoder run, and so to get images.
    """
    denoiser, autoencoder, scheduler = denoiser_of(pipe)[1], autoencoder_of(pipe), pipe.scheduler
    forward, steps, calls, decoded, grid = denoiser.forward, [], [], [], {}
    names = [name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"]
    watched = copy.deepcopy(scheduler)

    def watching_forward(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs[names[0]]
        output = forward(*args, **kwargs) if answer is None else answer(len(calls), len(sample))
        calls.append(Call(args, kwargs, output))
        return output

    own_step, own_set_timesteps = watched.step, watched.set_timesteps

    @functools.wraps(own_step)
    def watching_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scaled = watched.scale_model_input(sample, timestep) if hasattr(watched, "scale_model_input") else sample
        steps.append(Step(tuple(calls), timestep, sample, scaled, model_output))
        calls.clear()
        if len(steps) == max_steps:
            raise _EnoughError
        result = own_step(model_output, timestep, sample, *args, **kwargs)
        if final is not None:
            following = torch.cat([final] * (len(sample) // len(final)))
            if isinstance(result, tuple):
                return (following, *result[1:])
            result.prev_sample = following
        return result

    @functools.wraps(own_set_timesteps)
    def watching_set_timesteps(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own_set_timesteps).bind(*args, **kwargs).arguments
        grid.update({name: value for name, value in given.items() if name != "device" and value is not None})
        return own_set_timesteps(*args, **kwargs)

    def watching_decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(Decode(latents, args, kwargs, autoencoder.dtype))
        if not decodes:
            raise _EnoughError
        return type(autoencoder).decode(autoencoder, latents, *args, **kwargs)

    watched.step, watched.set_timesteps = watching_step, watching_set_timesteps
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    # both change finished images by rules of their own, which no reward is to learn
    aside = {name: getattr(pipe, name) for name in ("safety_checker", "watermark") if getattr(pipe, name, None) is not None}
    own_forward = vars(denoiser).get("forward")
    dtype = None if autoencoder is None else autoencoder.dtype
    images = None
    fork = torch.random.fork_rng([] if denoiser.device.type == "cpu" else [denoiser.device], device_type=denoiser.device.type)
    try:
        denoiser.forward, pipe.scheduler = watching_forward, watched
        for name in aside:
            setattr(pipe, name, None)
        if autoencoder is not None:
            autoencoder.decode = watching_decode
        pipe.set_progress_bar_config(**quiet | {"disable": True})
        with fork:
            images = pipe(**arguments, output_type="pt")[0]
        images = torch.as_tensor(images) if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)
    except _EnoughError:
        pipe.maybe_free_model_hooks()
    finally:
        del denoiser.forward
        if own_forward is not None:
            denoiser.forward = own_forward
        pipe.scheduler = scheduler
        for name, value in aside.items():
            setattr(pipe, name, value)
        if autoencoder is not None:
            del autoencoder.decode
            if autoencoder.dtype != dtype:  # some pipelines widen it for the time of decoding
                autoencoder.to(dtype)
        pipe.set_progress_bar_config(**quiet)
    start_std = float(getattr(watched, "init_noise_sigma", 1.0))
    return Replay(tuple(steps), grid, start_std, decoded[0] if decoded else None, images)
