"""`--dry_run`: everything is built and two real updates are made, for their memory and time; nothing of them is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_ctrl import CTRLConfig, CTRLTrainer, processes
from diffusers_ctrl.compiling import compiles
from diffusers_ctrl.evaluation import draw_samples
from task import TaskConfig


LABELS = 64  # labelled images that are read, for the label space
SAMPLES = 8  # of the base, where the dataset is drawn from it


@contextmanager
def dry_settings(task: TaskConfig, config: CTRLConfig) -> Iterator[tuple[TaskConfig, CTRLConfig]]:
    """The settings with which a dry run builds everything: in a temporary folder, with a few labels, without trackers or resuming."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one folder for the processes of a machine, which have one parent
        folder = Path(tempfile.gettempdir()) / f"ctrl-dry-run-{os.getppid()}"
        folder.mkdir(exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="ctrl-dry-run-"))
    few = SAMPLES if "base-samples" in task.dataset else LABELS
    try:
        yield (
            replace(task, num_labels=few if task.num_labels is None else min(few, task.num_labels)),
            replace(
                config,
                output_dir=str(folder),
                report_to="none",
                resume_from=None,
                checkpoint_every=0,
                sample_every=0,
                eval_every=0,
                kl_limit=None,
            ),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on the device, or by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def spell_seconds(seconds: float) -> str:
    """3725 -> '1 h 2 min'."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def print_dry_run(trainer: CTRLTrainer, task: TaskConfig) -> dict[str, Any]:
    """Makes two updates of each law that the run would train on, the first to warm up, and prints what they say about the run.

    Returns:
        {"parameters", "peak_bytes", "seconds_per_update", "seconds_per_coarse_update" where there are such, "seconds_train",
        "seconds_samples"}, the last two for the whole run.
    """
    config, policy, device = trainer.config, trainer.policy, trainer.accelerator.device
    built = peak_bytes(device)
    parameters = {name: sum(p.numel() for p in group) for name, group in policy.trainable_parameters().items()}
    frozen = sum(p.numel() for p in policy.denoiser.parameters() if not p.requires_grad)
    kinds = {"seconds_per_coarse_update": 2, "seconds_per_update": 2} if config.coarse_updates else {"seconds_per_update": 2}
    trainer.config = replace(config, max_updates=sum(kinds.values()), coarse_updates=2 if config.coarse_updates else 0)
    trainer.config.critic_trajectories = 0
    history = trainer.train()
    found: dict[str, Any] = {"parameters": parameters}
    for i, name in enumerate(kinds):
        found[name] = history[2 * i + 1]["seconds"] - history[2 * i]["seconds"]
    count = min(task.sample_batch_size, task.base_samples, 16)
    one_label = replace(trainer.environment, labels=trainer.environment.labels[:1])
    for _ in range(2 if compiles(trainer.accelerator) else 1):  # another size of batch is compiled first
        started = time.perf_counter()
        draw_samples(policy, one_label, count, batch_size=count, progress=False)
    per_sample = (time.perf_counter() - started) / count
    peak = peak_bytes(device)
    fine = max(0, config.max_updates - config.coarse_updates)
    found |= {
        "peak_bytes": peak,
        "seconds_train": found["seconds_per_update"] * fine
        + found.get("seconds_per_coarse_update", 0.0) * min(config.coarse_updates, config.max_updates),
        "seconds_samples": per_sample
        * -(-(task.base_samples + task.eval_samples * len(trainer.environment.labels)) // processes.count()),
    }
    if not trainer.accelerator.is_main_process:
        return found
    head = f", {parameters['control_head']:,} of the control head" if "control_head" in parameters else ""
    warm = " and the warm start of the control head" if config.critic_trajectories else ""
    where = "allocated on the GPU" if device.type == "cuda" else "of the process"
    tqdm.write(f"""
trainable      {parameters.get("lora", 0):,} parameters of LoRA, {parameters["label_encoder"]:,} of the label encoder{head}; {frozen:,} are frozen
an update      {trainer.batch_size} trajectories of {config.num_inference_steps} steps, {config.objective}, {len(trainer.environment.labels)} labels
memory         {peak / 2**30:.2f} GiB {where} at most, {built / 2**30:.2f} GiB before the first update
time           {found["seconds_per_update"]:.3g} s an update{f", {found['seconds_per_coarse_update']:.3g} s a coarse one" if config.coarse_updates else ""}
the run        about {spell_seconds(found["seconds_train"])} for {config.max_updates} updates, and {spell_seconds(found["seconds_samples"])} for base samples
               and evaluation; reading the labels, fitting the classifier{warm} come on top
Nothing was kept: run again without --dry_run.""")
    return found
