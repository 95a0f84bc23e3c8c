"""The tables that report.py makes of results/, as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from records import RESULTS
from report_format import exact_draws, over_seeds, pm, read, seeded, span, spread, table
from report_peers import SETTINGS, peers_short, peers_summary, peers_table


EXPERIMENTS = Path(__file__).resolve().parent / "experiments"


# -- labels, ablations, time --


def in_order(name: str) -> list[dict[str, Any]]:
    """The results of an experiment, its variants in the order of its file, their seeds ascending."""
    order = list(yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())["variants"])
    return sorted(read(name), key=lambda one: (order.index(one["variant"]), one["seed"]))


def aim_row(record: dict[str, Any], aim: str) -> dict[str, Any]:
    return next(row for row in record["rows"] if aim in row["tuned_for"])


LEARNERS = {"head": "CTRL, control head", "ctrl": "CTRL", "exact": "exact draws by CTRL's classifier", "cfg": "CFG fine-tuning"}


def sample_efficiency() -> str:
    found = read("sample_efficiency")
    if not found:
        return "Not run yet."
    lines = []
    for count in sorted({one["num_labels"] for one in found}):
        for method, name in LEARNERS.items():
            own = [one for one in found if (one["num_labels"], one["method"]) == (count, method)]
            if not own:
                continue
            cells = []
            for aim, key, digits in (
                ("plain", "accuracy", 3),
                ("accuracy", "accuracy", 3),
                ("plain", "tv", 3),
                ("distance", "tv", 3),
            ):
                rows = [aim_row(one, aim) for one in own]
                cells.append(spread([row[key] for row in rows], digits, [row[f"{key}_se"] for row in rows]))
            rows = [aim_row(one, "distance") for one in own]
            cells += [spread([1000 * row["mmd2"] for row in rows], 2, [1000 * row["mmd2_se"] for row in rows])]
            cells += [f"{statistics.mean(row['prompt_accuracy'] for row in rows):.3f}"]
            seconds = statistics.mean(
                one["seconds_training"] + (one["seconds_classifier"] if method != "cfg" else 0) for one in own
            )
            seeds = ", ".join(str(one["seed"]) for one in sorted(own, key=lambda one: one["seed"]))
            lines.append([str(count), f"**{name}**" if name.startswith("CTRL") else name, *cells, f"{seconds:.0f}", seeds])
    header = [
        "labels",
        "",
        "accuracy, plain",
        "accuracy, tuned",
        "TV, plain",
        "TV, tuned",
        "MMD², 1e-3, tuned for TV",
        "digit",
        "training, s",
        "seeds",
    ]
    about = f"{found[0]['outputs']} images a label. "
    about += f"As many exact draws of the truth show {exact_draws(found[0])}."
    return table(header, lines) + "\n\n" + about


def ablations() -> str:
    found = in_order("ablations")
    if not found:
        return "Not run yet."
    default = {one["seed"]: one["metrics"]["gap_from_base"] for one in found if one["variant"] == "default"}
    lines = []
    for variant in dict.fromkeys(one["variant"] for one in found):
        own = [one for one in found if one["variant"] == variant]
        metrics = [one["metrics"] for one in own]
        bounds = sum(m["gap_from_base_is_lower_bound"] for m in metrics)
        cells = [
            over_seeds(metrics, "accuracy"),
            spread([m["exact_accuracy"] for m in metrics]),
            over_seeds(metrics, "kl", 2),
            over_seeds(metrics, "objective", 2),
            over_seeds(metrics, "gap_from_base", 2) + (f" (lower bound: {bounds} of {len(own)})" if bounds else ""),
        ]
        more = [one["metrics"]["gap_from_base"] - default[one["seed"]] for one in own if one["seed"] in default]
        cells.append("" if variant == "default" or len(more) < 2 else spread(more, 2))
        nll = spread([one["classifier"]["unseen_nll"] for one in own])
        lines.append([variant, *cells, nll, span(one["updates"] for one in own), span(one["seed"] for one in own)])
    header = ["", "accuracy", "exact law's own", "KL", "J", "gap, base samples", "less default's, same seeds"]
    header += ["classifier's NLL, unseen digits", "updates", "seeds"]
    about = f"{found[0]['seconds_asked']:g} CPU seconds of training each, one thread; means over seeds."
    return table(header, lines) + "\n\n" + about


def time_to_gap() -> str:
    found = read("time_to_gap")
    if not found:
        return "Not run yet."
    levels, lines = list(found[0]["thresholds"]), []
    for one in found:
        last, seconds = one["curve"][-1], one["seconds"]
        reached = ["–" if value is None else f"{value:.0f}" for value in one["thresholds"].values()]
        lines.append(
            [
                seeded(one),
                *reached,
                f"{last['gap']:.2f} ± {last['gap_se']:.2f}",
                f"{last['accuracy']:.3f}",
                f"{seconds:.0f}",
                str(one["updates"]),
            ]
        )
    header = ["", *[f"{level} nats" for level in levels], "gap at the end", "accuracy", "seconds", "updates"]
    return (
        table(header, lines)
        + "\n\nSeconds are updates times what one costs on a core of its own (`digits_runs.py`); seed 0 where none is named; –: not within the seconds of that row."
    )


def critic_reach() -> str:
    found = in_order("critic_reach")
    if not found:
        return "Not run yet."
    lines = []
    for one in found:
        settings, cells = one["settings"], []
        for what in ("steered", "head"):
            points = one.get(what, [])
            for key, digits in (("gap", 2), ("accuracy", 3)):
                own = [point[f"{key}_se"] for point in points]
                cells.append(spread([point[key] for point in points], digits, own) if points else "–")
        updates = settings["surrogate"] * settings["critic_updates"]
        seen = f"the base's estimate, by {updates:,} updates" if updates else "the state"
        error = f"{100 * one['surrogate_error']:.2f} %" if updates else "–"
        sizes = [f"{settings[name]:,}" for name in ("critic_updates", "critic_trajectories")]
        lines.append([str(one["seed"]), seen, *sizes, error, f"{one['critic_loss']:.4f}", *cells])
    header = [
        "seed",
        "the critic sees",
        "its updates",
        "base trajectories",
        "surrogate's error",
        "critic's loss",
        "gap, steered",
        "accuracy",
    ]
    header += ["gap, head regressed", "accuracy"]
    about = f"Means over {len(found[0]['steered'])} sets of noise, the same for all rows of a column, of {found[0]['outputs']} images a label."
    return table(header, lines) + "\n\n" + about


# -- what an update costs --


def step_time() -> str:
    """A table for each run of step_time.py that is kept: all rows, and later ones with the rows that they are compared with; GPUs last."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("step_time_*.json"))]
    return "\n\n".join(map(_step_time, sorted(found, key=lambda record: record.get("device", "cpu") != "cpu"))) or "Not run yet."


