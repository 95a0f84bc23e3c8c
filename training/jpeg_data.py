"""JPEG compressibility, the paper's own first task: the size of an image as a JPEG of quality 95, in kilobytes, cut in classes.

Thresholds (arXiv 2406.12120, 512x512 images; a kilobyte has 1,000 bytes): score = -kilobytes. Alone: class 0 below -110, 1 up to
-85, 2 up to -60, 3 from -60. Together with the aesthetic score: class 0 below -70, 1 from -70.
The embedded digits have three classes, cut at the terciles of the base's own samples (`python training/jpeg_data.py` measures them).
"""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from PIL import Image


JPEG_CLASSES = ("largest", "large", "small", "smallest")
THRESHOLDS = (-110.0, -85.0, -60.0)
BINARY_CLASSES = ("low", "high")  # compressibility
BINARY_THRESHOLDS = (-70.0,)
PAPER_SIZE = 512  # pixels a side


def jpeg_kilobytes(images: torch.Tensor) -> torch.Tensor:
    """Size in kilobytes of each image (N, 3, H, W) in [0, 1] as a JPEG of quality 95: (N,)."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float64)


def _classify(images: torch.Tensor, thresholds: tuple[float, ...]) -> torch.Tensor:
    if tuple(images.shape[-2:]) != (PAPER_SIZE, PAPER_SIZE):
        raise ValueError(
            f"The compressibility classes are cut for {PAPER_SIZE}x{PAPER_SIZE} images, got {images.shape[-2]}x{images.shape[-1]}: "
            "resize them, or write a labeller with thresholds of your own."
        )
    return torch.bucketize(-jpeg_kilobytes(images), torch.tensor(thresholds, dtype=torch.float64), right=True)


def jpeg_class(images: torch.Tensor) -> torch.Tensor:
    """Class 0 (largest file) to 3 (smallest): (N, 3, 512, 512) in [0, 1] -> (N,) int64. Raises ValueError at another size."""
    return _classify(images, THRESHOLDS)


def jpeg_binary_class(images: torch.Tensor) -> torch.Tensor:
    """Class 0 (over 70 kilobytes) or 1: (N, 3, 512, 512) in [0, 1] -> (N,) int64. Raises ValueError at another size."""
    return _classify(images, BINARY_THRESHOLDS)


DIGIT_CLASSES = ("small", "middle", "large")
DIGIT_THRESHOLDS = (1.125, 1.164)  # kilobytes: terciles of 2,000 base samples
DIGIT_WIDTH = 0.005  # kilobytes; the score's uncertainty about a size near a threshold


def digit_jpeg_class(images: torch.Tensor) -> torch.Tensor:
    """Class 0 (smallest file) to 2 of each image of the digits base: (N, 3, 32, 32) in [0, 1] -> (N,) int64."""
    return torch.bucketize(jpeg_kilobytes(images), torch.tensor(DIGIT_THRESHOLDS, dtype=torch.float64), right=True)


def digit_jpeg_score(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(class | image), (N,) nats, an ordered logistic model of the real file size; no gradient goes through JPEG.

    images: (N, 3, 32, 32) in [0, 1]. labels: (N, 1) class indices.
    """
    size = jpeg_kilobytes(images.detach()).to(labels.device)
    low, high = ((size - threshold) / DIGIT_WIDTH for threshold in DIGIT_THRESHOLDS)
    # P(small) = σ(−low), P(large) = σ(high), P(middle) = σ(low) − σ(high) = σ(low) σ(−high) (1 − exp(high − low))
    middle = F.logsigmoid(low) + F.logsigmoid(-high) + torch.log1p(-torch.exp(high - low))
    log_probs = torch.stack([F.logsigmoid(-low), middle, F.logsigmoid(high)], dim=1)
    return log_probs.gather(1, labels[:, :1].long()).squeeze(1).float()


def main() -> None:
    """Prints the terciles of the file size over samples of the embedded base."""
    from diffusers import DiffusionPipeline

    from diffusers_ctrl.adapters import resolve_folder
    from digits_data import PROMPTS

    pipe = DiffusionPipeline.from_pretrained(resolve_folder("digits-base"))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.cat(
        [
            pipe(
                list(PROMPTS),
                num_images_per_prompt=20,
                num_inference_steps=16,
                guidance_scale=1.0,
                eta=1.0,
                generator=generator,
                output_type="pt",
            ).images
            for _ in range(10)
        ]
    )
    size = jpeg_kilobytes(images)
    low, high = size.quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)).tolist()
    print(f"terciles of {len(size)} samples: {low:.4f} and {high:.4f} kilobytes; standard deviation {size.std():.4f}")


if __name__ == "__main__":
    main()
