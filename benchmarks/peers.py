"""Tables 1 and 2: the digits' attributes, ours against other ways to condition the same base with the same classifier.

    python benchmarks/peers.py [--settings stroke slant jpeg stroke-slant] [--seeds 0 1 2] [--only NAME …] [--outputs 120] [--smoke]

A setting of experiments/peers.yaml and a seed are an adapter, which is trained first where runs/peers/SETTING-SEED does not have it (a variant of it, where
a method that is asked for needs that and none needs the recipe's): its classifier is everybody's p̂(y | x), its labelled images are what the trained
baselines learn from. Every method's one number is tuned on `--validation` images
a label, the same for all, twice: for the distance to the exact law (total variation), and for accuracy by the *classifier*, which is all that a
user could do; of a method for which Bayes says 1 that value has a row too, `plain`, which needs no tuning. The oracles judge only the finished
table. All methods of a seed draw with the same noise, each seed with its own. One JSON a method in results/peers/SETTING-seedSEED/; what is there
is not run again, unless it was drawn with other noise, or peer_methods.py now has other weights for it to try, or a plain row that it lacks.
`CTRL, trained longer` and `CTRL, control head` have adapters of their own, of the same classifier, in runs/peers/SETTING-SEED-longer and -head, for
the settings under `variants` in that file.
`exact draws` are base samples, resampled by p̂ as the exact law has it.

Columns: accuracy, macro-F1, worst label; prompt accuracy; distances of exact_reference.py, for exact draws also from set to set; KL of the paths to the base's and
the gap to the exact law at gamma = 1 that it bounds, where the method's steps are Gaussian ones; diversity: mean distance of two pictures of the same
prompt and label, over that of exact draws; rows of the denoiser's calls a sample, forward and backward; seconds a sample, and over the base's
own, which is timed before and after; seconds of training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from baselines.base import Labelled, encode, open_base  # noqa: E402
from exact_reference import (  # noqa: E402
    FLOORS,
    JUDGE,
    JUDGED,
    PRICED,
    VALIDATION,
    distance_to_law,
    make_reference,
    noise_seed,
    of_each,
    of_exact_draws,
    small,
    to_exact,
)

import train_ctrl  # noqa: E402
from diffusers_ctrl import Classifier, CTRLConfig  # noqa: E402
from diffusers_ctrl.accuracy import agreement  # noqa: E402
from diffusers_ctrl.adapters import CONFIG_NAME, load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.labels import label_grid  # noqa: E402
from digits_data import digit_oracle  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from likelihood import labelled_images, write_datasets  # noqa: E402
from peer_methods import METHODS, PLAIN, RECIPE, Draw, Method, Setting, Trained  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import TaskConfig, attribute_oracle, parse_arguments  # noqa: E402


EXPERIMENT = Path(__file__).resolve().parent / "experiments" / "peers.yaml"
BATCH, PATHS = 120, 100
TOLD = (
    "lora_rank",
    "control_head",
    "gamma_range",
    "num_inference_steps",
)  # what an adapter must have been trained with, beside the seed
TOY = {"max_updates": 2, "coarse_updates": 1, "coarse_steps": 4, "num_inference_steps": 4, "batch_size": 9, "num_labels": 90}
TOY |= {"eval_samples": 10, "base_samples": 90, "classifier_epochs": 1, "classifier_members": 2}
TOY_HEAD = {"critic_trajectories": 90, "critic_updates": 2}


def read_experiment() -> dict[str, Any]:
    return yaml.safe_load(EXPERIMENT.read_text())


def arguments_of(name: str, seed: int, folder: Path, kind: str, smoke: bool) -> list[str]:
    """The command line of a setting's training, or of a variant of it."""
    spec = read_experiment()
    settings = {**spec["common"], **spec["settings"][name], **({} if kind == RECIPE else spec["variants"][kind][name])}
    settings |= {**(TOY if smoke else {}), "seed": seed, "output_dir": folder}
    settings |= {key: value for key, value in TOY_HEAD.items() if smoke and key in settings}
    found = ["--config", str(ROOT / settings.pop("config"))]
    for key, value in settings.items():
        found += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def kinds_of(name: str) -> list[str]:
    """The kinds of adapter that a setting has."""
    return [RECIPE, *(kind for kind, settings in read_experiment()["variants"].items() if name in settings)]


