"""What a pipeline gives its denoiser besides the state, as rows that a batch takes its own from.

Text embeddings, pooled projections, masks, sizes, class labels, image positions, guidance: each family has its own. Nothing of that is
known here: `recording.record_conditions` reads it from the pipeline's own call into a `Plan`, which all prompts share, and the prompts'
tensors. A `Condition` is both, and restates from them the output that the pipeline would give its scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

import torch


class Slot(Enum):
    """A place of a call's template."""

    SAMPLE = "sample"
    TIMESTEP = "timestep"


@dataclass(frozen=True)
class Rows:
    """Place of the prompts' own tensor number `index`."""

    index: int


@dataclass(frozen=True)
class Repeated:
    """Place of a list that holds `value` once a row."""

    value: Any


@dataclass(frozen=True)
class CallTemplate:
    """One denoiser call a step makes.

    args, kwargs: what it is given, nested; a `Slot`, `Rows` or `Repeated` stands where something is filled in. parts: how many times
    it holds the batch, one after the other. sample_dtype: of the state it is given. time_per_row: whether the time is a vector.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: int
    sample_dtype: torch.dtype
    time_per_row: bool


@dataclass(frozen=True)
class Times:
    """What the denoiser is told of the scheduler's t: the recorded values, and slope · t + offset in between, where that fits."""

    grid: tuple[float, ...]
    values: torch.Tensor
    line: tuple[float, float] | None

    def __call__(self, t: torch.Tensor | int | float) -> torch.Tensor:
        """A number, (), in the dtype in which the pipeline gives it. Raises ValueError for a t that nothing is known of."""
        t = float(t)
        if t in self.grid:
            return self.values[self.grid.index(t)]
        if self.line is None:
            raise ValueError(f"What the denoiser is told at timestep {t} was not recorded; known are {self.grid}.")
        return torch.tensor(self.line[0] * t + self.line[1], dtype=torch.float64).to(self.values.dtype)


@dataclass(frozen=True)
class Plan:
    """How a pipeline calls its denoiser and what it makes of the answers; the same for all prompts.

    pipeline: its class. calls: of one step. conditional: number of the part, over all calls, that has the prompt.
    cfg_scale: s of u + s (c - u); None for a single part. sign: 1, or -1 for a pipeline that turns its denoiser's output around.
    guidance_scale: as the pipeline was asked. output_dtype, channels: of the
    output that `scheduler.step` gets, (B, channels, *). shape, dtype: of the states, without the batch. grid: what
    `set_timesteps` is given besides the number of steps.
    """

    pipeline: str
    calls: tuple[CallTemplate, ...]
    times: Times
    conditional: int
    cfg_scale: float | None
    sign: int
    guidance_scale: float
    channels: int
    output_dtype: torch.dtype
    shape: tuple[int, ...]
    dtype: torch.dtype
    grid: dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """The prompts' side of a recording: rows of tensors, which a batch takes its own from.

    plan: shared by all rows. tensors: for each place of the plan, one tensor (B, *) a part. index: number of each row's prompt, (B,).
    """

    plan: Plan
    tensors: tuple[tuple[torch.Tensor, ...], ...]
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> Condition:
        return replace(self, tensors=_map(self.tensors, lambda tensor: tensor[rows]), index=self.index[rows])

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return replace(
            self,
            plan=replace(self.plan, calls=_map(self.plan.calls, lambda tensor: tensor.to(device))),
            tensors=_map(self.tensors, lambda tensor: _moved(tensor, device)),
            index=self.index.to(device),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a state, without the batch: (C, H, W), or (L, C) where the pipeline packs it."""
        return self.plan.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of a state."""
        return self.plan.dtype

    @property
    def grid(self) -> dict[str, Any]:
        """What the pipeline gives `scheduler.set_timesteps` besides the number of steps: sigmas and mu of its own, for instance."""
        return self.plan.grid

    def output(
        self,
        call: Callable[[tuple[Any, ...], dict[str, Any], torch.Tensor | None], torch.Tensor],
        x: torch.Tensor,
        t: torch.Tensor | int | float,
        embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output that the pipeline would give `scheduler.step` at the state x, guidance included: (B, channels, *).

        Args:
            call: runs the denoiser with these args and kwargs, and adds (rows, D) to its time embedding where that is not None.
            x: (B, *), as the scheduler scales it. t: the scheduler's timestep, one for the batch or (B,).
            embedding: the labels', (B, D); it goes to the part that has the prompt, the other gets zeros.
        """
        plan, rows = self.plan, len(x)
        if len(self) != rows:
            raise ValueError(f"Got the conditions of {len(self)} prompts for {rows} samples: one a sample is needed.")
        given = torch.as_tensor(t).flatten()
        if len(given) not in (1, rows):
            raise ValueError(f"Got {len(given)} timesteps for {rows} samples: one for all is needed, or one a sample.")
        # one for all stays a number where the pipeline gives its denoiser a number
        time, answers = torch.stack([plan.times(value) for value in given]).to(x.device), []
        for template in plan.calls:
            count = template.parts * rows
            sample = x.to(template.sample_dtype)
            sample = torch.cat([sample] * template.parts) if template.parts > 1 else sample
            step_time = time.repeat(template.parts) if len(time) > 1 else time.expand(count) if template.time_per_row else time[0]
            filled = fill((template.args, template.kwargs), self.tensors, sample, step_time)
            added = embedding
            if embedding is not None and (template.parts > 1 or len(plan.calls) > 1):
                numbers = range(len(answers), len(answers) + template.parts)
                added = torch.cat([embedding if number == plan.conditional else torch.zeros_like(embedding) for number in numbers])
            answer = call(*filled, added).to(plan.output_dtype)
            answers += answer[:, : plan.channels].chunk(template.parts)
        output = answers[plan.conditional]
        if plan.cfg_scale is not None:
            unconditional = answers[1 - plan.conditional]
            output = unconditional + plan.cfg_scale * (output - unconditional)
        return output if plan.sign > 0 else -output


# -- nested arguments --


def _map(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with `function` of each tensor in it."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_map(value, function) for value in tree)
    if is_dataclass(tree) and type(tree).__module__ == __name__:
        return replace(tree, **{field.name: _map(getattr(tree, field.name), function) for field in fields(tree)})
    return tree


def _moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """On the device, without spelling out a row that all prompts share."""
    if len(tensor) > 1 and tensor.stride(0) == 0:
        return tensor[:1].to(device).expand_as(tensor)
    return tensor.to(device)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, tensors by value."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a) and type(a).__module__ == __name__:
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return bool(a == b)


def fill(tree: Any, tensors: tuple[tuple[torch.Tensor, ...], ...], sample: torch.Tensor, time: torch.Tensor) -> Any:
    """The tree with everything in its place; new containers, since pipelines' models may change theirs."""
    if tree is Slot.SAMPLE:
        return sample
    if tree is Slot.TIMESTEP:
        return time
    if isinstance(tree, Rows):
        parts = tensors[tree.index]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    if isinstance(tree, Repeated):
        return [tree.value] * len(sample)
    if isinstance(tree, dict):
        return {key: fill(value, tensors, sample, time) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(fill(value, tensors, sample, time) for value in tree)
    return tree
