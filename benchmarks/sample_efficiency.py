"""Accuracy and distance to the truth against the number of labelled digits: CTRL, and classifier-free-guidance fine-tuning on the same images.

    python benchmarks/sample_efficiency.py [--only ctrl-n100 cfg-n100 …] [--seeds 0 …] [--smoke]     # experiments/sample_efficiency.yaml

A variant is METHOD-nN. CTRL fits a calibrated classifier to N labelled images, nothing else, and trains for a range of gamma on the base's prompts; CFG
is fine-tuned on the N images, each with its label *and its digit as prompt*, which is more than CTRL is told. Both train for a fixed
number of updates, whatever N. `head` is CTRL by a control head alone, which a critic warms. `exact` are draws of the law that CTRL with this
classifier aims at, base samples resampled by p̂^gamma, at the values of both: what is lost to `exact` is the classifier's, what CTRL loses beyond it is what its training leaves over.

Each has one number at inference, gamma or the guidance weight (and for CFG how many updates were best), and gets the same validation budget for it: `validation` images a label for each value
tried. Those end as the file has them, and go on by the ratio of the last two as long as the last is better than all others (`peer_methods.py`). Rows of a result: `plain`, the value 1, which is what Bayes says; the best total variation to the truth, which takes the oracle; and
the best accuracy by the classifier fitted to the same N labels, which any user could do.

The truth is the same for all N and both methods: base samples whose exact class is the label, that is p(y | x) = 1 where the oracle reads y, else 0.
`nearest`: the mean distance of an image to the nearest of the N labelled ones (8x8 pictures), over the same of exact draws: well below one, it copies.
Distances as in exact_reference.py, with what exact draws show (`tv_floor`, `mmd2_floor`); standard errors by a jackknife over rounds of the prompts, binomial for accuracies.

Writes results/sample_efficiency/VARIANT-seedN.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from baselines import cfg_finetune
from baselines.base import Base, Labelled, encode, open_base
from digits_runs import Labels, cached_classifier, config_of, make_trainer, open_pipe, seen_digits, train, unseen_figures
from exact_reference import (
    FLOORS,
    JUDGE,
    JUDGED,
    VALIDATION,
    Reference,
    distance_to_law,
    make_reference,
    noise_seed,
    of_exact_draws,
    small,
    to_exact,
    total_variation,
)
from experiment import arguments, clock, run_all

from diffusers_ctrl import Classifier
from diffusers_ctrl.accuracy import agreement
from diffusers_ctrl.labels import label_grid
from diffusers_ctrl.rollouts import rollout
from digits_data import PROMPTS, digit_oracle, drawn_digits, oracle
from jackknife import jackknife
from peer_methods import Strengthened, beyond, is_best, sharpness


Images = list[torch.Tensor]  # of each label
Draw = Callable[[Any, int, int], Images]  # value that is tuned, images a label, seed -> images
IMPOSSIBLE = -60.0  # nats of a class that the oracle does not read: a number, so that a tiny pool without a class still has a law
BATCH = 100


@dataclass(frozen=True)
class Fitted:
    """series: what is tried of the number that is tuned, ascending, the plain one first; CFG's has its updates before it, and a series for each
    number of these. about: what the training was, for the result."""

    draw: Draw
    series: list[list[Any]]
    about: dict[str, Any]


def true_likelihood(attribute: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """log p(y | x) of the exact oracle: 0 where it reads y."""

    def likelihood(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.where(oracle(attribute, images) == labels[:, 0], 0.0, IMPOSSIBLE)

    return likelihood


@cache
def opened(base: str, steps: int) -> Base:
    return open_base(open_pipe(base), list(PROMPTS), steps)


@cache
def truth(base: str, steps: int, attribute: str, count: int, pool: Path) -> Reference:
    """The one law that everything is compared with."""
    rows = label_grid(Labels(attribute, 1, 0).space).labels
    return make_reference(opened(base, steps), true_likelihood(attribute), rows, 1.0, [attribute], count, pool)


def pool_of(spec: dict[str, Any], folder: Path) -> Path:
    """Where the base samples are that make the truth."""
    return folder / f"base-samples-{spec['base_samples']}.pt"


def fit_ctrl(
    spec: dict[str, Any], labels: Labels, classifier: Classifier, folder: Path, own: dict[str, Any] | None = None
) -> Fitted:
    """own: settings beside the recipe's, and its own gammas; those beyond the range are its end with a `strength` above 1."""
    settings = own or {"gammas": spec["gammas"]}
    config = config_of(spec["train"], settings, labels.seed, folder / "run")
    trainer = make_trainer(spec["base"], classifier, config)
    seconds, end = train(trainer), config.gamma_range[1]

    def draw(gamma: float, per_label: int, seed: int) -> Images:
        environment = replace(trainer.environment, gamma=min(gamma, end), gamma_range=None)
        generator, policy = torch.Generator().manual_seed(seed), trainer.policy
        if gamma > end:
            policy = Strengthened(policy, gamma / end)
        batch = environment.grid(per_label, generator)
        with torch.no_grad(), policy.merged():
            found = rollout(policy, environment.sampler, batch, generator, reference=False)
            return list(environment.decode(found.sample).split(per_label))

    return Fitted(draw, [settings["gammas"]], {"seconds_training": seconds, "updates": trainer.update})


