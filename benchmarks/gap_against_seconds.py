"""How fast each way of training closes the gap on the digits: benchmarks/experiments/*.yaml -> benchmarks/results/*.json.

    python benchmarks/gap_against_seconds.py benchmarks/experiments/digits_stroke_search.yaml [--only NAME …] [--seconds 120]

Each variant gets the same classifier, the same base samples and the same seconds of training: its number of updates, and with it
its cosine schedule, is set from the time of its first updates. The certificate is then measured on fresh trajectories.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from diffusers_ctrl import Categorical, Classifier, CTRLConfig, CTRLTrainer, LabelSpace, Policy  # noqa: E402
from diffusers_ctrl.adapters import resolve_folder  # noqa: E402
from diffusers_ctrl.classifiers import fit_classifier  # noqa: E402
from diffusers_ctrl.decoding import decoder, round_trip  # noqa: E402
from diffusers_ctrl.evaluation import draw_samples, evaluate  # noqa: E402
from diffusers_ctrl.recording import record_conditions  # noqa: E402
from diffusers_ctrl.rewards import classifier_reward  # noqa: E402
from digits_data import ATTRIBUTES, PROMPTS, drawn_digits, oracle  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402


def cached_classifier(base: str, attribute: str, num_labels: int, seed: int, folder: Path) -> Classifier:
    """The recipe's classifier, fitted once for all variants of a seed."""
    if (folder / "config.json").is_file():
        return Classifier.from_pretrained(folder)
    images, _ = drawn_digits()
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:num_labels]
    seen = round_trip(DiffusionPipeline.from_pretrained(resolve_folder(base)), images[rows])
    set_seed(seed)
    space = LabelSpace({attribute: Categorical(ATTRIBUTES[attribute])})
    classifier = Classifier(space.to_dict(), widths=(8, 16, 32), members=3)
    report = fit_classifier(classifier, seen, oracle(attribute, images[rows]).float().unsqueeze(1), seed=seed, max_epochs=80)
    print(report.lines(), flush=True)
    classifier.save_pretrained(folder)
    return classifier


def run_variant(spec: dict, settings: dict, seconds: float, eval_samples: int, base_samples: int, cache: Path) -> dict:
    """Trains one variant for `seconds`, then measures it."""
    base_name, attribute = spec["base"], spec["attribute"]
    own = {k: v for k, v in settings.items() if k != "coarse_share"} | {"coarse_updates": int("coarse_share" in settings)}
    config = CTRLConfig(**{**spec["common"], **own, "report_to": "none", "checkpoint_every": 0, "output_dir": str(cache / "run")})
    classifier = cached_classifier(
        base_name, attribute, spec["num_labels"], config.seed, cache / f"classifier-{attribute}-{config.seed}"
    )
    pipe = DiffusionPipeline.from_pretrained(resolve_folder(base_name))
    for component in (pipe.unet, pipe.vae, pipe.text_encoder):
        component.requires_grad_(False)
    set_seed(config.seed)
    policy = Policy(
        pipe.unet,
        label_space=LabelSpace({attribute: Categorical(ATTRIBUTES[attribute])}),
        lora_rank=config.lora_rank,
        lora_targets=config.lora_targets,
        guidance_scale=config.guidance_scale,
    )
    conditions = record_conditions(
        pipe, PROMPTS, num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
    )
    trainer = CTRLTrainer(
        policy,
        pipe.scheduler,
        classifier_reward(classifier),
        config,
        shape=conditions.shape,
        decode=decoder(pipe),
        prompt_embeds=conditions,
    )
    learning_rates, trainer.peaks = trainer.peaks, [0.0, 0.0]  # timed without moving
    share = settings.get("coarse_share", 0.0)

    def seconds_of_an_update(coarse: bool) -> float:
        config.coarse_updates = trainer.update + 1 if coarse else 0
        probe = []
        for _ in range(3):
            started = time.perf_counter()
            trainer._step()
            probe.append(time.perf_counter() - started)
        return min(probe)

    coarse_updates = int(share * seconds / seconds_of_an_update(True)) if share else 0
    fine_updates = max(1, int((1 - share) * seconds / seconds_of_an_update(False)))
    trainer.peaks = learning_rates
    trainer.optimizer.state.clear()
    config.coarse_updates, config.max_updates = coarse_updates, coarse_updates + fine_updates
    history = trainer.train()
    generator = torch.Generator().manual_seed(12345)
    tuned = draw_samples(policy, trainer.environment, eval_samples, generator, progress=False)
    base = draw_samples(policy, trainer.environment, base_samples // 3, generator, tuned=False, progress=False)
    metrics = evaluate(
        tuned, base, trainer.environment, list(ATTRIBUTES[attribute]), oracle=lambda images: oracle(attribute, images)
    )
    stride = max(1, len(history) // 100)
    smooth, curve = history[0]["objective"], []
    for i, row in enumerate(history):
        smooth = 0.9 * smooth + 0.1 * row["objective"]
        if i % stride == 0:
            curve.append([round(row["seconds"], 1), round(smooth, 4)])
    return {
        "settings": settings,
        "updates": trainer.update,
        "seconds": history[-1]["seconds"],
        "metrics": metrics,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--only", nargs="*", help="variants to run; all by default")
    parser.add_argument("--seconds", type=float, help="seconds of training a variant; the file's by default")
    parser.add_argument("--output", type=Path, help="results file; benchmarks/results/NAME.json by default")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    spec = yaml.safe_load(args.experiment.read_text())
    output = args.output or RESULTS / f"{args.experiment.stem}.json"
    results = json.loads(output.read_text()) if output.is_file() else {"variants": {}}
    for name, settings in spec["variants"].items():
        if args.only and name not in args.only:
            continue
        seconds = args.seconds or spec["seconds"]
        row = run_variant(spec, settings or {}, seconds, spec["eval_samples"], spec["base_samples"], args.cache)
        row |= {**provenance(), "threads": torch.get_num_threads()}
        row["seed"] = {**spec["common"], **(settings or {})}.get("seed", 0)
        results["variants"][name] = row
        write_json(output, results)
        m = row["metrics"]
        print(
            f"{name:28} {row['updates']:5} updates {row['seconds']:6.0f} s  J {m['objective']:.3f}  KL {m['kl']:.3f}  gap "
            f"{m['gap']:.3f} ± {m['gap_se']:.3f}  vs base {m['base_log_partition'] - m['objective']:.3f}  accuracy "
            f"{m['accuracy']:.3f} (exact {m['exact_accuracy']:.3f})  ess {m['ess']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
