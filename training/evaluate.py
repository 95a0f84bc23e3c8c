"""Measures an adapter again, on fresh samples, with the classifier it brings.

    python training/evaluate.py --adapter DIR --output_dir DIR [--config training/configs/NAME.yaml] [--ANY_FIELD VALUE …]

Prompts and oracles come from the config, sampler and gamma from the adapter. Writes metrics.json, samples.png, confusion.png. With
`--update_adapter true` the figures and the model card go into the adapter itself.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import CTRLPipeline, Policy  # noqa: E402
from diffusers_ctrl.adapters import Adapter, load_adapter, package_versions, resolve_folder, save_config  # noqa: E402
from diffusers_ctrl.bases import decoder, encode_prompts, latent_shape  # noqa: E402
from diffusers_ctrl.cards import save_card  # noqa: E402
from diffusers_ctrl.evaluation import confusion_matrix, draw_samples, evaluate, evaluate_gammas, gamma_grid  # noqa: E402
from diffusers_ctrl.injection import load_lora_state_dict  # noqa: E402
from diffusers_ctrl.rewards import classifier_reward  # noqa: E402
from diffusers_ctrl.rollouts import Environment, Sampler  # noqa: E402
from diffusers_ctrl.sampling import labelled_scheduler  # noqa: E402
from diffusers_ctrl.trainer import _option  # noqa: E402
from figures import plot_confusion, plot_samples, sample_rows  # noqa: E402
from train_ctrl import TaskConfig, import_function, parse_arguments, print_table, prompt_judge  # noqa: E402


@dataclass
class EvaluateConfig:
    """Which adapter, and where the figures go. All other fields are those of train_ctrl.py."""

    adapter: str = _option("digits-stroke", "Adapter: a folder, an embedded adapter's name, or a Hub id.")
    update_adapter: bool = _option(False, "Write the figures and the card into the adapter, a local folder then.")


def adapter_environment(adapter: Adapter, task: TaskConfig) -> tuple[Policy, Environment]:
    """The adapter on its base as a policy, and what it is judged in: its own sampler and gamma, the task's prompts.

    log p̂ is the task's scorer's, or else that of the classifier which the adapter brings; ValueError if there is neither.
    """
    if adapter.classifier is None and task.scorer is None:
        raise ValueError("This adapter brings no classifier, so no gap can be measured: give --scorer and --label_names.")
    settings, base = adapter.config.sampler, adapter.config.base
    pipe = CTRLPipeline.from_pretrained(base["id"], revision=base["revision"])
    denoiser = pipe.denoiser.requires_grad_(False)
    load_lora_state_dict(denoiser, adapter.lora)
    policy = Policy(
        denoiser,
        adapter.label_encoder,
        lora_rank=None,
        injection_site=adapter.config.injection_site,
        guidance_scale=settings["guidance_scale"],
    )
    space = adapter.label_encoder.label_space
    embeds, null = encode_prompts(pipe, task.prompts)
    environment = Environment(
        Sampler(labelled_scheduler(pipe.scheduler, settings), settings["num_inference_steps"], settings["options"]),
        latent_shape(pipe),
        import_function(task.scorer) or classifier_reward(adapter.classifier),
        torch.stack([space.encode(value)[0] for value in space.values()]),
        adapter.config.gamma,
        decode=decoder(pipe),
        prompt_embeds=embeds,
        null_embeds=null,
    )
    return policy, environment


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(EvaluateConfig, allow_abbrev=False)
    own, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    task, config = parse_arguments(rest)
    folder = resolve_folder(own.adapter)
    adapter = load_adapter(folder)
    policy, environment = adapter_environment(adapter, task)
    space = adapter.label_encoder.label_space
    names = [next(iter(value.values())) for value in space.values()]
    oracle = import_function(task.oracle)
    judges = {"oracle": oracle, "prompt_oracle": prompt_judge(task.prompt_oracle, task.prompts)}
    kept = {k: v for k, v in adapter.config.metrics.items() if k.startswith(("seconds_", "classifier_", "num_labels", "updates"))}
    with policy.merged():
        tuned = draw_samples(
            policy, environment, task.eval_samples, torch.Generator().manual_seed(config.seed + 2_000_003), description="evaluation"
        )
        per_label = max(1, task.base_samples // len(names))
        generator = torch.Generator().manual_seed(config.seed + 1_000_003)
        base = draw_samples(policy, environment, per_label, generator, tuned=False, description="base samples")
        metrics = kept | evaluate(tuned, base, environment, names, **judges)
        if adapter.config.gamma_range is not None:
            generator = torch.Generator().manual_seed(config.seed + 3_000_003)
            gammas = gamma_grid(tuple(adapter.config.gamma_range))
            metrics |= evaluate_gammas(policy, environment, base, gammas, task.eval_samples, generator, names, **judges)
        rows = sample_rows(policy, environment)
    metrics |= {
        "seed": adapter.config.metrics.get("seed", config.seed),
        "gamma": adapter.config.gamma,
        "versions": package_versions(),
    }
    output = folder if own.update_adapter else Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json.tmp").write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(output / "metrics.json.tmp", output / "metrics.json")
    plot_samples(rows, ["base", *names], output / "samples.png", "each column: the same noise")
    if oracle is not None:
        plot_confusion(confusion_matrix(tuned.label_rows, oracle(tuned.images), len(names)), names, output / "confusion.png")
    if own.update_adapter:
        updated = replace(adapter.config, metrics=metrics)
        save_config(folder, updated)
        save_card(folder, updated, prompts=task.prompts, attribute=next(iter(space.attributes)))
    print_table(metrics, names)
    return metrics


if __name__ == "__main__":
    main()
