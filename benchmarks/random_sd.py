"""Stable Diffusion of the sizes on which updates are timed: random weights, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


@dataclass(frozen=True)
class Size:
    """side: of the latents. heads, depths: of the attention of each width. plain: which block has none. The autoencoder doubles the side once for each of
    its widths but the first; so many latents are decoded at a time where a reward is differentiated (None: all)."""

    side: int
    widths: tuple[int, ...]
    layers: int
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    plain: int = -1
    groups: int = 16
    linear: bool = False
    text_width: int = 32
    text_length: int = 77
    vae_widths: tuple[int, ...] = (16, 32)
    vae_layers: int = 1
    vae_groups: int = 8
    vae_attention: bool = False
    reward_batch: int | None = None


_PUBLISHED: dict[str, Any] = {
    "groups": 32,
    "vae_widths": (128, 256, 512, 512),
    "vae_layers": 2,
    "vae_groups": 32,
    "vae_attention": True,
    "reward_batch": 1,  # four pictures' activations would be most of an update's memory, whatever the objective
}
SIZES = {
    "tiny": Size(16, (32, 64, 64), 1, (8,) * 3, (1,) * 3),  # 1.5 million weights
    "small": Size(32, (64, 128, 256), 2, (8,) * 3, (1,) * 3),  # 17.6 million
    # the shapes of the published models; SDXL's without what it is told of its pooled text and picture sizes, 5 of 2,567 million weights
    "sd15": Size(64, (320, 640, 1280, 1280), 2, (8,) * 4, (1,) * 4, text_width=768, **_PUBLISHED),
    "sdxl": Size(128, (320, 640, 1280), 2, (5, 10, 20), (1, 2, 10), plain=0, linear=True, text_width=2048, **_PUBLISHED),
}


def random_unet(size: Size) -> UNet2DConditionModel:
    down, up = ["CrossAttnDownBlock2D"] * len(size.widths), ["CrossAttnUpBlock2D"] * len(size.widths)
    down[size.plain], up[~size.plain] = "DownBlock2D", "UpBlock2D"
    return UNet2DConditionModel(
        sample_size=size.side,
        block_out_channels=size.widths,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        layers_per_block=size.layers,
        cross_attention_dim=size.text_width,
        attention_head_dim=size.heads,  # their number, as diffusers reads it
        transformer_layers_per_block=size.depths,
        use_linear_projection=size.linear,
        norm_num_groups=size.groups,
    ).requires_grad_(False)


def random_vae(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=size.side * 2 ** (len(size.vae_widths) - 1),
        block_out_channels=size.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae_widths),
        layers_per_block=size.vae_layers,
        latent_channels=4,
        norm_num_groups=size.vae_groups,
        mid_block_add_attention=size.vae_attention,
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
