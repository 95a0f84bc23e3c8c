"""What a label baked into a plain pipeline loses under classifier-free guidance, and how much of it `label_scale` brings back.

    python benchmarks/baked_guidance.py --adapter digits-stroke [--guidance_scales 2 3 5] [--per_label 50] [--seed 0]

Writes results/baked_guidance.json after each guidance scale: `baked.measure_baked` at four label scales.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from diffusers_ctrl.adapters import load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.baked import by_label_scale, label_scales, measure_baked  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import parse_arguments  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="digits-stroke")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[2.0, 3.0, 5.0])
    parser.add_argument("--per_label", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "baked_guidance.json")
    args = parser.parse_args()
    task, _ = parse_arguments([])
    adapter = load_adapter(resolve_folder(args.adapter))
    rows = {}
    for scale in args.guidance_scales:
        sampler = {**adapter.config.sampler, "guidance_scale": scale}
        policy, environment = adapter_environment(replace(adapter, config=replace(adapter.config, sampler=sampler)), task)
        with policy.merged():
            found = measure_baked(policy, environment, args.per_label, args.seed, label_scales(scale))
        rows[f"{scale:g}"] = found
        print(
            f"guidance scale {scale:g}: the label moves images by {found['baked_label_rms']:.3f}, log p̂ {found['baked_label_log_likelihood']:.3f}"
        )
        for factor, row in by_label_scale(found).items():
            print(
                f"  label_scale {factor:g}: off by {row['rms']:.3f}, log p̂ {row['log_likelihood']:.3f} ± {row['log_likelihood_se']:.3f}"
            )
        settings = {"adapter": args.adapter, "per_label": args.per_label, "seed": args.seed, "gamma": adapter.config.gamma}
        write_json(args.output, {"by_guidance_scale": rows, **settings, **provenance()})


if __name__ == "__main__":
    main()
