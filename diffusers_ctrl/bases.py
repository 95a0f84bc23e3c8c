"""What training and evaluation need to know of a diffusers pipeline: its denoiser, its states' shape, how states become images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline


def denoiser_of(pipe: DiffusionPipeline) -> tuple[str, torch.nn.Module]:
    """("unet" or "transformer", the module). Raises ValueError for a pipeline with neither."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name, getattr(pipe, name)
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to control.")


def latent_shape(pipe: DiffusionPipeline) -> tuple[int, int, int]:
    """(C, H, W) of the states that the pipeline's denoiser works on at its native size."""
    config = denoiser_of(pipe)[1].config
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
    device = denoiser_of(pipe)[1].device
    embeds, _ = pipe.encode_prompt(list(prompts), device, 1, False)
    null, _ = pipe.encode_prompt([""], device, 1, False)
    return embeds, null
