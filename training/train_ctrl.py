"""Adds a label to a pre-trained diffusion pipeline.

    accelerate launch training/train_ctrl.py [--config training/configs/NAME.yaml] [--ANY_FIELD VALUE …]

With no arguments: the embedded digits base learns stroke width from 600 labelled digits, and writes runs/digits-stroke/.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import CTRLConfig, CTRLTrainer, Policy, processes  # noqa: E402
from diffusers_ctrl.adapters import (  # noqa: E402
    AdapterConfig,
    collect_adapter,
    denoiser_sha256,
    package_versions,
    save_adapter,
)
from diffusers_ctrl.baked import label_scales, measure_baked  # noqa: E402
from diffusers_ctrl.cards import call_prompt, save_card  # noqa: E402
from diffusers_ctrl.checkpoints import write_file  # noqa: E402
from diffusers_ctrl.decoding import decoder  # noqa: E402
from diffusers_ctrl.evaluation import base_scores, draw_samples, evaluate, evaluate_gammas, exact_law, gamma_grid, judge  # noqa: E402
from diffusers_ctrl.labels import label_grid  # noqa: E402
from diffusers_ctrl.preemption import Preemption, marked  # noqa: E402
from diffusers_ctrl.recording import record_conditions  # noqa: E402
from diffusers_ctrl.sharing import check_shareable, push_adapter  # noqa: E402
from diffusers_ctrl.tracking import log_picture, number_log_lines, tracker_names  # noqa: E402
from dry_run import dry_settings, print_dry_run  # noqa: E402
from figures import plot_curves, plot_samples, sample_rows  # noqa: E402
from likelihood import make_likelihood  # noqa: E402
from provenance import training_record  # noqa: E402
from report import plot_agreement, print_table, write_metrics, write_report  # noqa: E402
from task import TaskConfig, attribute_oracle, load_base, parse_arguments, prompt_judge  # noqa: E402


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    task, config = parse_arguments(arguments)
    if not task.dry_run:
        with marked(Path(config.output_dir)):
            return run(task, config)
    with dry_settings(task, config) as settings:
        return run(*settings)


def take_cores(accelerator: Accelerator) -> None:
    """On CPU, where accelerate launch (it sets that variable) gives each process one thread and nothing else would use the other cores.

    Without the launcher the threads are torch's, or those of whoever set them.
    """
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def first_picture(folder: Path, config: AdapterConfig, label: Any) -> str:
    """The program that draws a labelled picture with the adapter of that folder, quoted for a shell."""
    # JSON's strings are Python's, and need no quotes that the shell's own would clash with
    where, what = (json.dumps(value, ensure_ascii=False) for value in (str(folder), label))
    program = f"from diffusers_ctrl import CTRLPipeline; pipe = CTRLPipeline.from_pretrained({where}); "
    return shlex.quote(program + f'pipe({call_prompt(config)}label={what}).images[0].save("labelled.png")')


def run(task: TaskConfig, config: CTRLConfig) -> dict[str, Any]:
    started = time.time()
    set_seed(config.seed)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    trackers = tracker_names(config.report_to) or None  # accelerate warns of an empty list
    accelerator = processes.make_accelerator(mixed_precision=config.mixed_precision, log_with=trackers, project_dir=str(output))
    number_log_lines(accelerator)
    take_cores(accelerator)
    oracle = attribute_oracle(task)
    if task.push_to_hub:
        check_shareable(task.base)  # now, not after hours of training

    # 1. the base and its prompts
    pipe = load_base(task).to(accelerator.device)
    denoiser_name = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    denoiser = getattr(pipe, denoiser_name)
    fingerprint = denoiser_sha256(denoiser)
    conditions = record_conditions(
        pipe, task.prompts, num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
    )
    decode = decoder(pipe)

    # 2. p(y | x): a scorer that is given, or a calibrated classifier of labelled images seen through the base's autoencoder
    likelihood = make_likelihood(task, config, pipe, output / "classifier", accelerator.device)
    names = label_grid(likelihood.space, config.label_bins, config.label_subsets).names

    # 3. the policy, the trainer, and what the exact law itself would score
    set_seed(config.seed)
    policy = Policy(
        denoiser,
        label_space=likelihood.space,
        lora_rank=config.lora_rank,
        lora_targets=config.lora_targets,
        injection_site=config.injection_site,
        gamma_range=None if config.gamma_range is None else tuple(config.gamma_range),
        guidance_scale=config.guidance_scale,
        checkpointing=config.checkpointing,
        control_head=config.control_head,
        shape=conditions.shape,
    )
    if task.low_vram and getattr(denoiser, "_supports_gradient_checkpointing", False):
        denoiser.enable_gradient_checkpointing()

    def save_images(update: int, policy: Policy) -> None:
        rows = sample_rows(policy, trainer.environment, distributed=True)
        if rows is None:
            return
        (output / "grids").mkdir(exist_ok=True)
        path = output / "grids" / f"update-{update:06d}.png"
        plot_samples(rows, ["base", *names], path, f"update {update}")
        log_picture(accelerator, "samples", path, update)

    trainer = CTRLTrainer(
        policy,
        pipe.scheduler,
        likelihood.reward,
        config,
        shape=conditions.shape,
        decode=decode,
        prompt_embeds=conditions,
        save_images=save_images,
        identity={"classifier": likelihood.weights, **{name: getattr(task, name) for name in ("attribute", "prompts", "scorer")}},
        accelerator=accelerator,
    )
    environment = trainer.environment
    if task.dry_run:
        return print_dry_run(trainer, task)
    generator = torch.Generator(accelerator.device).manual_seed(config.seed + 1_000_003)
    per_label, sizes = max(1, task.base_samples // len(names)), {"batch_size": task.sample_batch_size, "distributed": True}
    base = draw_samples(policy, environment, per_label, generator, tuned=False, description="base samples", **sizes)
    gammas = [config.gamma] if config.gamma_range is None else gamma_grid(tuple(config.gamma_range))

    scores = processes.on_main(lambda: base_scores(base, environment))
    log_partitions = [exact_law(base, replace(environment, gamma=g), scores=scores)["base_log_partition"] for g in gammas]
    trainer.log_partition = sum(log_partitions) / len(gammas)

    # 4. train, save, judge. The oracles are asked once before, so that one that fails does so before the training
    judges = {"oracle": oracle, "prompt_oracle": prompt_judge(task.prompt_oracle, task.prompts)}
    with processes.together(Exception):
        base = judge(base, environment, **judges)
    history = trainer.train()
    judging_started = time.time()
    metrics: dict[str, Any] = {
        "seconds_classifier": likelihood.seconds,
        "seconds_train": trainer.seconds,  # of the updates, those before a resume included
        "updates": trainer.update,
        **trainer.warmed,
        "weights_of_update": trainer.update if trainer.best_kept is None else trainer.best_kept,
        "num_labels": likelihood.num_labels,
        "seed": config.seed,
        "gamma": config.gamma,
        "versions": package_versions(),
    }
    main = accelerator.is_main_process  # which alone has the images, judges them and writes files
    with policy.merged(config.merge_lora):
        tuned = draw_samples(
            policy,
            environment,
            task.eval_samples,
            torch.Generator(accelerator.device).manual_seed(config.seed + 2_000_003),
            description="evaluation",
            **sizes,
        )
        tuned = judge(tuned, environment, **judges)
        metrics |= evaluate(tuned, base, environment, names, scores=scores) if main else {}
        if config.gamma_range is not None:
            generator = torch.Generator(accelerator.device).manual_seed(config.seed + 3_000_003)
            metrics |= evaluate_gammas(
                policy, environment, base, gammas, task.eval_samples, generator, names, scores=scores, **sizes, **judges
            )
        if config.guidance_scale > 1 and not config.control_head:
            scales, few = label_scales(config.guidance_scale), max(1, task.eval_samples // 5)
            metrics |= measure_baked(policy, environment, few, config.seed + 4_000_003, scales, distributed=True)
    rows = sample_rows(policy, environment, distributed=True)
    if rows is None:
        return metrics
    metrics |= {f"classifier_{key}": value for key, value in likelihood.calibration.items()}
    metrics["seconds_evaluate"] = time.time() - judging_started
    metrics["seconds_total"] = time.time() - started

    adapter_config = AdapterConfig(
        base={"id": task.base, "revision": task.base_revision, "denoiser_sha256": fingerprint},
        pipeline_class=type(pipe).__name__,
        denoiser=denoiser_name,
        label_space=likelihood.space.to_dict(),
        gamma=config.gamma,
        gamma_range=config.gamma_range,
        sampler={
            "scheduler": type(pipe.scheduler).__name__,
            "scheduler_config": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "options": environment.sampler.options,
        },
        injection_site=policy.injection_site,
        versions=package_versions(),
        metrics=metrics,
        training=training_record(task, config, likelihood.data, accelerator),
    )
    save_adapter(output, collect_adapter(adapter_config, denoiser, policy.label_encoder, likelihood.classifier))
    write_metrics(output, metrics)
    write_file(output / "history.json", json.dumps(history) + "\n")
    plot_samples(rows, ["base", *names], output / "samples.png", "each column: the same noise")
    plot_curves(history, trainer.log_partition, output / "curves.png")
    if oracle is not None:
        plot_agreement(output, likelihood.space, environment.labels, tuned)
    save_card(output, adapter_config)
    write_report(output, metrics, history, names, task, config)
    print_table(metrics, names)
    print(
        f"\n{metrics['seconds_total']:.0f} s in all. Written to {output}/: the adapter, metrics.json, samples.png, curves.png, report.html."
    )
    if task.push_to_hub:
        print("Pushed:", push_adapter(output, task.hub_model_id))
    print(f"Next:\n  python -c {first_picture(output, adapter_config, likelihood.space.example())}")
    return metrics


if __name__ == "__main__":
    with Preemption(at_once=True):  # what is not training is simply done again
        main()
    processes.leave()
