"""The model card of an adapter: README.md with the Hub's metadata, the certificate and how to use it."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .adapters import AdapterConfig
from .evaluation import by_gamma, lower_bounds
from .hub import is_repo_id
from .labels import Categorical, Continuous, LabelSpace


def _escaped(text: str) -> str:
    """The text on one line, without what Markdown, HTML or a table would take for its own."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#|!])", lambda found: f"&#{ord(found.group())};", text)


def _code(name: str) -> str:
    """A name as code, whatever is in it."""
    return f"`{name}`" if re.fullmatch(r"[\w .,:+=-]+", name) else f"<code>{_escaped(name)}</code>"


def _number(metrics: dict[str, Any], name: str, digits: int = 3) -> str:
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _label_lines(space: LabelSpace) -> str:
    """One line an attribute: what it may be."""
    lines = []
    for name, attribute in space.attributes.items():
        if isinstance(attribute, Categorical):
            cut = f", cut at {', '.join(f'{t:.4g}' for t in attribute.thresholds)}" if attribute.thresholds else ""
            cut += f" ({_escaped(attribute.unit)})" * bool(attribute.unit)
            lines.append(f"- {_code(name)}: {', '.join(map(_code, attribute.names))}{cut}")
        else:
            lines.append(
                f"- {_code(name)}: a number from {attribute.low:g} to {attribute.high:g} {_escaped(attribute.unit)}".rstrip()
            )
    return "\n".join(lines)


def _classifier_lines(metrics: dict[str, Any], space: LabelSpace) -> str:
    """One line an attribute that was learned: how good p̂(y | x) is on held-out labels, and how calibrated."""
    lines = []
    for name, attribute in space.attributes.items():
        prefix = "classifier_" if len(space) == 1 else f"classifier_{name}."

        def number(key: str, prefix: str = prefix) -> str:
            return f"{metrics[prefix + key]:.3f}" if prefix + key in metrics else "–"

        if f"{prefix}temperature" not in metrics and f"{prefix}accuracy" not in metrics:
            continue
        if isinstance(attribute, Categorical):
            lines.append(
                f"Classifier of {_escaped(name)}: held-out accuracy {number('accuracy')}, expected calibration error {number('ece_before')} before and\n"
                f"{number('ece_after')} after temperature scaling."
            )
        else:
            lines.append(
                f"Regression of {_escaped(name)}: held-out correlation {number('correlation')}, its central 50 % and 90 % intervals hold\n"
                f"{number('coverage_50_after')} and {number('coverage_90_after')} of the labels."
            )
    return "\n".join(lines)


def _part_rows(metrics: dict[str, Any]) -> str:
    """A table of the attributes and of the sets of attributes that labels give, where there is more than one; else nothing."""
    given = dict.fromkeys(key.split(".")[1] for key in metrics if key.startswith("by_given."))
    if not given:
        return ""
    names = ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")
    rows = "".join(
        f"\n| {_escaped(name.replace('+', ' and '))} | "
        + " | ".join(_number(metrics, f"by_given.{name}.{key}") for key in names)
        + " |"
        for name in given
    )
    return f"\nBy what the label gives:\n\n| given | accuracy | exact law's | KL | gap | gap to log Z from base samples |\n| --- | --- | --- | --- | --- | --- |{rows}\n"


def _continuous_rows(metrics: dict[str, Any], space: LabelSpace) -> str:
    """One line a continuous attribute: how what is asked for and what is measured agree."""
    return "".join(
        f"\n{_code(name)}: correlation of asked and measured {_number(metrics, f'by_attribute.{name}.correlation')} (exact law "
        f"{_number(metrics, f'exact_by_attribute.{name}.correlation')}), mean error "
        f"{_number(metrics, f'by_attribute.{name}.mean_error')} (exact law {_number(metrics, f'exact_by_attribute.{name}.mean_error')}).\n"
        for name, attribute in space.attributes.items()
        if isinstance(attribute, Continuous)
    )


