"""How a pipeline's finished states become images: unpacking, scaling and decoding, learned from the pipeline's own call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .bases import autoencoder_of, call_arguments, call_parameters
from .replay import Decode, first, replay, stand_in


@dataclass(frozen=True)
class Decoder:
    """Called with states (B, *shape), gives images (B, 3, H, W) in [0, 1], as the pipeline would return them; differentiable.

    shape: of a state, without the batch. image_shape: (3, H, W). autoencoder: None where states are images. unpack: a state to the
    autoencoder's latent, in order and in scale. call: the other arguments of the autoencoder's `decode`.
    """

    shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    autoencoder: torch.nn.Module | None
    unpack: Callable[[torch.Tensor], torch.Tensor]
    call: tuple[tuple[Any, ...], dict[str, Any]]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return self.images(self.unpack(states))

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of the autoencoder's own latents, (B, C, H, W)."""
        if self.autoencoder is not None:
            args, kwargs = self.call
            latents = first(self.autoencoder.decode(latents.to(self.autoencoder.dtype), *args, **kwargs))
        return (latents / 2 + 0.5).clamp(0, 1)


def decoder(pipe: DiffusionPipeline, **call: Any) -> Decoder:
    """The decoder of the states that `pipe(**call)` samples: by default those of its native size.

    The pipeline's call is run with a stand-in for its denoiser and chosen final states, and what reaches the autoencoder shows how it
    reorders, scales and shifts them. Its images of random states are then compared with the decoder's.

    Raises:
        ValueError: if the pipeline makes something else of its states, or finishes its images in another way.
    """
    name = type(pipe).__name__.removeprefix("CTRL")
    # two steps, whatever the scheduler: all that matters is the last state, which is put in its place
    arguments = call_arguments(pipe, ["0"] if "class_labels" in call_parameters(pipe) else [""], 2, 1.0, call)
    step = replay(pipe, arguments, max_steps=1).steps[0]
    answer, like = stand_in(step), step.state[:1]

    def seen(state: torch.Tensor) -> Decode:
        return replay(pipe, arguments, answer=answer, final=state).decode

    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(like.shape, generator=generator).to(like)
    autoencoder, unpack, rest = autoencoder_of(pipe), lambda states: states, ((), {})
    if autoencoder is not None:
        found = seen(probe)
        unpack = _unpacking(name, lambda state: seen(state).latents, probe, found.latents, autoencoder.config)
        rest = found.args, {key: value for key, value in found.kwargs.items() if key != "generator"}
        if found.dtype != autoencoder.dtype:  # the pipeline widens it for the time of decoding
            autoencoder = copy.deepcopy(autoencoder).to(found.dtype)
    decode = Decoder(tuple(like.shape[1:]), (), autoencoder, unpack, rest)
    with torch.no_grad():
        images, expected = decode(probe), replay(pipe, arguments, answer=answer, final=probe, decodes=True).images
    tolerance = 16 * torch.finfo(like.dtype).eps
    if images.shape != expected.shape or not (images.double() - expected.double()).abs().mean() <= tolerance:
        raise ValueError(
            f"{name} finishes its images in a way of its own: its decoder gives {tuple(images.shape)}, the pipeline itself "
            f"{tuple(expected.shape)}, or other values."
        )
    return Decoder(decode.shape, tuple(images.shape[1:]), autoencoder, unpack, rest)


def _unpacking(
    name: str, see: Callable[[torch.Tensor], torch.Tensor], probe: torch.Tensor, latents: torch.Tensor, config: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map from states to the autoencoder's latents: a reordering, a scale and a shift, from what the pipeline makes of states
    that are all zero, all one, and numbered.
    """
    if probe.numel() != latents.numel():
        raise ValueError(f"{name} decodes latents of shape {tuple(latents.shape)} from states of shape {tuple(probe.shape)}.")
    shape, dtype = latents.shape[1:], latents.dtype
    shift = see(torch.zeros_like(probe)).double()
    scale = see(torch.ones_like(probe)).double() - shift
    order, base = torch.zeros(latents.numel(), dtype=torch.long, device=probe.device), 32  # small enough for eight bits of mantissa
    numbers = torch.arange(probe.numel(), device=probe.device)
    for digit in range(math.ceil(math.log(max(probe.numel(), 2), base))):
        given = (numbers // base**digit % base).view_as(probe).to(probe)
        order += ((see(given).double() - shift) / scale).round().long().flatten() * base**digit
    if not torch.equal(order.sort().values, numbers):
        raise ValueError(f"{name} does more to its states before it decodes them than to reorder, scale and shift them.")
    ordered = torch.equal(order, numbers)

    def reordered(states: torch.Tensor) -> torch.Tensor:
        return states.reshape(len(states), *shape) if ordered else states.flatten(1)[:, order].view(len(states), *shape)

    for unpack in _scalings(reordered, scale, shift, dtype, config):
        if torch.equal(unpack(probe), latents):
            return unpack
    # no written-out constant gives the same bits: the measured ones, a number for each place where they differ
    a, b = scale.to(torch.float32)[0], shift.to(torch.float32)[0]

    def unpack(states: torch.Tensor) -> torch.Tensor:
        return (reordered(states).float() * a + b).to(dtype)

    if not (unpack(probe) - latents).abs().max() <= 8 * torch.finfo(dtype).eps * latents.abs().max():
        raise ValueError(f"{name} does more to its states before it decodes them than to reorder, scale and shift them.")
    return unpack


def _scalings(reordered: Callable, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype, config: Any) -> list[Callable]:
    """The ways in which pipelines write x / scaling_factor + shift_factor, each with its own rounding."""
    written = [value for value in dict(config).values() if isinstance(value, float)]

    def constant(value: float) -> float:
        """As the autoencoder's configuration has it, where it does."""
        close = [other for other in written if abs(other - value) <= 1e-2 * abs(value)]
        return min(close, key=lambda other: abs(other - value)) if close else value

    a, b = scale.flatten()[0].item(), shift.flatten()[0].item()
    if not (
        torch.allclose(scale, torch.full_like(scale, a), rtol=1e-2) and torch.allclose(shift, torch.full_like(shift, b), rtol=1e-2)
    ):
        return []
    divisor, offset = constant(1 / a), constant(b) if b else 0.0

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + offset if offset else x

    return [
        lambda states: add(reordered(states) / divisor).to(dtype),
        lambda states: add(reordered(states).to(dtype) / divisor),
        lambda states: add(1 / divisor * reordered(states)).to(dtype),
    ]


@torch.no_grad()
def round_trip(pipe: DiffusionPipeline, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] encoded and decoded by the pipeline's autoencoder: what its samples look like."""
    autoencoder = autoencoder_of(pipe)
    if autoencoder is None:
        return images
    done = []
    for chunk in images.split(batch_size):
        encoded = autoencoder.encode((chunk * 2 - 1).to(autoencoder.device, autoencoder.dtype))
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
        done.append((first(autoencoder.decode(latents)) / 2 + 0.5).clamp(0, 1).float().cpu())
    return torch.cat(done)
