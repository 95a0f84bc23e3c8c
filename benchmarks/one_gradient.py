"""Three objectives, one gradient: each against finite differences of J, on a tiny real U-Net in float64.

    python benchmarks/one_gradient.py [--batches 60] [--batch_size 60] [--seed 0] [--only objectives|coarse]

At the start (LoRA and label encoder change nothing yet) and at a perturbed point. J is the mean over `batches` fixed batches of
starts, labels and noises, so its central differences along a direction have no sampling error, and `direct_backprop` on the same noises
must equal them to rounding. The other two are compared with it:

- same noise: relative difference of the gradients, batch by batch (what must agree exactly);
- in expectation: ‖E a − E b‖ / ‖E b‖ and the cosine of the two means, with a correction for the noise of either (cross products of
  different batches only) and jackknife standard errors over the batches.

And what a coarse adjoint costs: `adjoint_matching` on 4 of 19 noisy steps, the trainer's default at K = 20, with the adjoint solved at these alone
against the adjoint solved at all, on the same batches, noises and steps.

Writes results/one_gradient.json and results/coarse_adjoint.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from diffusers_ctrl.experience import Baseline, collect, less_baseline  # noqa: E402
from diffusers_ctrl.objectives import adjoint_matching, direct_backprop, policy_gradient, random_steps  # noqa: E402
from diffusers_ctrl.policy import Policy  # noqa: E402
from diffusers_ctrl.rollouts import Batch, Environment, rollout  # noqa: E402
from jackknife import jackknife  # noqa: E402
from problems import tiny_environment, tiny_policy  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402


DIRECTIONS = 8
STEP = 1e-5
COARSE_STEPS, COARSE_COUNT = 20, 4


def parameters_of(policy: Policy) -> list[torch.nn.Parameter]:
    return [p for group in policy.trainable_parameters().values() for p in group]


def gradients(name: str, policy: Policy, environment: Environment, batches: int, batch_size: int, seed: int) -> torch.Tensor:
    """(batches, parameters): batch i of every objective starts from the same labels, prompts and noise."""
    baseline = Baseline(len(environment.labels), environment.num_prompts, len(environment.sampler.noisy_steps))
    found = []
    for index in tqdm(range(-1, batches), desc=name, unit="batch"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index + 1)
        batch = environment.draw(batch_size, generator)
        arguments = (policy, environment.sampler, batch, environment.log_likelihood, generator)
        if name == "policy_gradient":
            (experience,) = less_baseline([collect(*arguments)], [batch], baseline)
            if index < 0:
                continue  # it only fills the baseline: one that is taken from the batch itself would bias the gradient
            loss, _ = policy_gradient(*arguments, experience=experience)
        elif index < 0:
            continue
        else:
            loss, _ = (direct_backprop if name == "direct_backprop" else adjoint_matching)(*arguments)
        parts = torch.autograd.grad(loss, parameters_of(policy))
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def coarse_and_fine(
    policy: Policy, environment: Environment, count: int, batches: int, batch_size: int, seed: int
) -> list[torch.Tensor]:
    """Two of (batches, parameters): adjoint_matching on `count` random steps a batch, with the coarse adjoint and without."""
    found: list[list[torch.Tensor]] = [[], []]
    for index in tqdm(range(batches), desc="coarse adjoint", unit="batch"):
        for coarse, own in zip((True, False), found, strict=True):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index + 1)
            steps = random_steps(environment.sampler, count, generator)
            batch = environment.draw(batch_size, generator)
            arguments = (policy, environment.sampler, batch, environment.log_likelihood, generator)
            loss, _ = adjoint_matching(*arguments, steps=steps, coarse=coarse)
            own.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters_of(policy))]))
    return [torch.stack(own) for own in found]


def minus_j(policy: Policy, environment: Environment, batch: Batch, generator: torch.Generator) -> float:
    """−J of one batch, by a plain rollout and the environment's log p̂: nothing of the objectives is used."""
    path = rollout(policy, environment.sampler, batch, generator)
    return (path.kl - batch.gamma * environment.log_likelihood(path.sample, batch.labels)).mean().item()


def differences(
    policy: Policy, environment: Environment, directions: torch.Tensor, batches: int, batch_size: int, seed: int
) -> torch.Tensor:
    """(directions,): central differences of −J over the same batches as `gradients`."""

    def move(direction: torch.Tensor, step: float) -> None:
        offset = 0
        for p in parameters_of(policy):
            p.data += step * direction[offset : offset + p.numel()].view_as(p)
            offset += p.numel()

    @torch.no_grad()
    def loss() -> float:
        total = 0.0
        for index in range(batches):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index + 1)
            batch = environment.draw(batch_size, generator)
            total += minus_j(policy, environment, batch, generator)
        return total / batches

    found = []
    for direction in tqdm(directions, desc="finite differences", unit="direction"):
        values = []
        for step in (STEP, -STEP):
            move(direction, step)
            values.append(loss())
            move(direction, -step)
        found.append((values[0] - values[1]) / (2 * STEP))
    return torch.tensor(found, dtype=torch.float64)


