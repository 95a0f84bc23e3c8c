"""The control head: a small network beside the denoiser whose output is added to the denoiser's, and which is zero without a label.

LoRA and a label in the time embedding can only bend what the base computes. Where a control depends on the whole image in a way that the base
has no feature for (how much ink there is in all), they learn it slowly; a perceptron that sees the state and the base's answer to it learns it fast, at a
few per cent of a call. It works on a coarse grid, whatever the size of the states: fine detail stays the denoiser's.

A head may also be *alone*: no LoRA, no label in the time embedding. The denoiser then answers as the base does, so that one call of it serves
the tuned model and the base, and any number of labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


LABEL_WIDTH = 64  # of the head's own label embedding, beside the one in the time embedding
FINEST_GRID = 8


def coarse_grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, h, w) of the grid on which states of shape (C, H, W) are seen: 8 x 8, or all of a smaller one.

    Raises:
        ValueError: for states that are no images, such as packed tokens or videos.
    """
    if len(shape) != 3:
        raise ValueError(
            f"States of shape {tuple(shape)} are no images (C, H, W): control_head and critic_trajectories must be 0 for them."
        )
    return shape[0], min(FINEST_GRID, shape[1]), min(FINEST_GRID, shape[2])


def seen(x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """States (B, C or more, H, W) on the coarse grid, (B, C·h·w)."""
    return F.adaptive_avg_pool2d(x[:, : grid[0]], grid[1:]).flatten(1)


def check_head(head: object) -> None:
    """Raises ValueError unless this is {"grid": [C, h, w], "width"} of positive whole numbers, with "alone": true where it is."""
    if not isinstance(head, dict) or set(head) - {"alone"} != {"grid", "width"} or not isinstance(head["grid"], (list, tuple)):
        raise ValueError('head must be {"grid": [C, h, w], "width": number}, and may have "alone": true.')
    if head.get("alone", True) is not True:
        raise ValueError(f"head's alone must be true, or left out; got {str(head['alone'])[:80]}.")
    numbers = [*head["grid"], head["width"]]
    if len(numbers) != 4 or any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(f"head must have three positive whole numbers as grid and one as width; got {str(numbers)[:80]}.")


class ControlHead(nn.Module):
    """(state, the denoiser's output, its time embedding, the label's embedding) -> what is added to the output.

    The last layer has no bias and multiplies by a linear map of the label's embedding: no label, no change, bit for bit.

    Args:
        grid: (C, h, w), see `coarse_grid`. width: of the hidden layers. time_dim: of the denoiser's time embedding.
        alone: nothing else tells the denoiser of the label: what it answers is the base's output.
    """

    def __init__(self, grid: tuple[int, int, int], width: int, time_dim: int, alone: bool = False) -> None:
        super().__init__()
        self.grid, self.alone = tuple(grid), alone
        size = grid[0] * grid[1] * grid[2]
        self.state, self.middle, self.last = nn.Linear(2 * size, width), nn.Linear(width, width), nn.Linear(width, width)
        self.time = nn.Linear(time_dim, 3 * width)
        self.label = nn.Linear(LABEL_WIDTH, 2 * width, bias=False)
        self.out = nn.Linear(width, size, bias=False)

    def forward(self, sample: torch.Tensor, output: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """sample (B, C, H, W), output (B, C or more, H, W), time (B, D), label (B, LABEL_WIDTH) -> `output`, its first C channels changed."""
        channels, dtype = self.grid[0], self.out.weight.dtype
        scale, shift, shift2 = self.time(F.silu(time.to(dtype))).chunk(3, dim=1)
        gate, shift3 = self.label(label.to(dtype)).chunk(2, dim=1)
        both = torch.cat([seen(sample.to(dtype), self.grid), seen(output.to(dtype), self.grid)], dim=1)
        hidden = F.silu(self.state(both) * (1 + scale) + shift)
        hidden = hidden + F.silu(self.middle(hidden) + shift2 + shift3)
        added = self.out(F.silu(self.last(hidden)) * gate).view(-1, *self.grid)
        added = F.interpolate(added, size=output.shape[-2:], mode="nearest").to(output)
        if output.shape[1] == channels:
            return output + added
        return torch.cat([output[:, :channels] + added, output[:, channels:]], dim=1)
