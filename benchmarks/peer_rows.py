"""The rows of a method in the tables of peers.py: its one number tuned on validation images, then judged by the oracles on others."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from exact_reference import (
    FLOORS,
    JUDGE,
    JUDGED,
    PRICED,
    VALIDATION,
    distance_to_law,
    noise_seed,
    of_each,
    of_exact_draws,
    small,
    to_exact,
)
from tqdm.auto import tqdm

from diffusers_ctrl.accuracy import agreement
from peer_methods import EXACT, METHODS, PLAIN, Draw, Method, Setting, Trained, sharpness
from task import attribute_oracle


BATCH, PATHS = 120, 100


def noise_of(s: Setting, use: int, row: int) -> torch.Generator:
    """The noise of that row of the labels."""
    return torch.Generator().manual_seed(noise_seed(s.seed, use) * 1_000_003 + row)


def draw_all(s: Setting, draw: Draw, per_label: int, use: int) -> list[torch.Tensor]:
    """`per_label` images of each label, running through the prompts. use: of noise, as `noise_seed` has it."""
    prompts, found = torch.arange(per_label) % len(s.base.conditions), []
    for row, label in enumerate(s.labels):
        generator = noise_of(s, use, row)
        found.append(torch.cat([draw(label, part, generator) for part in prompts.split(BATCH)]))
    return found


def diversity(s: Setting, images: list[torch.Tensor], generator: torch.Generator) -> float:
    """Mean distance of two pictures of one label and digit, over the same of exact draws."""
    ratios = []
    for label, own in enumerate(images):
        exact = s.reference.in_turn(label, len(own), generator)
        parts = [(small(own), s.reference.cells_of(own)), (s.reference.features[exact], s.reference.cells[exact])]
        means = []
        for features, cells in parts:
            digits = s.reference.digits_of(cells)
            spread = [torch.pdist(features[digits == digit]).mean() for digit in digits.unique() if (digits == digit).sum() > 1]
            means.append(torch.stack(spread).mean())
        ratios.append((means[0] / means[1]).item())
    return sum(ratios) / len(ratios)


def judge(s: Setting, images: list[torch.Tensor]) -> dict[str, Any]:
    """The row's figures, means over labels; `by_label`: accuracy of each."""
    generator = torch.Generator().manual_seed(noise_seed(s.seed, JUDGE))
    space, pictures = s.space, torch.cat(images)
    asked = torch.cat([label.expand(len(own), -1) for label, own in zip(s.labels, images, strict=True)])
    found = torch.as_tensor(attribute_oracle(s.task)(pictures)).view(len(pictures), -1).double()
    out: dict[str, Any] = {k: v for k, v in agreement(space, asked, found).items() if k in ("accuracy", "macro_f1")}
    right = (found == asked).all(dim=1).double()
    out["accuracy_se"] = math.sqrt(out["accuracy"] * (1 - out["accuracy"]) / len(right))
    out["by_label"] = [part.mean().item() for part in right.split([len(own) for own in images])]
    out["worst_label"] = min(out["by_label"])
    prompts = torch.cat([torch.arange(len(own)) % len(s.base.conditions) for own in images])
    out["prompt_accuracy"] = (s.reference.digits_of(s.reference.cells_of(pictures)) == prompts).double().mean().item()
    out["tv"] = distance_to_law(s.reference, images)
    out["mmd2"] = statistics.mean(to_exact(s.reference, row, generator)(small(own)) for row, own in enumerate(images))
    return out | {"diversity": diversity(s, images, generator)}


def priced(s: Setting, draw: Draw, per_label: int) -> dict[str, float]:
    """KL of the paths to the base's, and log Z − E[log p̂ − KL], the gap to the exact law at gamma = 1; nats, with standard errors."""
    prompts, kl, gaps = torch.arange(per_label) % len(s.base.conditions), [], []
    for row, label in enumerate(s.labels):
        with s.base.pricing(per_label), torch.no_grad():
            images = draw(label, prompts, noise_of(s, PRICED, row))
            kl.append(s.base.kl.double())
            gaps.append(s.reference.log_partition - s.likelihood(images, label.expand(per_label, -1)).double() + kl[-1])
    out = {}
    for name, values in (("kl", torch.cat(kl)), ("gap", torch.cat(gaps))):
        if values.isfinite().all():
            out |= {name: values.mean().item(), f"{name}_se": (values.std() / math.sqrt(len(values))).item()}
    return out


