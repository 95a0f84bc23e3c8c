"""Seconds of training until the gap to the exact law is below so many nats: our objectives, and the official algorithm, on the digits.

    python benchmarks/time_to_gap.py [--only VARIANT …] [--seeds 0 …] [--smoke]      # experiments/time_to_gap.yaml

Same base, classifier, LoRA, batch and optimizer for all; a cosine over each run's own number of updates, which is what fits into the seconds. The gap is
log Z, from base samples, minus J on fresh trajectories, which are not counted in the seconds (CPU seconds of one thread). A threshold is reached at the
first point below it whose next point is below it too. The last point is measured twice, on other noise.

The official algorithm (official.py) runs as its authors run it, but for what that file says. It is given the KL weight, and then the learning
rate, with which it is best after `tuning_seconds`. It has no coarse start.

Writes results/time_to_gap/VARIANT-seedN.json: curve, seconds to each threshold (null: not within `seconds`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from digits_runs import (
    Labels,
    base_samples,
    cached_classifier,
    config_of,
    drawn,
    fit_to_seconds,
    make_trainer,
    train,
)
from experiment import arguments, run_all
from official import official_objective

from diffusers_ctrl import CTRLTrainer
from diffusers_ctrl.evaluation import certificate, exact_law, judge
from diffusers_ctrl.objectives import OBJECTIVES
from digits_data import oracle


Point = dict[str, float]


def time_to(curve: Sequence[Point], level: float) -> float | None:
    """Seconds of the first point with a gap below `level` that the next point confirms; None where there is none."""
    for point, following in zip(curve, curve[1:], strict=False):
        if point["gap"] < level and following["gap"] < level:
            return point["seconds"]
    return None


def measure(trainer: CTRLTrainer, law: dict[str, float], attribute: str, per_label: int, seed: int) -> Point:
    """Gap to log Z of the base samples (`law`, from `exact_law`), nats, with its parts."""
    found = judge(drawn(trainer, trainer.environment, per_label, seed), trainer.environment, lambda x: oracle(attribute, x))
    j = certificate(found, trainer.environment.gamma)
    accuracy = (found.measured[:, 0] == trainer.environment.labels[found.label_rows, 0]).double().mean().item()
    return {
        "gap": law["base_log_partition"] - j.objective,
        "gap_se": math.hypot(law["base_log_partition_se"], j.objective_se),
        "objective": j.objective,
        "kl": found.kl.mean().item(),
        "accuracy": accuracy,
    }


def curve_of(
    spec: dict[str, Any], settings: dict[str, Any], seconds: float, every: float, seed: int, cache: Path
) -> dict[str, Any]:
    """Trains one variant for so many seconds; a point about every `every` of them."""
    labels = Labels(spec["attribute"], spec["num_labels"], seed)
    if settings["objective"] == "official":
        OBJECTIVES["official"] = official_objective(1.0, settings["kl_weight"], seed)
    config = config_of(spec["common"], settings, seed, cache / "run")
    classifier, _ = cached_classifier(spec["base"], labels, cache, spec["epochs"])
    trainer = make_trainer(spec["base"], classifier, config)
    law = exact_law(base_samples(trainer, spec["base_samples"], cache), trainer.environment)
    fit_to_seconds(trainer, seconds, settings.get("coarse_share", 0.0))
    curve: list[Point] = []

    def look(update: int, spent: float) -> None:
        last = update == config.max_updates
        if last or spent >= every * (len(curve) + 1):
            for noise in (1, 2) if last else (1,):
                point = measure(trainer, law, spec["attribute"], spec["curve_samples"], noise)
                curve.append({"seconds": spent, "updates": update, **point})

    spent = train(trainer, look)
    about = {"updates": trainer.update, "coarse_updates": config.coarse_updates, "seconds": spent, **law}
    return {**about, "curve_samples": spec["curve_samples"], "curve": curve}


def tuned_official(spec: dict[str, Any], settings: dict[str, Any], seed: int, cache: Path) -> tuple[dict[str, Any], list[dict]]:
    """The settings with the KL weight, and then the learning rates, that are best after `tuning_seconds`; and all that was tried."""
    tried: list[tuple[dict[str, Any], Point]] = []

    def attempt(kl_weight: float, rates: list[float]) -> None:
        one = {"kl_weight": kl_weight, **dict(zip(("learning_rate", "label_learning_rate"), rates, strict=True))}
        found = curve_of(spec, {**settings, **one}, spec["tuning_seconds"], math.inf, seed, cache)
        tried.append((one, found["curve"][-1]))

    def best() -> dict[str, Any]:
        return min(tried, key=lambda pair: pair[1]["gap"])[0]

    first, *others = settings["learning_rates"]
    for kl_weight in settings["kl_weights"]:
        attempt(kl_weight, first)
    for rates in others:
        attempt(best()["kl_weight"], rates)
    return {**settings, **best()}, [{**one, **point} for one, point in tried]


def run(spec: dict[str, Any], name: str, seed: int, cache: Path) -> dict[str, Any]:
    settings, tried = spec["variants"][name], None
    if settings["objective"] == "official":
        settings, tried = tuned_official(spec, settings, seed, cache)
    found = curve_of(spec, settings, spec["seconds"], spec["every"], seed, cache)
    times = {f"{level:g}": time_to(found["curve"], level) for level in spec["thresholds"]}
    return {"settings": {**spec["common"], **settings}, "thresholds": times, **found, **({} if tried is None else {"tried": tried})}


def line(record: dict[str, Any]) -> str:
    reached = "  ".join(f"{k}: {'-' if v is None else f'{v:.0f} s'}" for k, v in record["thresholds"].items())
    last = record["curve"][-1]
    return f"{record['updates']} updates, {record['seconds']:.0f} s  gap {last['gap']:.2f} ± {last['gap_se']:.2f}  {reached}"


def main(given: list[str] | None = None) -> None:
    args = arguments("time_to_gap", __doc__, given)
    run_all(args, args.spec["variants"], lambda name, seed: run(args.spec, name, seed, args.cache), line)


if __name__ == "__main__":
    main()
