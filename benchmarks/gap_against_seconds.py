"""How fast each way of training closes the gap on the digits: benchmarks/experiments/*.yaml -> benchmarks/results/*.json.

    python benchmarks/gap_against_seconds.py benchmarks/experiments/digits_stroke_search.yaml [--only NAME …] [--seconds 120]

Each variant gets the same classifier, the same base samples and the same seconds of training: its number of updates, and with it
its cosine schedule, is set from the time of its first updates. The certificate is then measured on fresh trajectories.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml
from digits_runs import Labels, cached_classifier, config_of, fit_to_seconds, make_trainer

from diffusers_ctrl.evaluation import draw_samples, evaluate
from digits_data import ATTRIBUTES, oracle
from records import RESULTS, provenance, write_json


def run_variant(spec: dict, settings: dict, seconds: float, eval_samples: int, base_samples: int, cache: Path) -> dict:
    """Trains one variant for `seconds`, then measures it."""
    attribute, every = spec["attribute"], {**spec["common"], **settings}
    config = config_of(spec["common"], settings, every.get("seed", 0), cache / "run")
    classifier, _ = cached_classifier(spec["base"], Labels(attribute, spec["num_labels"], config.seed), cache)
    trainer = make_trainer(spec["base"], classifier, config)
    fit_to_seconds(trainer, seconds, every.get("coarse_share", 0.0))
    history = trainer.train()
    generator = torch.Generator().manual_seed(12345)
    tuned = draw_samples(trainer.policy, trainer.environment, eval_samples, generator, progress=False)
    base = draw_samples(trainer.policy, trainer.environment, base_samples // 3, generator, tuned=False, progress=False)
    metrics = evaluate(
        tuned, base, trainer.environment, list(ATTRIBUTES[attribute]), oracle=lambda images: oracle(attribute, images)
    )
    stride = max(1, len(history) // 100)
    smooth, curve = history[0]["objective"], []
    for i, row in enumerate(history):
        smooth = 0.9 * smooth + 0.1 * row["objective"]
        if i % stride == 0:
            curve.append([round(row["seconds"], 1), round(smooth, 4)])
    return {
        "settings": settings,
        "updates": trainer.update,
        "seconds": history[-1]["seconds"],
        "metrics": metrics,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--only", nargs="*", help="variants to run; all by default")
    parser.add_argument("--seconds", type=float, help="seconds of training a variant; the file's by default")
    parser.add_argument("--output", type=Path, help="results file; benchmarks/results/NAME.json by default")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the updates are counted out in seconds of one thread
    spec = yaml.safe_load(args.experiment.read_text())
    output = args.output or RESULTS / f"{args.experiment.stem}.json"
    results = json.loads(output.read_text()) if output.is_file() else {"variants": {}}
    for name, settings in spec["variants"].items():
        if args.only and name not in args.only:
            continue
        seconds = args.seconds or spec["seconds"]
        row = run_variant(spec, settings or {}, seconds, spec["eval_samples"], spec["base_samples"], args.cache)
        row |= {**provenance(), "threads": torch.get_num_threads()}
        row["seed"] = {**spec["common"], **(settings or {})}.get("seed", 0)
        results["variants"][name] = row
        write_json(output, results)
        m = row["metrics"]
        print(
            f"{name:28} {row['updates']:5} updates {row['seconds']:6.0f} s  J {m['objective']:.3f}  KL {m['kl']:.3f}  gap "
            f"{m['gap']:.3f} ± {m['gap_se']:.3f}  vs base {m['base_log_partition'] - m['objective']:.3f}  accuracy "
            f"{m['accuracy']:.3f} (exact {m['exact_accuracy']:.3f})  ess {m['ess']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