def folder_of(name: str, seed: int, kind: str, runs: Path) -> Path:
    """Where that adapter is, or will be. kind: RECIPE, or one of `variants`."""
    return runs / (f"{name}-{seed}" if kind == RECIPE else f"{name}-{seed}-{kind}")


def trained(name: str, seed: int, kind: str, runs: Path, smoke: bool) -> tuple[Trained, TaskConfig, CTRLConfig]:
    """The adapter, and what its command line says; trains it where it is not there yet."""
    folder = folder_of(name, seed, kind, runs)
    arguments = arguments_of(name, seed, folder, kind, smoke)
    task, config = parse_arguments(arguments)
    if not (folder / CONFIG_NAME).is_file():
        train_ctrl.main(arguments)
    adapter = load_adapter(folder)
    settings = adapter.config.training["settings"]
    told = {key: settings.get(key, getattr(CTRLConfig, key)) for key in TOLD} | {"seed": int(adapter.config.metrics["seed"])}
    if differ := [key for key, value in told.items() if value != getattr(config, key)]:
        raise SystemExit(
            f"The adapter in {folder} was trained with another {', '.join(differ)}: delete it, to train it again here."
        )
    adapter.classifier.eval().requires_grad_(False)
    seconds = adapter.config.metrics["seconds_classifier"] + adapter.config.metrics["seconds_train"]
    grid = label_grid(adapter.label_encoder.label_space, subsets=False)
    return Trained(adapter, *adapter_environment(adapter, task, grid), seconds), task, config


def open_setting(name: str, seed: int, runs: Path, base_samples: int, kind: str = RECIPE, smoke: bool = False) -> Setting:
    """runs: where the adapters are, or will be, and the base samples. kind: of the adapter whose classifier all are given."""
    first, task, config = trained(name, seed, kind, runs, smoke)
    given = first.adapter
    space = given.label_encoder.label_space
    pipe = DiffusionPipeline.from_pretrained(resolve_folder(given.config.base["id"]))
    base = open_base(pipe, list(task.prompts), given.config.sampler["num_inference_steps"])
    _, images, labels, _ = labelled_images(task, pipe, write_datasets(task, config, pipe), seed)
    data, rows = Labelled(encode(base, images), labels, digit_oracle(images)), label_grid(space, subsets=False).labels

    def same_classifier(other: str, classifier: Classifier) -> None:
        seen = images[:100]
        if not torch.allclose(of_each(seen, rows, given.classifier), of_each(seen, rows, classifier), atol=1e-3):
            one, two = (folder_of(name, seed, each, runs) for each in (kind, other))
            raise SystemExit(f"The adapters in {one} and {two} have other classifiers: delete one, to train it again here.")

    for other in kinds_of(name):
        if other != kind and (folder_of(name, seed, other, runs) / CONFIG_NAME).is_file():
            same_classifier(other, load_adapter(folder_of(name, seed, other, runs)).classifier.eval())

    def opened(wanted: str) -> Trained:
        if wanted == kind:
            return first
        found, *_ = trained(name, seed, wanted, runs, smoke)
        same_classifier(wanted, found.adapter.classifier)
        return found

    cache = runs / f"base-samples-{base_samples}.pt"
    reference = make_reference(base, given.classifier, rows, 1.0, list(space.attributes), base_samples, cache)
    return Setting(base, space, given.classifier, opened, rows, data, reference, task, seed, smoke)


