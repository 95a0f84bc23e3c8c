"""Stable Diffusion of the sizes on which updates are timed: random weights, float32, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


@dataclass(frozen=True)
class Size:
    """side: of the latents. The autoencoder doubles it once for each of its widths but the first."""

    side: int
    widths: tuple[int, ...]
    layers: int
    text_width: int = 32
    text_length: int = 77
    vae_widths: tuple[int, ...] = (16, 32)


SIZES = {"tiny": Size(16, (32, 64, 64), 1), "small": Size(32, (64, 128, 256), 2)}  # 1.5 and 17.6 million weights


def random_unet(size: Size) -> UNet2DConditionModel:
    deep = len(size.widths) - 1
    return UNet2DConditionModel(
        sample_size=size.side,
        block_out_channels=size.widths,
        down_block_types=("CrossAttnDownBlock2D",) * deep + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deep,
        layers_per_block=size.layers,
        cross_attention_dim=size.text_width,
        attention_head_dim=8,
        norm_num_groups=16,
    ).requires_grad_(False)


def random_vae(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=size.side * 2 ** (len(size.vae_widths) - 1),
        block_out_channels=size.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae_widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    ).requires_grad_(False)


def ddim() -> DDIMScheduler:
    """Stable Diffusion's schedule; trailing steps, so that the first starts from noise."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def random_embeds(size: Size, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, L, D) of prompts, and (1, L, D) of the empty one."""
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(count + 1, size.text_length, size.text_width, generator=generator)
    return both[:-1], both[-1:]
