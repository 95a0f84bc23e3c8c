"""What a run learns: the settings, how they are read from YAML and the command line, and what they name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from diffusers import DiffusionPipeline
from transformers import HfArgumentParser


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import Categorical, Continuous, CTRLConfig  # noqa: E402
from diffusers_ctrl.adapters import resolve_folder  # noqa: E402
from diffusers_ctrl.config import option  # noqa: E402
from diffusers_ctrl.transitions import scheduler_class  # noqa: E402


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "digits_stroke.yaml"
PER_ATTRIBUTE = (
    "dataset",
    "dataset_description",
    "label_column",
    "labeller",
    "scorer",
    "oracle",
    "label_thresholds",
    "label_units",
)
NONE = "-"  # in a list with one entry an attribute: nothing for this one


LOW_VRAM = (
    "checkpointing and the denoiser's own gradient checkpointing, micro-batches of 1 (the same batch by more accumulation), "
    "reward_batch_size 1, sample_batch_size 8, merge_lora off, and on a GPU with bfloat16 dtype bfloat16 and mixed_precision bf16"
)


@dataclass(frozen=True)
class AttributeTask:
    """One attribute of a run. names: its classes where the settings give them; interval: of a continuous one."""

    name: str
    dataset: str
    dataset_description: str | None
    label_column: str
    names: tuple[str, ...] | None
    interval: Continuous | None
    labeller: str | None
    scorer: str | None
    oracle: str | None
    label_thresholds: str | None
    label_units: str | None

    def categorical(self, names: Sequence[str]) -> Categorical:
        """The attribute with these classes, and with the thresholds and the unit that the settings give."""
        borders = None if self.label_thresholds is None else tuple(float(border) for border in self.label_thresholds.split("|"))
        return Categorical(tuple(names), borders, self.label_units or "")


@dataclass
class TaskConfig:
    """What is learned: base, labelled data, prompts, classifier, evaluation.

    A run may learn several attributes. Then `attribute` lists them, and every other setting of an attribute is a list with one entry
    for each in that order, '-' for none; a single entry serves all. Datasets may differ and need have no image in common.
    """

    base: str = option("digits-base", "Base pipeline: a folder, an embedded model's name, or a Hub id.")
    base_revision: str | None = option(None, "Revision of the base on the Hub.")
    attribute: list[str] = option(["stroke"], "Names of the attributes that the labels are about.")
    scheduler: str | None = option(
        None, "Scheduler class to use instead of the base's own: DDIMScheduler, MemorylessFlowMatchScheduler …"
    )
    dataset: list[str] = option(
        ["digits:stroke"],
        "Labelled images of each attribute: a folder, a parquet file, a Hub id, 'digits:ATTRIBUTE' for the embedded digits, or "
        "'base-samples' for the base's own samples, labelled by `labeller`.",
    )
    dataset_description: list[str] | None = option(
        None, "For the card: where each dataset's images come from, who labelled them and how, under which licence."
    )
    labeller: list[str] | None = option(None, "module:function, images -> class or value, for dataset base-samples.")
    scorer: list[str] | None = option(
        None,
        "module:function, images (N, 3, H, W), labels (N, 1) -> (N,) log p(y|x) in nats: used in place of a learned classifier; "
        "needs label_names or continuous. policy_gradient takes one without a gradient.",
    )
    num_labels: int | None = option(600, "How many labelled images of each dataset are used, the first so many; null for all.")
    image_column: str = option("image", "The datasets' image column.")
    label_column: list[str] = option(["label"], "The dataset's label column.")
    label_names: list[str] | None = option(
        None, "Classes in order; the dataset's own by default. With several attributes one entry each: 'thin|regular|bold'."
    )
    label_thresholds: list[str] | None = option(
        None, "For the card: the borders between an attribute's classes, '0.2|0.4', where they were cut from a measurement."
    )
    label_units: list[str] | None = option(None, "For the card: the unit of that measurement.")
    continuous: list[str] | None = option(
        None, "Attributes that are numbers, each as NAME:LOW:HIGH or NAME:LOW:HIGH:UNIT, the interval that labels may come from."
    )
    skip_unreadable: bool = option(False, "Leave out images that cannot be read instead of stopping.")
    prompts: list[str] = option([""], "Training prompts, drawn uniformly.")
    resolution: int | None = option(None, "Pixels a side of the images; the base's native size by default.")
    classifier_size: int = option(32, "Pixels a side that the classifier sees.")
    classifier_widths: list[int] = option([8, 16, 32], "Channels of the classifier's stages.")
    classifier_members: int = option(
        5, "Networks whose probabilities are averaged, each cross-fitted without a part of the labels."
    )
    classifier_coordinates: bool = option(True, "Whether the classifier sees where a pixel is, as slant or position need.")
    classifier_epochs: int | None = option(
        None,
        "At most so many epochs; early stopping on labels that are held out. By default 80, and with fewer than 600 labels as many optimizer "
        "steps as for 600.",
    )
    oracle: list[str] | None = option(None, "module:function, images -> true class or value; for evaluation only.")
    prompt_oracle: str | None = option(None, "module:function, images, list of prompts -> bool; for evaluation only.")
    eval_samples: int = option(300, "Samples per label in the final evaluation.")
    base_samples: int = option(1500, "Base samples for log Z and for the exact law's own accuracy.")
    dtype: str = option("float32", "Precision of the frozen base: float32, bfloat16 or float16.")
    sample_batch_size: int = option(100, "Trajectories at a time for base samples and evaluation.")
    streaming: bool = option(
        False,
        "Read the datasets row by row while the classifier learns, instead of holding all images in memory. Needs label_names.",
    )
    stream_head: int = option(
        2000, "streaming: rows of each dataset kept in memory; for these the members are cross-fitted, calibrated and stopped."
    )
    epoch_labels: int = option(10_000, "streaming: labels between two looks at the held-out ones, called an epoch.")
    low_vram: bool = option(False, f"For small GPUs. Sets: {LOW_VRAM}.")
    dry_run: bool = option(
        False, "Build everything, print parameters, memory and time of an update, and stop. Nothing is written to output_dir."
    )
    push_to_hub: bool = option(False, "Upload the adapter when done.")
    hub_model_id: str | None = option(None, "Hub repository of the adapter.")

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id USER/NAME.")
        for name in ("sample_batch_size", "stream_head", "epoch_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}.")
        if self.scheduler is not None:
            scheduler_class(self.scheduler)  # raises for a name that it does not know
        for attribute in self.attributes():
            if attribute.label_thresholds is not None and attribute.names is not None:
                attribute.categorical(attribute.names)  # an error now, not after the data are read
            named = attribute.names or attribute.interval
            if (
                attribute.dataset == "base-samples"
                and not (attribute.labeller and named and self.num_labels)
                and not attribute.scorer
            ):
                raise ValueError("dataset base-samples needs labeller, label_names (or continuous) and num_labels.")
            if attribute.scorer and not named:
                raise ValueError("scorer needs label_names, or continuous.")

    def attributes(self) -> list[AttributeTask]:
        """The run's attributes in order, each with its own settings.

        Raises:
            ValueError: for a list that has neither one entry nor one an attribute, or an interval that cannot be read.
        """
        count = len(self.attribute)
        if not count or len(set(self.attribute)) != count:
            raise ValueError(f"attribute must list one or more different names, got {self.attribute}.")
        columns: dict[str, list[Any]] = {}
        for setting in PER_ATTRIBUTE:
            values = getattr(self, setting) or [NONE]
            if len(values) not in (1, count):
                raise ValueError(
                    f"{setting} has {len(values)} entries for {count} attributes {self.attribute}: one each, or one for all."
                )
            columns[setting] = [None if v == NONE else v for v in (values * count if len(values) == 1 else values)]
        if self.label_names is None or count == 1:
            names: list[Any] = [self.label_names] * count
        elif len(self.label_names) == count:
            names = [None if entry == NONE else entry.split("|") for entry in self.label_names]
        else:
            raise ValueError(
                f"label_names has {len(self.label_names)} entries for {count} attributes: one each, as 'low|high', or '-'."
            )
        intervals = self._intervals()
        if unknown := sorted(set(intervals) - set(self.attribute)):
            raise ValueError(f"continuous names {unknown}, which attribute does not list: {self.attribute}.")
        return [
            AttributeTask(
                name=name,
                names=None if names[i] is None else tuple(names[i]),
                interval=intervals.get(name),
                **{setting: values[i] for setting, values in columns.items()},
            )
            for i, name in enumerate(self.attribute)
        ]

    def _intervals(self) -> dict[str, Continuous]:
        found = {}
        for entry in self.continuous or []:
            name, *rest = entry.split(":", 3)
            try:
                low, high, *unit = rest
                found[name] = Continuous(float(low), float(high), *unit)
            except ValueError as error:
                raise ValueError(f"continuous must be NAME:LOW:HIGH or NAME:LOW:HIGH:UNIT, got {entry!r}.") from error
        return found


def parse_arguments(arguments: list[str] | None = None) -> tuple[TaskConfig, CTRLConfig]:
    """Defaults < YAML file < command line. Raises ValueError for a key of the YAML file that is no field.

    Without --config the file is the digits' recipe; with a dataset or attribute of one's own there is none, since its prompts and oracles are
    the digits' strokes'.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser((TaskConfig, CTRLConfig), description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        default=str(DEFAULT_CONFIG),
        help="YAML file with any of the fields below, in place of the defaults that are shown there. Without --dataset and --attribute it is "
        "%(default)s.",
    )
    config = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), None)
    if config is None:
        if "--config" in arguments[:-1]:
            config = arguments[arguments.index("--config") + 1]
        elif not {argument.split("=", 1)[0] for argument in arguments} & {"--dataset", "--attribute"}:
            config = str(DEFAULT_CONFIG)
    try:
        values = {} if config is None else yaml.safe_load(Path(config).read_text()) or {}
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
        if key in ("attribute", *PER_ATTRIBUTE) and isinstance(value, str):
            value = [value]
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
        file = "" if config is None else f", or the values in {config},"
        raise ValueError(f"The arguments{file} are not of the right kind; see above.") from error
    return save_memory(task, train) if task.low_vram else (task, train)


