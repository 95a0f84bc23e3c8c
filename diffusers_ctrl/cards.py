"""The model card of an adapter: README.md with the Hub's metadata, the certificate and how to use it."""

from __future__ import annotations

import html
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .adapters import AdapterConfig
from .baked import by_label_scale
from .evaluation import by_gamma, lower_bounds
from .hub import is_repo_id
from .labels import Categorical, Continuous, LabelSpace
from .untrusted import is_number


UNKNOWN_ID = "path/or/hub-id/of/this/adapter"  # in a card that was not pushed


def _escaped(text: str) -> str:
    """The text on one line, without what Markdown, HTML or a table would take for its own."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(
        r"[\\`*{}\[\]()#|!]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"&#{ord(found.group())};", text
    )  # an_inner _ is text


def _code(name: str) -> str:
    """A name as code, whatever is in it."""
    return f"`{name}`" if re.fullmatch(r"[\w .,:+=-]+", name) else f"<code>{_escaped(name)}</code>"


def _number(metrics: dict[str, Any], name: str, digits: int = 3) -> str:
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if not is_number(value):
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if is_number(error) else "")


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
    if is_number(metrics.get("classifier_num_train")):
        lines.append(
            f"Each network of the classifier was fitted to {_number(metrics, 'classifier_num_train', 0)} of the images; "
            f"{_number(metrics, 'classifier_num_validation', 0)} were held out of one network or another, for early stopping, "
            "calibration and these figures:\n"
        )
    for name, attribute in space.attributes.items():
        prefix = "classifier_" if len(space) == 1 else f"classifier_{name}."
        if f"{prefix}temperature" not in metrics and f"{prefix}accuracy" not in metrics:
            continue

        def change(key: str, prefix: str = prefix) -> str:
            return f"{_number(metrics, f'{prefix}{key}_before')} before and {_number(metrics, f'{prefix}{key}_after')} after"

        temperature = f"temperature scaling (by {_number(metrics, prefix + 'temperature', 2)})"
        if isinstance(attribute, Categorical):
            lines.append(
                f"- {_code(name)}, classifier: held-out accuracy {_number(metrics, prefix + 'accuracy')}; expected calibration error "
                f"{change('ece')}, negative log-likelihood {change('nll')} {temperature}, in nats."
            )
        else:
            lines.append(
                f"- {_code(name)}, regression: held-out correlation {_number(metrics, prefix + 'correlation')}, root mean square error "
                f"{_number(metrics, prefix + 'rmse')} {_escaped(attribute.unit)}; its central 50 % intervals hold {change('coverage_50')}, "
                f"its 90 % intervals {change('coverage_90')} {temperature} of the labels."
            )
    return "\n".join(lines)


def _data_lines(metrics: dict[str, Any], training: dict[str, Any]) -> str:
    """One line a dataset and attribute: what it is, how many images, how many of each label."""
    lines = [
        f"- {_code(str(part.get('attribute', '')))}: "
        + "; ".join(f"{_escaped(key)} {_told(value)}" for key, value in part.items() if key != "attribute")
        for part in training.get("data", [])
    ]
    return "\n".join([f"{_number(metrics, 'num_labels', 0)} labelled images in all.\n", *lines])


def _told(value: Any) -> str:
    """A value out of JSON as text: 0.25; a name; thin 200, bold 190."""
    if isinstance(value, dict):
        return ", ".join(f"{_escaped(name)} {_told(count)}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    return f"{value:g}" if is_number(value) else _escaped(value)


def _literal(value: Any) -> str:
    """A value as YAML on one line, and without a character that would end it or that cannot be seen."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}" for c in text)


def settings_text(config: AdapterConfig) -> str:
    """The run's settings as a YAML file for train_ctrl.py, or "" for an adapter that does not tell."""
    settings = config.training.get("settings")
    if not settings:
        return ""
    settings = {"base": config.base["id"], "base_revision": config.base["revision"], **settings}
    lines = []
    for key, value in settings.items():
        if isinstance(value, list) and len(_literal(value)) > 100:
            lines += [f"{key}:", *(f"  - {_literal(item)}" for item in value)]
        else:
            lines.append(f"{key}: {_literal(value)}")
    return "\n".join(lines) + "\n"