def whose_classifier(name: str, seed: int, missing: Collection[str], runs: Path) -> str:
    """The adapter to begin with: the recipe's where a method needs it or it is there, else one that is needed or there. All have the same classifier."""
    needed = [METHODS[method].adapter for method in missing if METHODS[method].adapter]
    there = [kind for kind in kinds_of(name) if (folder_of(name, seed, kind, runs) / CONFIG_NAME).is_file()]
    return RECIPE if RECIPE in (*needed, *there) else [*needed, *there, RECIPE][0]


def check_partition(folder: Path, found: float, base_samples: int) -> None:
    """Raises SystemExit where results in the folder were made with another classifier: log Z of the same base samples would differ."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if record["base_samples"] == base_samples and abs(record["log_partition"] - found) > 1e-3:
            raise SystemExit(
                f"{path} is of another classifier: its log Z is {record['log_partition']:.4f}, and that of the adapters at hand {found:.4f}. Delete "
                "the folder, to run all methods again."
            )


def noise_of(s: Setting, use: int, row: int) -> torch.Generator:
    """The noise of that row of the labels."""
    return torch.Generator().manual_seed(noise_seed(s.seed, use) * 1_000_003 + row)


def draw_all(s: Setting, draw: Draw, per_label: int, use: int) -> list[torch.Tensor]:
    """`per_label` images of each label, running through the prompts. use: of noise, as `noise_seed` has it."""
    prompts, found = torch.arange(per_label) % len(s.base.conditions), []
    for row, label in enumerate(s.labels):
        generator = noise_of(s, use, row)
        found.append(torch.cat([draw(label, part, generator) for part in prompts.split(BATCH)]))
    return found


def diversity(s: Setting, images: list[torch.Tensor], generator: torch.Generator) -> float:
    """Mean distance of two pictures of one label and digit, over the same of exact draws."""
    ratios = []
    for label, own in enumerate(images):
        exact = s.reference.in_turn(label, len(own), generator)
        parts = [(small(own), s.reference.cells_of(own)), (s.reference.features[exact], s.reference.cells[exact])]
        means = []
        for features, cells in parts:
            digits = s.reference.digits_of(cells)
            spread = [torch.pdist(features[digits == digit]).mean() for digit in digits.unique() if (digits == digit).sum() > 1]
            means.append(torch.stack(spread).mean())
        ratios.append((means[0] / means[1]).item())
    return sum(ratios) / len(ratios)


def judge(s: Setting, images: list[torch.Tensor]) -> dict[str, Any]:
    """The row's figures, means over labels; `by_label`: accuracy of each."""
    generator = torch.Generator().manual_seed(noise_seed(s.seed, JUDGE))
    space, pictures = s.space, torch.cat(images)
    asked = torch.cat([label.expand(len(own), -1) for label, own in zip(s.labels, images, strict=True)])
    found = torch.as_tensor(attribute_oracle(s.task)(pictures)).view(len(pictures), -1).double()
    out: dict[str, Any] = {k: v for k, v in agreement(space, asked, found).items() if k in ("accuracy", "macro_f1")}
    right = (found == asked).all(dim=1).double()
    out["accuracy_se"] = math.sqrt(out["accuracy"] * (1 - out["accuracy"]) / len(right))
    out["by_label"] = [part.mean().item() for part in right.split([len(own) for own in images])]
    out["worst_label"] = min(out["by_label"])
    prompts = torch.cat([torch.arange(len(own)) % len(s.base.conditions) for own in images])
    out["prompt_accuracy"] = (s.reference.digits_of(s.reference.cells_of(pictures)) == prompts).double().mean().item()
    out["tv"] = distance_to_law(s.reference, images)
    out["mmd2"] = statistics.mean(to_exact(s.reference, row, generator)(small(own)) for row, own in enumerate(images))
    return out | {"diversity": diversity(s, images, generator)}


