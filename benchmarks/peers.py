"""Table 1: one attribute of the digits, ours against other ways to condition the same base with the same classifier.

    python benchmarks/peers.py --adapters digits-stroke [DIR …] [--config training/configs/NAME.yaml] [--outputs 600] [--only NAME …]

A seed is an adapter: its classifier is everybody's p̂(y | x), its labelled images (the recipe's, of its seed) are what the trained baselines learn
from. Every method's one number is tuned on `--validation` images a label, the same for all, twice: for the distance to the exact law (total
variation), and for accuracy by the *classifier*, which is all that a user could do. The oracles judge only the finished table. Rows that
are in results/peers_ATTRIBUTE.json already are kept; delete them to run them again.

Columns: accuracy, macro-F1, digits (prompt accuracy); distances of exact_reference.py with their floors; diversity: mean distance of two pictures
of the same prompt and label, over that of exact draws; rows of the denoiser's calls a sample, forward and backward; seconds a sample and of training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from baselines import best_of_n, cfg_finetune, classifier_guidance, ddpo, dps, draft, mpgd, tds, tfg  # noqa: E402
from baselines.base import Base, Labelled, encode, open_base  # noqa: E402
from exact_reference import Reference, distances, make_reference, small  # noqa: E402

from diffusers_ctrl.accuracy import agreement  # noqa: E402
from diffusers_ctrl.adapters import Adapter, load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.labels import label_grid  # noqa: E402
from diffusers_ctrl.rollouts import rollout  # noqa: E402
from digits_data import drawn_digits  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import attribute_oracle as make_oracle  # noqa: E402
from task import parse_arguments  # noqa: E402


Draw = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]  # label (A,), prompt rows, generator -> images
BATCH = 100


@dataclass(frozen=True)
class Setting:
    """One seed of the comparison."""

    base: Base
    adapter: Adapter
    labels: torch.Tensor
    data: Labelled
    reference: Reference
    task: Any
    seed: int

    def likelihood(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.adapter.classifier.log_prob(images, labels)


@dataclass(frozen=True)
class Method:
    """weights: what is tried. make: (setting, weight) -> how to draw; what it takes to make is the training's time."""

    weights: tuple[float, ...]
    make: Callable[[Setting, float], Draw]


def training_free(module: Any) -> Callable[[Setting, float], Draw]:
    def make(s: Setting, weight: float) -> Draw:
        return lambda y, prompts, g: module.sample(s.base, s.likelihood, y, prompts, g, weight=weight)

    return make


def with_noisy_classifier(s: Setting, weight: float) -> Draw:
    fitted = classifier_guidance.fit(s.base, s.data, seed=s.seed)
    return lambda y, prompts, g: classifier_guidance.sample(s.base, s.likelihood, y, prompts, g, classifier=fitted, weight=weight)


def with_cfg(s: Setting, weight: float) -> Draw:
    policy = cfg_finetune.fit(s.base, s.adapter.label_encoder.label_space, s.data, seed=s.seed)
    return lambda y, prompts, g: cfg_finetune.sample(s.base, s.likelihood, y, prompts, g, policy=policy, weight=weight)


def by_rl(module: Any) -> Callable[[Setting, float], Draw]:
    def make(s: Setting, weight: float) -> Draw:
        space = s.adapter.label_encoder.label_space
        policy = module.fit(s.base, space, s.likelihood, s.labels, weight=int(weight), seed=s.seed)
        return lambda y, prompts, g: module.sample(s.base, s.likelihood, y, prompts, g, policy=policy)

    return make


