"""Tables 1 and 2: the digits' attributes, ours against other ways to condition the same base with the same classifier.

    python benchmarks/peers.py [--settings stroke slant jpeg stroke-slant] [--seeds 0 1 2] [--only NAME …] [--outputs 120] [--smoke]

A setting of experiments/peers.yaml and a seed are labelled images, which the trained baselines learn from, and a classifier of them, which is everybody's
p̂(y | x); it is fitted first where runs/peers/SETTING-SEED does not have it, and an adapter is trained where a method that is asked for needs it. Every method's one number is tuned on `--validation` images
a label, the same for all: of the values of peer_methods.py, and where they are a strength beyond these by the ratio of the last two, as long as the last is
better than all before it. It is tuned twice: for the distance to the exact law (total variation), and for accuracy by the *classifier*, which is all that a
user could do; of a method for which Bayes says 1 that value has a row too, `plain`, which needs no tuning. The oracles judge only the finished
table. All methods of a seed draw with the same noise, each seed with its own. One JSON a method in results/peers/SETTING-seedSEED/; what is there
is not run again, unless it was drawn with other noise or other numbers of images. Where peer_methods.py has more weights to try than a result, these are tried too,
and judged if one is better (of a method that is fitted first, all of them again); a row with a `commit` of its own was kept from an earlier run.
`CTRL, trained longer`, `CTRL, control head` and `CTRL, control head, gamma to 16` have adapters of their own, of the same classifier, in
runs/peers/SETTING-SEED-longer, -head and -wider, for the settings under `variants` in that file.
`exact draws` are base samples, resampled by p̂^gamma as the exact law has it: what CTRL aims at, for every gamma.

Columns: accuracy, macro-F1, worst label; prompt accuracy; distances of exact_reference.py, for exact draws also from set to set; KL of the paths to the base's and
the gap to the exact law at gamma = 1 that it bounds, where the method's steps are Gaussian ones; diversity: mean distance of two pictures of the same
prompt and label, over that of exact draws; rows of the denoiser's calls a sample, forward and backward; seconds a sample, and over the base's
own, which is timed before and after; seconds of training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from baselines.base import Labelled, encode, open_base  # noqa: E402
from exact_reference import (  # noqa: E402
    JUDGED,
    make_reference,
    noise_seed,
    of_each,
)

import train_ctrl  # noqa: E402
from diffusers_ctrl import Classifier, CTRLConfig  # noqa: E402
from diffusers_ctrl.adapters import CONFIG_NAME, load_adapter  # noqa: E402
from diffusers_ctrl.labels import label_grid  # noqa: E402
from digits_data import digit_oracle  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from likelihood import labelled_images, make_likelihood, write_datasets  # noqa: E402
from peer_methods import METHODS, PLAIN, RECIPE, Setting, Trained  # noqa: E402
from peer_rows import rows_of  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import load_base, parse_arguments  # noqa: E402


OF_A_RUN = ("commit", "versions", "threads", "log_partition")  # what a row keeps of the run that it is of
EXPERIMENT = Path(__file__).resolve().parent / "experiments" / "peers.yaml"
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


def copy_classifier(source: Path, target: Path) -> None:
    """A run's classifier, where the source has one and the target has none."""
    if (source / "classifier" / "calibration.json").is_file() and not (target / "classifier").exists():
        shutil.copytree(source / "classifier", target / "classifier.tmp", dirs_exist_ok=True)
        (target / "classifier.tmp").rename(target / "classifier")


def trained(name: str, seed: int, kind: str, runs: Path, smoke: bool) -> Trained:
    """The adapter; trains it where it is not there yet."""
    folder = folder_of(name, seed, kind, runs)
    arguments = arguments_of(name, seed, folder, kind, smoke)
    task, config = parse_arguments(arguments)
    if not (folder / CONFIG_NAME).is_file():
        copy_classifier(folder_of(name, seed, RECIPE, runs), folder)
        train_ctrl.main([*arguments, "--resume_from", "latest"])  # with the classifier that is there, and from where it was stopped
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
    return Trained(adapter, *adapter_environment(adapter, task, grid), seconds)


