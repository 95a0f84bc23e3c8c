"""What a label costs at inference: a labelled call of the pipeline over a plain one, and over a plain one with LoRA left unmerged.

    python benchmarks/label_cost.py [--adapter digits-stroke] [--images 50] [--pairs 20] [--threads 1] [--smoke]

The shipped adapter, or another of the digits, 16 steps, CPU seconds (so that other programs count less); calls take turns, and each pair makes one ratio. Writes
results/label_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from diffusers_ctrl import CTRLPipeline, injection  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="digits-stroke", help="of the digits base: an embedded adapter's name or a folder")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "label_cost.json")
    parser.add_argument("--smoke", action="store_true", help="two pairs of two images, to see that it runs")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.images = args.pairs = 2
    torch.set_num_threads(args.threads)
    pipe = CTRLPipeline.from_pretrained(args.adapter)
    pipe.set_progress_bar_config(disable=True)
    prompts, limit = ["a handwritten seven"] * args.images, injection.MERGED_BYTES
    plain = {"num_inference_steps": 16, "eta": 1.0, "guidance_scale": 1.0}

    def unmerged() -> None:
        injection.MERGED_BYTES = 0
        try:
            pipe(prompts, label="bold")
        finally:
            injection.MERGED_BYTES = limit

    calls = {"plain": lambda: pipe(prompts, **plain), "labelled": lambda: pipe(prompts, label="bold"), "unmerged": unmerged}
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(args.pairs), unit="pair"):
        for name, call in calls.items():
            found[name].append(seconds(call) / args.images)
    record = {"images": args.images, "pairs": args.pairs, "threads": args.threads}
    record["cpu_seconds_an_image"] = {name: round(statistics.median(values), 5) for name, values in found.items()}
    for name in ("labelled", "unmerged"):
        ratios = [a / b for a, b in zip(found[name], found["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        record[f"{name}_over_plain"] = {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
        print(f"{name} call / plain call: {middle:.3f} ({low:.3f} to {high:.3f}, the middle half of {args.pairs} pairs)")
    write_json(args.output, {**record, **provenance()})


if __name__ == "__main__":
    main()