def best_of(tried: list[dict[str, Any]], method: Method) -> dict[str, dict[str, Any]]:
    """{aim: what was tried}: the nearest; the most accurate by the classifier, of equals the first; `plain`, the weight of 1, where Bayes says so."""
    best = {"distance": min(tried, key=lambda one: one["tv"]), "accuracy": max(tried, key=sharpness)}
    if method.plain and (plain := [one for one in tried if one["weight"] == 1]):
        best[PLAIN] = plain[0]
    return best


def validated(s: Setting, draw: Draw, validation: int) -> dict[str, float]:
    """How near to the exact law, and how often the classifier reads the label that was asked for."""
    images = draw_all(s, draw, validation, VALIDATION)
    with torch.no_grad():
        right = [(of_each(own, s.labels, s.classifier).argmax(dim=1) == row).sum().item() for row, own in enumerate(images)]
    return {"tv": distance_to_law(s.reference, images), "classifier_accuracy": sum(right) / sum(map(len, images))}


def tuned(
    s: Setting, method: Method, validation: int, bar: tqdm, known: dict[float, dict[str, Any]] | None = None
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], Callable[[float], Draw]]:
    """{aim: what was tried}, as `best_of` has it, all that was tried, and how to draw with a weight.

    known: by its weight what was tried before, and is not again.
    """
    started = time.perf_counter()
    fitted = method.fit(s) if method.fit else None
    fitting = fitted.seconds if isinstance(fitted, Trained) else time.perf_counter() - started

    @cache
    def draw_with(weight: float) -> Draw:
        return method.draw(s, fitted, weight)

    tried: list[dict[str, Any]] = []
    while (weight := method.next_weight(tried)) is not None:
        if known and weight in known:
            one = known[weight]
        else:
            started = time.perf_counter()
            draw = draw_with(weight)
            training = fitting + time.perf_counter() - started
            one = {"weight": weight, **validated(s, draw, validation), "training": training}
            bar.set_postfix(weight=weight, tv=f"{one['tv']:.3f}", accuracy=f"{one['classifier_accuracy']:.3f}")
        tried.append(one)
        if s.smoke:
            break
    return best_of(tried, method), tried, draw_with


def base_seconds(s: Setting, n: int) -> float:
    """A sample of the base itself, now."""
    started = time.perf_counter()
    s.base.draw(torch.arange(n) % len(s.base.conditions), torch.Generator().manual_seed(0))
    return (time.perf_counter() - started) / n


def judged_row(s: Setting, name: str, weight: float, draw: Draw, outputs: int) -> dict[str, Any]:
    """A method's figures with one weight, and what it costs."""
    alike = min(BATCH, outputs)  # as many at a time as the method draws
    before, started = base_seconds(s, alike), time.perf_counter()
    s.base.calls.clear()
    images = draw_all(s, draw, outputs, JUDGED)
    seconds, count = time.perf_counter() - started, outputs * len(s.labels)
    row = judge(s, images)
    row |= {f"{way}_calls": s.base.calls[way] / count for way in ("forward", "backward")}
    row["seconds_a_sample"] = seconds / count
    row["times_base"] = row["seconds_a_sample"] / ((before + base_seconds(s, alike)) / 2)
    if name == EXACT:
        row["smallest_ess"] = min(s.reference.effective_sizes(label, weight).min().item() for label in range(len(s.labels)))
    if METHODS[name].priced:
        row |= priced(s, draw, 10 if s.smoke else PATHS)
    return row


def rows_of(
    s: Setting, name: str, outputs: int, validation: int, bar: tqdm, earlier: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One row for each weight that is best for something.

    earlier: rows of the same method and noise, whose figures stay, but for a method that is fitted first: another fit is another law.
    """
    earlier = None if METHODS[name].fit else earlier
    judged = {row["weight"]: row for row in earlier or []}
    known = {one["weight"]: one for one in earlier[0]["tried"]} if earlier else {}
    best, tried, draw_with = tuned(s, METHODS[name], validation, bar, known)
    rows = []
    for chosen in tried:
        if aims := sorted(aim for aim, one in best.items() if one is chosen):
            weight = chosen["weight"]
            row = judged.get(weight) or judged_row(s, name, weight, draw_with(weight), outputs)
            of = {"weight": weight, "seconds_training": chosen["training"], "tried": tried}
            rows.append({**row, **of, "tuned_for": aims})
    if name == EXACT:  # of the law at gamma = 1, whatever the row's
        rows[0] |= of_exact_draws(s.reference, outputs, torch.Generator().manual_seed(noise_seed(s.seed, FLOORS)))
    return rows