def _baked_lines(config: AdapterConfig) -> str:
    """What a label loses when it is baked into a plain pipeline or LoRA file."""
    scale, metrics = config.sampler["guidance_scale"], config.metrics
    if config.training.get("settings", {}).get("control_head"):
        return "Its labels need it: it has a control head beside the denoiser, for which neither a plain pipeline nor a LoRA file has a place."
    head = (
        "`pipe.export_label(label, folder)` writes one label as an ordinary pipeline, `pipe.export_lora(file, label)` as an ordinary LoRA\n"
        "file; neither needs this package. A step without noise, which this adapter leaves to the base, is then taken with the tuned model."
    )
    rows = by_label_scale(metrics)
    lost = rows.get(1.0, {}).get("rms")
    if scale <= 1 or (is_number(lost) and lost < 1e-4):  # Flux has a guidance_scale, and no second half
        return head + "\nElse they are this adapter to rounding, since it was trained without classifier-free guidance."
    head += (
        f"\nIt was trained at guidance scale {scale:g}. A plain pipeline shows the label to both halves of the guidance, this adapter to one only, so a\n"
        "baked label is another model under guidance. `label_scale=` multiplies the label to make up for some of it"
    )
    if not rows:
        return f"{head}; by how much was not measured for this adapter."
    table = "".join(
        f"\n| baked, label_scale {factor:g} | {_number(row, 'rms')} | {_number(row, 'log_likelihood')} |"
        for factor, row in rows.items()
    )
    return (
        f"{head}. On the same noise, {_number(metrics, 'baked_samples', 0)} samples each:\n\n"
        "| | root mean square from the labelled images | log p̂(y given x), nats |\n| --- | --- | --- |"
        f"\n| labelled | 0 | {_number(metrics, 'baked_label_log_likelihood')} |{table}\n| base | {_number(metrics, 'baked_label_rms')} | – |"
    )


def _call_parameters(pipeline_class: str) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's call takes; nothing for a class that diffusers does not have."""
    found = getattr(diffusers, pipeline_class, None)
    return inspect.signature(found.__call__).parameters if inspect.isclass(found) else {}


def call_prompt(config: AdapterConfig) -> str:
    """The first argument of a call that draws the run's last prompt, as Python; "" where the pipeline takes none, or none was told."""
    prompts = config.training.get("settings", {}).get("prompts", [])
    if not prompts or not prompts[-1]:
        return ""
    prompt, parameters = prompts[-1], _call_parameters(config.pipeline_class)
    if "prompt" in parameters or not parameters:
        return f"{_literal(prompt)}, "
    if "class_labels" in parameters:  # as row_arguments reads a prompt
        return f"[{int(prompt)}], " if prompt.isdecimal() else f"[pipe.labels[{_literal(prompt)}]], "
    return ""


def _pipeline_tag(pipeline_class: str) -> str | None:
    """The Hub's name for what the pipeline does, by what its call takes."""
    parameters = _call_parameters(pipeline_class)
    if "prompt" in parameters:
        kind = "image" if "image" in parameters and "strength" in parameters else "text"
        return f"{kind}-to-{'video' if 'num_frames' in parameters else 'image'}"
    return "unconditional-image-generation" if "batch_size" in parameters else None


def _part_rows(metrics: dict[str, Any]) -> str:
    """A table of the attributes and of the sets of attributes that labels give, where there is more than one; else nothing."""
    own = [key.removeprefix("by_given.") for key in metrics if key.startswith("by_given.")]
    given = dict.fromkeys(key.rpartition(".")[0] for key in own)  # a figure's name has no dot, an attribute's may
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


