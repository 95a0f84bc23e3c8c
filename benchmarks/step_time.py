"""What one update costs: the official algorithm, our objectives, and sampling alone, on the same random-weight Stable Diffusion.

    python benchmarks/step_time.py [--size tiny] [--steps 20 50] [--threads 2] [--rounds 3] [--only NAME …] [--output FILE] [--smoke]
    python benchmarks/step_time.py --size sd15 --device cuda --dtype bfloat16 --only official sampling "adjoint_matching (default)"     # or sdxl

Batch 4, guidance 7.5, LoRA of rank 16 (in our rows merged once an update, where the base is float32) on the attention's projections, a reward by a small classifier of the decoded images. Each
row runs in a process of its own: two updates to warm up, then `--repeats` that are timed, of which the median counts (of two the faster); all rows once, then all again, `--rounds` times, so that
a slow minute of the machine meets all of them. Medians over rounds; ratios are taken within a round.

- seconds: of one update, that is of one batch of trajectories. CPU s: what its process computed meanwhile, on all its threads: other people's
  jobs disturb it less.
- steps/update: how many optimizer steps an update takes; a step: seconds divided by them. One, but where trajectories are reused.
- adjoint_matching draws its trajectories 4 at once, and has 2 of them (4 rows) in a call with a gradient, as is its default; differentiated all at
  once, 4. 2 trajectories at a time: the same update in two micro-batches, all of whose calls have 4 rows as the official algorithm's have.
- control head: alone, of width 512 (`lora_rank: 0`), in place of LoRA.
- channels last, compiled: the same update or sampling with the U-Net's convolutions so, or with `unet.compile()`; first_seconds, of the first warm-up,
  are what compiling costs, with nothing of it on the disk yet.
- MiB: the process's peak above what it had before its first update; on a GPU, what it had allocated there. rows: samples that the U-Nets were called
  with, recomputation included.
- TFLOP: of one update, as torch's FlopCounterMode counts matrix products, convolutions and attention; of rows that are not compiled. TFLOP/s: these over
  the seconds of the update counted, the median over rounds; / matmul: that over what a large matrix product of the same type reaches on the same device, measured before the first row.
- bfloat16: the frozen networks and the states are so, LoRA and what else is trained are float32, under accelerate's autocast; so is sampling, which is
  then the trainer's, not a pipeline's.
- On a GPU "CPU s" is mostly waiting. Another than its first is chosen by CUDA_VISIBLE_DEVICES.

`official` is the algorithm of official.py. `sampling` is one batch of trajectories of the tuned model, without gradient: the floor of any method that
learns from its own samples. A row that fails, as on a card that is too small, is named at the end, and the others are run. Writes
results/step_time_SIZE.json, with dtype and card in the name where they are others than float32 and a CPU, after each process, and goes on from there when it is called again on the same
commit with the same settings. `--smoke` is a look at three rows and 7 steps, for which `--output` must be given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from devices import DTYPES, Memory, counter_of_flops, finished, matmul_tflops  # noqa: E402
from official import official_loss, reference_unet  # noqa: E402
from random_sd import SIZES, ddim, random_embeds, random_unet, random_vae  # noqa: E402

from diffusers_ctrl import Categorical, Classifier, CTRLConfig, CTRLTrainer, LabelSpace, Policy  # noqa: E402
from diffusers_ctrl.rewards import classifier_reward  # noqa: E402
from diffusers_ctrl.rollouts import rollout  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402


GUIDANCE = 7.5
SPACE = LabelSpace(size=Categorical(("largest", "large", "small", "smallest")))
# settings of CTRLConfig by row; a float is a share of the steps
DEFAULT = {"objective": "adjoint_matching"}
HEAD = {"lora_rank": 0, "merge_lora": False, "control_head": 512}  # alone: LoRA left out, nothing in the U-Net is trained
ROWS: dict[str, dict[str, Any]] = {
    "official": {},
    "adjoint_matching (default)": DEFAULT,
    "adjoint_matching (default), 2 trajectories at a time": {
        **DEFAULT,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_batch_size": 2,
    },
    "adjoint_matching, differentiated all at once": {**DEFAULT, "gradient_batch_size": 4},
    "adjoint_matching, a fifth of the steps, 4 times": {**DEFAULT, "num_regression_steps": 0.2, "adjoint_passes": 4},
    "adjoint_matching, a fifth of the steps, adjoint at all": {**DEFAULT, "num_regression_steps": 0.2, "coarse_adjoint": False},
    "adjoint_matching, all steps": {**DEFAULT, "num_regression_steps": 1.0},
    "direct_backprop, all steps, tape": {"objective": "direct_backprop", "checkpointing": False},
    "direct_backprop, all steps, tape, KL at a fifth": {
        "objective": "direct_backprop",
        "checkpointing": False,
        "num_kl_steps": 0.2,
    },
    "direct_backprop, all steps": {"objective": "direct_backprop"},
    "direct_backprop, all steps, KL at a fifth": {"objective": "direct_backprop", "num_kl_steps": 0.2},
    "direct_backprop, last fifth": {"objective": "direct_backprop", "truncation": 0.2},
    "policy_gradient": {"objective": "policy_gradient"},
    "control head, adjoint_matching (default)": {**HEAD, **DEFAULT},
    "control head, direct_backprop, all steps": {**HEAD, "objective": "direct_backprop"},
    "control head, direct_backprop, all steps, tape": {**HEAD, "objective": "direct_backprop", "checkpointing": False},
    "sampling": {},
    "adjoint_matching (default), channels last": {**DEFAULT, "channels_last": True},
    "adjoint_matching (default), compiled": {**DEFAULT, "compiled": True},
    "sampling, channels last": {"channels_last": True},
    "sampling, compiled": {"compiled": True},
}
SMOKE = ("official", "adjoint_matching (default)", "sampling")


def update_of(
    row: str, size_name: str, steps: int, folder: str, device: str = "cpu", dtype: str = "float32"
) -> tuple[Callable[[], Any], torch.nn.Module, Any, torch.Generator]:
    """A function that does one update, the U-Net whose calls and the optimizer whose steps are to be counted, and what decides where the official
    algorithm truncates."""
    size = SIZES[size_name]
    torch.manual_seed(0)
    with torch.device(device):
        # torch's `to`: diffusers' own warns of layers that are to stay in float32 even where there are none
        unet, vae = (torch.nn.Module.to(network, DTYPES[dtype]) for network in (random_unet(size), random_vae(size)))
        classifier = Classifier(SPACE.to_dict(), image_size=16, widths=(8, 16)).requires_grad_(False).eval()
    prompts, null = (embeds.to(DTYPES[dtype]) for embeds in random_embeds(size, 8))
    # merged in half precision, W + BA would round BA away
    settings = {"batch_size": 4, "checkpointing": row != "official", "merge_lora": dtype == "float32"}
    settings |= {"reward_batch_size": size.reward_batch}
    settings |= {k: max(1, round(steps * v)) if isinstance(v, float) else v for k, v in ROWS[row].items()}
    if settings.pop("channels_last", False):
        unet.to(memory_format=torch.channels_last)
    compiled = settings.pop("compiled", False)
    settings |= {} if dtype == "float32" else {"mixed_precision": "bf16"}
    config = CTRLConfig(output_dir=folder, num_inference_steps=steps, guidance_scale=GUIDANCE, report_to="none", **settings)
    policy = Policy(
        unet,
        label_space=SPACE,
        lora_rank=config.lora_rank,
        control_head=config.control_head,
        shape=(4, size.side, size.side),
        guidance_scale=1.0 if row == "official" else GUIDANCE,
        checkpointing=config.checkpointing,
    )

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return (vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    trainer = CTRLTrainer(
        policy,
        ddim(),
        classifier_reward(classifier),
        config,
        shape=(4, size.side, size.side),
        decode=decode,
        prompt_embeds=prompts,
        null_embeds=null,
    )
    environment, generator = trainer.environment, torch.Generator().manual_seed(0)
    noise = generator if device == "cpu" else torch.Generator(device).manual_seed(0)
    if compiled:
        unet.compile()
    if row.startswith("sampling"):

        def sampling() -> None:
            batch = environment.draw(config.batch_size, noise)
            with torch.no_grad(), policy.merged(config.merge_lora), trainer.accelerator.autocast():
                rollout(policy, environment.sampler, batch, noise, reference=False)

        return sampling, unet, trainer.optimizer, generator
    if row != "official":
        return trainer._step, unet, trainer.optimizer, generator
    reference = reference_unet(unet)
    reference.conv_in.register_forward_pre_hook(lambda _, given: unet.conv_in.count(given))

    def official() -> None:
        batch = environment.draw(config.batch_size, noise)
        with trainer.accelerator.autocast():
            given = (policy, reference, environment.sampler, batch, environment.log_likelihood, GUIDANCE)
            loss = official_loss(*given, kl_weight=1.0, generator=generator, noise=noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in policy.trainable_parameters().values() for p in group], 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return official, unet, trainer.optimizer, generator


def worker(row: str, size: str, steps: int, repeats: int, device: str, dtype: str) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    rows, optimizer_steps = [0], [0]
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else the rest would run as it is, unseen
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32  # torch's defaults differ
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        update, unet, optimizer, generator = update_of(row, size, steps, folder, device, dtype)

        def count(given: tuple[torch.Tensor, ...]) -> None:
            rows[0] += len(given[0])

        unet.conv_in.count = count
        if (compiled := unet._compiled_call_impl) is None:
            unet.conv_in.register_forward_pre_hook(lambda _, given: count(given))
        else:  # a hook would be compiled, and compiled again for each number that it has counted
            unet._compiled_call_impl = lambda *given, **named: (count(given), compiled(*given, **named))[1]
        take = optimizer.step
        optimizer.step = lambda: (optimizer_steps.__setitem__(0, optimizer_steps[0] + 1), take())
        memory, started = Memory(device), finished(device)
        update()
        first = finished(device) - started
        update()
        rows[0], optimizer_steps[0], seconds, cpu_seconds, states = 0, 0, [], [], []
        for _ in range(repeats):
            states.append(generator.get_state())
            started, computed = finished(device), time.process_time()
            update()
            seconds.append(finished(device) - started)
            cpu_seconds.append(time.process_time() - computed)
        median = statistics.median_low(seconds)
        found = {
            "first_seconds": first,
            "seconds": median,
            "cpu_seconds": statistics.median(cpu_seconds),
            "mib": memory.mib(),
            "rows": rows[0] / repeats,
            "optimizer_steps": optimizer_steps[0] / repeats,
        }
        if compiled is None:
            generator.set_state(states[seconds.index(median)])  # the same update again, truncated where that was
            with counter_of_flops() as counter:
                update()
            found["tflop"] = counter.get_total_flops() / 1e12
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--output", type=Path, help="results/step_time_SIZE[_DTYPE][_CARD].json by default")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        torch.set_num_threads(args.threads)
        print(json.dumps(worker(args.worker, args.size, args.steps[0], args.repeats, args.device, args.dtype)))
        return
    if args.smoke:
        if args.output is None:
            parser.error("--smoke needs --output: it is no result to keep beside the others.")
        args.steps, args.rounds, args.repeats, args.only = [7], 1, 1, list(SMOKE)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    card = torch.cuda.get_device_name() if on_gpu else "cpu"
    told = [args.dtype] * (args.dtype != "float32") + [card.replace(" ", "-")] * on_gpu
    output = args.output or RESULTS / f"{'_'.join(['step_time', args.size, *told])}.json"
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TQDM_DISABLE": "1"}
    environment |= {"ACCELERATE_USE_CPU": str(not on_gpu).lower()}  # else the trainer takes a GPU that is there
    record = {
        "size": args.size,
        "device": card,
        "dtype": args.dtype,
        "threads": args.threads,
        "repeats": args.repeats,
        **provenance(),
    }
    found, failed = earlier(output, record), {}
    todo = [(number, steps, row) for number in range(args.rounds) for steps in args.steps for row in args.only]
    todo = [(number, steps, row) for number, steps, row in todo if number >= len(found.get((steps, row), []))]
    torch.set_num_threads(args.threads)
    matmul = {"matmul_tflops": matmul_tflops(args.device, args.dtype)}
    bar = tqdm(todo, unit="process")
    for _, steps, row in bar:
        if (name := f"{row}, {steps} steps") in failed:
            continue
        bar.set_description(name)
        command = [sys.executable, __file__, "--worker", row, "--size", args.size, "--steps", str(steps)]
        command += ["--threads", str(args.threads), "--repeats", str(args.repeats), "--device", args.device, "--dtype", args.dtype]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            failed[name] = run.stderr[-2000:]
            continue
        found.setdefault((steps, row), []).append(json.loads(run.stdout.splitlines()[-1]))
        write_json(output, record | matmul | {"rows": summary(found, **matmul)})
    show(summary(found, **matmul))
    if failed:
        raise SystemExit("\n".join(f"{row}: {error}" for row, error in failed.items()) + f"\nFailed: {'; '.join(failed)}.")


def earlier(output: Path, record: dict[str, Any]) -> dict[tuple[int, str], list[dict[str, float]]]:
    """The rounds that a results file has of the same commit and settings, by steps and row."""
    if not output.is_file():
        return {}
    before = json.loads(output.read_text())
    if any(before.get(key) != value for key, value in record.items()):
        return {}
    return {(row["steps"], row["name"]): row["rounds"] for row in before["rows"] if "rounds" in row}


def summary(found: dict[tuple[int, str], list[dict[str, float]]], matmul_tflops: float) -> list[dict[str, Any]]:
    """The table's rows; ratios to the official algorithm and to sampling, within each round; TFLOP/s over those of a matrix product."""
    rows = []
    for (steps, name), rounds in found.items():
        row: dict[str, Any] = {"name": name, "steps": steps}
        row |= {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        row["seconds_an_optimizer_step"] = row["seconds"] / max(1.0, row["optimizer_steps"])
        if "tflop" in row:
            row["tflops"] = statistics.median(one["tflop"] / one["seconds"] for one in rounds)
            row["over_matmul"] = row["tflops"] / matmul_tflops
        row["seconds_range"] = [min(one["seconds"] for one in rounds), max(one["seconds"] for one in rounds)]
        for what, other, key in (
            ("time_over_official", "official", "seconds"),
            ("cpu_time_over_official", "official", "cpu_seconds"),
            ("memory_over_official", "official", "mib"),
            ("time_over_sampling", "sampling", "seconds"),
            ("cpu_time_over_sampling", "sampling", "cpu_seconds"),
        ):
            if others := found.get((steps, other)):
                row[what] = statistics.median(a[key] / b[key] for a, b in zip(rounds, others, strict=False))
        if "time_over_official" in row:
            row["optimizer_step_over_official"] = row["time_over_official"] / max(1.0, row["optimizer_steps"])
        rows.append(row | {"rounds": rounds})
    return rows


COLUMNS = {
    "steps": "steps",
    "seconds": "seconds",
    "cpu_seconds": "CPU s",
    "time_over_official": "/official",
    "cpu_time_over_official": "CPU /off.",
    "time_over_sampling": "/sampling",
    "optimizer_steps": "steps/update",
    "seconds_an_optimizer_step": "a step",
    "mib": "MiB",
    "memory_over_official": "MiB /off.",
    "rows": "rows",
    "tflop": "TFLOP",
    "over_matmul": "/ matmul",
}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print(f"{'':66}" + "".join(f"{title:>13}" for title in COLUMNS.values()))
    for row in rows:
        print(f"{row['name']:66}" + "".join(f"{row.get(key, float('nan')):>13.4g}" for key in COLUMNS))


if __name__ == "__main__":
    main()
