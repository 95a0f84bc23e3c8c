"""The tables of peers.py: every method's figures, and for the README the two that matter."""

from __future__ import annotations

import statistics
from typing import Any

from report_format import exact_draws, read, span, spread, table


EDGE = "†"  # behind a value that is the largest of those tried
AIMS = ("plain", "distance", "accuracy")
EXACT, HEAD = "exact draws", "CTRL, control head"
SETTINGS = {"stroke": "stroke", "slant": "slant", "jpeg": "JPEG size", "stroke-slant": "stroke and slant"}
BACKWARD = ("MPGD",)  # through the classifier and the decoder, though not through the denoiser, which is what `calls` counts


def aims_of(found: list[dict[str, Any]], method: str) -> dict[str, list[dict[str, Any]]]:
    """Its rows over seeds by what they are for; an aim that some seed has no row for is left out."""
    own = [one for one in found if one["method"] == method]
    aims = {aim: [row for one in own for row in one["rows"] if aim in row["tuned_for"]] for aim in AIMS}
    return {aim: rows for aim, rows in aims.items() if len(rows) == len(own)}


def method_rows(found: list[dict[str, Any]], method: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(what they are for, its rows over seeds): one for several aims where all seeds agree, with no name where that is all aims."""
    aims, lines = aims_of(found, method), []
    for rows in aims.values():
        names = [aim for aim, own in aims.items() if own == rows]
        line = ("" if len(names) == len(aims) else ", ".join(names), rows)
        lines += [line] if line not in lines else []
    return lines


def with_errors(rows: list[dict[str, Any]], key: str, digits: int, found: list[dict[str, Any]], scale: float = 1.0) -> str:
    """Mean ± error of a column. A distance's own error is that of exact draws from set to set."""
    values = [scale * row[key] for row in rows if key in row]
    if not rows or len(values) < len(rows):
        return "–"
    of_exact = [scale * one["rows"][0][f"{key}_floor_sd"] for one in found if one["method"] == EXACT and key in ("tv", "mmd2")]
    own = [statistics.mean(of_exact)] * len(rows) if of_exact else [row.get(f"{key}_se") for row in rows]
    return spread(values, digits, own)


def peers_table(setting: str) -> str:
    found = [one for one in read("peers") if one["setting"] == setting]
    if not found:
        return "Not run yet."
    if len({(one["outputs"], one["validation"]) for one in found}) > 1:
        raise SystemExit(f"results/peers/{setting}-seed* hold rows of different numbers of images: run peers.py for that setting.")
    order = list(
        dict.fromkeys(one["method"] for one in sorted(found, key=lambda one: best_accuracy(found, one["method"]), reverse=True))
    )
    lines = []
    for method in order:
        for aim, rows in method_rows(found, method):

            def column(key: str, digits: int, rows: list[dict[str, Any]] = rows, scale: float = 1.0) -> str:
                return with_errors(rows, key, digits, found, scale)

            calls = f"{rows[0]['forward_calls']:.0f}" + (f" + {rows[0]['backward_calls']:.0f}" if rows[0]["backward_calls"] else "")
            lines.append(
                [
                    f"**{method}**" if method.startswith("CTRL") else method,
                    f"{span(row['weight'] for row in rows)}{EDGE if any(map(at_the_edge, rows)) else ''}"
                    + (f" ({aim})" if aim else ""),
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
    seeds = {method: sorted({one["seed"] for one in found if one["method"] == method}) for method in order}
    about = [
        f"Seeds {', '.join(map(str, seeds[order[0]]))}"
        + "".join(f"; {method}: {', '.join(map(str, own))}" for method, own in seeds.items() if own != seeds[order[0]])
        + f". {EDGE}: the largest value tried. Seconds of training: CTRL's with its classifier, which the others are given."
        + f" {found[0]['outputs']} images a label ({found[0]['labels']} labels), {found[0]['validation']} for each weight tried.",
    ]
    if exact := [one["rows"][0] for one in found if one["method"] == EXACT]:
        floors = [f"{name}_{kind}" for name in ("tv", "mmd2") for kind in ("floor", "floor_sd")]
        shown = exact_draws({name: statistics.mean(row[name] for row in exact) for name in floors})
        about.append(f"As many exact draws show {shown}{', mean over seeds' if len(exact) > 1 else ''}.")
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


def peers_short(setting: str = "stroke") -> str:
    """For the README: each method's accuracy where it is tuned for that, its distance where it is tuned for that, both untuned, and what they cost."""
    found = [one for one in read("peers") if one["setting"] == setting]
    lines = []
    aimed = {method: aims_of(found, method) for method in {one["method"] for one in found} - {EXACT}}
    for method in sorted(aimed, key=lambda name: (-statistics.mean(row["accuracy"] for row in aimed[name]["accuracy"]), name)):
        near, sharp, plain = (aimed[method].get(aim, []) for aim in ("distance", "accuracy", "plain"))
        gradients = any(row["backward_calls"] for row in near) or method in (*BACKWARD, "classifier guidance")
        cost = f"{span(round(row['times_base'], 1) for row in [*near, *sharp])}"
        name = f"**{method}**" if method.startswith("CTRL") else method
        cells = [
            with_errors(own, key, 3, found) for key, own in (("accuracy", sharp), ("tv", near), ("accuracy", plain), ("tv", plain))
        ]
        lines.append([name, *cells, "yes" if gradients else "no", cost])
    floors = [one["rows"][0]["tv_floor"] for one in found if one["method"] == EXACT]
    floor = f" (exact draws: {statistics.mean(floors):.3f})" if floors else ""
    header = [
        "",
        "accuracy, tuned for it",
        f"TV to the exact law, tuned for it{floor}",
        "accuracy, plain",
        "TV, plain",
        "gradients at inference",
        "× base's time",
    ]
    return table(header, lines)


def peers_summary() -> str:
    """For the README: of each setting a single draw by the control head, and the best of the others by the same figure."""
    lines = []
    for setting, name in SETTINGS.items():
        found = [one for one in read("peers") if one["setting"] == setting]
        others = {one["method"] for one in found if not one["method"].startswith("CTRL")} - {EXACT}
        cells = []
        for aim, key, best in (("accuracy", "accuracy", max), ("distance", "tv", min), ("plain", "tv", min)):
            rows = {method: aims_of(found, method).get(aim) for method in (HEAD, *others)}
            means = {method: statistics.mean(row[key] for row in rows[method]) for method in others if rows[method]}
            other = best(means, key=lambda method: (means[method], method))
            cells += [f"**{with_errors(rows[HEAD], key, 3, found)}**", f"{with_errors(rows[other], key, 3, found)} ({other})"]
        floors = [one["rows"][0]["tv_floor"] for one in found if one["method"] == EXACT]
        lines.append([name, *cells, f"{statistics.mean(floors):.3f}"])
    header = [
        "",
        "accuracy, tuned for it",
        "best other",
        "TV, tuned for it",
        "best other",
        "TV, plain",
        "best other",
        "exact draws' TV",
    ]
    return table(header, lines)


def at_the_edge(row: dict[str, Any]) -> bool:
    """Whether the best of several values tried is the largest, and a larger one might be better still."""
    tried = {one["weight"]: one["classifier_accuracy"] for one in row["tried"]}
    could_be_better = "distance" in row["tuned_for"] or ("accuracy" in row["tuned_for"] and tried[row["weight"]] < 1)
    return len(tried) > 1 and row["weight"] == max(tried) and could_be_better


def best_accuracy(found: list[dict[str, Any]], method: str) -> float:
    return statistics.mean(max(row["accuracy"] for row in one["rows"]) for one in found if one["method"] == method)
