"""J from trajectories, with as little noise as they allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch


FEW, MOST = 50, 10.0  # rows of a half, and the largest slope that more of them may find


def path_objectives(
    reward: torch.Tensor, kl: torch.Tensor, log_ratio: torch.Tensor, groups: Sequence[torch.Tensor]
) -> torch.Tensor:
    """(N,) nats, float64: their mean within a group is an unbiased estimate of its J.

    reward − KL of a path has that expectation, with the exact KL of its steps; so has reward − KL − c·(log-ratio − KL) for any fixed c, since the
    log-ratio less the KL is a sum of steps whose means are zero, whatever came before. At the optimum c = 1 takes all noise away; for a control that
    is too weak the best c is above 1. Each half of the rows takes its c from a regression on the other half (control variates with
    cross-fitting): c and what it multiplies are then independent, and the estimate has no bias. c is at least 0, and at most 1 where few rows tell it.

    Args:
        reward: gamma · log p̂ of trajectories of the tuned model, which must be independent of each other. kl: Σ_k KL_k.
            log_ratio: Σ_k log p_theta/p_pre. All (N,), nats.
        groups: the rows of each; every row is in one of them. A row that is not finite spoils its own group only.
    """
    j, noise = reward.double() - kl.double(), log_ratio.double() - kl.double()
    order = torch.cat(list(groups))  # halves of each group, not of all rows as they come
    order = order[(j.isfinite() & noise.isfinite())[order]]
    out = j.clone()
    for own, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        if len(other) > 1 and (power := noise[other].square().sum()) > 0:
            slope = ((j[other] - j[other].mean()) * noise[other]).sum() / power
            out[own] -= slope.clamp(0, 1 if len(other) < FEW else MOST) * noise[own]
    return out
