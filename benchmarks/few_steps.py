"""An adapter sampled with other numbers of steps than it was trained with: is it still the label's law, and what does it cost?

    python benchmarks/few_steps.py --adapter digits-stroke [--steps 8 16 32 50] [--outputs 300] [--seed 0]

Each K is its own base law, so base and tuned model are both sampled with it, and the gap at K is to the exact law of the K-step base.
`trained` marks the adapter's own K. Writes results/few_steps.json after each K.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from diffusers_ctrl.adapters import load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.evaluation import draw_samples, evaluate  # noqa: E402
from diffusers_ctrl.labels import label_grid  # noqa: E402
from diffusers_ctrl.rollouts import Sampler  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import attribute_oracle, parse_arguments, prompt_judge  # noqa: E402


NAMES = (
    "accuracy",
    "exact_accuracy",
    "base_accuracy",
    "prompt_accuracy",
    "base_prompt_accuracy",
    "kl",
    "objective",
    "log_partition",
    "base_log_partition",
    "gap",
    "gap_from_base",
    "ess",
    "smallest_ess",
    "gap_is_lower_bound",
    "base_smallest_ess",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="digits-stroke")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 50], help="K, one row each")
    parser.add_argument("--outputs", type=int, default=300, help="tuned samples, and as many base samples, for each label")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "few_steps.json")
    args = parser.parse_args()
    task, _ = parse_arguments([])
    adapter = load_adapter(resolve_folder(args.adapter))
    policy, environment = adapter_environment(adapter, task)
    names = label_grid(adapter.label_encoder.label_space).names
    judges = {"oracle": attribute_oracle(task), "prompt_oracle": prompt_judge(task.prompt_oracle, task.prompts)}
    results = {
        "adapter": args.adapter,
        "trained_steps": adapter.config.sampler["num_inference_steps"],
        "gamma": adapter.config.gamma,
        "outputs_per_label": args.outputs,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        **provenance(),
        "rows": [],
    }
    own = environment.sampler
    for steps in args.steps:
        started = time.perf_counter()
        at = replace(environment, sampler=Sampler(own.scheduler, steps, own.options))
        with policy.merged():
            generator = torch.Generator().manual_seed(args.seed + 1_000_003 * steps)
            tuned = draw_samples(policy, at, args.outputs, generator, progress=False)
            base = draw_samples(policy, at, args.outputs, generator, tuned=False, progress=False)
        found = evaluate(tuned, base, at, names, **judges)
        row = {"steps": steps, "seconds": round(time.perf_counter() - started, 1)}
        row |= {key: found[key] for name in NAMES for key in (name, f"{name}_se") if key in found}
        results["rows"].append(row)
        write_json(args.output, results)
        print(
            f"K {steps:3}  accuracy {row['accuracy']:.3f} ± {row['accuracy_se']:.3f} (exact law {row['exact_accuracy']:.3f})  digit "
            f"{row['prompt_accuracy']:.3f} (base {row['base_prompt_accuracy']:.3f})  KL {row['kl']:.2f}  gap {row['gap']:.2f} ± "
            f"{row['gap_se']:.2f}, from base samples {row['gap_from_base']:.2f} ± {row['gap_from_base_se']:.2f}  {row['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
