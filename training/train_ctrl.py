"""Adds a label to a pre-trained diffusion pipeline.

    accelerate launch training/train_ctrl.py [--config training/configs/NAME.yaml] [--ANY_FIELD VALUE …]

With no arguments: the embedded digits base learns stroke width from 600 labelled digits, and writes runs/digits-stroke/.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import diffusers
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from transformers import HfArgumentParser


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import Categorical, CTRLConfig, CTRLTrainer, LabelSpace, Policy  # noqa: E402
from diffusers_ctrl.adapters import (  # noqa: E402
    AdapterConfig,
    collect_adapter,
    denoiser_sha256,
    package_versions,
    resolve_folder,
    save_adapter,
)
from diffusers_ctrl.cards import save_card  # noqa: E402
from diffusers_ctrl.classifiers import Classifier, fit_classifier  # noqa: E402
from diffusers_ctrl.decoding import decoder, round_trip  # noqa: E402
from diffusers_ctrl.evaluation import (  # noqa: E402
    by_gamma,
    confusion_matrix,
    draw_samples,
    evaluate,
    evaluate_gammas,
    exact_law,
    gamma_grid,
)
from diffusers_ctrl.recording import record_conditions  # noqa: E402
from diffusers_ctrl.rewards import classifier_reward  # noqa: E402
from diffusers_ctrl.trainer import _option  # noqa: E402
from digits_data import write_digits_dataset  # noqa: E402
from figures import plot_confusion, plot_curves, plot_samples, sample_rows  # noqa: E402
from labelled_data import LabelledImages, load_labelled_images  # noqa: E402
from sampled_data import write_sampled_dataset  # noqa: E402


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "digits_stroke.yaml"


@dataclass
class TaskConfig:
    """What is learned: base, labelled data, prompts, classifier, evaluation."""

    base: str = _option("digits-base", "Base pipeline: a folder, an embedded model's name, or a Hub id.")
    base_revision: str | None = _option(None, "Revision of the base on the Hub.")
    attribute: str = _option("stroke", "Name of the attribute that the labels are about.")
    scheduler: str | None = _option(None, "diffusers scheduler class to use instead of the base's own, such as DDIMScheduler.")
    dataset: str = _option(
        "digits:stroke",
        "Labelled images: a folder, a parquet file, a Hub id, 'digits:ATTRIBUTE' for the embedded digits, or 'base-samples' for "
        "the base's own samples, labelled by `labeller`.",
    )
    labeller: str | None = _option(None, "module:function, images -> class, for dataset base-samples.")
    scorer: str | None = _option(
        None,
        "module:function, images (N, 3, H, W), labels (N, 1) -> (N,) log p(y|x) in nats: used in place of a learned classifier; "
        "needs label_names. policy_gradient takes one without a gradient.",
    )
    num_labels: int | None = _option(600, "How many labelled images are used, the first so many rows; null for all.")
    image_column: str = _option("image", "The dataset's image column.")
    label_column: str = _option("label", "The dataset's label column.")
    label_names: list[str] | None = _option(None, "Classes in order; the dataset's own by default.")
    skip_unreadable: bool = _option(False, "Leave out images that cannot be read instead of stopping.")
    prompts: list[str] = _option([""], "Training prompts, drawn uniformly.")
    resolution: int | None = _option(None, "Pixels a side of the images; the base's native size by default.")
    classifier_size: int = _option(32, "Pixels a side that the classifier sees.")
    classifier_widths: list[int] = _option([8, 16, 32], "Channels of the classifier's stages.")
    classifier_members: int = _option(
        5, "Networks whose probabilities are averaged, each cross-fitted without a part of the labels."
    )
    classifier_epochs: int = _option(80, "At most so many epochs; early stopping on labels that are held out.")
    oracle: str | None = _option(None, "module:function, images -> true class; for evaluation only.")
    prompt_oracle: str | None = _option(None, "module:function, images, list of prompts -> bool; for evaluation only.")
    eval_samples: int = _option(300, "Samples per label in the final evaluation.")
    base_samples: int = _option(1500, "Base samples for log Z and for the exact law's own accuracy.")
    dtype: str = _option("float32", "Precision of the frozen base: float32, bfloat16 or float16.")
    push_to_hub: bool = _option(False, "Upload the adapter when done.")
    hub_model_id: str | None = _option(None, "Hub repository of the adapter.")

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id USER/NAME.")
        if self.dataset == "base-samples" and not (self.labeller and self.label_names and self.num_labels):
            raise ValueError("dataset base-samples needs labeller, label_names and num_labels.")
        if self.scorer and not self.label_names:
            raise ValueError("scorer needs label_names.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}.")
        if self.scheduler is not None and not hasattr(diffusers, self.scheduler):
            raise ValueError(f"scheduler {self.scheduler!r} is not a class of diffusers.")


def parse_arguments(arguments: list[str] | None = None) -> tuple[TaskConfig, CTRLConfig]:
    """Defaults < YAML file < command line. Raises ValueError for a key of the YAML file that is no field."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser((TaskConfig, CTRLConfig), description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help="YAML file with any of the fields below.")
    config = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), None)
    if config is None:
        config = arguments[arguments.index("--config") + 1] if "--config" in arguments[:-1] else str(DEFAULT_CONFIG)
    try:
        values = yaml.safe_load(Path(config).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {config} cannot be read: {error}.") from error
    known = {f.name for f in (*fields(TaskConfig), *fields(CTRLConfig))}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{config} has unknown fields {unknown}.")
    # the file's values go through the parser as arguments of their own, so that they are checked as the command line's are
    from_file: list[str] = []
    kinds = {**get_type_hints(TaskConfig), **get_type_hints(CTRLConfig)}
    for key, value in values.items():
        kind = kinds[key]
        if value is None and type(None) not in get_args(kind):
            raise ValueError(f"{config}: {key} must not be null.")
        wants_list = any(get_origin(part) is list for part in (kind, *get_args(kind)))
        if value is not None and isinstance(value, (list, dict)) != wants_list:
            raise ValueError(f"{config}: {key} must be {kind}, got {value!r}.")
        if value is not None:
            from_file += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    parser.set_defaults(**{key: None for key, value in values.items() if value is None})
    try:
        task, train, _ = parser.parse_args_into_dataclasses([*from_file, *arguments])
    except SystemExit as error:
        if error.code == 0:  # --help
            raise
        raise ValueError(f"The arguments, or the values in {config}, are not of the right kind; see above.") from error
    return task, train


def import_function(path: str | None) -> Callable[..., Any] | None:
    """'module:function' -> the function."""
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} is not module:function that can be imported: {error}.") from error


