"""How near to the exact law a step-by-step gradient can steer, with no network to learn it: what the gap of a good adapter may be.

    python benchmarks/lookahead_reach.py --adapter digits-stroke [--scores classifier ink] [--steps 16 32] [--outputs 300] [--seed 0]

The optimal control of step k is u = sigma_k E[∇log h_{k+1}(x_{k+1})], h(x) the probability of the label where x leads, and the
expectation over the controlled step. Here h_k is log p̂ at the base's denoised estimate with one temperature and bias a class for each
step, fitted to base trajectories, and u is found anew for every sample (the mean of three draws, averaged over two rounds): three
forward and twenty-one backward calls a step, far more than an adapter's one, and still not the optimum. But its J is an honest lower
bound on what this base, this K and this p̂ allow, so log Z − J bounds from above the part of the gap that no training removes.

`ink` puts in place of the classifier an ordered logistic of the true amount of ink, 0.11 standard deviations wide: a p̂ with the
smoothest possible gradient. Writes results/lookahead_reach.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from diffusers_ctrl.adapters import load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.policy import Policy  # noqa: E402
from diffusers_ctrl.rollouts import Batch, Environment, Sampler, base_transition  # noqa: E402
from digits_data import stroke_oracle, thresholds  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import parse_arguments  # noqa: E402


LogProbs = Callable[[torch.Tensor], torch.Tensor]  # images -> (B, classes) nats
INK_WIDTH = 0.003


def ink_log_probs(images: torch.Tensor) -> torch.Tensor:
    """Ordered logistic of the mean ink around the oracle's thresholds: (B, 3) nats, differentiable."""
    ink = 1 - images.clamp(0, 1).mean(dim=(1, 2, 3))  # the oracle's own measure, but with a gradient
    low, high = ((ink - threshold) / INK_WIDTH for threshold in thresholds("stroke"))
    logits = torch.stack([F.logsigmoid(-low), F.logsigmoid(low) + F.logsigmoid(-high), F.logsigmoid(high)], dim=1)
    return logits.log_softmax(dim=1).float()


