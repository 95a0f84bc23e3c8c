"""J from trajectories, with as little noise as they allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def path_objectives(
    reward: torch.Tensor, kl: torch.Tensor, log_ratio: torch.Tensor, groups: Sequence[torch.Tensor]
) -> torch.Tensor:
    """(N,) nats, float64: their mean within a group is an unbiased estimate of its J.

    reward − KL of a path has that expectation, with the exact KL of its steps; so has reward − c·log-ratio − (1 − c)·KL for any fixed c, since the
    log-ratio less the KL is a sum of steps whose means are zero, whatever came before. Far from the optimum c = 0 has the least noise,
    at the optimum c = 1 has none at all. Each half of the rows takes its c, from 0 to 1, from a regression on the other half (control variates
    with cross-fitting), so that c and what it multiplies are independent, and the estimate stays without bias.

    Args:
        reward: gamma · log p̂ of independent trajectories of the tuned model. kl: Σ_k KL_k. log_ratio: Σ_k log p_theta/p_pre. All (N,), nats.
        groups: the rows of each; every row is in one of them.
    """
    j, noise = (reward - kl).double(), (log_ratio - kl).double()
    out, order = j.clone(), torch.cat(list(groups))  # halves of each group, not of all rows as they come
    for own, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        if len(other) > 1 and (power := noise[other].square().sum()) > 0:
            slope = ((j[other] - j[other].mean()) * noise[other]).sum() / power
            out[own] -= slope.clamp(0, 1) * noise[own]
    return out