def fit_head(spec: dict[str, Any], labels: Labels, classifier: Classifier, folder: Path) -> Fitted:
    """A control head alone, warmed by a critic, then as many updates as the recipe has, all on its own steps, for a wider range of gamma."""
    return fit_ctrl(spec, labels, classifier, folder, spec["head"])


def fit_exact(spec: dict[str, Any], labels: Labels, classifier: Classifier, folder: Path) -> Fitted:
    """Nothing is trained. Images of the pool, drawn for each label and prompt by p̂(y | x)^gamma."""
    base, pool = opened(spec["base"], spec["train"]["num_inference_steps"]), pool_of(spec, folder)
    rows = label_grid(labels.space).labels
    reference = make_reference(base, classifier, rows, 1.0, [labels.attribute], spec["base_samples"], pool)

    def draw(gamma: float, per_label: int, seed: int) -> Images:
        generator, prompts = torch.Generator().manual_seed(seed), torch.arange(per_label) % len(PROMPTS)
        chosen = [reference.draws(label, prompts, generator, gamma) for label in range(len(rows))]
        return [reference.images[own].float() for own in chosen]

    return Fitted(draw, [sorted({*spec["gammas"], *spec["head"]["gammas"]})], {"seconds_training": 0.0})


def fit_cfg(spec: dict[str, Any], labels: Labels, _: Classifier, __: Path) -> Fitted:
    base, (images, digits) = opened(spec["base"], spec["train"]["num_inference_steps"]), drawn_digits()
    data = Labelled(encode(base, images[labels.rows]), labels.given().float().unsqueeze(1), torch.as_tensor(digits)[labels.rows])
    policies, seconds = {}, {}
    for updates in spec["cfg_updates"]:
        started = clock()
        policies[updates] = cfg_finetune.fit(base, labels.space, data, updates=updates, seed=labels.seed)
        seconds[updates] = clock() - started

    def draw(value: tuple[int, float], per_label: int, seed: int) -> Images:
        (updates, weight), out = value, []
        for row in range(len(label_grid(labels.space).labels)):
            generator, prompts = torch.Generator().manual_seed(1000 * seed + row), torch.arange(per_label) % len(PROMPTS)
            options = {"policy": policies[updates], "weight": weight}
            parts = [
                cfg_finetune.sample(base, None, torch.tensor([float(row)]), part, generator, **options)
                for part in prompts.split(BATCH)
            ]
            out.append(torch.cat(parts))
        return out

    # plain: all updates, weight 1
    series = [[(updates, weight) for weight in spec["cfg_weights"]] for updates in reversed(spec["cfg_updates"])]
    about = {"seconds_training": sum(seconds.values()), "seconds_by_updates": {str(k): v for k, v in seconds.items()}}
    return Fitted(draw, series, about)


METHODS = {"ctrl": fit_ctrl, "head": fit_head, "cfg": fit_cfg, "exact": fit_exact}


def distances_with_errors(reference: Reference, images: Images, seed: int) -> dict[str, float]:
    """Total variation and squared MMD, means over the labels, with standard errors."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for label, own in enumerate(images):
        rounds = max(2, len(own) // reference.num_prompts)  # prompts take turns, so each group has them all
        law, cells = reference.law(label), reference.cells_of(own)
        far, pictures = to_exact(reference, label, generator), small(own)
        row = {"tv": total_variation(cells, law), "mmd2": far(pictures)}
        row["tv_se"] = jackknife(lambda kept, c=cells, p=law: total_variation(c[kept], p), len(own), rounds)
        row["mmd2_se"] = jackknife(lambda kept, x=pictures, far=far: far(x[kept]), len(own), rounds)
        rows.append(row)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("tv", "mmd2")}
    return means | {name: math.sqrt(sum(row[name] ** 2 for row in rows)) / len(rows) for name in ("tv_se", "mmd2_se")}


def judged(reference: Reference, labels: Labels, images: Images, seed: int) -> dict[str, Any]:
    """One row's figures, by the exact oracles."""
    pictures, per_label = torch.cat(images), len(images[0])
    asked = torch.arange(len(images)).repeat_interleave(per_label).double().unsqueeze(1)
    found = oracle(labels.attribute, pictures).double().unsqueeze(1)
    obeyed = (digit_oracle(pictures) == torch.arange(per_label).remainder(len(PROMPTS)).repeat(len(images))).double()
    out: dict[str, Any] = {k: v for k, v in agreement(labels.space, asked, found).items() if k in ("accuracy", "macro_f1")}
    out["by_label"] = [part.mean().item() for part in (found == asked).double().split(per_label)]
    out["accuracy_se"] = math.sqrt(sum(p * (1 - p) / per_label for p in out["by_label"])) / len(images)
    out["prompt_accuracy"], out["prompt_accuracy_se"] = obeyed.mean().item(), (obeyed.std() / math.sqrt(len(obeyed))).item()
    return out | distances_with_errors(reference, images, seed)


