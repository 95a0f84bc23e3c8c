"""Renders results/ into the tables and figures of benchmarks/README.md and of the README.

    python benchmarks/report.py [--check]

Between `<!-- NAME -->` and `<!-- /NAME -->` stands what `SECTIONS[NAME]` makes of the JSON files; the rest is written by hand. --check says whether
the files are as they would be rendered, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from diffusers_ctrl.checkpoints import write_file  # noqa: E402


RESULTS = Path(__file__).resolve().parent / "results"
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "README.md")


def read(folder: str) -> list[dict[str, Any]]:
    """The results of results/FOLDER/, in order of name."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).rglob("*.json"))]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 3, own: float | None = None) -> str:
    """Mean ± standard error: over seeds where there are several, the one's own else."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else own
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def span(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


# -- peers: tables 1 and 2 --


def method_rows(found: list[dict[str, Any]], method: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(what it is tuned for, its rows over seeds): one for both aims where all seeds agree."""
    own = [one for one in found if one["method"] == method]
    aims = {
        aim: [next(row for row in one["rows"] if row["tuned_for"] in (aim, "both")) for one in own]
        for aim in ("distance", "accuracy")
    }
    if aims["distance"] == aims["accuracy"]:
        return [("", aims["distance"])]
    return list(aims.items())


def peers_table(setting: str) -> str:
    found = [one for one in read("peers") if one["setting"] == setting]
    if not found:
        return "Not run yet."
    order = list(
        dict.fromkeys(one["method"] for one in sorted(found, key=lambda one: best_accuracy(found, one["method"]), reverse=True))
    )
    lines = []
    for method in order:
        for aim, rows in method_rows(found, method):

            def column(key: str, digits: int, rows: list[dict[str, Any]] = rows, scale: float = 1.0) -> str:
                values = [scale * row[key] for row in rows if key in row]
                return spread(values, digits, rows[0].get(f"{key}_se")) if len(values) == len(rows) else "–"

            calls = f"{rows[0]['forward_calls']:.0f}" + (f" + {rows[0]['backward_calls']:.0f}" if rows[0]["backward_calls"] else "")
            lines.append(
                [
                    f"**{method}**" if method.startswith("CTRL") else method,
                    f"{span(row['weight'] for row in rows)}" + (f" ({aim})" if aim else ""),
                    column("accuracy", 3),
                    column("macro_f1", 3),
                    column("worst_label", 2),
                    column("prompt_accuracy", 3),
                    column("tv", 3),
                    column("mmd2", 2, scale=1000),
                    column("gap", 2),
                    column("diversity", 2),
                    calls,
                    column("times_base", 1),
                    f"{statistics.mean(row['seconds_training'] for row in rows):.0f}",
                ]
            )
    floors = [row for one in found for row in one["rows"]]
    seeds = {method: sorted({one["seed"] for one in found if one["method"] == method}) for method in order}
    about = [
        f"Seeds {', '.join(map(str, seeds[order[0]]))}"
        + "".join(f"; {method}: {', '.join(map(str, own))}" for method, own in seeds.items() if own != seeds[order[0]])
        + f". {found[0]['outputs']} images a label ({found[0]['labels']} labels), {found[0]['validation']} for each weight tried.",
        f"Exact draws would show TV {statistics.mean(row['tv_floor'] for row in floors):.3f} and MMD² "
        f"{1000 * statistics.mean(row['mmd2_floor'] for row in floors):.2f}e-3 (its mean size; its mean is 0).",
    ]
    header = [
        "method",
        "weight (tuned for)",
        "accuracy",
        "macro-F1",
        "worst label",
        "digit",
        "TV",
        "MMD², 1e-3",
        "gap, nats",
        "diversity",
    ]
    header += ["calls a sample", "× base's time", "training, s"]
    return "\n".join([table(header, lines), "", *about])


def best_accuracy(found: list[dict[str, Any]], method: str) -> float:
    return statistics.mean(max(row["accuracy"] for row in one["rows"]) for one in found if one["method"] == method)


# -- what an update costs --


