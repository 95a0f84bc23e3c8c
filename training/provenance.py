"""What a run tells the model card: its data, its settings, what it ran on. Never a path of this machine."""

from __future__ import annotations

import platform
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusers_ctrl import Categorical, CTRLConfig
from diffusers_ctrl.labels import Attribute
from digits_data import SOURCE
from task import AttributeTask, TaskConfig


# the base and the seed have their own places; the others are about the run, not about what comes out of it
UNTOLD = {
    *("base", "base_revision", "seed", "output_dir", "push_to_hub", "hub_model_id", "resume_from", "report_to"),
    *("checkpoint_every", "checkpoints_total_limit", "sample_every", "dataset_description"),
}


def shareable_name(dataset: str) -> str:
    """A dataset's name without the folders that it lies in here."""
    return Path(dataset).name if Path(dataset).exists() or Path(dataset).is_absolute() else dataset


def data_record(attribute: AttributeTask, meaning: Attribute, labels: torch.Tensor) -> dict[str, Any]:
    """Which labelled images an attribute was learned from, and how many there are of each label.

    Args:
        labels: (N,) classes or values, NaN where an image has none.
    """
    labels = labels[~labels.isnan()]
    local = Path(attribute.dataset).exists()
    record: dict[str, Any] = {"attribute": attribute.name, "dataset": shareable_name(attribute.dataset) + " (not public)" * local}
    source = attribute.dataset_description or (SOURCE if attribute.dataset.startswith("digits:") else None)
    record |= {} if source is None else {"source": source}
    record |= {} if attribute.dataset != "base-samples" else {"labelled by": attribute.labeller}
    record["images"] = len(labels)
    if isinstance(meaning, Categorical):
        return record | {"labels": {name: int((labels == i).sum()) for i, name in enumerate(meaning.names)}}
    spread = {"lowest": labels.min(), "mean": labels.mean(), "highest": labels.max()} if len(labels) else {}
    return record | {"labels": {name: round(value.item(), 4) for name, value in spread.items()}}


def settings_record(task: TaskConfig, config: CTRLConfig) -> dict[str, Any]:
    """The settings that are not the defaults: with the base, a config that trains the same again."""
    settings = {}
    for values in (task, config):
        for f in fields(values):
            value = getattr(values, f.name)
            default = f.default if f.default is not MISSING else f.default_factory()
            if f.name not in UNTOLD and value != default:
                settings[f.name] = value
    if "dataset" in settings:
        settings["dataset"] = [shareable_name(dataset) for dataset in task.dataset]
    return settings


def training_record(task: TaskConfig, config: CTRLConfig, data: list[dict[str, Any]], accelerator: Accelerator) -> dict[str, Any]:
    """`AdapterConfig.training`. data: one `data_record` an attribute."""
    on_gpu = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type
    compute = {"device": device, "processes": accelerator.num_processes, "threads": torch.get_num_threads()}
    compute |= {"precision": config.mixed_precision, "python": platform.python_version()}
    return {"data": data, "settings": settings_record(task, config), "compute": compute}