def save_memory(task: TaskConfig, train: CTRLConfig) -> tuple[TaskConfig, CTRLConfig]:
    """The settings of `low_vram` in place of those given. The batch of an update stays as it is, and the precision on a CPU."""
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    follows = train.global_batch_size is not None
    settings = replace(
        train,
        batch_size=1,
        gradient_accumulation_steps=1 if follows else train.batch_size * train.gradient_accumulation_steps,
        checkpointing=True,
        reward_batch_size=1,
        merge_lora=False,
        mixed_precision="bf16" if half else train.mixed_precision,
    )
    return replace(task, sample_batch_size=min(8, task.sample_batch_size), dtype="bfloat16" if half else task.dtype), settings


def import_function(path: str | None) -> Callable[..., Any] | None:
    """'module:function' -> the function."""
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} is not module:function that can be imported: {error}.") from error


def attribute_oracle(task: TaskConfig) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The attributes' oracles as one: images -> (N, A) true classes and values. None unless every attribute has one."""
    oracles = [import_function(attribute.oracle) for attribute in task.attributes()]
    if any(oracle is None for oracle in oracles):
        return None
    return lambda images: torch.stack([oracle(images).double().cpu() for oracle in oracles], dim=1)


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
        pipe.scheduler = scheduler_class(task.scheduler).from_config(pipe.scheduler.config)
    return pipe
