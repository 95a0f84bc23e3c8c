"""Eight denoiser families as real diffusers pipelines, tiny and with random weights. No network; nothing is cached.

`build(name)` gives a `Family`: the pipeline, how to call it for two samples, and a scheduler with noise that it can sample with.
Every picture is 16x16 (Sana's 32x32), every latent 8x8; a call of two steps takes some hundredths of a second on one core.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from pretrain_digits import build_tokenizer  # noqa: E402


PROMPTS = ["a handwritten one", "a handwritten seven"]
WIDTH = 16  # of every text encoder
DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False}


@dataclass(frozen=True)
class Family:
    """One denoiser family at a tiny size.

    pipe: with the scheduler that the family's checkpoints come with. call: what `pipe(**call)` needs for two different samples, at
    their smallest size, without guidance. guided: what to add for classifier-free guidance, or None where the family has none.
    samples: the name of the argument in `call` that makes two samples. noisy: a scheduler with noise for this pipeline. options:
    arguments of the call that this scheduler needs (eta). img2img: the family's image-to-image pipeline class, where it has one.
    """

    name: str
    pipe: DiffusionPipeline
    call: dict[str, Any]
    samples: str
    noisy: Any
    guided: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    img2img: str | None = None

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer

    def one(self, index: int) -> dict[str, Any]:
        """The call for sample `index` alone."""
        value = self.call[self.samples]
        return {**self.call, self.samples: [value[index]] if isinstance(value, list) else 1}


def build(name: str) -> Family:
    """A fresh pipeline of this family; the same weights each time. Leaves torch's own random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family = BUILDERS[name](name)
        for module in family.pipe.components.values():
            if isinstance(module, nn.Module):
                _spread(module)
                module.eval().requires_grad_(True)
    family.pipe.set_progress_bar_config(disable=True)
    return family


@torch.no_grad()
def _spread(module: nn.Module) -> None:
    """What is zero at the start (biases, last layers) would hide differences: it gets small values."""
    for parameter in module.parameters():
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, std=0.1)


def _clip(cls: type, tokenizer: Any) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = cls(config)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.normal_()
    return encoder


def _clip_tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


def _letters() -> list[str]:
    return [*"abcdefghijklmnopqrstuvwxyz"]


def _t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in ("▁", *_letters()))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=24)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def _gemma() -> tuple[GemmaTokenizer, Gemma2Model]:
    vocab = {piece: i for i, piece in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_letters()))}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[], model_max_length=24)
    config = Gemma2Config(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=vocab["<bos>"],
        eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<pad>"],
    )
    return tokenizer, Gemma2Model(config)


def tiny_vae(**kwargs: Any) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        **kwargs,
    )


def tiny_unet(**kwargs: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **kwargs,
    )


def _stable_diffusion(name: str) -> Family:
    tokenizer = _clip_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(cross_attention_dim=WIDTH),
        scheduler=PNDMScheduler(**{k: v for k, v in DIFFUSION.items() if k != "clip_sample"}, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Family(
        name,
        pipe,
        call={"prompt": list(PROMPTS), "guidance_scale": 1.0},
        samples="prompt",
        noisy=DDIMScheduler(**DIFFUSION),
        guided={"guidance_scale": 3.0},
        options={"eta": 1.0},
        img2img="StableDiffusionImg2ImgPipeline",
    )


def _stable_diffusion_xl(name: str) -> Family:
    tokenizer = _clip_tokenizer()
    unet = tiny_unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**{k: v for k, v in DIFFUSION.items() if k != "clip_sample"}, timestep_spacing="leading"),
    )
    return Family(
        name,
        pipe,
        call={"prompt": list(PROMPTS), "guidance_scale": 1.0, "height": 16, "width": 16},
        samples="prompt",
        noisy=DDIMScheduler(**DIFFUSION),
        guided={"guidance_scale": 3.0},
        options={"eta": 1.0},
        img2img="StableDiffusionXLImg2ImgPipeline",
    )


def _stable_diffusion_3(name: str) -> Family:
    clip_tokenizer, (t5_tokenizer, t5) = _clip_tokenizer(), _t5(2 * WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=_clip(CLIPTextModelWithProjection, clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=_clip(CLIPTextModelWithProjection, clip_tokenizer),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )
    return Family(
        name,
        pipe,
        call={"prompt": list(PROMPTS), "guidance_scale": 1.0, "height": 16, "width": 16, "max_sequence_length": 24},
        samples="prompt",
        noisy=FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        guided={"guidance_scale": 3.0},
        img2img="StableDiffusion3Img2ImgPipeline",
    )


def _flux(name: str) -> Family:
    distilled = name == "flux"
    tokenizer, (t5_tokenizer, t5) = _clip_tokenizer(), _t5(WIDTH)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 4, 8),
    )
    shifting = {"shift": 3.0, "use_dynamic_shifting": True}
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    return Family(
        name,
        pipe,
        call={"prompt": list(PROMPTS), "guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 24},
        samples="prompt",
        noisy=FlowMatchEulerDiscreteScheduler(**shifting, stochastic_sampling=True),
        guided=None if distilled else {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
        img2img="FluxImg2ImgPipeline",
    )


def _pixart_sigma(name: str) -> Family:
    tokenizer, t5 = _t5(WIDTH)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        caption_channels=WIDTH,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=tiny_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )
    plain = {"use_resolution_binning": False, "clean_caption": False}
    return Family(
        name,
        pipe,
        call={"prompt": list(PROMPTS), "guidance_scale": 1.0, "height": 16, "width": 16, "max_sequence_length": 24, **plain},
        samples="prompt",
        noisy=DDIMScheduler(clip_sample=False),
        guided={"guidance_scale": 3.0},
        options={"eta": 1.0},
    )


def _sana(name: str) -> Family:
    tokenizer, gemma = _gemma()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
    )
    levels = {
        "block_types": ("ResBlock",) * 3,
        "block_out_channels": (4, 8, 8),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((),) * 3,
    }
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        **{f"encoder_{key}": value for key, value in levels.items()},
        **{f"decoder_{key}": value for key, value in levels.items()},
        scaling_factor=0.41407,
    )
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    plain = {"use_resolution_binning": False, "complex_human_instruction": None}
    return Family(
        name,
        pipe,
        call={"prompt": list(PROMPTS), "guidance_scale": 1.0, "height": 32, "width": 32, "max_sequence_length": 24, **plain},
        samples="prompt",
        noisy=FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        guided={"guidance_scale": 3.0},
    )


def _dit(name: str) -> Family:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,  # the pipeline's null class is 1000
    )
    pipe = DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False), id2label={0: "zero", 7: "seven, sept"})
    return Family(
        name,
        pipe,
        call={"class_labels": [1, 7], "guidance_scale": 1.0},
        samples="class_labels",
        noisy=DDPMScheduler(clip_sample=False),
        guided={"guidance_scale": 3.0},
    )


def _ddpm(name: str) -> Family:
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return Family(name, DDPMPipeline(unet, DDPMScheduler()), call={"batch_size": 2}, samples="batch_size", noisy=DDPMScheduler())


BUILDERS: dict[str, Callable[[str], Family]] = {
    "stable_diffusion": _stable_diffusion,
    "stable_diffusion_xl": _stable_diffusion_xl,
    "stable_diffusion_3": _stable_diffusion_3,
    "flux": _flux,
    "flux_true_cfg": _flux,
    "pixart_sigma": _pixart_sigma,
    "sana": _sana,
    "dit": _dit,
    "ddpm": _ddpm,
}
