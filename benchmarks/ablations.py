"""What CTRL's result depends on, a row each: labels corrupted, calibration, gamma, truncation, steps, LoRA rank, objective.

    python benchmarks/ablations.py [--only VARIANT …] [--seeds 0 …] [--smoke]      # experiments/ablations.yaml

All variants get the same seconds of training (as a quiet core would take them, `price_of` in digits_runs.py), the same labels and seed, and differ from `default` in what their
name says. The gap is to the exact law of the variant's own p̂, gamma and number of steps; accuracy and `exact_accuracy`, that law's own, are by the
exact oracle, which a wrong p̂ does not share. So corrupted labels show in `exact_accuracy`, what training leaves over in the gap.

`corrupted`: that share of the labels is another class than the digit's, for the classifier's fit and its calibration alike. `temperature`: put in
place of the fitted one; 1 is no calibration, less is over-confident on purpose.

Writes results/ablations/VARIANT-seedN.json.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from digits_runs import (
    Labels,
    base_samples,
    cached_classifier,
    config_of,
    drawn,
    figures,
    fit_to_seconds,
    make_trainer,
    train,
    unseen_figures,
)
from experiment import arguments, run_all

from diffusers_ctrl.evaluation import lower_bounds


NAMES = ("accuracy", "macro_f1", "prompt_accuracy", "exact_accuracy", "base_accuracy", "log_likelihood", "kl", "objective")
NAMES += ("log_partition", "base_log_partition", "gap", "gap_from_base", "smallest_ess", "base_smallest_ess")


def run(spec: dict[str, Any], name: str, seed: int, cache: Path) -> dict[str, Any]:
    settings = spec["variants"][name] or {}
    own = {key: settings[key] for key in ("corrupted", "members") if key in settings}
    labels = Labels(spec["attribute"], spec["num_labels"], seed, **own)
    classifier, _ = cached_classifier(spec["base"], labels, cache, spec["epochs"])
    fitted = classifier.config.temperatures[0]
    if "temperature" in settings:
        classifier.register_to_config(temperatures=(settings["temperature"],))
    config = config_of(spec["common"], settings, seed, cache / "run")
    trainer = make_trainer(spec["base"], classifier, config)
    base = base_samples(trainer, spec["base_samples"], cache)
    price = fit_to_seconds(trainer, spec["seconds"], {**spec["common"], **settings}["coarse_share"])
    cpu = train(trainer)
    found = figures(trainer, spec["attribute"], drawn(trainer, trainer.environment, spec["eval_samples"], 5), base)
    metrics = {key: found[key] for name in NAMES for key in (name, f"{name}_se") if key in found}
    metrics |= {f"{key}_is_lower_bound": key in lower_bounds(found) for key in ("gap", "gap_from_base")}
    return {
        "settings": {**spec["common"], **settings},
        "changed": settings,
        "updates": trainer.update,
        "coarse_updates": config.coarse_updates,
        "seconds": price.of(trainer.update, config.coarse_updates),
        "seconds_cpu": cpu,
        "seconds_an_update": asdict(price),
        "seconds_asked": spec["seconds"],
        "classifier": {**unseen_figures(spec["base"], labels, classifier), "fitted_temperature": fitted},
        "metrics": metrics,
    }


def line(record: dict[str, Any]) -> str:
    m = record["metrics"]
    flags = "".join(" (lower bound)" if m[f"{name}_is_lower_bound"] else "" for name in ("gap_from_base",))
    return (
        f"{record['updates']:4} updates {record['seconds']:4.0f} s  accuracy {m['accuracy']:.3f} (exact {m['exact_accuracy']:.3f})  KL "
        f"{m['kl']:.2f}  gap {m['gap_from_base']:.2f} ± {m['gap_from_base_se']:.2f}{flags}"
    )


def main(given: list[str] | None = None) -> None:
    args = arguments("ablations", __doc__, given)
    run_all(args, args.spec["variants"], lambda name, seed: run(args.spec, name, seed, args.cache), line)


if __name__ == "__main__":
    main()