def priced(s: Setting, draw: Draw, per_label: int) -> dict[str, float]:
    """KL of the paths to the base's, and log Z − E[log p̂ − KL], the gap to the exact law at gamma = 1; nats, with standard errors."""
    prompts, kl, gaps = torch.arange(per_label) % len(s.base.conditions), [], []
    for row, label in enumerate(s.labels):
        with s.base.pricing(per_label), torch.no_grad():
            images = draw(label, prompts, noise_of(s, PRICED, row))
            kl.append(s.base.kl.double())
            gaps.append(s.reference.log_partition - s.likelihood(images, label.expand(per_label, -1)).double() + kl[-1])
    out = {}
    for name, values in (("kl", torch.cat(kl)), ("gap", torch.cat(gaps))):
        if values.isfinite().all():
            out |= {name: values.mean().item(), f"{name}_se": (values.std() / math.sqrt(len(values))).item()}
    return out


def tuned(s: Setting, method: Method, validation: int, bar: tqdm) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """{aim: what was tried}: `plain`, the weight of 1, where Bayes says so; the best by distance; the most accurate by the classifier. And all."""
    started = time.perf_counter()
    fitted, tried = method.fit(s), []
    fitting = fitted.seconds if isinstance(fitted, Trained) else time.perf_counter() - started
    for weight in method.weights[:1] if s.smoke else method.weights:
        started = time.perf_counter()
        draw = method.draw(s, fitted, weight)
        training = fitting + time.perf_counter() - started
        images = draw_all(s, draw, validation, VALIDATION)
        right = []
        for row, own in enumerate(images):
            with torch.no_grad():
                scores = of_each(own, s.labels, s.classifier)
            right.append((scores.argmax(dim=1) == row).double().mean().item())
        tried.append({"weight": weight, "tv": distance_to_law(s.reference, images), "classifier_accuracy": sum(right) / len(right)})
        tried[-1] |= {"draw": draw, "training": training}
        bar.set_postfix(weight=weight, tv=f"{tried[-1]['tv']:.3f}", accuracy=f"{tried[-1]['classifier_accuracy']:.3f}")
    best = {"distance": min(tried, key=lambda one: one["tv"]), "accuracy": max(tried, key=lambda one: one["classifier_accuracy"])}
    if method.plain and (plain := [one for one in tried if one["weight"] == 1]):
        best[PLAIN] = plain[0]
    return best, tried


def base_seconds(s: Setting, n: int) -> float:
    """A sample of the base itself, now."""
    started = time.perf_counter()
    s.base.draw(torch.arange(n) % len(s.base.conditions), torch.Generator().manual_seed(0))
    return (time.perf_counter() - started) / n


def rows_of(s: Setting, name: str, outputs: int, validation: int, bar: tqdm) -> list[dict[str, Any]]:
    """One row for each weight that is best for something."""
    method, rows = METHODS[name], []
    best, tried = tuned(s, method, validation, bar)
    for chosen in tried:
        if not (aims := sorted(aim for aim, one in best.items() if one is chosen)):
            continue
        s.base.calls.clear()
        alike = min(BATCH, outputs)  # as many at a time as the method draws
        before, started = base_seconds(s, alike), time.perf_counter()
        s.base.calls.clear()
        images = draw_all(s, chosen["draw"], outputs, JUDGED)
        seconds, count = time.perf_counter() - started, outputs * len(s.labels)
        row = {"tuned_for": aims, "weight": chosen["weight"], **judge(s, images)}
        row |= {f"{way}_calls": s.base.calls[way] / count for way in ("forward", "backward")}
        row["seconds_a_sample"] = seconds / count
        row["times_base"] = row["seconds_a_sample"] / ((before + base_seconds(s, alike)) / 2)
        row["seconds_training"] = chosen["training"]
        if name == "exact draws":
            row |= of_exact_draws(s.reference, outputs, torch.Generator().manual_seed(noise_seed(s.seed, FLOORS)))
        if method.priced:
            row |= priced(s, chosen["draw"], 10 if s.smoke else PATHS)
        rows.append(row | {"tried": [{k: v for k, v in one.items() if k != "draw"} for one in tried]})
    return rows


