"""How every benchmark leaves its results: with commit and versions, and never half-written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from diffusers_ctrl.adapters import package_versions


RESULTS = Path(__file__).resolve().parent / "results"


def provenance() -> dict[str, Any]:
    """{"commit", "versions"} of what runs."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "versions": package_versions()}


def resident_mib(name: str = "VmRSS") -> float:
    """Memory of this process: VmRSS now, or VmHWM, the most since the mark was set back (/proc/self/clear_refs, so Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def save_figure(figure: Any, path: Path, dpi: int = 130) -> None:
    """Saves a matplotlib figure under a temporary name, renames it, and closes the figure."""
    import matplotlib.pyplot as plt

    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=dpi)
    plt.close(figure)
    os.replace(temporary, path)
