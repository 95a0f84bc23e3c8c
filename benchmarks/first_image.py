"""How long a new user waits: from `python` to the first labelled image, adapter and base downloaded from a Hub, nothing in any cache.

    python benchmarks/first_image.py [--repeats 5] [--threads 2]

The shipped base and adapter lie in repositories of the tests' loopback Hub. Each repeat is a process of its own with an empty HF_HOME. Seconds of
the clock: starting Python and importing, `from_pretrained` by the adapter's Hub id (download and loading; loading alone is measured by a second one
without the network, after the image), the image, and the whole up to there; and the processor's seconds. So it says something on a quiet machine
only. Writes results/first_image.json: median, smallest and largest of each.
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
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from hub_client import contents, environment  # noqa: E402
from hub_server import HubServer  # noqa: E402

from diffusers_ctrl import assets  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402


BASE, ADAPTER = "user/digits-base", "user/digits-stroke"
USER = """
import json, resource, sys, time
from diffusers_ctrl import CTRLPipeline
imported = time.time()
pipe = CTRLPipeline.from_pretrained({adapter!r})
loaded = time.time()
image = pipe("a handwritten seven", label="bold").images[0]
drawn = time.time()
used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
CTRLPipeline.from_pretrained({adapter!r}, local_files_only=True)
again = time.time() - drawn
stamps = dict(imported=imported, loaded=loaded, drawn=drawn, again=again, used=used, size=image.size)
print("STAMPS" + json.dumps(stamps))
"""


def serve(hub: HubServer) -> None:
    """The shipped base and adapter as two repositories; the adapter names the base there."""
    hub.create(BASE, contents(assets.find("digits-base")))
    files = contents(assets.find("digits-stroke"))
    config = json.loads(files["ctrl_config.json"])
    config["base"] |= {"id": BASE, "revision": hub.repos[BASE].refs["main"]}
    hub.create(ADAPTER, files | {"ctrl_config.json": json.dumps(config).encode()})


def once(hub: HubServer, threads: int) -> dict[str, float]:
    """Seconds of one new user."""
    with tempfile.TemporaryDirectory() as home:
        env = environment(hub.url, Path(home), OMP_NUM_THREADS=str(threads))
        started = time.time()
        done = subprocess.run([sys.executable, "-c", USER.format(adapter=ADAPTER)], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"The user's process failed:\n{done.stderr[-3000:]}")
    stamps = json.loads(done.stdout.split("STAMPS")[1])
    return {
        "import": stamps["imported"] - started,
        "download": max(0.0, stamps["loaded"] - stamps["imported"] - stamps["again"]),
        "load": stamps["again"],
        "first_image": stamps["drawn"] - stamps["loaded"],
        "whole": stamps["drawn"] - started,
        "processor": stamps["used"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "first_image.json")
    args = parser.parse_args()
    rows = []
    with HubServer() as hub:
        serve(hub)
        for _ in range(args.repeats):
            rows.append(once(hub, args.threads))
            print("  ".join(f"{name} {seconds:.2f}" for name, seconds in rows[-1].items()), flush=True)
    summary = {
        name: {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}
        for name in rows[0]
        for values in [[row[name] for row in rows]]
    }
    for name, found in summary.items():
        print(f"{name:12} median {found['median']:6.2f} s, from {found['smallest']:.2f} to {found['largest']:.2f}")
    load = dict(zip(("1min", "5min", "15min"), os.getloadavg(), strict=True))
    settings = {"repeats": args.repeats, "threads": args.threads, "cores": len(os.sched_getaffinity(0)), "load_average": load}
    write_json(args.output, {"seconds": summary, "rows": rows, **settings, **provenance()})


if __name__ == "__main__":
    main()
