"""What the learning experiments on the embedded digits share: labels, classifiers, a training of so many seconds, samples of the base.

Seconds are those of one thread on a core that has nothing else to do. A shared core is slower even in CPU seconds, by up to three times here, so
that what a training costs is measured in calls of the base (`price_of`).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training"), str(ROOT / "benchmarks")]
from experiment import clock  # noqa: E402

from diffusers_ctrl import Categorical, Classifier, CTRLConfig, CTRLTrainer, LabelSpace, Policy  # noqa: E402
from diffusers_ctrl.adapters import resolve_folder  # noqa: E402
from diffusers_ctrl.classifiers import epochs_for, fit_classifier  # noqa: E402
from diffusers_ctrl.decoding import decoder, round_trip  # noqa: E402
from diffusers_ctrl.evaluation import Samples, draw_samples, evaluate, judge  # noqa: E402
from diffusers_ctrl.recording import record_conditions  # noqa: E402
from diffusers_ctrl.rewards import classifier_reward  # noqa: E402
from diffusers_ctrl.rollouts import Environment  # noqa: E402
from digits_data import ATTRIBUTES, PROMPTS, digit_oracle, drawn_digits, oracle  # noqa: E402


# seconds of a call of the base, 32 rows, where the results were made: a core to itself, its other hyperthread busy
BASE_STEP = 0.025
PRICED = 3  # updates that are timed for their price


@dataclass(frozen=True)
class Labels:
    """What a classifier is fitted to. corrupted: the share whose label is another than the digit's own. members: of the classifier."""

    attribute: str
    count: int
    seed: int
    corrupted: float = 0.0
    members: int = 3

    @property
    def space(self) -> LabelSpace:
        return LabelSpace({self.attribute: Categorical(ATTRIBUTES[self.attribute])})

    @property
    def rows(self) -> torch.Tensor:
        """Which of the real digits: the first `count` in the seed's order, so that fewer labels are a part of more."""
        return self._order()[: self.count]

    @property
    def unseen(self) -> torch.Tensor:
        """The other real digits."""
        return self._order()[self.count :]

    def _order(self) -> torch.Tensor:
        return torch.randperm(len(drawn_digits()[0]), generator=torch.Generator().manual_seed(self.seed))

    def given(self) -> torch.Tensor:
        """(count,) classes, as the classifier is told them."""
        true = oracle(self.attribute, drawn_digits()[0][self.rows])
        return corrupt(true, self.corrupted, len(ATTRIBUTES[self.attribute]), self.seed)


def corrupt(labels: torch.Tensor, share: float, classes: int, seed: int) -> torch.Tensor:
    """`labels` (N,) with round(share · N) of them, at random, replaced by another class, each as likely."""
    generator = torch.Generator().manual_seed(seed + 77)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    moved = torch.randint(1, classes, (len(chosen),), generator=generator)
    out = labels.clone()
    out[chosen] = (labels[chosen] + moved.to(labels)) % classes
    return out


