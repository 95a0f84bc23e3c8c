"""Trains the embedded base from scratch: a StableDiffusionPipeline that writes digits by hand.

    python training/pretrain_digits.py --output_dir runs/digits-base

Everything is learned from the 1,797 real digits of scikit-learn: a small AutoencoderKL, then a UNet2DConditionModel together with
a small CLIPTextModel. The result is an ordinary diffusers folder in float16, plus `metrics.json` and `samples.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from digits_data import DIGIT_NAMES, PROMPTS, digit_oracle, drawn_digits  # noqa: E402


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary is every byte plus the words of the ten prompts, saved in `folder`."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(letters + [letter + "</w>" for letter in letters])}
    merges: list[tuple[str, str]] = []
    for word in ("a", "handwritten", *DIGIT_NAMES):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault(pair[0] + pair[1], len(vocab))
            parts = [pair[0] + pair[1], *parts[2:]]
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=8)
    tokenizer.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for name in DIGIT_NAMES:  # the text encoder must be able to tell them apart: one token a word
        ids = tokenizer(f"a handwritten {name}").input_ids
        if len(ids) != 5 or tokenizer.decode(ids[1:-1]) != f"a handwritten {name}":
            raise RuntimeError(f"the tokenizer splits 'a handwritten {name}' into {ids}")
    return tokenizer


def build_models(tokenizer: CLIPTokenizer) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=4,
        time_embedding_dim=128,
        resnet_time_scale_shift="scale_shift",
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8,
            projection_dim=48,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused by trailing spacing; the pipeline asks for it
    )
    return vae, unet, text_encoder, scheduler


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A little affine jitter (rotation, shear, scale, shift), as one hand writes a digit twice."""
    n = len(images)

    def jitter(scale: float) -> torch.Tensor:
        return scale * (2 * torch.rand(n, generator=generator) - 1)

    angle, shear, shift = jitter(0.06), jitter(0.06), torch.stack([jitter(0.05), jitter(0.05)], dim=1)
    sx, sy = 1 + jitter(0.05), 1 + jitter(0.05)
    theta = torch.stack(
        [
            torch.stack([sx * angle.cos(), -angle.sin() + shear, shift[:, 0]], dim=1),
            torch.stack([angle.sin(), sy * angle.cos(), shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def cosine(step: int, total: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, steps))
    progress = tqdm(range(steps), desc="autoencoder", unit="step")
    for _ in progress:
        batch = augment(images[torch.randint(len(images), (64,), generator=generator)], generator) * 2 - 1
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        error = (reconstruction - batch).square().sum(dim=(1, 2, 3)).mean() / (2 * 0.15**2 * 3)
        loss = (error + posterior.kl().mean()) / 1024
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", rmse=f"{(reconstruction - batch).square().mean().sqrt().item():.3f}")
    vae.requires_grad_(False).eval()


@torch.no_grad()
def encode_digits(vae: AutoencoderKL, images: torch.Tensor, copies: int, generator: torch.Generator) -> torch.Tensor:
    """(N, 3, 32, 32) -> (copies, N, 2, 4, 4, 4): mean and standard deviation of the latents of `copies` jittered drawings."""
    encoded = []
    for copy in tqdm(range(copies), desc="encoding", unit="copy"):
        drawn = images if copy == 0 else augment(images, generator)
        posterior = vae.encode(drawn * 2 - 1).latent_dist
        encoded.append(torch.stack([posterior.mean, posterior.std], dim=1))
    return torch.stack(encoded)


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    targets: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    tokens = tokenizer([*PROMPTS, ""], padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, steps))
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.8)
    batch_size, copies, n = 256, len(latents), len(targets)
    alphas = scheduler.alphas_cumprod
    progress = tqdm(range(steps), desc="denoiser", unit="step")
    for step in progress:
        index = torch.randint(n, (batch_size,), generator=generator)
        mean, std = latents[torch.randint(copies, (batch_size,), generator=generator), index].unbind(1)
        clean = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        # stratified: each batch covers all noise levels evenly
        t = ((torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size * 1000).long()
        alpha = alphas[t][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        classes = targets[index]
        classes = torch.where(torch.rand(batch_size, generator=generator) < 0.12, 10, classes)  # 10: the empty prompt
        embeds = text_encoder(tokens)[0][classes]
        loss = F.mse_loss(unet(noisy, t, embeds).sample, velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(parameters)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    ema.copy_to(parameters)


@torch.no_grad()
def judge(pipe: StableDiffusionPipeline, n: int, steps: int, eta: float, guidance: float, seed: int) -> tuple[float, list]:
    """Share of `n` samples whose digit, read by the SVM, is the one asked for; and the pictures."""
    pipe.set_progress_bar_config(disable=True)
    classes = torch.arange(n) % 10
    images, pictures = [], []
    for start in range(0, n, 100):
        chunk = [PROMPTS[i] for i in classes[start : start + 100]]
        out = pipe(
            chunk,
            num_inference_steps=steps,
            eta=eta,
            guidance_scale=guidance,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed + start),
        ).images
        images.append(out.float().cpu())
        if start == 0:
            pictures = pipe.image_processor.numpy_to_pil(out.float().cpu().permute(0, 2, 3, 1).numpy())
    read = digit_oracle(torch.cat(images))
    return (read == classes).double().mean().item(), pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/digits-base", help="where the pipeline folder is written")
    parser.add_argument("--vae_steps", type=int, default=2500)
    parser.add_argument("--denoiser_steps", type=int, default=4500)
    parser.add_argument("--copies", type=int, default=16, help="jittered drawings of each digit")
    parser.add_argument("--num_eval", type=int, default=500, help="samples judged by the SVM")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.time()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    output = Path(args.output_dir)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    images, target = drawn_digits()
    targets = torch.from_numpy(target)
    tokenizer = build_tokenizer(temporary / "tokenizer")
    vae, unet, text_encoder, scheduler = build_models(tokenizer)
    train_vae(vae, images, args.vae_steps, generator)
    latents = encode_digits(vae, images, args.copies, generator)
    scale = 1.0 / (latents[:, :, 0].square() + latents[:, :, 1].square()).mean().sqrt().item()
    vae.register_to_config(scaling_factor=round(scale, 4))
    latents = latents * vae.config.scaling_factor
    train_denoiser(unet, text_encoder, tokenizer, scheduler, latents, targets, args.denoiser_steps, generator)
    unet.eval(), text_encoder.eval()

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(temporary)
    # transformers loads in the dtype that its config names, diffusers in float32: the halves must agree
    text_config = temporary / "text_encoder" / "config.json"
    text_config.write_text(json.dumps({**json.loads(text_config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    pipe = StableDiffusionPipeline.from_pretrained(temporary)  # judged as it will be loaded: rounded to float16
    metrics = {"seed": args.seed, "num_eval": args.num_eval, "parameters": sum(p.numel() for p in pipe.unet.parameters())}
    for name, steps, eta, guidance in (("", 20, 1.0, 1.0), ("_guidance_2", 20, 1.0, 2.0), ("_ddim_50", 50, 0.0, 1.0)):
        accuracy, pictures = judge(pipe, args.num_eval, steps, eta, guidance, seed=10_000 + args.seed)
        metrics[f"digit_accuracy{name}"] = accuracy
        metrics[f"digit_accuracy{name}_se"] = math.sqrt(accuracy * (1 - accuracy) / args.num_eval)
        if name == "":
            make_image_grid([p.resize((64, 64)) for p in pictures], rows=len(pictures) // 10, cols=10).save(
                temporary / "samples.png"
            )
    metrics["seconds"] = time.time() - started
    (temporary / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    os.replace(temporary, output)
    print(json.dumps(metrics, indent=2))
    print(f"Look at {output / 'samples.png'}; next: accelerate launch training/train_ctrl.py --base {output}")


if __name__ == "__main__":
    main()
