"""How noisy each objective's gradient is, and whether they point the same way: at an adapter as it was trained.

    python benchmarks/gradient_noise.py --adapter digits-stroke [--batches 30] [--batch_size 32]

Every objective gets the same labels, prompts and starting noise. With g_i the gradient of batch i: signal = mean of g_i · g_j over i ≠ j, an
unbiased estimate of |E g|²; noise = E|g|² − signal; cosine of the mean gradients. Writes results/gradient_noise.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from diffusers_ctrl.adapters import load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.objectives import OBJECTIVES  # noqa: E402
from diffusers_ctrl.policy import Policy  # noqa: E402
from diffusers_ctrl.rollouts import Environment  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import parse_arguments  # noqa: E402


def gradients(name: str, policy: Policy, environment: Environment, batches: int, batch_size: int, seed: int) -> torch.Tensor:
    """(batches, parameters), float64."""
    parameters = [p for group in policy.trainable_parameters().values() for p in group]
    found = []
    for index in tqdm(range(batches), desc=name, unit="batch"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        batch = environment.draw(batch_size, generator)
        with policy.merged():
            loss, _ = OBJECTIVES[name](policy, environment.sampler, batch, environment.log_likelihood, generator)
            parts = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="digits-stroke")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task, _ = parse_arguments([])
    policy, environment = adapter_environment(load_adapter(resolve_folder(args.adapter)), task)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("label_encoder"))
    means, rows = {}, {}
    for name in OBJECTIVES:
        found = gradients(name, policy, environment, args.batches, args.batch_size, args.seed)
        products = found @ found.T
        square = products.diag().mean().item()
        signal = (products.sum() - products.diag().sum()).item() / (args.batches * (args.batches - 1))
        means[name] = found.mean(0)
        rows[name] = {"signal": signal, "noise": square - signal, "signal_to_noise": signal / (square - signal)}
        print(f"{name:18} signal {signal:.3g}  noise {square - signal:.3g}  ratio {signal / (square - signal):.4f}", flush=True)
    cosine = torch.nn.functional.cosine_similarity
    for name in list(rows)[1:]:
        rows[name]["cosine_to_direct_backprop"] = cosine(means[name], means["direct_backprop"], dim=0).item()
    settings = {key: getattr(args, key) for key in ("adapter", "batches", "batch_size", "seed")}
    write_json(RESULTS / "gradient_noise.json", {**settings, "objectives": rows, **provenance()})


if __name__ == "__main__":
    main()