def card_text(config: AdapterConfig, pictures: Sequence[str] = ()) -> str:
    """The card's Markdown body. pictures: names of files beside it."""
    metrics, training = config.metrics, config.training
    space = LabelSpace.from_dict(config.label_space)
    shown = "".join(f"![{Path(name).stem}]({name})\n\n" for name in pictures)
    title, label = _escaped(" and ".join(space.attributes)), repr(space.example())
    prompt = call_prompt(config)
    rows = "\n".join(
        f"| {title} | {_number(metrics, name)} | {_number(metrics, 'base_' + name)} | {_number(metrics, 'exact_' + name)} |"
        for title, name in (
            ("label accuracy", "accuracy"),
            ("macro-F1", "macro_f1"),
            ("prompt accuracy", "prompt_accuracy"),
            ("log p̂(y given x), nats", "log_likelihood"),
            ("log Z, nats", "log_partition"),
            ("J = E[gamma log p̂ − KL], nats", "objective"),
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
        + f" | {_number(row, 'ess', 0)} |"
        for gamma, row in by_gamma(metrics).items()
    )
    if at_gamma and config.gamma_range:
        at_gamma = (
            f"\nThe same at other gamma, `pipe(..., gamma=…)` from {config.gamma_range[0]:g} to {config.gamma_range[1]:g}:\n\n"
            "| gamma | accuracy | exact law's | KL | gap | gap to log Z from base samples | effective sample size |\n"
            "| --- | --- | --- | --- | --- | --- | --- |" + at_gamma + "\n"
        )
    doubt = " The effective sample size is low: the gap is only a lower bound." if metrics.get("gap_is_lower_bound") else ""
    attributes = ", ".join(map(_escaped, space.attributes))
    settings = settings_text(config)
    run = f"accelerate launch training/train_ctrl.py --config settings.yaml --seed {_number(metrics, 'seed', 0)}"
    how = (
        f"""With `settings.yaml` as below (what it leaves out has its default), in a clone of diffusers_ctrl:

```bash
{run}
```

```yaml
{settings}```
"""
        if settings
        else "Its settings were not recorded."
    )
    compute = _told(training.get("compute", {})) or "not recorded"
    return f"""# {title} for {_escaped(config.base["id"])}

A label-conditioned adapter for {_code(config.pipeline_class)}, made with [diffusers_ctrl](https://arxiv.org/abs/2406.12120).
It samples from p(x | prompt) · p({attributes} | x)^{config.gamma:g}. A label may give any of:

{_label_lines(space)}

```python
from diffusers_ctrl import CTRLPipeline

pipe = CTRLPipeline.from_pretrained("{UNKNOWN_ID}")  # with its base, {_literal(config.base["id"])}
image = pipe({prompt}label={label}).images[0]
```

{shown}## Certificate

| | tuned | base | exact law |
| --- | --- | --- | --- |
{rows}
{_continuous_rows(metrics, space)}{_part_rows(metrics)}{at_gamma}
The gap bounds, from above, the KL divergence in nats between what this adapter samples and the exact conditional law.
Measured with {config.sampler["num_inference_steps"]} steps of {_escaped(config.sampler["scheduler"])} ({_told(config.sampler["options"]) or "no options"}), guidance scale
{config.sampler["guidance_scale"]:g}; effective sample size {_number(metrics, "ess", 0)}.{doubt} ± is one standard error of the sampling; that of the
classifier, which is taken for the truth here, is not in it. To measure again:
`python training/evaluate.py --adapter {UNKNOWN_ID} --config settings.yaml`.

## Training data

{_data_lines(metrics, training)}

{_classifier_lines(metrics, space)}

The base was trained on other data, of which this card knows nothing: see its own card.

## How it was trained

{how}
{_number(metrics, "updates", 0)} updates in {_number(metrics, "seconds_train", 0)} s (classifier {_number(metrics, "seconds_classifier", 0)} s, evaluation {_number(metrics, "seconds_evaluate", 0)} s), seed {_number(metrics, "seed", 0)}; compute: {compute}.
Versions: {_told(config.versions)}.

## Without this package

{_baked_lines(config)}

## Limits and intended use

For drawing images with the base above, of prompts like those it was trained on, where the label matters; with the sampler it was measured with, or one
near it. It can draw nothing that the base cannot. The label means what the classifier learned from the images above: it is as good, and as biased, as
they are, and nothing here says that it holds for other images or other prompts. It is no measurement of anything in the world: do not use it, nor its
classifier, to judge real images or people. The gap above says how far it is from the exact conditional law, and nothing says how far the classifier
is from the truth. The base's licence and its limits apply as well.
"""


def save_card(folder: str | os.PathLike, config: AdapterConfig) -> Path:
    """Writes README.md into the adapter folder, with those pictures that are there; returns its path."""
    metrics = config.metrics
    title = " and ".join(LabelSpace.from_dict(config.label_space).attributes)
    pictures = [path.name for kind in ("samples", "confusion*", "curves") for path in sorted(Path(folder).glob(f"{kind}.png"))]
    results = [
        EvalResult(
            task_type="conditional-generation",
            dataset_type="samples",
            dataset_name=f"{title} labels",
            metric_type=name,
            metric_name=metric,
            metric_value=round(metrics[name], 4),
        )
        for name, metric in (
            ("gap", "gap to the exact conditional law (nats)"),
            ("kl", "KL to the base (nats)"),
            ("accuracy", "label accuracy"),
        )
        if is_number(metrics.get(name))
    ]
    shared = is_repo_id(config.base["id"])  # a folder of this machine is nobody else's base
    lora = [] if config.training.get("settings", {}).get("lora_rank") == 0 else ["lora"]
    data = ModelCardData(
        base_model=config.base["id"] if shared else None,
        base_model_relation="adapter" if shared else None,
        library_name="diffusers",
        pipeline_tag=_pipeline_tag(config.pipeline_class),
        tags=["diffusers_ctrl", *lora, "conditional-control", "reinforcement-learning"],
        license="apache-2.0",
        eval_results=results or None,
        model_name=f"{title} for {config.base['id']}",
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(config, pictures)}")
    path = Path(folder) / "README.md"
    card.save(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return path


def shared_card(text: str, own: AdapterConfig, shared: AdapterConfig, repo_id: str, subfolder: str | None = None) -> str:
    """A card as it is pushed: what people wrote into it stays, its usage names the repository, and another base is named throughout.

    Args:
        text: README.md of the folder. own: its config; `shared`: the one that is pushed.

    Raises:
        ValueError: if the card's metadata cannot be read.
    """
    inside = f'", subfolder="{subfolder}' if subfolder else ""
    text = text.replace(f'"{UNKNOWN_ID}"', f'"{repo_id}{inside}"').replace(UNKNOWN_ID, repo_id)
    old, new = own.base["id"], shared.base["id"]
    if own.base == shared.base:
        return text
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"README.md has metadata that cannot be read: {error}") from error
    card.data.base_model, card.data.base_model_relation = new, "adapter"
    if isinstance(card.data.get("model_name"), str):
        card.data.model_name = card.data.model_name.replace(old, new)
    for form in (_escaped, _literal, str):
        card.text = card.text.replace(form(old), form(new))
    at = [f"\nbase_revision: {_literal(config.base['revision'])}\n" for config in (own, shared)]
    card.text = card.text.replace(*at)
    return f"---\n{card.data.to_yaml()}\n---\n{card.text}"
