"""Draws docs/nats.png: what a gap of so many nats can look like. `python docs/nats.py`

Each panel has the exact posterior of a Gaussian prior and a soft threshold, by quadrature, and a tuned law at a given
KL(tuned ‖ exact): a mixture of the exact law and the prior, which is what an adapter that obeys only sometimes samples.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402


def laws(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Densities of the prior N(0, 1) and of the posterior given the label "above 0.5", softened by 0.15."""
    prior = np.exp(-points * points / 2) / np.sqrt(2 * np.pi)
    posterior = prior / (1 + np.exp(-(points - 0.5) / 0.15))
    return prior, posterior / np.trapezoid(posterior, points)


def divergence(p: np.ndarray, q: np.ndarray, points: np.ndarray) -> float:
    """KL(p ‖ q) in nats by quadrature."""
    return float(np.trapezoid(p * np.log(p / q), points))


def mixture_at(gap: float, points: np.ndarray) -> tuple[float, np.ndarray]:
    """The share of the prior, by bisection, at which the mixture is `gap` nats from the posterior; and the mixture."""
    prior, posterior = laws(points)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        mixed = share * prior + (1 - share) * posterior
        low, high = (share, high) if divergence(mixed, posterior, points) < gap else (low, share)
    return share, mixed


def main() -> None:
    points = np.linspace(-4, 4.5, 4001)
    prior, posterior = laws(points)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), sharey=True)
    for axis, gap in zip(axes, (0.02, 0.1, 0.5, 1.0), strict=True):
        share, mixed = mixture_at(gap, points)
        missed = np.trapezoid(mixed[points < 0.2], points[points < 0.2])
        axis.fill_between(points, posterior, color="#d0d7e5", label="exact conditional law")
        axis.plot(points, prior, color="#999999", linestyle=":", label="base")
        axis.plot(points, mixed, color="#b3321b", label="tuned")
        distance = np.trapezoid(np.abs(mixed - posterior), points) / 2
        axis.set_title(
            f"{gap:g} nats: total variation {distance:.2f},\n{100 * missed:.0f} % of samples on the wrong side", fontsize=10
        )
        axis.set_xlabel("an attribute of the image")
        axis.set_yticks([])
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "nats.png", dpi=110)


if __name__ == "__main__":
    main()
