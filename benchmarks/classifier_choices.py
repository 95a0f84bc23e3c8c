"""What makes a classifier of a few hundred digits better and its log-likelihood smoother: benchmarks/results/classifier_choices.json.

    python benchmarks/classifier_choices.py [--only NAME …] [--attributes stroke slant] [--labels 600 898] [--seeds 0 1 2]

Each variant is fitted to labelled digits as the recipes see them (through the base's autoencoder, labels by the exact oracle) and
measured on the other digits: accuracy, NLL, calibration error; and on samples of the base, which are what a reward is asked about: NLL,
and the accuracy of the exact law p_pre(x | prompt) p̂(y | x), the best that an adapter can have. Smoothness: the mean norm of the gradient
of log p̂(y | x) in the image, for labels drawn uniformly. Rows that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from diffusers_ctrl import Classifier, LabelSpace  # noqa: E402
from diffusers_ctrl.adapters import resolve_folder  # noqa: E402
from diffusers_ctrl.calibration import expected_calibration_error  # noqa: E402
from diffusers_ctrl.classifiers import fit_classifier  # noqa: E402
from diffusers_ctrl.decoding import round_trip  # noqa: E402
from digits_data import PROMPTS, drawn_digits, label_attribute, oracle  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402


COMMON = {"widths": (8, 16, 32), "members": 3, "max_epochs": 60}
VARIANTS = {
    "plain": {},
    "coordinates": {"coordinates": True},
    "coordinates, noise 0.1": {"coordinates": True, "noise": 0.1},
    "noise 0.1": {"noise": 0.1},
    "coordinates, 5 members": {"coordinates": True, "members": 5},
    "coordinates, weight decay 0.1": {"coordinates": True, "weight_decay": 0.1},
    "coordinates, wider": {"coordinates": True, "widths": (16, 32, 48)},
    "coordinates, 16 pixels": {"coordinates": True, "image_size": 16},
}
SAMPLES_A_PROMPT = 180


def seen_images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The real digits as the base's autoencoder shows them, samples of the base, and the prompt (row) of each sample."""
    pipe = DiffusionPipeline.from_pretrained(resolve_folder("digits-base"))
    pipe.set_progress_bar_config(disable=True)
    digits = round_trip(pipe, drawn_digits()[0])
    prompts = torch.arange(len(PROMPTS)).repeat_interleave(6).repeat(SAMPLES_A_PROMPT // 6)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 16, "eta": 1.0, "guidance_scale": 1.0, "generator": generator, "output_type": "pt"}
    samples = [pipe([PROMPTS[row] for row in rows], **options).images for rows in prompts.split(60)]
    return digits, torch.cat(samples), prompts


def log_probs_of(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([classifier.log_probs(chunk)[0] for chunk in images.split(256)]).double()


def gradient_norms(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    norms = []
    for chunk, label in zip(images.split(256), labels.split(256), strict=True):
        chunk = chunk.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(classifier.log_prob(chunk, label).sum(), chunk)
        norms.append(gradient.flatten(1).norm(dim=1))
    return torch.cat(norms)


def measure(
    settings: dict, attribute: str, num_labels: int, seed: int, digits: torch.Tensor, samples: torch.Tensor, prompts: torch.Tensor
) -> dict[str, float]:
    """Fits one classifier and says how good and how smooth it is."""
    labels = oracle(attribute, drawn_digits()[0])
    rows = torch.randperm(len(digits), generator=torch.Generator().manual_seed(1000 + seed))
    train, test = rows[:num_labels], rows[num_labels:]
    settings = {**COMMON, **settings}
    model = {key: settings.pop(key) for key in ("widths", "members", "coordinates", "image_size") if key in settings}
    set_seed(seed)
    classifier = Classifier(LabelSpace({attribute: label_attribute(attribute)}).to_dict(), **model)
    started = time.process_time()
    report = fit_classifier(classifier, digits[train], labels[train].float().unsqueeze(1), seed=seed, progress=False, **settings)
    seconds = time.process_time() - started
    found, truth = log_probs_of(classifier, digits[test]), labels[test]
    drawn, drawn_truth = log_probs_of(classifier, samples), oracle(attribute, samples)
    asked = torch.randint(found.shape[1], (len(test), 1), generator=torch.Generator().manual_seed(seed)).float()
    norms = gradient_norms(classifier, digits[test], asked)
    exact = []
    for prompt in range(len(PROMPTS)):
        of_prompt = prompts == prompt
        weights = drawn[of_prompt].exp()
        right = drawn_truth[of_prompt, None] == torch.arange(weights.shape[1])
        exact.append((weights * right).sum(0) / weights.sum(0))
    return {
        "accuracy": (found.argmax(1) == truth).double().mean().item(),
        "nll": -found.gather(1, truth[:, None]).mean().item(),
        "ece": expected_calibration_error(found, truth),
        "gradient_norm": norms.mean().item(),
        "base_accuracy": (drawn.argmax(1) == drawn_truth).double().mean().item(),
        "base_nll": -drawn.gather(1, drawn_truth[:, None]).mean().item(),
        "exact_accuracy": torch.stack(exact).mean().item(),
        "temperature": report.attributes[attribute].temperature,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="variants to run; all by default")
    parser.add_argument("--attributes", nargs="+", default=["stroke", "slant"])
    parser.add_argument("--labels", nargs="+", type=int, default=[600, 898])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "classifier_choices.json")
    args = parser.parse_args()
    images = seen_images()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": {}}
    for seed in args.seeds:
        for attribute in args.attributes:
            for num_labels in args.labels:
                for name in args.only or VARIANTS:
                    key = f"{attribute}, {num_labels} labels, {name}"
                    done = results["rows"].setdefault(key, {})
                    if str(seed) in done:
                        continue
                    done[str(seed)] = measure(VARIANTS[name], attribute, num_labels, seed, *images)
                    shown = "  ".join(f"{k} {v:.3f}" for k, v in done[str(seed)].items())
                    print(f"{key}, seed {seed}: {shown}", flush=True)
                    write_json(args.output, {**results, **provenance(), "common": COMMON, "variants": VARIANTS})


if __name__ == "__main__":
    main()