class Lookahead:
    """log h_k(y | x) of every class, calibrated a step at a time."""

    def __init__(self, policy: Policy, environment: Environment, log_probs: LogProbs) -> None:
        self.policy, self.environment, self.log_probs = policy, environment, log_probs
        steps = len(environment.sampler.timesteps)
        self.scale, self.bias = torch.ones(steps + 1, 1, 3), torch.zeros(steps + 1, 1, 3)

    def raw(self, x: torch.Tensor, batch: Batch, k: int) -> torch.Tensor:
        if k < len(self.environment.sampler.timesteps):
            x = base_transition(self.policy, self.environment.sampler, batch, k, x).denoised
        return self.log_probs(self.environment.decode(x))

    def __call__(self, x: torch.Tensor, batch: Batch, k: int) -> torch.Tensor:
        return (self.raw(x, batch, k) * self.scale[k] + self.bias[k]).log_softmax(dim=1)

    def gradient(self, x: torch.Tensor, batch: Batch, k: int) -> torch.Tensor:
        x = x.detach().requires_grad_()
        chosen = self(x, batch, k).gather(1, batch.labels[:, :1].long()).sum()
        return torch.autograd.grad(chosen, x)[0]

    def calibrate(self, count: int, generator: torch.Generator) -> float:
        """Fits scale and bias to `count` base trajectories; returns log Z, the mean over prompts and labels, from the same."""
        sampler, raw, prompts = self.environment.sampler, [], []
        with torch.no_grad():
            for _ in tqdm(range(count // 150), desc="base trajectories", unit="batch"):
                batch = self.environment.draw(150, generator)
                x, found = batch.noise, []
                for k in range(len(sampler.timesteps)):
                    found.append(self.raw(x, batch, k))
                    step = base_transition(self.policy, sampler, batch, k, x)
                    x = step.mean if k not in sampler.noisy_steps else step.sample(generator)
                raw.append(torch.stack([*found, self.raw(x, batch, len(sampler.timesteps))]))
                prompts.append(batch.prompts)
        scores, prompts = torch.cat(raw, dim=1), torch.cat(prompts)
        target = scores[-1].softmax(dim=1)
        scale, bias = self.scale.clone().mul_(0.3).requires_grad_(), self.bias.clone().requires_grad_()
        optimizer = torch.optim.Adam([scale, bias], lr=0.03)
        for _ in range(500):
            loss = -(target * (scores * scale + bias).log_softmax(dim=2)).sum(dim=2).mean(dim=1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.scale, self.bias = scale.detach(), bias.detach()
        self.scale[-1], self.bias[-1] = 1.0, 0.0
        by_prompt = [target[prompts == prompt].double().mean(dim=0).log().mean() for prompt in prompts.unique()]
        return torch.stack(by_prompt).mean().item()


def steer(
    lookahead: Lookahead, batch: Batch, generator: torch.Generator, rounds: int, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_K and the KL, (B,) nats, of the control that `Lookahead` gives."""
    sampler, policy = lookahead.environment.sampler, lookahead.policy
    x, kl = batch.noise, torch.zeros(len(batch))

    def noise() -> torch.Tensor:
        return torch.randn(x.shape, generator=generator)

    for k in tqdm(range(len(sampler.timesteps)), desc="steering", unit="step"):
        with torch.no_grad():
            step = base_transition(policy, sampler, batch, k, x)
        if k not in sampler.noisy_steps:
            x = step.mean
            continue
        std = step.std
        control = std * lookahead.gradient(step.mean, batch, k + 1)
        for _ in range(rounds):
            ahead = [lookahead.gradient(step.mean + std * (control + noise()), batch, k + 1) for _ in range(draws)]
            control = 0.4 * control + 0.6 * std * torch.stack(ahead).mean(dim=0)
        kl = kl + control.square().flatten(1).sum(1) / 2
        x = step.mean + std * (control + noise())
    return x, kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="digits-stroke", help="brings the base, the sampler and the classifier")
    parser.add_argument("--scores", nargs="+", default=["classifier", "ink"], choices=["classifier", "ink"])
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32], help="K")
    parser.add_argument("--outputs", type=int, default=300)
    parser.add_argument("--calibration", type=int, default=1500, help="base trajectories for h and log Z")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    adapter = load_adapter(resolve_folder(args.adapter))
    task, _ = parse_arguments([])
    policy, environment = adapter_environment(adapter, task)
    scheduler, options = environment.sampler.scheduler, environment.sampler.options
    scores = {"classifier": lambda images: adapter.classifier.log_probs(images)[0], "ink": ink_log_probs}
    rows = []
    for name in args.scores:
        for steps in args.steps:
            started = time.perf_counter()
            values = dict(vars(environment)) | {"sampler": Sampler(scheduler, steps, options)}
            lookahead = Lookahead(policy, Environment(**values), scores[name])
            generator = torch.Generator().manual_seed(args.seed)
            log_z = lookahead.calibrate(args.calibration, generator)
            batch = lookahead.environment.draw(args.outputs, generator)
            x, kl = steer(lookahead, batch, generator, rounds=2, draws=3)
            with torch.no_grad():
                images = lookahead.environment.decode(x)
                reward = scores[name](images).gather(1, batch.labels[:, :1].long()).squeeze(1)
            objective = reward - kl
            error = objective.std().item() / math.sqrt(len(objective))
            row = {
                "score": name,
                "steps": steps,
                "log_partition": log_z,
                "reward": reward.mean().item(),
                "kl": kl.mean().item(),
                "gap": log_z - objective.mean().item(),
                "gap_se": error,
                "accuracy": (stroke_oracle(images) == batch.label_rows).double().mean().item(),
                "seconds": round(time.perf_counter() - started, 1),
            }
            rows.append(row)
            print(
                f"{name:10} K {steps:3}  gap {row['gap']:.2f} ± {error:.2f}  KL {row['kl']:.2f}  log p̂ {row['reward']:.2f}  "
                f"accuracy {row['accuracy']:.3f}  {row['seconds']} s",
                flush=True,
            )
    write_json(RESULTS / "lookahead_reach.json", {**vars(args), "rows": rows, **provenance()})


if __name__ == "__main__":
    main()
