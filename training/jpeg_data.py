"""JPEG compressibility, the paper's own first task: the size of an image as a JPEG of quality 95, in kilobytes, cut in four classes.

Thresholds (arXiv 2406.12120, 512x512 images): score = -kilobytes; class 0 below -110, 1 up to -85, 2 up to -60, 3 from -60.
"""

from __future__ import annotations

import io

import torch
from PIL import Image


JPEG_CLASSES = ("largest", "large", "small", "smallest")
THRESHOLDS = (-110.0, -85.0, -60.0)


def jpeg_kilobytes(images: torch.Tensor) -> torch.Tensor:
    """Size in kilobytes of each image (N, 3, H, W) in [0, 1] as a JPEG of quality 95: (N,)."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float64)


def jpeg_class(images: torch.Tensor) -> torch.Tensor:
    """Class 0 (largest file) to 3 (smallest) of each 512x512 image: (N, 3, H, W) in [0, 1] -> (N,) int64."""
    return torch.bucketize(-jpeg_kilobytes(images), torch.tensor(THRESHOLDS, dtype=torch.float64), right=True)
