"""The LAION aesthetic score, the second attribute of the paper's multi-task: how much people like a picture, from about 1 to 10.

The score is five linear layers, with nothing between them at inference, on the normalised image embedding of CLIP ViT-L/14. The
layers' weights are published as `sac+logos+ava1-l14-linearMSE.pth` (github.com/christophschuhmann/improved-aesthetic-predictor).
No pickle is read here: convert the file once (docs/paper_tasks.md has the line) and name the result, and CLIP's folder if it is
not to come from the Hub, in the environment:

    AESTHETIC_HEAD=aesthetic_head.safetensors  AESTHETIC_CLIP=openai/clip-vit-large-patch14

Threshold (arXiv 2406.12120): class 1 from a score of 5.7.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


AESTHETIC_CLASSES = ("low", "high")
AESTHETIC_THRESHOLD = 5.7
AESTHETIC_WIDTH = (
    0.1  # of the score; how sure the likelihood below is near the threshold. Ours: the paper learns a classifier instead
)
HEAD_LAYERS = {"layers.0": (768, 1024), "layers.2": (1024, 128), "layers.4": (128, 64), "layers.6": (64, 16), "layers.7": (16, 1)}
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
BATCH = 32  # images at a time where no gradient is taken


class AestheticScorer(nn.Module):
    """CLIP's image encoder and the head: images (N, 3, H, W) in [0, 1] -> scores (N,), differentiable in the images.

    Raises:
        ValueError: if CLIP's embedding is not of the head's 768 dimensions.
    """

    def __init__(self, clip: CLIPVisionModelWithProjection, head: dict[str, torch.Tensor]) -> None:
        super().__init__()
        width = clip.config.projection_dim
        if width != HEAD_LAYERS["layers.0"][0]:
            raise ValueError(f"The aesthetic head takes CLIP embeddings of 768 dimensions (ViT-L/14); this CLIP's have {width}.")
        self.clip = clip
        self.head = nn.Sequential(*(nn.Linear(*shape) for shape in HEAD_LAYERS.values()))
        for layer, name in zip(self.head, HEAD_LAYERS, strict=True):
            layer.load_state_dict({key: head[f"{name}.{key}"] for key in ("weight", "bias")})
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1))
        self.float().eval().requires_grad_(False)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, S, S) as CLIP takes them: shorter side resized (bicubic), centre, normalised."""
        size = self.clip.config.image_size
        height, width = images.shape[-2:]
        if (height, width) != (size, size):
            scale = size / min(height, width)
            shape = (max(size, int(height * scale)), max(size, int(width * scale)))
            images = F.interpolate(
                images.to(self.mean.dtype), size=shape, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
            top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
            images = images[..., top : top + size, left : left + size]
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeds = self.clip(pixel_values=self.prepare(images)).image_embeds
        return self.head(F.normalize(embeds, dim=-1)).squeeze(-1)


def load_head(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The head's weights from a safetensors file with the published names (`layers.0.weight`, …).

    Raises:
        ValueError: if the file is not there, is a pickle, is damaged, or has other names or shapes.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
        raise ValueError(f"{path} is a pickle, which is not read: convert it to safetensors once, as docs/paper_tasks.md says.")
    if not path.is_file():
        raise ValueError(f"The aesthetic head {str(path)!r} does not exist; docs/paper_tasks.md says how to get it.")
    try:
        head = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The aesthetic head {str(path)!r} cannot be read: {error}.") from error
    wanted = {}
    for name, (width_in, width_out) in HEAD_LAYERS.items():
        wanted |= {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}
    found = {name: tuple(weight.shape) for name, weight in head.items()}
    if found != wanted:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))[0]
        raise ValueError(
            f"The aesthetic head {str(path)!r} has {wrong!r} of shape {found.get(wrong)}, where {wanted.get(wrong)} is wanted: it "
            "must have the layers of sac+logos+ava1-l14-linearMSE and nothing else."
        )
    return head


@lru_cache(maxsize=1)
def load_scorer(head: str, clip: str = DEFAULT_CLIP) -> AestheticScorer:
    """The scorer of a head's safetensors file and a CLIP model's folder or Hub id, loaded once.

    Raises:
        ValueError: if either cannot be loaded; it says which.
    """
    weights = load_head(head)
    try:
        model, report = CLIPVisionModelWithProjection.from_pretrained(clip, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The CLIP model {clip!r} cannot be loaded ({reason}); name it with AESTHETIC_CLIP.") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{clip!r} is not a CLIP model with an image encoder: it lacks {len(missing)} weights, first {missing[0]!r}."
        )
    return AestheticScorer(model, weights)


def aesthetic_score(images: torch.Tensor) -> torch.Tensor:
    """The aesthetic score of each image, (N,) float32, by the models that the environment names; differentiable in the images.

    images: (N, 3, H, W) in [0, 1]. Images on the CPU are scored on the accelerator if there is one. Always in float32.

    Raises:
        ValueError: if AESTHETIC_HEAD is not set, or names nothing that can be read.
    """
    head = os.environ.get("AESTHETIC_HEAD")
    if not head:
        raise ValueError(
            "The aesthetic score needs the head's weights: set AESTHETIC_HEAD to their safetensors file (docs/paper_tasks.md)."
        )
    own = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # as Accelerator has it
    device = own if images.device.type == "cpu" else images.device
    scorer = load_scorer(head, os.environ.get("AESTHETIC_CLIP") or DEFAULT_CLIP).to(device)
    tracked = torch.is_grad_enabled() and images.requires_grad
    with torch.autocast(device.type, enabled=False):
        scores = [scorer(part.to(device)) for part in ([images] if tracked else images.split(BATCH))]
    return torch.cat(scores).to(images.device)


def aesthetic_class(images: torch.Tensor) -> torch.Tensor:
    """Class 0 (score under 5.7) or 1 of each image: (N, 3, H, W) in [0, 1] -> (N,) int64."""
    with torch.no_grad():
        return (aesthetic_score(images) >= AESTHETIC_THRESHOLD).long()


def aesthetic_log_likelihood(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(class | image), (N,) nats: a logistic of the score about the threshold; differentiable. A reward without a classifier.

    images: (N, 3, H, W) in [0, 1]. labels: (N, 1) class indices, NaN where not given, which adds 0.
    """
    margin = (aesthetic_score(images) - AESTHETIC_THRESHOLD) / AESTHETIC_WIDTH
    label = labels[:, 0].to(margin.device)
    given = F.logsigmoid((2 * label.nan_to_num(0.0) - 1) * margin)
    return torch.where(label.isnan(), torch.zeros_like(given), given)
