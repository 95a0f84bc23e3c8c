"""Everything that `make bench` runs, at toy size, to see that it runs: two at a time in two processes, each on one thread.

    python benchmarks/smoke.py [--output runs/bench-smoke] [--only NAME …]

Starts from nothing, says what each took, and names those that failed. What it writes is no result.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PEERS = ["--seeds", "0", "--runs", "{output}", "--results", "{output}/peers"]
# the longest first; each is the module and the arguments of its `main`
RUNS = {
    "peers": ("peers", ["--settings", "stroke", *PEERS]),
    "sample_efficiency": ("sample_efficiency", ["--results", "{output}/sample_efficiency"]),
    "ablations": ("ablations", ["--results", "{output}/ablations"]),
    "step_time": ("step_time", ["--threads", "1", "--output", "{output}/step_time.json"]),
    "peers, two attributes": ("peers", ["--settings", "stroke-slant", "--only", "base", "CTRL", "classifier guidance", *PEERS]),
    "time_to_gap": ("time_to_gap", ["--results", "{output}/time_to_gap"]),
    "critic_reach": ("critic_reach", ["--results", "{output}/critic_reach"]),
    "label_cost": ("label_cost", ["--output", "{output}/label_cost.json"]),
}


def run(name: str, output: Path) -> tuple[float, str]:
    """Seconds that it took, and what went wrong."""
    module, arguments = RUNS[name]
    started = time.perf_counter()
    try:
        importlib.import_module(module).main(["--smoke", *(part.format(output=output) for part in arguments)])
    except (Exception, SystemExit):  # the others are still worth running
        return time.perf_counter() - started, traceback.format_exc()
    return time.perf_counter() - started, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench-smoke", help="is emptied first")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    failed = []
    # spawned: a forked child of a process with torch in it may hang
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = {pool.submit(run, name, args.output): name for name in args.only}
        for done in as_completed(runs):
            seconds, error = done.result()
            print(f"{runs[done]}: {'FAILED' if error else 'ran'}, {seconds:.0f} s\n{error}", flush=True)
            failed += [runs[done]] if error else []
    if failed:
        sys.exit(f"Failed: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