def open_pipe(base: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(resolve_folder(base))
    for component in (pipe.unet, pipe.vae, pipe.text_encoder):
        component.requires_grad_(False)
    return pipe


@cache
def seen_digits(base: str) -> torch.Tensor:
    """All real digits as the base's autoencoder shows them: (1797, 3, 32, 32) in [0, 1]."""
    return round_trip(open_pipe(base), drawn_digits()[0])


def cached_classifier(base: str, labels: Labels, folder: Path, max_epochs: int = 80) -> tuple[Classifier, float]:
    """The recipe's classifier, fitted once for all runs with the same labels; and the seconds that this took."""
    epochs = epochs_for(labels.count, max_epochs)  # as many optimizer steps for few labels as for the recipe's
    name = f"{labels.attribute}-{labels.count}-{labels.corrupted:g}-{labels.members}-{epochs['max_epochs']}-{labels.seed}"
    folder = folder / f"classifier-{name}"
    if (folder / "seconds.json").is_file():
        return Classifier.from_pretrained(folder).eval().requires_grad_(False), json.loads((folder / "seconds.json").read_text())
    seen, started = seen_digits(base)[labels.rows], clock()
    set_seed(labels.seed)
    classifier = Classifier(labels.space.to_dict(), widths=(8, 16, 32), members=labels.members)
    given = labels.given().float().unsqueeze(1)
    fit_classifier(classifier, seen, given, seed=labels.seed, progress=False, **epochs)
    seconds = clock() - started
    classifier.save_pretrained(folder)
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return classifier, seconds


@torch.no_grad()
def unseen_figures(base: str, labels: Labels, classifier: Classifier) -> dict[str, float]:
    """How well the classifier says the true class of the real digits that it was not fitted to: NLL in nats, accuracy, temperature."""
    (log_probs,) = classifier.log_probs(seen_digits(base)[labels.unseen])
    true = oracle(labels.attribute, drawn_digits()[0][labels.unseen])
    right = (log_probs.argmax(dim=1) == true).double().mean().item()
    return {
        "unseen_nll": F.nll_loss(log_probs, true).item(),
        "unseen_accuracy": right,
        "temperature": classifier.config.temperatures[0],
    }


def make_trainer(base: str, classifier: Classifier, config: CTRLConfig) -> CTRLTrainer:
    """A fresh policy on the base and its trainer, for the digits' ten prompts."""
    pipe = open_pipe(base)
    set_seed(config.seed)
    conditions = record_conditions(
        pipe, PROMPTS, num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
    )
    policy = Policy(
        pipe.unet,
        label_space=classifier.label_space,
        lora_rank=config.lora_rank,
        lora_targets=config.lora_targets,
        gamma_range=None if config.gamma_range is None else tuple(config.gamma_range),
        guidance_scale=config.guidance_scale,
        control_head=config.control_head,
        shape=conditions.shape,
    )
    return CTRLTrainer(
        policy,
        pipe.scheduler,
        classifier_reward(classifier),
        config,
        shape=conditions.shape,
        decode=decoder(pipe),
        prompt_embeds=conditions,
    )


def config_of(common: dict[str, Any], settings: dict[str, Any], seed: int, folder: Path) -> CTRLConfig:
    """The run's settings: `common` with the variant's own, those that are not CTRLConfig's left out."""
    every = {**common, **settings}
    chosen = {name: value for name, value in every.items() if name in CTRLConfig.__dataclass_fields__}
    # so that the trainer makes a coarser law; how many updates run on it is set once they are timed
    coarse = int(bool(every.get("coarse_share")))
    fixed = {"report_to": "none", "checkpoint_every": 0, "seed": seed, "output_dir": str(folder)}
    return CTRLConfig(**{"coarse_updates": coarse, **chosen, **fixed})


@dataclass(frozen=True)
class Price:
    """Seconds of an update on the coarser law, and of one on the trainer's own, on a core that has nothing else to do."""

    coarse: float
    fine: float

    def of(self, updates: int, coarse_updates: int) -> float:
        """Seconds of the first so many updates."""
        coarse = min(updates, coarse_updates)
        return coarse * self.coarse + (updates - coarse) * self.fine


def base_step(trainer: CTRLTrainer) -> float:
    """CPU seconds that one call of the base takes now, 32 rows: the yardstick."""
    environment = trainer.environment
    batch = environment.draw(32, torch.Generator().manual_seed(0))
    started = clock()
    with torch.no_grad():
        trainer.policy.reference(batch.noise, environment.sampler.timesteps[0], batch.prompt_embeds)
    return clock() - started


def price_of(trainer: CTRLTrainer, coarse: bool) -> Price:
    """What updates cost, from the least of a few, measured in calls of the base that are timed in between. Nothing is learned here.

    Both slow down together where a core is shared, by up to three times here; their ratio is what a quiet core would show.
    """
    config, (peaks, trainer.peaks) = trainer.config, (trainer.peaks, [0.0] * len(trainer.peaks))

    def seconds_of_an_update(on_coarse: bool) -> float:
        config.coarse_updates = PRICED if on_coarse else 0
        updates, calls = [], []
        for trainer.update in range(PRICED):  # each draws steps of its own to learn from
            calls += [base_step(trainer) for _ in range(5)]
            started = clock()
            trainer._step()
            updates.append(clock() - started)
        trainer.update = 0
        return min(updates) / min(calls) * BASE_STEP

    found = Price(seconds_of_an_update(True) if coarse else 0.0, seconds_of_an_update(False))
    trainer.peaks, trainer.baseline = peaks, None
    trainer.optimizer.state.clear()
    return found


def warmed(trainer: CTRLTrainer) -> float:
    """Warms the control head, where the settings say so; its seconds, by the same measure."""
    if not trainer.config.critic_trajectories:
        return 0.0
    calls = [base_step(trainer) for _ in range(20)]
    started = clock()
    trainer._warm_start()
    seconds = clock() - started
    calls += [base_step(trainer) for _ in range(20)]
    return seconds / statistics.median(calls) * BASE_STEP


def fit_to_seconds(trainer: CTRLTrainer, seconds: float, coarse_share: float) -> Price:
    """Sets the number of updates, and with it the learning rate's cosine, to what these seconds pay for.

    coarse_share: of the seconds, spent on the trainer's coarser law first.
    """
    price, config = price_of(trainer, coarse_share > 0), trainer.config
    config.coarse_updates = int(coarse_share * seconds / price.coarse) if coarse_share else 0
    config.max_updates = config.coarse_updates + max(1, int((1 - coarse_share) * seconds / price.fine))
    return price


def train(trainer: CTRLTrainer, look: Callable[[int], None] = lambda update: None) -> float:
    """Trains to the end; returns the CPU seconds of the updates alone. look: called with the update after each; not counted."""
    spent, since = 0.0, clock()

    def hook(update: int, policy: Policy) -> None:
        nonlocal spent, since
        spent += clock() - since
        look(update)
        since = clock()

    trainer.save_images, trainer.config.sample_every = hook, 1
    trainer.train()
    return spent


def base_samples(trainer: CTRLTrainer, count: int, folder: Path) -> Samples:
    """About `count` base samples, drawn once for all runs with as many steps, and scored by this trainer's reward."""
    environment, steps = trainer.environment, trainer.environment.sampler.num_inference_steps
    path = folder / f"base-{steps}-{count}.safetensors"
    if not path.is_file():
        generator = torch.Generator().manual_seed(11)
        drawn = draw_samples(
            trainer.policy, environment, max(1, count // len(environment.labels)), generator, tuned=False, description="base"
        )
        folder.mkdir(parents=True, exist_ok=True)
        rows = {"labels": drawn.label_rows, "prompts": drawn.prompt_rows}
        save_file({"images": drawn.images.half(), **rows}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    found = load_file(path)
    images, labels = found["images"].float(), found["labels"]
    with torch.no_grad():
        asked = environment.labels[labels]
        parts = zip(images.split(500), asked.split(500), strict=True)
        score = torch.cat([environment.score(own, label) for own, label in parts]).double()
    return Samples(images, labels, found["prompts"], score, torch.zeros_like(score), torch.zeros_like(score))


def drawn(trainer: CTRLTrainer, environment: Environment, per_label: int, seed: int) -> Samples:
    """Fresh samples of the tuned model."""
    with trainer.policy.merged():
        return draw_samples(trainer.policy, environment, per_label, torch.Generator().manual_seed(seed), progress=False)


def figures(trainer: CTRLTrainer, attribute: str, tuned: Samples, base: Samples) -> dict[str, Any]:
    """`evaluate`'s, by the exact oracles; of the base only what the exact law needs."""
    environment, names = trainer.environment, list(ATTRIBUTES[attribute])
    measured = (environment, lambda images: oracle(attribute, images))
    tuned = judge(tuned, *measured, lambda images, prompts: digit_oracle(images) == prompts)
    return evaluate(tuned, judge(base, *measured), environment, names)