def ours(s: Setting, weight: float) -> Draw:
    """weight: particles of exact sampling; 1 is one plain call of the adapter."""
    policy, environment = adapter_environment(s.adapter, s.task)

    @torch.no_grad()
    def draw(y: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        row, count = int((s.labels == y).all(dim=1).nonzero()[0]), int(weight)
        every = prompts.repeat_interleave(count)
        batch = environment.batch(torch.full_like(every, row), every, generator)
        with policy.merged():
            found = rollout(policy, environment.sampler, batch, generator, reference=count > 1)
        images = environment.decode(found.sample)
        s.base.calls["forward"] += len(every) * s.base.steps * (2 if count > 1 else 1)
        if count == 1:
            return images
        weights = environment.gamma * environment.score(images, batch.labels).double() - found.log_ratio
        chosen = torch.multinomial(weights.view(-1, count).softmax(dim=1), 1, generator=generator).flatten()
        return images.view(-1, count, *images.shape[1:])[torch.arange(len(prompts)), chosen]

    return draw


METHODS = {
    "base": Method((0,), lambda s, _: lambda y, prompts, g: s.base.draw(prompts, g)),
    "CTRL": Method((1,), ours),
    "CTRL, 8 particles": Method((8,), ours),
    "DPS": Method((0.25, 0.5, 1, 2, 4), training_free(dps)),
    "MPGD": Method((0.05, 0.1, 0.2, 0.4, 0.8), training_free(mpgd)),
    "TFG": Method((0.1, 0.2, 0.4, 0.8), training_free(tfg)),
    "TDS": Method((0.25, 0.5, 1), training_free(tds)),
    "best of n": Method((2, 4, 8, 16), training_free(best_of_n)),
    "classifier guidance": Method((0.5, 1, 2, 4), with_noisy_classifier),
    "CFG fine-tuning": Method((1, 2, 3, 5), with_cfg),
    "DRaFT-K, no KL": Method((25, 50, 100), by_rl(draft)),
    "DDPO, no KL": Method((50, 100, 200), by_rl(ddpo)),
}


def draw_all(s: Setting, draw: Draw, per_label: int, seed: int) -> list[torch.Tensor]:
    """`per_label` images of each label, running through the prompts."""
    prompts, found = torch.arange(per_label) % len(s.base.conditions), []
    for row, label in enumerate(s.labels):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
        found.append(torch.cat([draw(label, part, generator) for part in prompts.split(BATCH)]))
    return found


def diversity(s: Setting, images: list[torch.Tensor], generator: torch.Generator) -> float:
    """Mean distance of two pictures of one label and digit, over the same of exact draws."""
    ratios = []
    for label, own in enumerate(images):
        exact = s.reference.draws(label, len(own), generator)
        parts = [(small(own), s.reference.cells_of(own)), (s.reference.features[exact], s.reference.cells[exact])]
        means = []
        for features, cells in parts:
            spread = [torch.pdist(features[cells // 10 == digit]).mean() for digit in range(10) if (cells // 10 == digit).sum() > 1]
            means.append(torch.stack(spread).mean())
        ratios.append((means[0] / means[1]).item())
    return sum(ratios) / len(ratios)


def judge(s: Setting, images: list[torch.Tensor], seed: int) -> dict[str, float]:
    """The row's figures, means over labels."""
    generator = torch.Generator().manual_seed(seed)
    oracle, pictures = make_oracle(s.task), torch.cat(images)
    asked = torch.cat([label.expand(len(own), -1) for label, own in zip(s.labels, images, strict=True)])
    found = torch.as_tensor(oracle(pictures)).view(len(pictures), -1).double()
    prompts = torch.cat([torch.arange(len(own)) % len(s.base.conditions) for own in images])
    out = {k: v for k, v in agreement(s.adapter.label_encoder.label_space, asked, found).items() if k in ("accuracy", "macro_f1")}
    out["prompt_accuracy"] = (s.reference.cells_of(pictures) // 10 == prompts).double().mean().item()
    apart = [distances(s.reference, row, own, generator) for row, own in enumerate(images)]
    out |= {name: sum(one[name] for one in apart) / len(apart) for name in apart[0]}
    return out | {"diversity": diversity(s, images, generator)}


def tuned_and_judged(s: Setting, method: Method, outputs: int, validation: int) -> list[dict[str, Any]]:
    """One row for the weight that is best by distance, one for the most accurate by the classifier where that is another."""
    tried = []
    for weight in method.weights:
        started = time.perf_counter()
        draw = method.make(s, weight)
        training = time.perf_counter() - started
        images = draw_all(s, draw, validation, seed=1)
        apart = [distances(s.reference, row, own, torch.Generator().manual_seed(0))["tv"] for row, own in enumerate(images)]
        right = []
        for row, own in enumerate(images):
            with torch.no_grad():
                scores = torch.stack([s.likelihood(own, label.expand(len(own), -1)) for label in s.labels], dim=1)
            right.append((scores.argmax(dim=1) == row).double().mean().item())
        tried.append({"weight": weight, "tv": sum(apart) / len(apart), "classifier_accuracy": sum(right) / len(right)})
        tried[-1] |= {"draw": draw, "training": training}
    best = {
        "distance": min(tried, key=lambda one: one["tv"]),
        "accuracy": max(tried, key=lambda one: one["classifier_accuracy"]),
    }
    if best["distance"] is best["accuracy"]:
        best = {"both": best["distance"]}
    rows = []
    for aim, chosen in best.items():
        s.base.calls.clear()
        started = time.perf_counter()
        images = draw_all(s, chosen["draw"], outputs, seed=2)
        seconds, count = time.perf_counter() - started, outputs * len(s.labels)
        row = {"tuned_for": aim, "weight": chosen["weight"], **judge(s, images, seed=3)}
        row |= {f"{way}_calls": s.base.calls[way] / count for way in ("forward", "backward")}
        row |= {"seconds_a_sample": seconds / count, "seconds_training": chosen["training"]}
        rows.append(row | {"tried": [{k: v for k, v in one.items() if k != "draw"} for one in tried]})
    return rows


def open_setting(name: str, arguments: list[str], base_samples: int, cache: Path) -> Setting:
    adapter = load_adapter(resolve_folder(name))
    task, _ = parse_arguments(arguments)
    seed, settings = int(adapter.config.metrics.get("seed", 0)), adapter.config.sampler
    adapter.classifier.eval().requires_grad_(False)
    pipe = DiffusionPipeline.from_pretrained(resolve_folder(adapter.config.base["id"]))
    base = open_base(pipe, list(task.prompts), settings["num_inference_steps"])
    labels = label_grid(adapter.label_encoder.label_space).labels
    (attribute,) = adapter.label_encoder.label_space.attributes
    images, digits = drawn_digits()
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: task.num_labels]
    measured = torch.as_tensor(make_oracle(task)(images[rows])).view(len(rows), -1).float()
    data = Labelled(encode(base, images[rows]), measured, torch.as_tensor(digits)[rows])

    def likelihood(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return adapter.classifier.log_prob(x, y)

    reference = make_reference(base, likelihood, labels, adapter.config.gamma, attribute, base_samples, cache)
    return Setting(base, adapter, labels, data, reference, task, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", default=["digits-stroke"])
    parser.add_argument("--config", help="the recipe, whose prompts, labels and oracle are used")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--outputs", type=int, default=600, help="images a label")
    parser.add_argument("--validation", type=int, default=200, help="images a label for each weight that is tried")
    parser.add_argument("--base_samples", type=int, default=50_000)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "base-samples.pt")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    arguments = ["--config", args.config] if args.config else []
    for name in args.adapters:
        setting = open_setting(name, arguments, args.base_samples, args.cache)
        output = args.output or RESULTS / f"peers_{setting.reference.attribute}.json"
        record = json.loads(output.read_text()) if output.exists() else {"rows": []}
        for method in args.only:
            if any((row["method"], row["adapter"]) == (method, name) for row in record["rows"]):
                continue
            rows = tuned_and_judged(setting, METHODS[method], args.outputs, args.validation)
            about = {
                "method": method,
                "adapter": name,
                "seed": setting.seed,
                "outputs": args.outputs,
                "validation": args.validation,
            }
            record["rows"] += [about | {"base_samples": args.base_samples, **provenance(), **row} for row in rows]
            write_json(output, record)
            for row in rows:
                print(
                    f"{method:20} {row['tuned_for']:9} {row['weight']:>6g}  accuracy {row['accuracy']:.3f}  digits "
                    f"{row['prompt_accuracy']:.3f}  TV {row['tv']:.3f} (floor {row['tv_floor']:.3f})  MMD² {row['mmd2']:.4f}  diversity "
                    f"{row['diversity']:.2f}  calls {row['forward_calls']:.0f}+{row['backward_calls']:.0f}  {row['seconds_a_sample']:.3f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
