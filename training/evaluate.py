"""Measures an adapter again, on fresh samples, with the classifier it brings.

    python training/evaluate.py --adapter NAME [--output_dir DIR] [--config training/configs/NAME.yaml] [--ANY_FIELD VALUE …]

With `accelerate launch` in place of `python` the processes share out the sampling. Prompts and oracles come from the config, sampler and
gamma from the adapter. Writes metrics.json, samples.png, confusion.png to runs/NAME-evaluation, if not elsewhere. With `--update_adapter
true` the figures and the model card go into the adapter itself.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import CTRLPipeline, Policy, assets, processes  # noqa: E402
from diffusers_ctrl.adapters import Adapter, load_adapter, local_folder, package_versions, resolve_folder, save_config  # noqa: E402
from diffusers_ctrl.baked import label_scales, measure_baked  # noqa: E402
from diffusers_ctrl.cards import save_card  # noqa: E402
from diffusers_ctrl.config import option  # noqa: E402
from diffusers_ctrl.decoding import decoder  # noqa: E402
from diffusers_ctrl.evaluation import draw_samples, evaluate, evaluate_gammas, gamma_grid, judge  # noqa: E402
from diffusers_ctrl.injection import load_lora_state_dict  # noqa: E402
from diffusers_ctrl.labels import LabelGrid, label_grid  # noqa: E402
from diffusers_ctrl.recording import record_conditions  # noqa: E402
from diffusers_ctrl.rewards import attribute_rewards, classifier_reward  # noqa: E402
from diffusers_ctrl.rollouts import Environment, Sampler, in_chunks  # noqa: E402
from diffusers_ctrl.transitions import scheduler_class  # noqa: E402
from diffusers_ctrl.untrusted import hub_cache  # noqa: E402
from figures import plot_samples, sample_rows  # noqa: E402
from report import plot_agreement, print_table, write_metrics  # noqa: E402
from task import DTYPES, TaskConfig, attribute_oracle, import_function, parse_arguments, prompt_judge  # noqa: E402


@dataclass
class EvaluateConfig:
    """Which adapter, and where the figures go. All other fields are those of train_ctrl.py."""

    adapter: str = option("digits-stroke", "Adapter: a folder, an embedded adapter's name, or a Hub id.")
    update_adapter: bool = option(False, "Write the figures and the card into the adapter, a local folder then.")
    output_dir: str | None = option(None, "Where the figures go, whatever the config says; runs/NAME-evaluation by default.")

    def output(self) -> Path:
        """The folder that is written to. Raises ValueError where that would change an adapter that is not to be changed."""
        folder = local_folder(self.adapter)  # None: on the Hub
        given = None if self.output_dir is None else Path(self.output_dir)
        is_own = None not in (folder, given) and folder.resolve() == given.resolve()
        if not self.update_adapter:
            if is_own:
                raise ValueError(f"--output_dir {given} is the adapter itself: give another, or --update_adapter true.")
            return given or Path("runs", f"{os.path.basename(os.path.abspath(self.adapter))}-evaluation")
        if folder is None or assets.ROOT in folder.resolve().parents or hub_cache(folder):
            raise ValueError(
                f"--update_adapter writes into the adapter, and {self.adapter!r} is in the package or on the Hub: give a folder of your own."
            )
        if given is not None and not is_own:
            raise ValueError(f"--update_adapter writes into {self.adapter}, not to --output_dir {given}: leave one of the two out.")
        return folder


def adapter_environment(
    adapter: Adapter, task: TaskConfig, grid: LabelGrid | None = None, device: torch.device | str = "cpu"
) -> tuple[Policy, Environment]:
    """The adapter on its base as a policy, and what it is judged in: its own sampler and gamma, the task's prompts and precision.

    log p̂ is that of the classifier which the adapter brings, or else the sum of the task's scorers.

    Args:
        grid: the labels; by default every label of the adapter's space, with five values of a continuous attribute.

    Raises:
        ValueError: if there is neither a classifier nor a scorer for every attribute.
    """
    space = adapter.label_encoder.label_space
    scorers = {attribute.name: import_function(attribute.scorer) for attribute in task.attributes()}
    if adapter.classifier is None and any(scorers.get(name) is None for name in space.attributes):
        raise ValueError(
            "This adapter brings no classifier, so no gap can be measured: give --attribute, --scorer and --label_names of "
            f"{list(space.attributes)}."
        )
    if all(scorers.get(name) is not None for name in space.attributes):
        reward = attribute_rewards({name: scorers[name] for name in space.attributes}, space)
    else:
        reward = classifier_reward(adapter.classifier.to(device))
    grid = grid or label_grid(space)
    settings, base = adapter.config.sampler, adapter.config.base
    pipe = CTRLPipeline.from_pretrained(base["id"], revision=base["revision"], torch_dtype=DTYPES[task.dtype]).to(device)
    denoiser = pipe.denoiser.requires_grad_(False)
    if adapter.lora:
        load_lora_state_dict(denoiser, adapter.lora)
    policy = Policy(
        denoiser,
        adapter.label_encoder.to(device),
        lora_rank=None,
        injection_site=adapter.config.injection_site,
        guidance_scale=settings["guidance_scale"],
    )
    # the adapter's own, also where the base comes with another: figures are of the law that it was trained for
    known = type(pipe.scheduler).__name__ == settings["scheduler"]
    scheduler = type(pipe.scheduler) if known else scheduler_class(settings["scheduler"])
    pipe.scheduler, steps = scheduler.from_config(settings["scheduler_config"]), settings["num_inference_steps"]
    conditions = record_conditions(pipe, task.prompts, num_inference_steps=steps, guidance_scale=settings["guidance_scale"])
    environment = Environment(
        Sampler(pipe.scheduler, steps, settings["options"], conditions.grid),
        conditions.shape,
        reward,
        grid.labels.to(device),
        adapter.config.gamma,
        decode=decoder(pipe),
        prompt_embeds=conditions.to(device),
        space=space,
    )
    return policy, environment


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(EvaluateConfig, allow_abbrev=False)
    own, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    output = own.output()
    task, config = parse_arguments(rest)
    folder = resolve_folder(own.adapter)
    adapter = load_adapter(folder)
    space = adapter.label_encoder.label_space
    if task.attribute != list(space.attributes):
        raise ValueError(
            f"The settings are about {task.attribute}, the adapter about {list(space.attributes)}: give the --config it was trained "
            "with, whose prompts and oracles are used."
        )
    grid = label_grid(space, config.label_bins, config.label_subsets)
    accelerator = processes.make_accelerator()
    device = accelerator.device
    policy, environment = adapter_environment(adapter, task, grid, device)
    chunk = config.reward_batch_size
    environment = replace(environment, decode=in_chunks(environment.decode, chunk), reward_batch_size=chunk)
    sizes = {"batch_size": task.sample_batch_size, "distributed": True}
    names, oracle = grid.names, attribute_oracle(task)
    judges = {"oracle": oracle, "prompt_oracle": prompt_judge(task.prompt_oracle, task.prompts)}
    kept = {k: v for k, v in adapter.config.metrics.items() if k.startswith(("seconds_", "classifier_", "num_labels", "updates"))}
    with policy.merged():
        generator = torch.Generator(device).manual_seed(config.seed + 2_000_003)
        tuned = draw_samples(policy, environment, task.eval_samples, generator, description="evaluation", **sizes)
        per_label = max(1, task.base_samples // len(names))
        generator = torch.Generator(device).manual_seed(config.seed + 1_000_003)
        base = draw_samples(policy, environment, per_label, generator, tuned=False, description="base samples", **sizes)
        tuned, base = (judge(samples, environment, **judges) for samples in (tuned, base))
        metrics = kept | (evaluate(tuned, base, environment, names) if accelerator.is_main_process else {})
        if adapter.config.gamma_range is not None:
            generator = torch.Generator(device).manual_seed(config.seed + 3_000_003)
            gammas = gamma_grid(tuple(adapter.config.gamma_range))
            metrics |= evaluate_gammas(policy, environment, base, gammas, task.eval_samples, generator, names, **sizes, **judges)
        if policy.guidance_scale > 1 and adapter.label_encoder.control_head is None:
            scales, few = label_scales(policy.guidance_scale), max(1, task.eval_samples // 5)
            metrics |= measure_baked(policy, environment, few, config.seed + 4_000_003, scales, distributed=True)
        rows = sample_rows(policy, environment, distributed=True)
    if rows is None:  # the main process has the images, judges them and writes the files
        return metrics
    metrics |= {
        "seed": adapter.config.metrics.get("seed", config.seed),
        "gamma": adapter.config.gamma,
        "versions": package_versions(),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_metrics(output, metrics)
    plot_samples(rows, ["base", *names], output / "samples.png", "each column: the same noise")
    if oracle is not None:
        plot_agreement(output, space, environment.labels, tuned)
    if own.update_adapter:
        updated = replace(adapter.config, metrics=metrics)
        save_config(folder, updated)
        save_card(folder, updated)
    print_table(metrics, names)
    print(f"\nWritten to {output}/.")
    return metrics


if __name__ == "__main__":
    main()
    processes.leave()