def _step_time(record: dict[str, Any]) -> str:
    rounds, lines = {(row["name"], row["steps"]): row["rounds"] for row in record["rows"]}, []

    def ratio(row: dict[str, Any], other: str, digits: int) -> str:
        """Of the seconds: the median over rounds, and the range where there are several."""
        pairs = zip(row["rounds"], rounds.get((other, row["steps"]), []), strict=False)
        found = sorted(own["seconds"] / theirs["seconds"] for own, theirs in pairs)
        if not found:
            return "–"
        span = f" ({found[0]:.{digits}f}–{found[-1]:.{digits}f})" if len(found) > 1 and row["name"] != other else ""
        return f"{statistics.median(found):.{digits}f}{span}"

    counted = any("tflop" in row for row in record["rows"])
    columns = [("mib", 0), ("memory_over_official", 2), ("rows", 0), ("optimizer_steps", 0), ("optimizer_step_over_official", 2)]
    columns += [("tflop", 2), ("tflops", 1), ("over_matmul", 2)] if counted else []
    for row in sorted(record["rows"], key=lambda row: row["steps"]):
        cells = [f"{row['seconds']:.2f}", ratio(row, "official", 2), ratio(row, "sampling", 1)]
        cells += [f"{row[key]:.{digits}f}" if key in row else "–" for key, digits in columns]
        lines.append([row["name"], str(row["steps"]), *cells, str(len(row["rounds"]))])
    header = ["one update", "K", "seconds", "/ official", "/ sampling", "MiB above the model", "/ official", "U-Net rows"]
    header += ["optimizer steps", "seconds a step / official"]
    header += [*(["TFLOP", "TFLOP/s", "/ matmul"] if counted else []), "rounds"]
    device = record.get("device", "cpu")
    where = f"{record['threads']} threads" if device == "cpu" else device
    about = f"Size {record['size']}, {where}, {record.get('dtype', 'float32')}, medians (range) over rounds of the median of {record['repeats']} updates, commit {record['commit'][:7]}."
    about += f" A large matrix product: {record['matmul_tflops']:.1f} TFLOP/s." if counted else ""
    return table(header, lines) + "\n\n" + about


def label_cost() -> str:
    record = json.loads((RESULTS / "label_cost.json").read_text())
    rows = []
    for name, what in (
        ("labelled", "a labelled call"),
        ("unmerged", "the same with LoRA beside the weights, as plain diffusers runs it"),
    ):
        ratio = record[f"{name}_over_plain"]
        rows.append([what, f"{ratio['median']:.2f}", f"{ratio['quartiles'][0]:.2f}–{ratio['quartiles'][1]:.2f}"])
    about = f"{record['pairs']} pairs of calls of {record['images']} images, {record['threads']} thread."
    return table(["", "times a plain call", "middle half"], rows) + "\n\n" + about


# -- the README's own tables --


def digits_stroke() -> str:
    """The main command's seeds, and the shipped adapter."""
    lines = []
    for name, file in (
        ("the command above, γ = 1, seed 0, fresh clone, one core", "digits-stroke-fresh"),
        ("the same, code of five days before, seed 0", "digits-stroke-seed0"),
        ("seed 1", "digits-stroke-seed1"),
        ("seed 2, on two cores", "digits-stroke-seed2"),
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
    m = json.loads((RESULTS / "digits-stroke-fresh.json").read_text())
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
    **{f"peers-{setting}": (lambda setting=setting: peers_table(setting)) for setting in SETTINGS},
    "peers-short": peers_short,
    "peers-summary": peers_summary,
    "sample-efficiency": sample_efficiency,
    "ablations": ablations,
    "time-to-gap": time_to_gap,
    "critic-reach": critic_reach,
    "step-time": step_time,
    "label-cost": label_cost,
    "digits-stroke": digits_stroke,
    "digits-stroke-gamma": digits_stroke_gamma,
}