def open_setting(name: str, seed: int, runs: Path, base_samples: int, smoke: bool = False) -> Setting:
    """runs: where the classifier, the adapters and the base samples are, or will be.

    Raises:
        SystemExit: if an adapter of that setting and seed has another classifier.
    """
    folder = folder_of(name, seed, RECIPE, runs)
    for kind in kinds_of(name):
        copy_classifier(folder_of(name, seed, kind, runs), folder)
    task, config = parse_arguments(arguments_of(name, seed, folder, RECIPE, smoke))
    pipe = load_base(task)
    kept = replace(config, resume_from="latest")  # the classifier that is there, if it was made with these settings
    given = make_likelihood(task, kept, pipe, folder / "classifier", torch.device("cpu"))
    classifier, space = given.classifier.eval().requires_grad_(False), given.space
    base = open_base(pipe, list(task.prompts), config.num_inference_steps)
    _, images, labels, _ = labelled_images(task, pipe, write_datasets(task, config, pipe), seed)
    data, rows = Labelled(encode(base, images), labels, digit_oracle(images)), label_grid(space, subsets=False).labels

    def check(kind: str, other: Classifier) -> None:
        seen = images[:100]
        if not torch.allclose(of_each(seen, rows, classifier), of_each(seen, rows, other), atol=1e-3):
            one = folder_of(name, seed, kind, runs)
            raise SystemExit(f"The adapter in {one} has another classifier than {folder}: delete one, to train it again here.")

    for kind in kinds_of(name):
        if (folder_of(name, seed, kind, runs) / CONFIG_NAME).is_file():
            check(kind, load_adapter(folder_of(name, seed, kind, runs)).classifier.eval())

    def opened(kind: str) -> Trained:
        found = trained(name, seed, kind, runs, smoke)
        check(kind, found.adapter.classifier)
        return found

    pool = runs / f"base-samples-{base_samples}.pt"
    reference = make_reference(base, classifier, rows, 1.0, list(space.attributes), base_samples, pool)
    return Setting(base, space, classifier, opened, rows, data, reference, task, seed, smoke)


def check_partition(folder: Path, found: float, base_samples: int) -> None:
    """Raises SystemExit where results in the folder were made with another classifier: log Z of the same base samples would differ."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for one in [record, *record["rows"]] if record["base_samples"] == base_samples else []:
            if abs((own := one.get("log_partition", found)) - found) > 1e-3:
                raise SystemExit(
                    f"{path} is of another classifier: its log Z is {own:.4f}, and that of the one at hand {found:.4f}. Delete the folder, to run "
                    "all methods again."
                )


def earlier_rows(path: Path, seed: int, counts: dict[str, int]) -> list[dict[str, Any]]:
    """The rows of a result that today's would be the same as: of the same noise, and of the same numbers of images. They say what they are of."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if any(record[key] != value for key, value in {"noise_seed": noise_seed(seed, JUDGED), **counts}.items()):
        return []
    return [{**{key: record[key] for key in OF_A_RUN}, **row} for row in record["rows"]]


def has_tried(rows: list[dict[str, Any]], method: str) -> bool:
    """Whether these are all the rows of a method: of all the weights that it tries, and a plain one where it has that."""
    if not rows:
        return False
    tried, plain = rows[0]["tried"], any(PLAIN in row["tuned_for"] for row in rows)
    in_turn = all(METHODS[method].next_weight(tried[:count]) == one["weight"] for count, one in enumerate(tried))
    return in_turn and METHODS[method].next_weight(tried) is None and plain >= METHODS[method].plain


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = list(read_experiment()["settings"])
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--outputs", type=int, help="images a label; by default as experiments/peers.yaml has it for the setting")
    parser.add_argument(
        "--validation", type=int, help="images a label for each weight that is tried; by default as that file has it"
    )
    parser.add_argument("--base_samples", type=int, default=51_000)
    parser.add_argument(
        "--runs",
        type=Path,
        help="where the classifiers, adapters and base samples are, or will be: runs/peers; with --smoke runs/peers-smoke",
    )
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
        counts = {**read_experiment()["images"][name], "base_samples": args.base_samples}
        counts |= {key: value for key in ("outputs", "validation") if (value := getattr(args, key)) is not None}
        earlier = {method: earlier_rows(path, seed, counts) for method, path in paths.items()}
        missing = {
            method: path
            for method, path in paths.items()
            if not (earlier[method] and args.smoke or has_tried(earlier[method], method))
        }
        if not missing:
            continue
        s = open_setting(name, seed, args.runs, args.base_samples, args.smoke)
        check_partition(folder, s.reference.log_partition, args.base_samples)
        bar = tqdm(missing.items(), unit="method")
        for method, path in bar:
            bar.set_description(f"{name}, seed {seed}: {method}")
            rows = rows_of(s, method, counts["outputs"], counts["validation"], bar, earlier[method])
            about = {"setting": name, "seed": seed, "method": method, "labels": len(s.labels), **counts}
            about |= {"noise_seed": noise_seed(seed, JUDGED), "threads": torch.get_num_threads()}
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