def step_time() -> str:
    path = RESULTS / "step_time_tiny.json"
    if not path.exists():
        return "Not run yet."
    record = json.loads(path.read_text())
    lines = []
    for row in record["rows"]:
        ratios = [f"{row[key]:.2f}" if key in row else "–" for key in ("time_over_official", "time_over_sampling")]
        memory = [f"{row['mib']:.0f}", f"{row['memory_over_official']:.2f}" if "memory_over_official" in row else "–"]
        lines.append([row["name"], str(row["steps"]), f"{row['seconds']:.2f}", *ratios, *memory, f"{row['rows']:.0f}"])
    header = [
        "",
        "steps",
        "seconds",
        "of the official algorithm's",
        "times sampling",
        "MiB above the model",
        "of the official's",
        "U-Net rows",
    ]
    about = f"{record['threads']} threads, median of {record['rounds']} rounds of {record['repeats']} updates, commit {record['commit'][:7]}."
    return table(header, lines) + "\n\n" + about


# -- the README's own tables --


def pm(metrics: dict[str, Any], key: str, digits: int = 3) -> str:
    return f"{metrics[key]:.{digits}f} ± {metrics[key + '_se']:.{digits}f}"


def digits_stroke() -> str:
    """The main command's seeds, and the shipped adapter."""
    lines = []
    for name, file in (
        ("the command above, γ = 1, seed 0", "digits-stroke-seed0"),
        ("seed 1", "digits-stroke-seed1"),
        ("seed 2, on two cores, fresh clone", "digits-stroke-seed2"),
        ("the shipped `digits-stroke` (γ from 0.5 to 4, `digits_stroke_gamma.yaml`, seed 0) at γ = 1", "digits-stroke-shipped"),
    ):
        m = json.loads((RESULTS / f"{file}.json").read_text())
        cells = [
            pm(m, "accuracy"),
            f"{m['exact_accuracy']:.3f}",
            f"{m['prompt_accuracy']:.3f}",
            pm(m, "gap", 2),
            pm(m, "gap_from_base", 2),
        ]
        lines.append([name, *cells, f"{m['updates']}", f"{m['seconds_train'] / 60:.0f}"])
    m = json.loads((RESULTS / "digits-stroke-seed0.json").read_text())
    header = [
        "",
        f"label accuracy (base {m['base_accuracy']:.2f})",
        "exact law's own",
        f"digit as prompted (base {m['base_prompt_accuracy']:.3f})",
    ]
    return table([*header, "gap, weights", "gap, base samples", "updates", "minutes of training"], lines)


def digits_stroke_gamma() -> str:
    """The shipped adapter at each gamma."""
    m = json.loads((RESULTS / "digits-stroke-shipped.json").read_text())
    lines = []
    for gamma in sorted({float(key.removeprefix("by_gamma.").rsplit(".", 1)[0]) for key in m if key.startswith("by_gamma.")}):
        own = {key.removeprefix(f"by_gamma.{gamma:g}."): value for key, value in m.items()}
        cells = [
            pm(own, "accuracy"),
            f"{own['exact_accuracy']:.3f}",
            pm(own, "kl", 2),
            pm(own, "gap", 2),
            pm(own, "gap_from_base", 2),
        ]
        lines.append([f"γ = {gamma:g}", *cells])
    return table(["the shipped adapter at", "label accuracy", "exact law's own", "KL", "gap, weights", "gap, base samples"], lines)


SECTIONS: dict[str, Callable[[], str]] = {
    **{
        f"peers-{setting}": (lambda setting=setting: peers_table(setting))
        for setting in ("stroke", "slant", "jpeg", "stroke-slant")
    },
    "step-time": step_time,
    "digits-stroke": digits_stroke,
    "digits-stroke-gamma": digits_stroke_gamma,
}


def rendered(page: str) -> str:
    """The page with its sections made anew."""

    def section(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- {name} -->\n{SECTIONS[name]()}\n<!-- /{name} -->" if name in SECTIONS else found.group(0)

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", section, page, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if args.check and after != before:
            raise SystemExit(f"{path.relative_to(ROOT)} is not what its results say: run python benchmarks/report.py.")
        if not args.check:
            write_file(path, after)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