def cross_mean(products: torch.Tensor) -> torch.Tensor:
    """Mean of the off-diagonal elements of (n, n): an estimate of E a · E b that the noise of one batch does not bias."""
    n = len(products)
    return (products.sum() - products.diag().sum()) / (n * (n - 1))


def compare(found: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Of two sets of (batches, parameters) gradients: relative error and cosine of the means, with standard errors."""
    own, other, both = found @ found.T, truth @ truth.T, found @ truth.T
    off = (found - truth) @ (found - truth).T

    def relative_error(rows: torch.Tensor) -> float:
        part = [cross_mean(m[rows][:, rows]).item() for m in (off, other)]
        return math.copysign(math.sqrt(abs(part[0]) / part[1]), part[0])  # negative: no difference to be seen beside the noise

    def cosine(rows: torch.Tensor) -> float:
        a, b, c = (cross_mean(m[rows][:, rows]).item() for m in (both, own, other))
        return a / math.sqrt(b * c)

    same_noise = ((found - truth).norm(dim=1) / truth.norm(dim=1)).max().item()
    every, count = torch.arange(len(found)), len(found)
    return {
        "same_noise_relative_difference": same_noise,
        "relative_error": relative_error(every),
        "relative_error_se": jackknife(relative_error, count, count),
        "cosine": cosine(every),
        "cosine_se": jackknife(cosine, count, count),
    }


def compare_objectives(args: argparse.Namespace) -> None:
    settings = (args.batches, args.batch_size, args.seed)
    rows = []
    for point, perturb in (("start", 0.0), ("perturbed", 0.1)):
        policy, environment = tiny_policy(perturb=perturb), tiny_environment(steps=args.steps)
        found = {
            name: gradients(name, policy, environment, *settings)
            for name in ("direct_backprop", "adjoint_matching", "policy_gradient")
        }
        directions = torch.randn(
            DIRECTIONS, found["direct_backprop"].shape[1], generator=torch.Generator().manual_seed(args.seed)
        ).double()
        numeric = differences(policy, environment, directions, *settings)
        analytic = directions @ found["direct_backprop"].mean(0)
        worst = ((numeric - analytic).abs() / numeric.abs()).max().item()
        rows.append({"point": point, "objective": "direct_backprop", "finite_difference_relative_error": worst})
        print(f"{point:10} direct_backprop   finite differences along {DIRECTIONS} directions: relative error at most {worst:.1e}")
        for name in ("adjoint_matching", "policy_gradient"):
            row = compare(found[name], found["direct_backprop"])
            # the same comparison without direct_backprop in between: slopes against the differences themselves
            slopes = found[name] @ directions.T
            error = (slopes - found["direct_backprop"] @ directions.T).std(0) / args.batches**0.5
            error = error + 1e-6 * numeric.abs()  # the differences' own rounding, where there is no other
            row["finite_difference_z"] = ((slopes.mean(0) - numeric).abs() / error).max().item()
            rows.append({"point": point, "objective": name, **row})
            print(
                f"{point:10} {name:17} same noise {row['same_noise_relative_difference']:.1e}  in expectation: relative error "
                f"{row['relative_error']:+.3f} ± {row['relative_error_se']:.3f}, cosine {row['cosine']:.3f} ± {row['cosine_se']:.3f}; "
                f"largest z against finite differences {row['finite_difference_z']:.1f}",
                flush=True,
            )
    write_json(RESULTS / "one_gradient.json", {**vars(args), "rows": rows, **provenance()})


def compare_coarse(args: argparse.Namespace) -> None:
    rows = []
    for point, perturb, guidance in (("start", 0.0, 1.0), ("perturbed", 0.1, 1.0), ("perturbed", 0.1, 7.5)):
        policy = tiny_policy(guidance, perturb)
        coarse, fine = coarse_and_fine(
            policy, tiny_environment(steps=COARSE_STEPS), COARSE_COUNT, args.batches, args.batch_size, args.seed
        )
        row = {"steps": COARSE_STEPS, "count": COARSE_COUNT, "guidance_scale": guidance, **compare(coarse, fine)}
        rows.append({"point": point, "objective": "adjoint_matching, coarse adjoint", **row})
        print(
            f"{point:10} coarse adjoint, guidance {guidance}: {COARSE_COUNT} of {COARSE_STEPS - 1} steps, in expectation: relative error {row['relative_error']:+.3f} ± "
            f"{row['relative_error_se']:.3f}, cosine {row['cosine']:.4f} ± {row['cosine_se']:.4f}",
            flush=True,
        )
    write_json(RESULTS / "coarse_adjoint.json", {**vars(args), "rows": rows, **provenance()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=60, help="trajectories a batch")
    parser.add_argument("--steps", type=int, default=4, help="K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("objectives", "coarse"), help="both comparisons by default")
    args = parser.parse_args()
    if args.only != "coarse":
        compare_objectives(args)
    if args.only != "objectives":
        compare_coarse(args)


if __name__ == "__main__":
    main()
