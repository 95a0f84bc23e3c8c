"""Gap against seconds: learning the control of a look-ahead first, then J itself. One curve a variant.

    python benchmarks/lookahead_distill.py [--variants direct distill both] [--seconds 480] [--seed 0]

Same base, classifier (the shipped adapter's), LoRA, thread and seconds for all. `direct` is direct_backprop on batches of 32, with 8 steps
for the first half and 16 then. `distill` regresses the adapter's control on sigma ∇log ĥ of `lookahead_reach.Lookahead` along
trajectories of which half are steered by it and half by the adapter itself, kept in a replay: many regressions a trajectory and
hardly any noise in their target, but its optimum is the look-ahead's, not J's. `both` distils for two thirds of the time and then runs
direct_backprop, which is exact. Seconds are training's alone. Writes results/lookahead_distill.json and .png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from diffusers import DDIMScheduler
from torch import nn
from tqdm.auto import tqdm


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training"), str(ROOT / "benchmarks")]
from lookahead_reach import Lookahead  # noqa: E402

from diffusers_ctrl.adapters import load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.evaluation import draw_samples  # noqa: E402
from diffusers_ctrl.objectives import direct_backprop  # noqa: E402
from diffusers_ctrl.policy import Policy  # noqa: E402
from diffusers_ctrl.rollouts import Batch, Environment, Sampler  # noqa: E402
from digits_data import stroke_oracle  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, save_figure, write_json  # noqa: E402
from task import parse_arguments  # noqa: E402


BATCH, REGRESSION_BATCH, REGRESSIONS, CAPACITY = 32, 128, 8, 200_000
LORA_RATE, DISTILL_RATE, POLISH_RATE, LABEL_FACTOR = 6e-3, 4e-3, 2e-3, 5.0
CURVE_POINTS, CURVE_SAMPLES, FINAL_SAMPLES = 6, 100, 200  # samples a label


def fresh(policy: Policy, seed: int) -> None:
    """Puts LoRA and label encoder back to where training starts, and lets them learn."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter.data, a=math.sqrt(5), generator=generator)
        elif "lora_B" in name or name.startswith("label_encoder"):
            parameter.data.zero_()
        parameter.requires_grad_("lora_" in name or name.startswith("label_encoder"))


