"""Two attributes from disjoint datasets: one adapter for both, against two single adapters whose controls are added.

    python benchmarks/composition.py --joint runs/digits-stroke-slant --stroke runs/half-stroke --slant runs/half-slant

All sixteen labels (nine combinations, each attribute alone, none), by the pipeline's own call, judged by the exact oracles. Writes
results/composition.json, results/composition.png (the 3x3 grid of both methods) and results/composition-accuracy.png.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "benchmarks")]
from diffusers_ctrl import CTRLPipeline  # noqa: E402
from digits_data import ATTRIBUTES as ALL_ATTRIBUTES  # noqa: E402
from digits_data import PROMPTS, digit_oracle, slant_oracle, stroke_oracle  # noqa: E402
from records import RESULTS, provenance, save_figure, write_json  # noqa: E402


Label = dict[str, str]
ATTRIBUTES = {name: ALL_ATTRIBUTES[name] for name in ("stroke", "slant")}


def all_labels() -> list[Label]:
    """Every combination of the attributes and of their subsets; {} is none."""
    choices = [[None, *names] for names in ATTRIBUTES.values()]
    return [
        {name: value for name, value in zip(ATTRIBUTES, row, strict=True) if value is not None}
        for row in itertools.product(*choices)
    ]


def draw(pipe: CTRLPipeline, label: Label, per_prompt: int, seed: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`per_prompt` images of each digit: images (N, 3, H, W), digits (N,)."""
    generator = torch.Generator().manual_seed(seed)
    steps = {} if label else {"num_inference_steps": 16, "eta": 1.0, "guidance_scale": 1.0}  # the base as the adapters have it
    found = pipe(
        list(PROMPTS),
        num_images_per_prompt=per_prompt,
        label=label or None,
        generator=generator,
        output_type="pt",
        **options,
        **steps,
    )
    return found.images, torch.arange(len(PROMPTS)).repeat_interleave(per_prompt)


def judge(images: torch.Tensor, digits: torch.Tensor, label: Label) -> dict[str, float]:
    """Shares of images with the attributes that the label gives, together and each, and with the prompt's digit."""
    found = {"stroke": stroke_oracle(images), "slant": slant_oracle(images)}
    right = {name: found[name] == ATTRIBUTES[name].index(value) for name, value in label.items()}
    out = {name: hit.double().mean().item() for name, hit in right.items()}
    if label:
        out["accuracy"] = torch.stack(list(right.values())).all(0).double().mean().item()
    out["digit"] = (digit_oracle(images) == digits).double().mean().item()
    return out


def summary(rows: list[dict[str, Any]], count: int) -> dict[str, dict[str, float]]:
    """Means over the labels that give the same attributes, with the standard error of the pooled share."""
    out: dict[str, dict[str, float]] = {}
    for given in ("stroke+slant", "stroke", "slant", ""):
        own = [row for row in rows if "+".join(row["label"]) == given]
        names = ("accuracy", "digit") if given else ("digit",)
        means = {name: sum(row[name] for row in own) / len(own) for name in names}
        errors = {f"{name}_se": math.sqrt(sum(row[name] * (1 - row[name]) for row in own) / count) / len(own) for name in names}
        worst = {"worst": min(row["accuracy"] for row in own)} if given else {}
        out[given or "none"] = means | errors | worst
    return out


def plot_grid(pictures: dict[str, list[torch.Tensor]], path: Path) -> None:
    """For each method a 3x3 grid: stroke by row, slant by column; in each cell one sample of five digits, the same noise throughout."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(7.2 * len(pictures), 2.1), squeeze=False)
    for axis, (name, cells) in zip(axes[0], pictures.items(), strict=True):
        rows = [
            torch.cat([torch.cat([*cell, torch.ones(3, 32, 8)], dim=2) for cell in cells[3 * i : 3 * i + 3]], dim=2)
            for i in range(3)
        ]
        axis.imshow(torch.cat([torch.cat([row, torch.ones(3, 8, row.shape[2])], dim=1) for row in rows], dim=1).permute(1, 2, 0))
        axis.set_xticks([80 + 168 * i for i in range(3)], ATTRIBUTES["slant"])
        axis.set_yticks([16 + 40 * i for i in range(3)], ATTRIBUTES["stroke"])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_title(name)
    figure.tight_layout()
    save_figure(figure, path)


def plot_accuracy(results: dict[str, Any], path: Path) -> None:
    """Joint accuracy of the nine cells, by method."""
    figure, axes = plt.subplots(1, len(results), figsize=(3.6 * len(results), 3.4), squeeze=False)
    for axis, (name, found) in zip(axes[0], results.items(), strict=True):
        cells = [row["accuracy"] for row in found["rows"] if len(row["label"]) == 2]
        axis.imshow(torch.tensor(cells).view(3, 3), cmap="Blues", vmin=0, vmax=1)
        for i, value in enumerate(cells):
            axis.text(i % 3, i // 3, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        axis.set_xticks(range(3), ATTRIBUTES["slant"])
        axis.set_yticks(range(3), ATTRIBUTES["stroke"])
        axis.set_title(f"{name}: {found['summary']['stroke+slant']['accuracy']:.3f}", fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joint", required=True, help="adapter of both attributes")
    parser.add_argument("--stroke", required=True, help="adapter of stroke alone, from its half of the digits")
    parser.add_argument("--slant", required=True, help="adapter of slant alone, from the other half")
    parser.add_argument("--per_prompt", type=int, default=30, help="images of each digit, for each label")
    parser.add_argument("--gammas", type=float, nargs="+", default=[1.0, 2.5], help="exponents, within all the adapters' ranges")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    joint = CTRLPipeline.from_pretrained(args.joint)
    added = CTRLPipeline.from_pretrained(args.stroke)
    added.unload_ctrl_adapter()
    added.load_ctrl_adapter(args.stroke, adapter_name="stroke")
    added.load_ctrl_adapter(args.slant, adapter_name="slant")
    pipes, count = {"one adapter": joint, "two adapters added": added}, args.per_prompt * len(PROMPTS)
    results: dict[str, Any] = {}
    pictures: dict[str, list[torch.Tensor]] = {}
    for gamma in args.gammas:
        for name, pipe in pipes.items():
            pipe.set_progress_bar_config(disable=True)
            rows, started, title = [], time.time(), f"{name}, gamma {gamma:g}"
            for label in all_labels():
                images, digits = draw(pipe, label, args.per_prompt, args.seed, **({"gamma": gamma} if label else {}))
                rows.append({"label": label, **judge(images, digits, label)})
                if len(label) == 2 and gamma == args.gammas[-1]:
                    pictures.setdefault(title, []).append(images[:: 2 * args.per_prompt])
            results[title] = {"summary": summary(rows, count), "rows": rows, "seconds": time.time() - started}
            for given, found in results[title]["summary"].items():
                print(f"{title:30} {given:14}" + "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    record = {"images_per_label": count, "gammas": args.gammas, "seed": args.seed, **results, **provenance()}
    write_json(RESULTS / "composition.json", record)
    plot_grid(pictures, RESULTS / "composition.png")
    plot_accuracy(results, RESULTS / "composition-accuracy.png")


if __name__ == "__main__":
    main()
