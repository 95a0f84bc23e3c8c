"""The embedded models: `digits-base` (a StableDiffusionPipeline folder) and adapters trained on it."""

from __future__ import annotations

from pathlib import Path


ROOT = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of the models that ship inside the package."""
    return sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("_"))


def find(name: str) -> Path | None:
    """The folder of the embedded model called `name`, or None."""
    return ROOT / name if name in names() else None
