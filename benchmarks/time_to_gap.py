"""Seconds of training until the gap to the exact law is below so many nats: our objectives, and the official algorithm, on the digits.

    python benchmarks/time_to_gap.py [--only VARIANT …] [--seeds 0 …] [--smoke]      # experiments/time_to_gap.yaml

Same base, classifier, batch and optimizer for all; LoRA, but for `control-head`, whose seconds begin with its warm start; a cosine over each run's own
number of updates, which is what fits into the seconds (`seconds` of the experiment file, or the variant's own). The gap is
log Z, from base samples, minus J on fresh trajectories, which are not counted. Seconds are updates times what one costs on a quiet core (`price_of` in
digits_runs.py). A threshold is reached at the first point below it whose next point is below it too. The last point is measured twice, on
other noise.

The official algorithm (official.py) runs as its authors run it, but for what that file says, once with each of a few KL weights, of which the best
counts. It has no coarse start.

Writes results/time_to_gap/VARIANT-seedN.json: curve, seconds to each threshold (null: not within `seconds`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
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
    warmed,
)
from experiment import arguments, run_all
from official import official_objective

from diffusers_ctrl import CTRLTrainer
from diffusers_ctrl.evaluation import Samples, certificate, exact_law, judge
from diffusers_ctrl.objectives import OBJECTIVES
from diffusers_ctrl.rollouts import Environment
from digits_data import oracle


Point = dict[str, float]


def time_to(curve: Sequence[Point], level: float) -> float | None:
    """Seconds of the first point with a gap below `level` that the next point confirms; None where there is none."""
    for point, following in zip(curve, curve[1:], strict=False):
        if point["gap"] < level and following["gap"] < level:
            return point["seconds"]
    return None


def point_of(samples: Samples, environment: Environment, law: dict[str, float], attribute: str) -> Point:
    """Gap to log Z of the base samples (`law`, from `exact_law`), nats, with its parts."""
    found = judge(samples, environment, lambda x: oracle(attribute, x))
    j = certificate(found, environment.gamma)
    right = (found.measured[:, 0] == environment.labels[found.label_rows, 0]).double()
    return {
        "gap": law["base_log_partition"] - j.objective,
        "gap_se": math.hypot(law["base_log_partition_se"], j.objective_se),
        "objective": j.objective,
        "kl": found.kl.mean().item(),
        "accuracy": right.mean().item(),
        "accuracy_se": (right.std() / math.sqrt(len(right))).item(),
    }


def measure(trainer: CTRLTrainer, law: dict[str, float], attribute: str, per_label: int, seed: int) -> Point:
    """`point_of` fresh samples of the tuned model."""
    return point_of(drawn(trainer, trainer.environment, per_label, seed), trainer.environment, law, attribute)


def run(spec: dict[str, Any], name: str, seed: int, cache: Path) -> dict[str, Any]:
    """Trains one variant; a point about every `every` seconds."""
    settings, labels = spec["variants"][name], Labels(spec["attribute"], spec["num_labels"], seed)
    if settings["objective"] == "official":
        OBJECTIVES["official"] = official_objective(1.0, settings["kl_weight"], seed)
    config = config_of(spec["common"], settings, seed, cache / "run")
    classifier, _ = cached_classifier(spec["base"], labels, cache, spec["epochs"])
    trainer = make_trainer(spec["base"], classifier, config)
    law = exact_law(base_samples(trainer, spec["base_samples"], cache), trainer.environment)
    of = {name: settings.get(name, spec[name]) for name in ("seconds", "every", "curve_samples")}
    warm = warmed(trainer)
    price = fit_to_seconds(trainer, of["seconds"] - warm, settings.get("coarse_share", 0.0))
    curve: list[Point] = []

    def look(update: int) -> None:
        last, spent = update == config.max_updates, warm + price.of(update, config.coarse_updates)
        # a warm start is worth a point of its own, before anything else is learned
        if last or spent >= warm + of["every"] * (len(curve) + (not warm)):
            for noise in (1, 2) if last else (1,):
                point = measure(trainer, law, spec["attribute"], of["curve_samples"], noise)
                curve.append({"seconds": spent, "updates": update, **point})

    cpu = train(trainer, look)
    times = {f"{level:g}": time_to(curve, level) for level in spec["thresholds"]}
    about = {"settings": {**spec["common"], **settings}, "thresholds": times, "seconds": curve[-1]["seconds"], "seconds_cpu": cpu}
    about |= {
        "updates": trainer.update,
        "seconds_warm_start": warm,
        "coarse_updates": config.coarse_updates,
        "seconds_an_update": asdict(price),
        **law,
    }
    return {**about, "curve_samples": of["curve_samples"], "curve": curve}


def line(record: dict[str, Any]) -> str:
    reached = "  ".join(f"{k}: {'-' if v is None else f'{v:.0f} s'}" for k, v in record["thresholds"].items())
    last = record["curve"][-1]
    return f"{record['updates']} updates, {record['seconds']:.0f} s  gap {last['gap']:.2f} ± {last['gap_se']:.2f}  {reached}"


def main(given: list[str] | None = None) -> None:
    args = arguments("time_to_gap", __doc__, given)
    run_all(args, args.spec["variants"], lambda name, seed: run(args.spec, name, seed, args.cache), line)


if __name__ == "__main__":
    main()