def has_tried(path: Path, method: str) -> bool:
    """Whether a result is of today's noise and weights that are tried, and has a plain row where the method has one."""
    record = json.loads(path.read_text())
    rows = record["rows"]
    if record.get("noise_seed") != noise_seed(record["seed"], JUDGED):
        return False
    plain = any(PLAIN in row["tuned_for"] for row in rows)
    return [one["weight"] for one in rows[0]["tried"]] == list(METHODS[method].weights) and plain >= METHODS[method].plain


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = list(read_experiment()["settings"])
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--outputs", type=int, default=120, help="images a label")
    parser.add_argument("--validation", type=int, default=30, help="images a label for each weight that is tried")
    parser.add_argument("--base_samples", type=int, default=51_000)
    parser.add_argument("--runs", type=Path, help="where the adapters are, or will be: runs/peers; with --smoke runs/peers-smoke")
    parser.add_argument("--results", type=Path, help="benchmarks/results/peers; with --smoke within --runs")
    parser.add_argument("--smoke", action="store_true", help="everything at toy size, to see that it runs")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.outputs, args.validation = 20, 10
        args.base_samples = 300
    args.runs = args.runs or ROOT / "runs" / ("peers-smoke" if args.smoke else "peers")
    args.results = args.results or (args.runs / "results" if args.smoke else RESULTS / "peers")
    if "TDS" in args.only and importlib.util.find_spec("azula") is None:
        print("TDS is left out: it needs azula, which benchmarks/README.md says how to install.")
        args.only.remove("TDS")
    for name, seed in [(name, seed) for seed in args.seeds for name in args.settings]:
        folder = args.results / f"{name}-seed{seed}"
        kinds = {method: METHODS[method].adapter for method in args.only}
        methods = [method for method, kind in kinds.items() if kind is None or kind in kinds_of(name)]
        paths = {method: folder / f"{method.replace(',', '').replace(' ', '-')}.json" for method in methods}
        missing = {
            method: path for method, path in paths.items() if not (path.exists() and (args.smoke or has_tried(path, method)))
        }
        if not missing:
            continue
        kind = whose_classifier(name, seed, missing, args.runs)
        s = open_setting(name, seed, args.runs, args.base_samples, kind, args.smoke)
        check_partition(folder, s.reference.log_partition, args.base_samples)
        bar = tqdm(missing.items(), unit="method")
        for method, path in bar:
            bar.set_description(f"{name}, seed {seed}: {method}")
            rows = rows_of(s, method, args.outputs, args.validation, bar)
            about = {"setting": name, "seed": seed, "method": method, "labels": len(s.labels), "outputs": args.outputs}
            about |= {"noise_seed": noise_seed(seed, JUDGED)}
            about |= {"validation": args.validation, "base_samples": args.base_samples, "threads": torch.get_num_threads()}
            write_json(path, {**about, "log_partition": s.reference.log_partition, "rows": rows, **provenance()})
            for row in rows:
                bar.write(
                    f"{method:20} {'+'.join(row['tuned_for']):17} {row['weight']:>6g}  accuracy {row['accuracy']:.3f} (worst {row['worst_label']:.2f}) "
                    f"digits {row['prompt_accuracy']:.3f}  TV {row['tv']:.3f}  MMD² {row['mmd2']:.4f}  gap "
                    f"{row.get('gap', float('nan')):.2f}  diversity {row['diversity']:.2f}  calls {row['forward_calls']:.0f}+"
                    f"{row['backward_calls']:.0f}  {row['seconds_a_sample']:.3f} s, {row['times_base']:.1f} times the base's"
                )
    print(f"Written to {args.results}/. Next: python benchmarks/report.py")


if __name__ == "__main__":
    main()