def nearest(reference: Reference, images: Images, labelled: torch.Tensor, seed: int) -> float:
    """Mean distance to the nearest of the labelled images (N, C, H, W), over that of as many exact draws."""
    generator, known = torch.Generator().manual_seed(seed), small(labelled)
    exact = [reference.in_turn(label, len(own), generator) for label, own in enumerate(images)]
    found = [
        torch.cdist(parts, known).amin(dim=1).mean() for parts in (small(torch.cat(images)), reference.features[torch.cat(exact)])
    ]
    return (found[0] / found[1]).item()


@torch.no_grad()
def classifier_accuracy(classifier: Classifier, images: Images) -> float:
    right = [(classifier.log_probs(own)[0].argmax(dim=1) == row).double().mean().item() for row, own in enumerate(images)]
    return sum(right) / len(right)


def next_value(value: Any, values: list[Any]) -> Any:
    """What comes after it, where it is beyond the series or ends it."""
    if isinstance(value, tuple):
        return (*value[:-1], beyond(value[-1], [one[-1] for one in values]))
    return beyond(value, values)


def chosen(
    fitted: Fitted, reference: Reference, classifier: Classifier, validation: int, seed: int
) -> tuple[dict[Any, list[str]], list[dict]]:
    """{value: what it is the best for}, and all that was tried."""

    def judge(value: Any) -> dict[str, Any]:
        images = fitted.draw(value, validation, noise_seed(seed, VALIDATION))
        read = {"tv": distance_to_law(reference, images), "classifier_accuracy": classifier_accuracy(classifier, images)}
        return {"value": value, **read}

    tried = [judge(value) for values in fitted.series for value in values]
    for values in fitted.series:
        last = next(one for one in tried if one["value"] == values[-1])
        while is_best(last, [one for one in tried if one is not last]):
            last = judge(next_value(last["value"], values))
            tried.append(last)
    best = {
        "plain": fitted.series[0][0],
        "distance": min(tried, key=lambda one: one["tv"])["value"],
        "accuracy": max(tried, key=sharpness)["value"],
    }
    return {value: [aim for aim, of in best.items() if of == value] for value in dict.fromkeys(best.values())}, tried


def run(spec: dict[str, Any], name: str, seed: int, folder: Path) -> dict[str, Any]:
    method, count = name.split("-n")
    labels = Labels(spec["attribute"], int(count), seed)
    classifier, seconds = cached_classifier(spec["base"], labels, folder, spec["epochs"])
    about = {"seconds_classifier": seconds, "classifier": unseen_figures(spec["base"], labels, classifier)}
    fitted = METHODS[method](spec, labels, classifier, folder)
    pool = pool_of(spec, folder)
    reference = truth(spec["base"], spec["train"]["num_inference_steps"], spec["attribute"], spec["base_samples"], pool)
    best, tried = chosen(fitted, reference, classifier, spec["validation"], seed)
    labelled, rows = seen_digits(spec["base"])[labels.rows], []
    for value, aims in best.items():
        images, judge = fitted.draw(value, spec["outputs"], noise_seed(seed, JUDGED)), noise_seed(seed, JUDGE)
        row = {"value": value, "tuned_for": aims, **judged(reference, labels, images, judge)}
        rows.append(row | {"nearest": nearest(reference, images, labelled, judge)})
    about |= {"method": method, "num_labels": int(count), **fitted.about}
    about |= of_exact_draws(reference, spec["outputs"], torch.Generator().manual_seed(noise_seed(seed, FLOORS)))
    return {**about, **{key: spec[key] for key in ("outputs", "validation", "base_samples")}, "rows": rows, "tried": tried}


def line(record: dict[str, Any]) -> str:
    rows = [
        f"{'+'.join(row['tuned_for'])} {row['value']}: accuracy {row['accuracy']:.3f} ± {row['accuracy_se']:.3f}, TV {row['tv']:.3f}, "
        f"MMD² {row['mmd2']:.4f}, digit {row['prompt_accuracy']:.3f}"
        for row in record["rows"]
    ]
    return f"{record['seconds_training']:.0f} s, exact draws' TV {record['tv_floor']:.3f}  " + "; ".join(rows)


def main(given: list[str] | None = None) -> None:
    args = arguments("sample_efficiency", __doc__, given)
    variants = {f"{method}-n{n}": None for n in args.spec["num_labels"] for method in METHODS}
    run_all(args, variants, lambda name, seed: run(args.spec, name, seed, args.cache), line)


if __name__ == "__main__":
    main()