def prompt_judge(path: str | None, prompts: list[str]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The prompt oracle at `path` as a function of images and prompt rows."""
    oracle = import_function(path)
    if oracle is None:
        return None
    return lambda images, rows: oracle(images, [prompts[row] for row in rows.tolist()])


def load_base(task: TaskConfig) -> DiffusionPipeline:
    """The frozen base pipeline, with the task's scheduler where it names one."""
    folder = resolve_folder(task.base, revision=task.base_revision)
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[task.dtype])
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if task.scheduler is not None:
        pipe.scheduler = getattr(diffusers, task.scheduler).from_config(pipe.scheduler.config)
    return pipe


def labelled_images(task: TaskConfig, config: CTRLConfig, pipe: DiffusionPipeline) -> LabelledImages:
    """The task's dataset, written first where it is the embedded digits or the base's own samples."""
    dataset, folder = task.dataset, Path(config.output_dir) / "dataset"
    if dataset.startswith("digits:"):
        dataset = str(write_digits_dataset(folder, dataset.split(":", 1)[1], task.num_labels or 1797, config.seed))
    elif dataset == "base-samples":
        dataset = str(folder)
        if not (config.resume_from and (folder / "train.parquet").is_file()):
            settings = {name: getattr(config, name) for name in ("num_inference_steps", "guidance_scale", "eta")}
            accepted = inspect.signature(pipe.__call__).parameters
            write_sampled_dataset(
                folder,
                pipe,
                task.prompts,
                import_function(task.labeller),
                task.label_names,
                task.num_labels,
                seed=config.seed,
                **{name: value for name, value in settings.items() if name in accepted},
            )
    return load_labelled_images(
        dataset,
        task.resolution or decoder(pipe).image_shape[-1],
        image_column=task.image_column,
        label_column=task.label_column,
        label_names=task.label_names,
        max_rows=task.num_labels,
        skip_unreadable=task.skip_unreadable,
    )


