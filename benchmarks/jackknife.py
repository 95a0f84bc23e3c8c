"""Standard errors of statistics that have no formula of their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def jackknife(statistic: Callable[[torch.Tensor], float], count: int, groups: int) -> float:
    """Standard error of a statistic of `count` rows, which it takes by their indices, by leaving out one of so many groups of neighbours at a time."""
    rows = torch.arange(count)
    parts = rows.tensor_split(min(groups, count))
    values = torch.tensor([statistic(rows[~torch.isin(rows, part)]) for part in parts], dtype=torch.float64)
    return math.sqrt((len(parts) - 1) / len(parts) * (values - values.mean()).square().sum().item())
