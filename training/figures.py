"""Pictures that a finished run leaves behind: sample grid, curves, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from diffusers_ctrl import processes  # noqa: E402
from diffusers_ctrl.policy import Policy  # noqa: E402
from diffusers_ctrl.rollouts import Environment, rollout  # noqa: E402


@torch.no_grad()
def sample_rows(
    policy: Policy, environment: Environment, columns: int = 10, seed: int = 0, *, distributed: bool = False
) -> torch.Tensor | None:
    """Images (1 + M, columns, C, H, W): the base, then each label, every row from the same noise and the same prompts.

    With `distributed` all processes call this and draw their shares; the main process gets all rows, the others None.
    """
    prompts = torch.arange(columns) % environment.num_prompts
    device = environment.labels.device
    wanted = (None, *range(len(environment.labels)))
    own = processes.rounds(len(wanted)) if distributed else [range(row, row + 1) for row in range(len(wanted))]
    rows = []
    for part in own:
        label = wanted[part.start] if part else None  # all must call a base that is dealt out to them
        generator = torch.Generator(device).manual_seed(seed)
        batch = environment.batch(torch.full((columns,), label or 0), prompts, generator)
        trajectory = rollout(policy, environment.sampler, batch, generator, tuned=label is not None, reference=False)
        rows.append(environment.decode(trajectory.sample).float().cpu()[None][: len(part)])
    drawn = torch.cat(rows)
    return processes.gather_rows(drawn, to_main=True) if distributed else drawn


def plot_samples(rows: torch.Tensor, names: Sequence[str], path: Path, title: str = "") -> None:
    """Draws `sample_rows` with the row's name at its left."""
    count, columns, channels, height, width = rows.shape
    gap = max(1, round(0.03 * max(height, width)))  # grey, a frame around each picture
    # one picture on one axis: an axis for each picture takes seconds
    sheet = F.pad(rows.clamp(0, 1).expand(-1, -1, max(3, channels), -1, -1), (gap, 0, gap, 0), value=0.8)
    sheet = sheet.permute(0, 3, 1, 4, 2).reshape(count * (height + gap), columns * (width + gap), -1)
    sheet = F.pad(sheet, (0, 0, 0, gap, 0, gap), value=0.8)
    size = (columns * 0.8 + 1.0, count * 0.8 * (height + gap) / (width + gap) + 0.4)
    figure, axis = plt.subplots(figsize=size)
    axis.imshow(sheet.numpy(), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([(i + 0.5) * (height + gap) for i in range(count)], names, fontsize=11)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_curves(history: Sequence[dict[str, float]], log_partition: float | None, path: Path) -> None:
    """J against log Z, reward and KL, by seconds of training. Where every update was skipped there is nothing to draw, and no file."""
    if not history:
        path.unlink(missing_ok=True)
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    seconds = np.array([row["seconds"] for row in history])

    def smooth(values: list[float]) -> np.ndarray:
        out, mean = [], values[0]
        for value in values:
            mean = 0.9 * mean + 0.1 * value
            out.append(mean)
        return np.array(out)

    objective = [row["objective"] for row in history]
    left.plot(seconds, objective, color="#9ecae1", lw=0.8)
    left.plot(seconds, smooth(objective), color="#08519c", label="J (smoothed)")
    if log_partition is not None:
        left.axhline(log_partition, color="black", ls="--", lw=1, label="log Z")
        left.set_ylim(max(min(objective), log_partition - 4), log_partition + 1)
    left.set_xlabel("seconds of training")
    left.set_ylabel("nats")
    left.legend()
    right.plot(seconds, smooth([row["kl"] for row in history]), color="#a63603", label="KL to the base")
    right.plot(seconds, -smooth([row["reward"] for row in history]), color="#31a354", label="−log p̂(y | x)")
    right.set_ylim(0, 6)
    right.set_xlabel("seconds of training")
    right.set_ylabel("nats")
    right.legend()
    _save(figure, path)


def plot_confusion(confusion: torch.Tensor, names: Sequence[str], path: Path) -> None:
    """Rows: label asked for; columns: the label measured by the oracle; each row a distribution."""
    share = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).numpy()
    figure, axis = plt.subplots(figsize=(1.2 + 0.9 * len(names), 1.0 + 0.8 * len(names)))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    for i in range(len(names)):
        for j in range(len(names)):
            axis.text(j, i, f"{share[i, j]:.2f}", ha="center", va="center", color="white" if share[i, j] > 0.6 else "black")
    axis.set_xlabel("measured")
    axis.set_ylabel("asked for")
    _save(figure, path)


def plot_asked_and_found(asked: torch.Tensor, found: torch.Tensor, name: str, unit: str, path: Path) -> None:
    """Of a continuous attribute: what was measured (median, central half, central 90 %) at each value that was asked for."""
    values = asked.unique()
    quantiles = torch.stack([found[asked == v].quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).to(found)) for v in values])
    figure, axis = plt.subplots(figsize=(4.2, 4))
    axis.fill_between(values, quantiles[:, 0], quantiles[:, 4], color="#deebf7", label="central 90 %")
    axis.fill_between(values, quantiles[:, 1], quantiles[:, 3], color="#9ecae1", label="central half")
    axis.plot(values, quantiles[:, 2], "o-", color="#08519c", label="median")
    axis.plot(values, values, color="black", ls="--", lw=1, label="asked = measured")
    axis.set_xlabel(f"{name} asked for")
    axis.set_ylabel(f"{name} measured")
    if unit:
        axis.set_title(f"in {unit}", fontsize=8)
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(path)
