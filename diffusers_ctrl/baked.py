"""How far a label that is baked into a plain pipeline (export.py) is from the labelled one under classifier-free guidance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import processes
from .evaluation import Samples, draw_samples
from .injection import find_injection_sites
from .policy import Policy
from .rollouts import Environment


def label_scales(guidance_scale: float) -> tuple[float, ...]:
    """Factors of the label's embedding that are worth a try: 1, guidance_scale (equal to first order), and two in between."""
    return tuple(round(1 + (guidance_scale - 1) * share, 3) for share in (0.0, 1 / 3, 2 / 3, 1.0))


@contextmanager
def _label_everywhere(policy: Policy, embedding: torch.Tensor) -> Iterator[None]:
    """Within the block the tuned model has `embedding` (1, D) in its time embedding, in both halves of the guidance; the base has not."""
    inside, tuned = False, policy._tuned

    def call(*args: Any) -> torch.Tensor:
        nonlocal inside
        inside = True
        try:
            return tuned(*args)
        finally:
            inside = False

    def add(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + embedding.to(output) if inside else output

    policy._tuned = call
    handles = [site.register_forward_hook(add) for site in find_injection_sites(policy.denoiser, policy.injection_site)[1]]
    try:
        yield
    finally:
        del policy._tuned
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_baked(
    policy: Policy, environment: Environment, per_label: int, seed: int, scales: Sequence[float], distributed: bool = False
) -> dict[str, float]:
    """Samples of each label, labelled and baked, on the same noise: how far apart the images are and how well they fit the label.

    Both leave the steps without noise to the base, so what is measured is what guidance does.

    Args:
        per_label: samples a label. scales: the `label_scale` of `export.bake_label`, each on the same noise.
        distributed: all processes call this, and share out the drawing.

    Returns:
        baked.{scale}.rms, root mean square over images in [0, 1] of baked − labelled; baked.{scale}.log_likelihood, the mean of
        log p̂(y | x) in nats, with its _se; the same of the labelled samples as baked_label_log_likelihood; baked_label_rms, of
        labelled − base; baked_samples, how many of each. Nothing where the images are another process's.
    """
    parts: dict[float | str, list[Samples]] = {key: [] for key in ("labelled", "base", *scales)}
    for row, label in enumerate(environment.labels):
        one = replace(environment, labels=label.unsqueeze(0))
        # the policy is told of no label, and its samples are still judged by this one
        reward = environment.reward
        null = replace(
            one,
            labels=torch.full_like(one.labels, torch.nan),
            reward=lambda images, labels, reward=reward, label=label: reward(images, label.expand(len(images), -1)),
        )

        def draw(environment: Environment, tuned: bool = True, row: int = row) -> Samples:
            generator = torch.Generator(environment.labels.device).manual_seed(seed + row)
            return draw_samples(policy, environment, per_label, generator, tuned=tuned, progress=False, distributed=distributed)

        parts["labelled"].append(draw(one))
        parts["base"].append(draw(one, tuned=False))
        embedding = policy.label_encoder(one.labels, environment.gamma)
        for scale in scales:
            with _label_everywhere(policy, scale * embedding):
                parts[scale].append(draw(null))
    if distributed and processes.index() > 0:
        return {}
    images = {key: torch.cat([samples.images for samples in found]).double() for key, found in parts.items()}
    scores = {key: torch.cat([samples.log_likelihood for samples in found]) for key, found in parts.items()}

    def rms(key: float | str) -> float:
        return (images[key] - images["labelled"]).square().mean().sqrt().item()

    out: dict[str, float] = {"baked_samples": len(images["base"]), "baked_label_rms": rms("base")}
    for key, prefix in (("labelled", "baked_label_"), *((scale, f"baked.{scale:g}.") for scale in scales)):
        out[f"{prefix}log_likelihood"] = scores[key].mean().item()
        out[f"{prefix}log_likelihood_se"] = (scores[key].std() / len(scores[key]) ** 0.5).item()
        out |= {} if key == "labelled" else {f"{prefix}rms": rms(key)}
    return out


def by_label_scale(metrics: dict[str, Any]) -> dict[float, dict[str, Any]]:
    """The rows of `measure_baked` in a flat dict of metrics: {label_scale: {NAME: value}}, in order of the scale."""
    rows: dict[float, dict[str, Any]] = {}
    for key, value in metrics.items():
        if found := re.fullmatch(r"baked\.(\d+(?:\.\d+)?)\.([a-z_]+)", key):
            rows.setdefault(float(found[1]), {})[found[2]] = value
    return dict(sorted(rows.items()))
