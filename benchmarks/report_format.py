"""What the tables of report.py are made of: results, numbers with their errors, Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from records import RESULTS


def read(folder: str) -> list[dict[str, Any]]:
    """The results of results/FOLDER/, in order of name."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).rglob("*.json"))]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_error(values: Sequence[float], own: Sequence[float | None] = (None,)) -> tuple[float, float | None]:
    """Mean, and standard error over seeds: never less than what each one's `own` error makes of the mean, since two or three may agree by chance."""
    known = [error for error in own if error is not None]
    within = sum(error**2 for error in known) ** 0.5 / len(values) if len(known) == len(values) else None
    across = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), max((error for error in (within, across) if error is not None), default=None)


def spread(values: Sequence[float], digits: int = 3, own: Sequence[float | None] = (None,)) -> str:
    """Mean ± its error, as a table has them."""
    mean, error = mean_and_error(values, own)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def pm(metrics: dict[str, Any], key: str, digits: int = 3) -> str:
    """One figure with its own standard error."""
    return over_seeds([metrics], key, digits)


def over_seeds(metrics: Sequence[dict[str, Any]], key: str, digits: int = 3) -> str:
    """One figure of the metrics of several seeds, each with its own standard error."""
    return spread([m[key] for m in metrics], digits, [m[f"{key}_se"] for m in metrics])


def exact_draws(found: dict[str, Any]) -> str:
    """What exact_reference.py's `of_exact_draws` found."""
    shown = [
        f"{scale * found[f'{name}_floor']:.{places}f} ± {scale * found[f'{name}_floor_sd']:.{places}f}"
        for name, places, scale in (("tv", 3, 1), ("mmd2", 2, 1000))
    ]
    return f"TV {shown[0]} and MMD² {shown[1]}e-3 (± is the standard deviation from set to set)"


def span(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def seeded(record: dict[str, Any]) -> str:
    """A result's variant, and its seed where that is not 0."""
    return record["variant"] + (f", seed {record['seed']}" if record["seed"] else "")
