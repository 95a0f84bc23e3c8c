"""What one update costs: the official algorithm, our objectives, and sampling alone, on the same random-weight Stable Diffusion.

    python benchmarks/step_time.py [--size tiny] [--steps 20 50] [--threads 2] [--rounds 3] [--only NAME …]

Batch 4, guidance 7.5, float32, LoRA of rank 16 on the attention's projections, a reward by a small classifier of the decoded images. Each
row runs in a process of its own: two updates to warm up, then `--repeats` that are timed; all rows once, then all again, `--rounds` times, so that
a slow minute of the machine meets all of them. Seconds: median over rounds of the median update; ratios are taken within a round.
MiB: the process's peak above what it had before its first update. rows: samples that the U-Net was called with, recomputation included.

`official` is the algorithm of official.py. `sampling` is one batch of trajectories of the tuned model, without gradient: the floor of any method that
learns from its own samples. Writes results/step_time_SIZE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from official import official_loss, reference_unet  # noqa: E402
from random_sd import SIZES, ddim, random_embeds, random_unet, random_vae  # noqa: E402

from diffusers_ctrl import Categorical, Classifier, CTRLConfig, CTRLTrainer, LabelSpace, Policy  # noqa: E402
from diffusers_ctrl.rewards import classifier_reward  # noqa: E402
from diffusers_ctrl.rollouts import rollout  # noqa: E402
from records import RESULTS, provenance, resident_mib, write_json  # noqa: E402


GUIDANCE = 7.5
SPACE = LabelSpace(size=Categorical(("largest", "large", "small", "smallest")))
# settings of CTRLConfig by row; K stands for the number of steps
ROWS: dict[str, dict[str, Any]] = {
    "official": {},
    "adjoint_matching, a fifth of the steps (default)": {"objective": "adjoint_matching", "num_regression_steps": 0.2},
    "adjoint_matching, all steps": {"objective": "adjoint_matching"},
    "direct_backprop, all steps, tape": {"objective": "direct_backprop", "checkpointing": False},
    "direct_backprop, all steps": {"objective": "direct_backprop"},
    "direct_backprop, last fifth": {"objective": "direct_backprop", "truncation": 0.2},
    "policy_gradient": {"objective": "policy_gradient"},
    "sampling": {},
}
DEFAULT = "adjoint_matching, a fifth of the steps (default)"


def update_of(row: str, size_name: str, steps: int, folder: str) -> tuple[Callable[[], Any], torch.nn.Module]:
    """A function that does one update, and the U-Net whose calls are to be counted."""
    size = SIZES[size_name]
    torch.manual_seed(0)
    unet, vae = random_unet(size), random_vae(size)
    classifier = Classifier(SPACE.to_dict(), image_size=16, widths=(8, 16)).requires_grad_(False).eval()
    prompts, null = random_embeds(size, 8)
    settings = {"checkpointing": row != "official", "merge_lora": True}
    settings |= {k: max(1, round(steps * v)) if isinstance(v, float) else v for k, v in ROWS[row].items()}
    config = CTRLConfig(
        output_dir=folder, num_inference_steps=steps, guidance_scale=GUIDANCE, batch_size=4, report_to="none", **settings
    )
    policy = Policy(
        unet,
        label_space=SPACE,
        guidance_scale=1.0 if row == "official" else GUIDANCE,
        checkpointing=config.checkpointing,
    )

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return (vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    trainer = CTRLTrainer(
        policy,
        ddim(),
        classifier_reward(classifier),
        config,
        shape=(4, size.side, size.side),
        decode=decode,
        prompt_embeds=prompts,
        null_embeds=null,
    )
    environment, generator = trainer.environment, torch.Generator().manual_seed(0)
    if row == "sampling":

        def sampling() -> None:
            batch = environment.draw(config.batch_size, generator)
            with torch.no_grad(), policy.merged():
                rollout(policy, environment.sampler, batch, generator, reference=False)

        return sampling, unet
    if row != "official":
        return trainer._step, unet
    reference = reference_unet(unet)
    reference.conv_in.register_forward_pre_hook(lambda _, given: unet.conv_in.count(given))

    def official() -> None:
        batch = environment.draw(config.batch_size, generator)
        loss = official_loss(
            policy, reference, environment.sampler, batch, environment.log_likelihood, GUIDANCE, kl_weight=1.0, generator=generator
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in policy.trainable_parameters().values() for p in group], 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return official, unet


def worker(row: str, size: str, steps: int, repeats: int) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    rows = [0]
    with tempfile.TemporaryDirectory() as folder:
        update, unet = update_of(row, size, steps, folder)

        def count(given: tuple[torch.Tensor, ...]) -> None:
            rows[0] += len(given[0])

        unet.conv_in.count = count
        unet.conv_in.register_forward_pre_hook(lambda _, given: count(given))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_mib()
        update(), update()
        rows[0], seconds = 0, []
        for _ in range(repeats):
            started = time.perf_counter()
            update()
            seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "mib": resident_mib("VmHWM") - before, "rows": rows[0] / repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(args.threads)
        print(json.dumps(worker(args.worker, args.size, args.steps[0], args.repeats)))
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TQDM_DISABLE": "1"}
    found: dict[tuple[int, str], list[dict[str, float]]] = {(k, row): [] for k in args.steps for row in args.only}
    bar = tqdm(total=args.rounds * len(found), unit="process")
    for _ in range(args.rounds):
        for (steps, row), rounds in found.items():
            bar.set_description(f"{row}, {steps} steps")
            command = [sys.executable, __file__, "--worker", row, "--size", args.size, "--steps", str(steps)]
            command += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(f"{row}: {run.stderr[-2000:]}")
            rounds.append(json.loads(run.stdout.splitlines()[-1]))
            bar.update()
    bar.close()
    write_json(RESULTS / f"step_time_{args.size}.json", summary(found, args))


def summary(found: dict[tuple[int, str], list[dict[str, float]]], args: argparse.Namespace) -> dict[str, Any]:
    """The table, printed as it is made; ratios to the official algorithm and to sampling, within each round."""
    record = {
        "size": args.size,
        "threads": args.threads,
        "rounds": args.rounds,
        "repeats": args.repeats,
        **provenance(),
        "rows": [],
    }
    print(f"{'':52}{'steps':>6}{'seconds':>10}{'official':>10}{'floor':>8}{'MiB':>8}{'official':>10}{'rows':>8}")
    for (steps, name), rounds in found.items():
        row: dict[str, Any] = {"name": name, "steps": steps}
        row |= {key: statistics.median(one[key] for one in rounds) for key in ("seconds", "mib", "rows")}
        row["seconds_range"] = [min(one["seconds"] for one in rounds), max(one["seconds"] for one in rounds)]
        for what, other, key in (
            ("time_over_official", "official", "seconds"),
            ("memory_over_official", "official", "mib"),
            ("time_over_sampling", "sampling", "seconds"),
        ):
            if others := found.get((steps, other)):
                row[what] = statistics.median(a[key] / b[key] for a, b in zip(rounds, others, strict=True))
        record["rows"].append(row)
        cells = [
            f"{row.get(key, float('nan')):.2f}" for key in ("time_over_official", "time_over_sampling", "memory_over_official")
        ]
        print(
            f"{name:52}{steps:>6}{row['seconds']:>10.2f}{cells[0]:>10}{cells[1]:>8}{row['mib']:>8.0f}{cells[2]:>10}{row['rows']:>8.0f}"
        )
    return record


if __name__ == "__main__":
    main()
