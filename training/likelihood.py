"""p(y | x) of a run: labelled images read, a calibrated classifier fitted to them as the base's autoencoder shows them, or a scorer."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from diffusers_ctrl import Categorical, Continuous, CTRLConfig, LabelSpace, processes
from diffusers_ctrl.calibration import CalibrationReport
from diffusers_ctrl.checkpoints import differences, fingerprint, write_file
from diffusers_ctrl.classifiers import Classifier, MoreBatches, epochs_for, fit_classifier, resized
from diffusers_ctrl.decoding import decoder, round_trip
from diffusers_ctrl.labels import Attribute
from diffusers_ctrl.rewards import attribute_rewards, classifier_reward
from digits_data import label_attribute, parse_part, write_digits_dataset
from labelled_data import LabelledImages, load_labelled_images
from provenance import data_record
from sampled_data import write_sampled_dataset
from streamed_data import LabelledStream, stream_labelled_images
from task import AttributeTask, TaskConfig, import_function


@dataclass(frozen=True)
class Likelihood:
    """reward: images, labels (B, A) -> (B,) log p̂(y | x) in nats. classifier: None where a scorer has a part in the reward.

    calibration: of the classifier, flat. seconds: that it took to fit. num_labels: images with a label of some attribute. data: what
    each attribute was learned from, for the card. weights: fingerprint of the classifier, if any.
    """

    reward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    space: LabelSpace
    classifier: Classifier | None
    calibration: dict[str, Any]
    seconds: float
    num_labels: int
    data: list[dict[str, Any]]
    weights: str | None


def _by_dataset(task: TaskConfig) -> dict[str, list[AttributeTask]]:
    """The attributes without a scorer, by the dataset that labels them."""
    shared: dict[str, list[AttributeTask]] = {}
    for attribute in task.attributes():
        if attribute.scorer is None:
            shared.setdefault(attribute.dataset, []).append(attribute)
    return shared


def write_datasets(task: TaskConfig, config: CTRLConfig, pipe: DiffusionPipeline) -> dict[str, str]:
    """Where each dataset is. The embedded digits and the base's own samples are written first.

    All processes call this: they share out the drawing of the base's samples.
    """
    folder, found = Path(config.output_dir) / "dataset", {}
    for dataset, attributes in _by_dataset(task).items():
        found[dataset] = dataset
        if dataset.startswith("digits:"):
            spec = dataset.removeprefix("digits:")
            arguments = (folder / spec.replace("/", "-of-"), spec, task.num_labels, config.seed)
            found[dataset] = str(processes.on_main(lambda arguments=arguments: write_digits_dataset(*arguments)))
        elif dataset == "base-samples":
            found[dataset] = str(folder / dataset)
            settings = {name: getattr(config, name) for name in ("num_inference_steps", "guidance_scale", "eta")}
            accepted = inspect.signature(pipe.__call__).parameters
            write_sampled_dataset(
                found[dataset],
                pipe,
                task.prompts,
                {attribute.name: import_function(attribute.labeller) for attribute in attributes},
                {attribute.name: attribute.names for attribute in attributes if attribute.names is not None},
                task.num_labels,
                seed=config.seed,
                **{name: value for name, value in settings.items() if name in accepted},
            )
    return found


def labelled_images(
    task: TaskConfig, pipe: DiffusionPipeline, folders: dict[str, str], seed: int
) -> tuple[LabelSpace, torch.Tensor, torch.Tensor, MoreBatches | None]:
    """What is to be learned of the attributes without a scorer: their label space, images (N, 3, H, W) in [0, 1] and labels (N, A).

    With `streaming` these are the datasets' heads, and the fourth is where the rest comes from (see `fit_classifier`).

    A dataset is read once for all attributes that it labels, from where `write_datasets` says. An image has NaN for the attributes that
    its dataset says nothing of.
    """
    attributes = [attribute for attribute in task.attributes() if attribute.scorer is None]
    parts, spaces, streams = [], {}, []
    for dataset, own in _by_dataset(task).items():
        data = _load(task, pipe, folders[dataset], own, seed)
        columns = [attributes.index(attribute) for attribute in own]
        if isinstance(data, LabelledStream):
            streams.append((data, columns))
            data = data.head
        rows = torch.full((len(data.images), len(attributes)), torch.nan)
        rows[:, columns] = data.labels
        for column, attribute in enumerate(own):
            spaces[attribute.name] = _meaning(attribute) or attribute.categorical(data.names[column])
        parts.append((data.images, rows))
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    more = _interleaved(streams, len(attributes)) if streams else None
    return LabelSpace({attribute.name: spaces[attribute.name] for attribute in attributes}), images, labels, more


def _interleaved(streams: list[tuple[LabelledStream, list[int]]], width: int) -> MoreBatches:
    """Batches of the streams in turn, as `fit_classifier` asks for them: labels (B, width), a stream's in its columns and NaN elsewhere."""

    def more(held: torch.Tensor, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        sources, first = [], 0
        for stream, columns in streams:
            own = held[(held >= first) & (held < first + len(stream.keys))] - first
            sources.append((stream.batches(own.tolist(), batch_size, seed), columns))
            first += len(stream.keys)
        for batches, columns in cycle(sources):
            images, labels = next(batches)
            rows = torch.full((len(images), width), torch.nan)
            rows[:, columns] = labels
            yield images, rows

    return more


def _meaning(attribute: AttributeTask) -> Attribute | None:
    """What the settings say of the attribute's labels; None where its dataset does.

    Raises:
        ValueError: for label_names of the embedded digits that are not theirs: their classes are cut, and named in the card, in one order.
    """
    if attribute.interval is not None:
        return attribute.interval
    if attribute.dataset.startswith("digits:") and attribute.scorer is None:
        digits = label_attribute(parse_part(attribute.dataset.removeprefix("digits:"))[0])
        classes = digits.names if isinstance(digits, Categorical) else ()
        if attribute.names not in (None, classes):
            raise ValueError(
                f"label_names of {attribute.name!r} are {list(attribute.names)}, but {attribute.dataset!r} has "
                f"{f'the classes {list(classes)}, in this order' if classes else 'numbers for labels'}: leave label_names out."
            )
        return digits
    return None if attribute.names is None else attribute.categorical(attribute.names)


def _load(
    task: TaskConfig, pipe: DiffusionPipeline, dataset: str, attributes: list[AttributeTask], seed: int
) -> LabelledImages | LabelledStream:
    """One dataset with a column for each of `attributes`."""
    own = attributes[0].dataset == "base-samples"
    columns = [attribute.name if own else attribute.label_column for attribute in attributes]
    size = task.resolution or decoder(pipe).image_shape[-1]
    names = [attribute.names for attribute in attributes]
    kinds = ["continuous" if isinstance(_meaning(attribute), Continuous) else "categorical" for attribute in attributes]
    common = {
        "image_column": task.image_column,
        "max_rows": task.num_labels,
        "skip_unreadable": task.skip_unreadable,
        # as the reward will see them, and no larger in memory than the classifier takes them
        "transform": lambda images: resized(round_trip(pipe, images), task.classifier_size),
    }
    if task.streaming:
        return stream_labelled_images(
            dataset, size, label_columns=columns, label_names=names, kinds=kinds, head=task.stream_head, seed=seed, **common
        )
    return load_labelled_images(dataset, size, label_column=columns, label_names=names, kind=kinds, **common)


NOTHING_FITTED = {"report": {}, "seconds": 0.0, "num_labels": 0, "data": {}, "weights": None}


def _records(task: TaskConfig, space: LabelSpace, labels: torch.Tensor) -> dict[str, dict[str, Any]]:
    """What the card says of each learned attribute's data. Of a stream, the counts are those of its head."""
    own = {attribute.name: attribute for attribute in task.attributes() if attribute.scorer is None}
    return {name: data_record(own[name], meaning, labels[:, i]) for i, (name, meaning) in enumerate(space.attributes.items())}


def classifier_settings(task: TaskConfig, config: CTRLConfig) -> dict[str, Any]:
    """All that the classifier is made from, for JSON; two runs with the same settings have the same classifier."""
    names = {"base", "base_revision", "num_labels", "image_column", "resolution", "skip_unreadable", "dtype"}
    names |= {"streaming", "stream_head", "epoch_labels"} if task.streaming else set()
    own = {f.name: getattr(task, f.name) for f in fields(task) if f.name in names or f.name.startswith("classifier_")}
    attributes = [asdict(attribute) for attribute in task.attributes() if attribute.scorer is None]
    for attribute in attributes:
        del attribute["oracle"], attribute["dataset_description"]  # which judge and tell, and do not teach
    if any(attribute["dataset"] == "base-samples" for attribute in attributes):
        own |= {name: getattr(config, name) for name in ("num_inference_steps", "guidance_scale", "eta")}
        own |= {"prompts": task.prompts, "scheduler": task.scheduler}
    return json.loads(json.dumps({**own, "attributes": attributes, "seed": config.seed}))


def warnings_of(report: CalibrationReport, space: LabelSpace, labels: torch.Tensor, epochs: int) -> list[str]:
    """A sentence for each categorical attribute of which the classifier knows next to nothing: RL could learn nothing from it.

    labels: (N, A), NaN where not given. Its NLL on held-out labels is compared with the entropy of their frequencies, what guessing costs.
    """
    found = []
    for column, (name, attribute) in zip(labels.T, space.attributes.items(), strict=True):
        if isinstance(attribute, Categorical):
            shares = torch.bincount(column[~column.isnan()].long()).double() / (~column.isnan()).sum()
            guessing, own = torch.special.entr(shares).sum().item(), report.attributes[name].nll_after
            if own > 0.9 * guessing:
                found.append(
                    f"The classifier knows next to nothing of {name!r}: its NLL on held-out labels is {own:.2f} nats, and guessing by their "
                    f"frequencies costs {guessing:.2f}. With {int((~column.isnan()).sum())} labels, {epochs} epochs are few optimizer steps: try "
                    "more classifier_epochs, or more labels."
                )
    return found


def fit_classifier_into(
    folder: Path,
    task: TaskConfig,
    config: CTRLConfig,
    space: LabelSpace,
    images: torch.Tensor,
    labels: torch.Tensor,
    more: MoreBatches | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """Fits and calibrates a classifier and writes it to `folder`, with calibration.json as the last file: where that is, it is whole.

    Returns:
        The classifier; what calibration.json says: report, seconds, num_labels, data (for the card), settings, and the weights'
        fingerprint.
    """
    report_path = folder / "calibration.json"
    report_path.unlink(missing_ok=True)
    started = time.time()
    set_seed(config.seed)
    classifier = Classifier(
        space.to_dict(),
        image_size=task.classifier_size,
        in_channels=images.shape[1],
        widths=tuple(task.classifier_widths),
        members=task.classifier_members,
        coordinates=task.classifier_coordinates,
    )
    if task.dry_run:  # as large and as slow as a fitted one
        return classifier.eval().requires_grad_(False), dict(NOTHING_FITTED)
    batch = 64
    epochs = epochs_for(len(images) if more is None else task.epoch_labels)
    if task.classifier_epochs is not None:
        epochs = {"max_epochs": task.classifier_epochs}
    report = fit_classifier(
        classifier,
        images,
        labels,
        seed=config.seed,
        **epochs,
        batch_size=batch,
        more=more,
        epoch_batches=max(1, task.epoch_labels // batch),
    )
    print(report.lines(), flush=True)
    for sentence in warnings_of(report, space, labels, epochs["max_epochs"]):
        print(f"Warning: {sentence}", flush=True)
    classifier.save_pretrained(folder)
    saved = {
        "report": report.metrics(),
        "seconds": time.time() - started,
        "num_labels": len(images) if more is None else report.metrics().get("num_train", len(images)),
        "data": _records(task, space, labels),
        "settings": classifier_settings(task, config),
        "weights": fingerprint(classifier.state_dict().items()),
    }
    write_file(report_path, json.dumps(saved, indent=2) + "\n")
    return classifier, saved


def load_fitted(folder: Path, settings: dict[str, Any]) -> tuple[Classifier, dict[str, Any]] | None:
    """The classifier that an earlier start of this run left in `folder`, if it is whole and was made with the same settings."""
    try:
        saved = json.loads((folder / "calibration.json").read_text())
        if changed := differences(saved["settings"], settings):
            raise ValueError(f"it was made with other settings: {'; '.join(changed)}".replace(" in the checkpoint", " then"))
        classifier = Classifier.from_pretrained(folder)
        if saved["weights"] != fingerprint(classifier.state_dict().items()):
            raise ValueError("its weights are not those that were written")
        return classifier, saved
    except FileNotFoundError:
        return None  # the run was ended before it was there
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"The classifier in {folder} is not used, and fitted again: {error}.", flush=True)
        return None


def make_likelihood(
    task: TaskConfig, config: CTRLConfig, pipe: DiffusionPipeline, folder: Path, device: torch.device
) -> Likelihood:
    """p(y | x) of all attributes: scorers as they are, and one classifier of all the others, kept in `folder`.

    All processes call this. The main one reads the images and fits the classifier, the others get it from there.
    """
    attributes = task.attributes()
    scorers = {attribute.name: import_function(attribute.scorer) for attribute in attributes if attribute.scorer is not None}
    meanings = {attribute.name: _meaning(attribute) for attribute in attributes}  # of all, for their errors come before any work
    given = {name: meanings[name] for name in scorers}
    classifier, saved = None, NOTHING_FITTED
    if len(scorers) < len(attributes):
        found = processes.on_main(lambda: load_fitted(folder, classifier_settings(task, config))) if config.resume_from else None
        if found is None:
            folders = write_datasets(task, config, pipe)
            found = processes.on_main(
                lambda: fit_classifier_into(folder, task, config, *labelled_images(task, pipe, folders, config.seed))
            )
        classifier, saved = found
        classifier.to(device)
        given |= classifier.label_space.attributes
    space = LabelSpace({attribute.name: given[attribute.name] for attribute in attributes})
    data = [saved["data"].get(a.name, {"attribute": a.name, "scorer": a.scorer}) for a in attributes]
    figures = [saved["report"], saved["seconds"], saved["num_labels"], data, saved["weights"]]
    if not scorers:
        return Likelihood(classifier_reward(classifier), space, classifier, *figures)
    own = {name: _alone(classifier, column) for column, name in enumerate(classifier.label_space.attributes)} if classifier else {}
    return Likelihood(attribute_rewards({**own, **scorers}, space), space, None, *figures)


def _alone(classifier: Classifier, column: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """log p̂ of one attribute of a classifier: images, labels (B, 1) -> (B,) nats."""
    whole = classifier_reward(classifier)

    def reward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = torch.full((len(labels), len(classifier.label_space)), torch.nan, device=labels.device)
        rows[:, column] = labels[:, 0]
        return whole(images, rows)

    return reward