def card_text(config: AdapterConfig, *, prompts: Sequence[str], pictures: Sequence[str] = ()) -> str:
    """The card's Markdown body. pictures: names of files beside it."""
    metrics = config.metrics
    space = LabelSpace.from_dict(config.label_space)
    shown = "".join(f"![{Path(name).stem}]({name})\n\n" for name in pictures)
    title, label = _escaped(" and ".join(space.attributes)), repr(space.example())
    prompt = f"{prompts[-1]!r}, " if prompts and prompts[-1] else ""
    rows = "\n".join(
        f"| {title} | {_number(metrics, name)} | {_number(metrics, 'base_' + name)} | {_number(metrics, 'exact_' + name)} |"
        for title, name in (
            ("label accuracy", "accuracy"),
            ("macro-F1", "macro_f1"),
            ("prompt accuracy", "prompt_accuracy"),
            ("log p̂(y given x), nats", "log_likelihood"),
            ("log Z, nats", "log_partition"),
            ("J = gamma log p̂ − KL, nats", "objective"),
            ("KL to the base, nats", "kl"),
            ("**gap = log Z − J, nats**", "gap"),
            ("gap to log Z from base samples, nats", "gap_from_base"),
        )
    )
    at_gamma = "".join(
        f"\n| {gamma:g} | "
        + " | ".join(
            ("≥ " if name in lower_bounds(row) else "") + _number(row, name)
            for name in ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")
        )
        + " |"
        for gamma, row in by_gamma(metrics).items()
    )
    if at_gamma:
        at_gamma = (
            f"\nThe same at other gamma, `pipe(..., gamma=…)` from {config.gamma_range[0]:g} to {config.gamma_range[1]:g}:\n\n"
            "| gamma | accuracy | exact law's | KL | gap | gap to log Z from base samples |\n| --- | --- | --- | --- | --- | --- |"
            + at_gamma
            + "\n"
        )
    doubt = " The effective sample size is low: the gap is only a lower bound." if metrics.get("gap_is_lower_bound") else ""
    return f"""# {title} for {_escaped(config.base["id"])}

A label-conditioned adapter for `{config.pipeline_class}`, made with [diffusers_ctrl](https://arxiv.org/abs/2406.12120).
It samples from p(x | prompt) · p({", ".join(map(_escaped, space.attributes))} | x)^{config.gamma:g}. A label may give any of:

{_label_lines(space)}

```python
from diffusers_ctrl import CTRLPipeline

pipe = CTRLPipeline.from_pretrained("path/or/hub-id/of/this/adapter")
image = pipe({prompt}label={label}).images[0]
```

{shown}## Certificate

| | tuned | base | exact law |
| --- | --- | --- | --- |
{rows}
{_continuous_rows(metrics, space)}{_part_rows(metrics)}{at_gamma}
The gap bounds, from above, the KL divergence in nats between what this adapter samples and the exact conditional law.
Measured with {config.sampler["num_inference_steps"]} steps of {config.sampler["scheduler"]} {config.sampler["options"]}, guidance scale
{config.sampler["guidance_scale"]:g}; effective sample size {metrics.get("ess", float("nan")):.0f}.{doubt}

## Training

{metrics.get("num_labels", "?")} labelled images, {metrics.get("updates", "?")} updates in {metrics.get("seconds_train", float("nan")):.0f} s, seed {metrics.get("seed", "?")}.
{_classifier_lines(metrics, space)}
Versions: {", ".join(f"{k} {v}" for k, v in config.versions.items())}.

The label means what the classifier learned from those images; it is as good, and as biased, as they are.
"""


def save_card(folder: str | os.PathLike, config: AdapterConfig, *, prompts: Sequence[str]) -> Path:
    """Writes README.md into the adapter folder, with the samples if they are there; returns its path."""
    metrics = config.metrics
    title = " and ".join(LabelSpace.from_dict(config.label_space).attributes)
    pictures = [name for name in ("samples.png",) if (Path(folder) / name).is_file()]
    results = [
        EvalResult(
            task_type="conditional-generation",
            dataset_type="samples",
            dataset_name=f"{title} labels",
            metric_type=name,
            metric_name=metric,
            metric_value=round(metrics[name], 4),
        )
        for name, metric in (("gap", "gap to the exact conditional law (nats)"), ("accuracy", "label accuracy"))
        if metrics.get(name) is not None
    ]
    shared = is_repo_id(config.base["id"])  # a folder of this machine is nobody else's base
    data = ModelCardData(
        base_model=config.base["id"] if shared else None,
        base_model_relation="adapter" if shared else None,
        library_name="diffusers",
        tags=["diffusers_ctrl", "lora", "conditional-control", "reinforcement-learning"],
        license="apache-2.0",
        eval_results=results or None,
        model_name=f"{title} for {config.base['id']}",
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(config, prompts=prompts, pictures=pictures)}")
    path = Path(folder) / "README.md"
    card.save(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return path