class Learner:
    """AdamW on LoRA and label encoder under a cosine over a share of the run."""

    def __init__(self, policy: Policy, rate: float) -> None:
        groups = policy.trainable_parameters()
        self.rates = (rate, LABEL_FACTOR * rate)
        self.parameters = [*groups["lora"], *groups["label_encoder"]]
        self.optimizer = torch.optim.AdamW(
            [{"params": part} for part in groups.values()], lr=rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.updates = 0

    def step(self, loss: torch.Tensor, done: float) -> None:
        """done: share of the time that has passed, in [0, 1]."""
        factor = min(1.0, (self.updates + 1) / 10) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.updates += 1


class Distillation:
    """Trajectories with the look-ahead's control at each of their states, and regressions on them."""

    def __init__(self, policy: Policy, lookahead: Lookahead, generator: torch.Generator) -> None:
        self.policy, self.lookahead, self.generator = policy, lookahead, generator
        self.environment, self.replay, self.newest = lookahead.environment, {}, 0
        sampler = self.environment.sampler
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        # DDIM's mean is affine in the denoiser's output: this is its slope, in units of the step's noise
        steps = [sampler.transition(one, t, 0 * one) for t in sampler.timesteps]
        self.slope = torch.tensor([step.mean.item() / max(step.std.item(), 1e-12) for step in steps])

    def control(self, x: torch.Tensor, steps: torch.Tensor, batch: Batch, reference: torch.Tensor) -> torch.Tensor:
        """The adapter's own control, of rows at different steps."""
        timesteps = self.environment.sampler.timesteps[steps]
        output = self.policy(x, timesteps, batch.labels, None, batch.prompt_embeds, None)
        return self.slope[steps].view(-1, 1, 1, 1) * (output - reference)

    def collect(self, steered: float) -> None:
        """One batch of trajectories, a share of them steered by the look-ahead and the others by the adapter."""
        sampler = self.environment.sampler
        batch = self.environment.draw(BATCH, self.generator)
        teacher = (torch.rand(BATCH, generator=self.generator) < steered).view(-1, 1, 1, 1)
        x, rows = batch.noise, []
        for k in sampler.noisy_steps:
            t, steps = sampler.timesteps[k], torch.full((BATCH,), k)
            with torch.no_grad():
                reference = self.policy.reference(x, t, batch.prompt_embeds, None)
                base = sampler.transition(reference, t, x)
                own = self.control(x, steps, batch, reference)
            target = base.std * self.lookahead.gradient(base.mean, batch, k + 1)
            row = {"x": x, "step": steps, "reference": reference, "target": target}
            rows.append(row | {"labels": batch.labels, "prompts": batch.prompts})
            noise = torch.randn(x.shape, generator=self.generator)
            x = base.mean + base.std * (torch.where(teacher, target, own) + noise)
        new = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        self.newest = len(new["step"])
        self.replay = {n: torch.cat([self.replay[n], v])[-CAPACITY:] if self.replay else v for n, v in new.items()}

    def loss(self) -> torch.Tensor:
        """Σ_k ½‖u_k − target‖², its mean over drawn states: a quarter of them from the newest trajectories."""
        size = len(self.replay["step"])
        index = torch.randint(size, (REGRESSION_BATCH,), generator=self.generator)
        recent = REGRESSION_BATCH // 4
        index[:recent] = size - 1 - torch.randint(self.newest, (recent,), generator=self.generator)
        drawn = {name: value[index] for name, value in self.replay.items()}
        batch = Batch(drawn["x"], drawn["labels"], None, self.environment.prompt_embeds[drawn["prompts"]])
        residual = self.control(drawn["x"], drawn["step"], batch, drawn["reference"]) - drawn["target"]
        return len(self.environment.sampler.noisy_steps) / 2 * residual.square().flatten(1).sum(1).mean()


def run(variant: str, policy: Policy, lookahead: Lookahead, log_z: float, seconds: float, seed: int) -> dict:
    """Trains one variant for so many seconds; returns its curve [[seconds, gap, error, accuracy, KL], …] and counts."""
    environment = lookahead.environment
    generator = torch.Generator().manual_seed(seed)
    fresh(policy, seed)
    distillation = Distillation(policy, lookahead, generator)
    own = DDIMScheduler.from_config(environment.sampler.scheduler.config)
    coarse = replace(environment, sampler=Sampler(own, 8, environment.sampler.options))
    distilled = {"direct": 0.0, "distill": 1.0, "both": 2 / 3}[variant] * seconds
    learners = {"distill": Learner(policy, DISTILL_RATE), "direct": Learner(policy, POLISH_RATE if distilled else LORA_RATE)}
    used, curve, bar = 0.0, [], tqdm(total=round(seconds), desc=variant, unit="s")
    while used < seconds:
        started = time.perf_counter()
        if used < distilled:
            with policy.merged():
                distillation.collect(1.0 if used < 0.1 * distilled else 0.5)
            for _ in range(REGRESSIONS):
                with policy.merged():
                    loss = distillation.loss()
                learners["distill"].step(loss, used / distilled)
        else:
            place = coarse if not distilled and used < seconds / 2 else environment
            with policy.merged():
                loss, _ = direct_backprop(
                    policy, place.sampler, place.draw(BATCH, generator), environment.log_likelihood, generator
                )
            learners["direct"].step(loss, (used - distilled) / (seconds - distilled))
        used += time.perf_counter() - started
        bar.update(min(round(used), bar.total) - bar.n)
        if used >= seconds * (len(curve) + 1) / CURVE_POINTS:
            curve.append(
                [round(used, 1), *measure(policy, environment, log_z, FINAL_SAMPLES if used >= seconds else CURVE_SAMPLES)]
            )
            bar.set_postfix(gap=f"{curve[-1][1]:.2f}", accuracy=f"{curve[-1][3]:.2f}")
    bar.close()
    return {"curve": curve, "updates": {name: learner.updates for name, learner in learners.items()}}


def measure(policy: Policy, environment: Environment, log_z: float, per_label: int) -> list[float]:
    """[gap, its standard error, label accuracy by the oracle, KL] of fresh trajectories."""
    with policy.merged():
        found = draw_samples(policy, environment, per_label, torch.Generator().manual_seed(12345), progress=False)
    objective = found.log_likelihood - found.kl
    accuracy = (stroke_oracle(found.images) == found.label_rows).double().mean().item()
    error = objective.std().item() / math.sqrt(len(objective))
    return [round(v, 4) for v in (log_z - objective.mean().item(), error, accuracy, found.kl.mean().item())]


def plot(variants: dict[str, dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, row in variants.items():
        seconds, gap, error, *_ = zip(*row["curve"], strict=True)
        axis.errorbar(seconds, gap, error, fmt="o-", ms=4, capsize=3, label=name)
    axis.set(xlabel="seconds of training, one thread", ylabel="gap: log Z (base samples) − J (nats)", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", default="digits-stroke", help="brings the base, the sampler, the classifier and where LoRA goes"
    )
    parser.add_argument("--variants", nargs="+", default=["direct", "distill", "both"], choices=["direct", "distill", "both"])
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    adapter = load_adapter(resolve_folder(args.adapter))
    task, _ = parse_arguments([])
    policy, environment = adapter_environment(adapter, task)
    environment = replace(environment, gamma_range=None)
    lookahead = Lookahead(policy, environment, lambda images: adapter.classifier.log_probs(images)[0])
    log_z = lookahead.calibrate(1500, torch.Generator().manual_seed(args.seed))
    output = RESULTS / "lookahead_distill.json"
    results = json.loads(output.read_text()) if output.is_file() else {"variants": {}}
    for variant in args.variants:
        row = run(variant, policy, lookahead, log_z, args.seconds, args.seed)
        row |= {
            "seconds": args.seconds,
            "seed": args.seed,
            "log_partition": log_z,
            **provenance(),
        }
        results["variants"][variant] = row
        print(f"{variant:8} {row['updates']}  seconds, gap, error, accuracy, KL: {row['curve'][-1]}", flush=True)
        write_json(output, results)
        plot(results["variants"], output.with_suffix(".png"))


if __name__ == "__main__":
    main()
