"""Peak memory of one update against the number of steps K, for each objective; and against the micro-batch and the reward's chunks.

    python benchmarks/memory.py [--steps 10 50 100 1000]

Each row is a process of its own. A small U-Net (latents 4x16x16, batch 8, float32) takes one update of 4 steps, so that all code is
loaded; then the kernel's high-water mark of resident memory is set back (/proc/self/clear_refs, so Linux only), and the row is that
mark after one update of K steps, above what was resident before. Freed memory is given back at once (MALLOC_MMAP_THRESHOLD_), so that no
free list counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from devices import Memory
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

from diffusers_ctrl import Categorical, LabelSpace, Policy
from diffusers_ctrl.objectives import OBJECTIVES
from diffusers_ctrl.rollouts import Environment, Sampler
from records import RESULTS, provenance, write_json


BATCH, SHAPE = 8, (4, 16, 16)
ROWS = {  # objective, checkpointing; whether memory should not depend on K
    "direct_backprop": ("direct_backprop", False, False),
    "direct_backprop, checkpointing": ("direct_backprop", True, True),
    "adjoint_matching": ("adjoint_matching", False, True),
    "policy_gradient": ("policy_gradient", False, False),
}
LARGEST = {"direct_backprop": 100}  # plain direct_backprop would need tens of gigabytes at 1,000
BATCHES = {  # micro-batches, rows that are decoded and scored at a time
    "batch of 8": (1, None),
    "batch of 8, reward_batch_size 1": (1, 1),
    "8 micro-batches of 1": (8, None),
}


def problem(steps: int, objective: str, checkpointing: bool, decode: bool, reward_batch_size: int | None):
    """(policy, environment) of a small U-Net with random weights; with `decode` an autoencoder makes 128x128 images first."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SHAPE[-1],
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    ).requires_grad_(False)
    vae = AutoencoderKL(
        latent_channels=SHAPE[0],
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    ).requires_grad_(False)
    policy = Policy(unet, label_space=LabelSpace(tone=Categorical(("dark", "light"))), lora_rank=4, checkpointing=checkpointing)
    for group in policy.trainable_parameters().values():
        for parameter in group:
            torch.nn.init.normal_(parameter, std=0.02)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )

    def reward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.logsigmoid((2 * labels[:, 0] - 1) * images.flatten(1).mean(1))

    environment = Environment(
        Sampler(scheduler, steps, {"eta": 1.0}),
        SHAPE,
        reward,
        torch.tensor([[0.0], [1.0]]),
        decode=(lambda x: vae.decode(x).sample) if decode else (lambda x: x),
        reward_batch_size=reward_batch_size,
    )
    return policy, environment


def update(policy: Policy, environment: Environment, objective: str, micro_batches: int) -> None:
    """The gradient of one update, accumulated over micro-batches."""
    generator = torch.Generator().manual_seed(0)
    policy.zero_grad()
    for _ in range(micro_batches):
        batch = environment.draw(BATCH // micro_batches, generator)
        loss, _ = OBJECTIVES[objective](policy, environment.sampler, batch, environment.log_likelihood, generator)
        (loss / micro_batches).backward()


def measure(
    steps: int, objective: str, checkpointing: bool, micro_batches: int, reward_batch_size: int | None, decode: bool
) -> dict:
    """One row, in this process."""
    update(*problem(4, objective, checkpointing, decode, reward_batch_size), objective, micro_batches)
    policy, environment = problem(steps, objective, checkpointing, decode, reward_batch_size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory, started = Memory("cpu"), time.perf_counter()
    update(policy, environment, objective, micro_batches)
    seconds = time.perf_counter() - started
    return {"peak_mib": round(memory.mib(), 1), "seconds_per_step": round(seconds / steps, 4)}


def in_fresh_process(**settings) -> dict:
    """`measure` where nothing ran before."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--row", json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The row {settings} failed: {done.stderr[-2000:]}")
    return {**settings, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 100, 1000])
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(measure(**arguments.row)))
        return
    record = {"batch": BATCH, "shape": SHAPE, "by_steps": {}, "by_batch": {}, **provenance()}
    for name, (objective, checkpointing, independent) in ROWS.items():
        rows = []
        for steps in arguments.steps:
            if steps <= LARGEST.get(name, steps):
                settings = {"steps": steps, "objective": objective, "checkpointing": checkpointing, "decode": False}
                rows.append(in_fresh_process(**settings, micro_batches=1, reward_batch_size=None))
        record["by_steps"][name] = rows
        print(f"{name:32}" + "".join(f"  K = {row['steps']}: {row['peak_mib']:.0f} MiB" for row in rows), flush=True)
        if independent:
            ratio = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
            print(f"{'':32}  K = {rows[-1]['steps']} over K = {rows[0]['steps']}: {ratio:.2f}", flush=True)
        write_json(arguments.output, record)
    for name, (micro_batches, reward_batch_size) in BATCHES.items():
        settings = {"steps": 10, "objective": "adjoint_matching", "checkpointing": False, "decode": True}
        row = in_fresh_process(**settings, micro_batches=micro_batches, reward_batch_size=reward_batch_size)
        record["by_batch"][name] = row
        print(f"{name:32}  {row['peak_mib']:.0f} MiB", flush=True)
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
