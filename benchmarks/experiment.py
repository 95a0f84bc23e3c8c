"""How an experiment of many runs is driven: a YAML file, one JSON a run, and what is there already is not run again.

A file has `variants` (name -> settings), whatever else its runner wants, and under `smoke` what replaces that at toy size, with the names of the
variants that run then, or {name: what replaces its settings}. A run that fails is named at the end and does not keep the others from running.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from records import RESULTS, provenance, write_json


EXPERIMENTS = Path(__file__).resolve().parent / "experiments"
clock = time.process_time  # with one thread: the seconds of a core that does nothing else, however busy this one is


def read(path: Path, smoke: bool) -> dict[str, Any]:
    """The experiment in a YAML file."""
    spec = yaml.safe_load(path.read_text())
    small = spec.pop("smoke")
    if not smoke:
        return spec
    if names := small.pop("variants", None):
        over = names if isinstance(names, dict) else dict.fromkeys(names, {})
        spec["variants"] = {name: merged(spec["variants"][name], own) for name, own in over.items()}
    return merged(spec, small)


def merged(settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`settings` with those of `over` in place of its own, within nested ones too; lists are replaced whole."""
    out = dict(settings)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if both else value
    return out


def arguments(name: str, doc: str | None, given: list[str] | None) -> argparse.Namespace:
    """The options that all experiments have; `spec` is what the experiment's file says."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="variants to run; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--smoke", action="store_true", help="everything at toy size, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS / name)
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/benchmarks"), help="classifiers and base samples, kept between runs"
    )
    args = parser.parse_args(given)
    args.spec = read(EXPERIMENTS / f"{name}.yaml", args.smoke)
    if args.smoke:
        args.cache = args.results / "cache"
    torch.set_num_threads(1)
    return args


def run_all(
    args: argparse.Namespace, variants: dict[str, Any], run: Callable[[str, int], dict[str, Any]], line: Callable[[dict], str]
) -> None:
    """run(variant, seed) for each of `variants` and of `args.seeds`, into args.results/VARIANT-seedN.json. line: what is printed of one.

    Raises:
        SystemExit: for a variant that there is not; and at the end, naming the runs that failed, if any did.
    """
    if unknown := set(args.only or []) - set(variants):
        raise SystemExit(f"No variant {', '.join(sorted(unknown))}: choose from {', '.join(variants)}.")
    paths = {(n, seed): args.results / f"{n}-seed{seed}.json" for seed in args.seeds for n in args.only or variants}
    failed, bar = [], tqdm([key for key, path in paths.items() if not path.exists()], unit="run")
    for name, seed in bar:
        bar.set_description(f"{name}, seed {seed}")
        started = clock()
        try:
            record = run(name, seed)
        except Exception:  # whatever it is, the other runs are worth having
            failed.append(f"{name}, seed {seed}")
            bar.write(traceback.format_exc())
            continue
        about = {"variant": name, "seed": seed, "smoke": args.smoke, "threads": 1, "seconds_in_all": clock() - started}
        write_json(paths[name, seed], {**about, **record, **provenance()})
        bar.write(f"{name:28} {line(record)}")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(paths)} runs failed: {'; '.join(failed)}. Run this again for those.")