def fit_or_load_classifier(
    task: TaskConfig, space: LabelSpace, images: torch.Tensor, labels: torch.Tensor, folder: Path, seed: int, resume: bool
) -> tuple[Classifier, dict[str, Any], float]:
    """The calibrated classifier, its report, and the seconds it took; a resumed run reads the one it had."""
    report_path = folder / "calibration.json"
    if resume and report_path.is_file():
        saved = json.loads(report_path.read_text())
        return Classifier.from_pretrained(folder), saved["report"], saved["seconds"]
    started = time.time()
    set_seed(seed)
    classifier = Classifier(
        space.to_dict(),
        image_size=task.classifier_size,
        in_channels=images.shape[1],
        widths=tuple(task.classifier_widths),
        members=task.classifier_members,
    )
    report = fit_classifier(classifier, images, labels.float().unsqueeze(1), seed=seed, max_epochs=task.classifier_epochs)
    print(report.lines(), flush=True)
    classifier.save_pretrained(folder)
    seconds = time.time() - started
    report_path.write_text(json.dumps({"report": asdict(report), "seconds": seconds}, indent=2) + "\n")
    return classifier, asdict(report), seconds


def print_table(metrics: dict[str, Any], names: list[str]) -> None:
    def cell(name: str, digits: int = 3) -> str:
        if metrics.get(name) is None:
            return "-"
        error = metrics.get(f"{name}_se")
        return f"{metrics[name]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    print(f"\n{'':24}{'tuned':>18}{'base':>18}{'exact law':>18}")
    for name in ("accuracy", "macro_f1", "prompt_accuracy", "log_likelihood"):
        print(f"{name:24}{cell(name):>18}{cell('base_' + name):>18}{cell('exact_' + name):>18}")
    print(f"{'log_partition (nats)':24}{cell('log_partition'):>18}{cell('base_log_partition'):>18}")
    for name in ("objective", "kl", "gap", "gap_from_base"):
        print(f"{name + ' (nats)':24}{cell(name):>18}")
    print(f"{'effective sample size':24}{metrics['ess']:>18.0f}   (smallest prompt-label pair: {metrics['smallest_ess']:.1f})")
    if metrics["gap_is_lower_bound"]:
        print("warning: the effective sample size of some pair is under 10, so gap is only a lower bound.")
    if metrics.get("base_smallest_ess", 10) < 10:
        print("warning: the base samples' effective size is under 10 for some pair: gap_from_base is too small as well.")
    for gamma, row in by_gamma(metrics).items():
        shown = {key: row.get(key) for key in ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")}
        print(f"  gamma {gamma:<16g}" + "  ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None))
    for name in names:
        shown = {key: metrics.get(f"by_label.{name}.{key}") for key in ("accuracy", "kl", "gap")}
        print(f"  {name:22}" + "  ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    started = time.time()
    task, config = parse_arguments(arguments)
    set_seed(config.seed)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    trackers = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=trackers, project_dir=str(output))
    if accelerator.device.type == "cpu":
        # accelerate launch gives each process one thread; on CPU there is nothing else to use the other cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
    oracle = import_function(task.oracle)

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
    if task.scorer is not None:
        reward, names = import_function(task.scorer), list(task.label_names)
        space = LabelSpace({task.attribute: Categorical(tuple(names))})
        classifier, calibration, classifier_seconds, num_labels = None, {}, 0.0, 0
    else:
        data = labelled_images(task, config, pipe)
        names, num_labels = list(data.names), len(data.labels)
        space = LabelSpace({task.attribute: Categorical(tuple(names))})
        classifier, calibration, classifier_seconds = fit_or_load_classifier(
            task, space, round_trip(pipe, data.images), data.labels, output / "classifier", config.seed, bool(config.resume_from)
        )
        reward = classifier_reward(classifier.to(accelerator.device))

    # 3. the policy, the trainer, and what the exact law itself would score
    set_seed(config.seed)
    policy = Policy(
        denoiser,
        label_space=space,
        lora_rank=config.lora_rank,
        lora_targets=config.lora_targets,
        injection_site=config.injection_site,
        gamma_range=None if config.gamma_range is None else tuple(config.gamma_range),
        guidance_scale=config.guidance_scale,
        checkpointing=config.checkpointing,
    )

    def save_images(update: int, policy: Policy) -> None:
        rows = sample_rows(policy, trainer.environment)
        (output / "grids").mkdir(exist_ok=True)
        plot_samples(rows, ["base", *names], output / "grids" / f"update-{update:06d}.png", f"update {update}")

    trainer = CTRLTrainer(
        policy,
        pipe.scheduler,
        reward,
        config,
        shape=conditions.shape,
        decode=decode,
        prompt_embeds=conditions,
        save_images=save_images,
        accelerator=accelerator,
    )
    environment = trainer.environment
    generator = torch.Generator(accelerator.device).manual_seed(config.seed + 1_000_003)
    per_label = max(1, task.base_samples // len(names))
    base = draw_samples(policy, environment, per_label, generator, tuned=False, description="base samples")
    gammas = [config.gamma] if config.gamma_range is None else gamma_grid(tuple(config.gamma_range))
    log_partitions = [exact_law(base, replace(environment, gamma=gamma), None)["base_log_partition"] for gamma in gammas]
    trainer.log_partition = sum(log_partitions) / len(gammas)

    # 4. train, save, judge
    train_started = time.time()
    history = trainer.train()
    train_seconds = time.time() - train_started
    metrics: dict[str, Any] = {
        "seconds_classifier": classifier_seconds,
        "seconds_train": train_seconds,
        "updates": trainer.update,
        "num_labels": num_labels,
        "seed": config.seed,
        "gamma": config.gamma,
        "versions": package_versions(),
    }
    if not accelerator.is_main_process:
        return metrics
    with policy.merged(config.merge_lora):
        tuned = draw_samples(
            policy,
            environment,
            task.eval_samples,
            torch.Generator(accelerator.device).manual_seed(config.seed + 2_000_003),
            description="evaluation",
        )
        judges = {"oracle": oracle, "prompt_oracle": prompt_judge(task.prompt_oracle, task.prompts)}
        metrics |= evaluate(tuned, base, environment, names, **judges)
        if config.gamma_range is not None:
            generator = torch.Generator(accelerator.device).manual_seed(config.seed + 3_000_003)
            metrics |= evaluate_gammas(policy, environment, base, gammas, task.eval_samples, generator, names, **judges)
    metrics |= {f"classifier_{key}": value for key, value in calibration.items()}
    metrics["seconds_evaluate"] = time.time() - train_started - train_seconds
    metrics["seconds_total"] = time.time() - started

    adapter_config = AdapterConfig(
        base={"id": task.base, "revision": task.base_revision, "denoiser_sha256": fingerprint},
        pipeline_class=type(pipe).__name__,
        denoiser=denoiser_name,
        label_space=space.to_dict(),
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
    )
    save_adapter(output, collect_adapter(adapter_config, denoiser, policy.label_encoder, classifier))
    (output / "metrics.json.tmp").write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(output / "metrics.json.tmp", output / "metrics.json")
    (output / "history.json").write_text(json.dumps(history) + "\n")
    plot_samples(sample_rows(policy, environment), ["base", *names], output / "samples.png", "each column: the same noise")
    plot_curves(history, trainer.log_partition, output / "curves.png")
    if oracle is not None:
        plot_confusion(confusion_matrix(tuned.label_rows, oracle(tuned.images), len(names)), names, output / "confusion.png")
    save_card(output, adapter_config, prompts=task.prompts, attribute=task.attribute)
    print_table(metrics, names)
    print(f"\n{metrics['seconds_total']:.0f} s in all. Written to {output}/: the adapter, metrics.json, samples.png, curves.png.")
    if task.push_to_hub:
        push(output, task.hub_model_id)
    prompt = f"{task.prompts[-1]!r}, " if task.prompts[-1] else ""
    print(
        'Next:\n  python -c "from diffusers_ctrl import CTRLPipeline; '
        f"CTRLPipeline.from_pretrained('{output}')({prompt}label='{names[-1]}').images[0].save('{names[-1]}.png')\""
    )
    return metrics


def push(folder: Path, repo_id: str) -> None:
    """Uploads the adapter, its card and its pictures; not the checkpoints, the logs or the data."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    allowed = ["ctrl_config.json", "metrics.json", "README.md", "*.png", "*.safetensors", "label_encoder/*", "classifier/*"]
    ignored = ["checkpoints/*", "grids/*", "dataset/*", "ctrl/*"]
    print("Pushed:", api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=allowed, ignore_patterns=ignored))


if __name__ == "__main__":
    main()
