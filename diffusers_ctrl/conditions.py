"""What a pipeline gives its denoiser besides the state, recorded from the pipeline's own call, for any family.

Text embeddings, pooled projections, masks, sizes, class labels, image positions, guidance: each family has its own. Nothing of that is
known here. `record_conditions` runs the pipeline with the training prompts, mostly with a stand-in for the denoiser, and keeps

- a template of each denoiser call: where the state goes, where the time goes, which tensors belong to a prompt, what is shared;
- how the time that the denoiser gets depends on the scheduler's t;
- how the calls' answers become the output that `scheduler.step` gets: classifier-free guidance u + s (c - u) in either order, in one
  batch or in two calls, its sign, and channels that are left out (a learned variance);
- the arguments of `scheduler.set_timesteps`, the shape of the states, their dtype.

Then it compares: the output restated from the recording, and the one that the real denoiser led the real pipeline to. The law that is
tuned is the sampler's own, or there is an error.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .bases import call_arguments, denoiser_of
from .replay import Replay, Step, first, replay, stand_in


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
            filled = _fill((template.args, template.kwargs), self.tensors, sample, step_time)
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


def record_conditions(
    pipe: DiffusionPipeline,
    prompts: Sequence[str | int],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    **call: Any,
) -> Condition:
    """The conditions of `prompts`, one row each, as `pipe(prompt, num_inference_steps=…, guidance_scale=…, **call)` makes them.

    The pipeline's scheduler must be the one that training samples with. Costs four denoiser calls, and each prompt's encoding; the tensors of a prompt are kept, nothing else.

    Args:
        prompts: texts; class numbers or names for a pipeline that takes `class_labels`; [""] for an unconditional one.
        call: more arguments of the pipeline's call, such as height and width, true_cfg_scale, or negative_prompt (one text for all, or a
            list with one for each prompt).

    Raises:
        ValueError: if what the pipeline does with its denoiser is not of the kind described above, or differs from what was
            recorded; the message names the pipeline.
    """
    if not prompts:
        raise ValueError("No prompt was given: at least one is needed, [''] for a pipeline without text.")
    name = type(pipe).__name__.removeprefix("CTRL")
    last = len(prompts) - 1

    def arguments(*rows: int) -> dict[str, Any]:
        own = {
            key: [value[row] for row in rows] if _is_per_prompt(name, key, value, len(prompts)) else value
            for key, value in call.items()
        }
        return call_arguments(pipe, [prompts[row] for row in rows], num_inference_steps, guidance_scale, own)

    real = replay(pipe, arguments(0, last), max_steps=1).steps[0]
    _check_start(name, pipe, real)
    faked = replay(pipe, arguments(0, last), answer=stand_in(real))
    # each prompt alone: its tensors are those that grow with the batch; the last one with the real denoiser, to be compared with
    singles = [replay(pipe, arguments(row), answer=stand_in(real), max_steps=1).steps[0] for row in range(last)]
    singles.append(replay(pipe, arguments(last), max_steps=1).steps[0])
    places = _places(pipe)
    found = [_templates(name, single, real, places) for single in singles]
    calls, leaves = found[0]
    for other, its_leaves in found[1:]:
        if not _same(other, calls) or [leaf.shape for leaf in its_leaves] != [leaf.shape for leaf in leaves]:
            raise ValueError(
                f"{name} gives its denoiser conditions of different shapes for different prompts; they cannot share a batch."
            )
    parts = _leaf_parts(calls)
    tensors = tuple(
        tuple(_stacked([leaves[place].chunk(parts[place])[part] for _, leaves in found]) for part in range(parts[place]))
        for place in range(len(leaves))
    )
    grid = {key: value for key, value in faked.grid.items() if key != "num_inference_steps"}
    if len(faked.steps) != num_inference_steps:
        raise ValueError(
            f"{name} takes {len(faked.steps)} steps with its {type(pipe.scheduler).__name__} for num_inference_steps = {num_inference_steps}."
        )
    conditional, cfg_scale, sign = _guidance(name, faked, arguments(0, last))
    plan = Plan(
        pipeline=name,
        calls=calls,
        times=_times(name, faked, places),
        conditional=conditional,
        cfg_scale=cfg_scale,
        sign=sign,
        guidance_scale=guidance_scale,
        channels=real.model_output.shape[1],
        output_dtype=real.model_output.dtype,
        shape=tuple(real.state.shape[1:]),
        dtype=real.state.dtype,
        grid=grid,
    )
    index = torch.arange(len(prompts), device=real.state.device)
    condition = Condition(plan, tensors, index)
    _verify(name, pipe, condition, singles[-1], real, faked)
    return condition


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


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """(P, *) of the prompts' rows (1, *); one row seen P times where all are equal, as those of the empty prompt."""
    if all(torch.equal(row, rows[0]) for row in rows):
        return rows[0].detach().clone().expand(len(rows), *rows[0].shape[1:])
    return torch.cat(rows).detach()


def _same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, tensors by value."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if is_dataclass(a) and type(a).__module__ == __name__:
        return all(_same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return bool(a == b)


def _fill(tree: Any, tensors: tuple[tuple[torch.Tensor, ...], ...], sample: torch.Tensor, time: torch.Tensor) -> Any:
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
        return {key: _fill(value, tensors, sample, time) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_fill(value, tensors, sample, time) for value in tree)
    return tree


# -- reading a recording --


def _is_per_prompt(name: str, key: str, value: Any, count: int) -> bool:
    if not (key.startswith("negative_prompt") and isinstance(value, (list, tuple))):
        return False
    if len(value) != count:
        raise ValueError(f"{name} got {len(value)} {key} for {count} prompts: one for each is needed, or one text for all.")
    return True


def _places(pipe: DiffusionPipeline) -> tuple[str, str, int]:
    """Names of the denoiser's arguments for the state and the time, and the latter's position."""
    denoiser = denoiser_of(pipe)[1]
    names = [name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"]
    if "timestep" not in names:
        raise ValueError(f"{type(denoiser).__name__} takes no argument named timestep; it takes {names}.")
    return names[0], "timestep", names.index("timestep")


def _arguments(call: Any, places: tuple[str, str, int]) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor, torch.Tensor]:
    """A call's args and kwargs with the slots marked, the state and the time."""
    (sample_name, time_name, position), args, kwargs = places, list(call.args), dict(call.kwargs)
    if args:
        sample, args[0] = args[0], Slot.SAMPLE
    else:
        sample, kwargs[sample_name] = kwargs[sample_name], Slot.SAMPLE
    if len(args) > position:
        time, args[position] = args[position], Slot.TIMESTEP
    else:
        time, kwargs[time_name] = kwargs[time_name], Slot.TIMESTEP
    return tuple(args), kwargs, sample, torch.as_tensor(time)


def _templates(
    name: str, single: Step, real: Step, places: tuple[str, str, int]
) -> tuple[tuple[CallTemplate, ...], list[torch.Tensor]]:
    """The calls of a step with one prompt, and the prompt's tensors; told apart by what the step with two prompts has."""
    if len(single.calls) != len(real.calls):
        raise ValueError(
            f"{name} calls its denoiser {len(single.calls)} times a step for one prompt and {len(real.calls)} for two."
        )
    templates, leaves = [], []
    for one, two in zip(single.calls, real.calls, strict=True):
        args, kwargs, sample, time = _arguments(one, places)
        many_args, many_kwargs, many_sample, many_time = _arguments(two, places)
        parts = len(sample)
        if len(many_sample) != 2 * parts:
            raise ValueError(f"{name} gives its denoiser {parts} rows for one prompt and {len(many_sample)} for two.")
        for given, count, step in ((sample, parts, single), (many_sample, 2 * parts, real)):
            state = step.model_input[: count // parts].to(given.dtype)
            if given.shape[1:] != state.shape[1:] or not torch.equal(given, torch.cat([state] * parts)):
                raise ValueError(
                    f"{name} gives its denoiser something else than the state of its scheduler (an image to start from or to keep, "
                    "for instance), so its law cannot be restated."
                )
        if (time.numel(), many_time.numel()) not in ((1, 1), (parts, 2 * parts)):
            raise ValueError(f"{name} gives its denoiser times of shape {tuple(many_time.shape)} for two prompts.")
        template = _template(name, (args, kwargs), (many_args, many_kwargs), parts, leaves)
        per_row = time.ndim == 1 and many_time.numel() == 2 * parts
        templates.append(CallTemplate(*template, parts, sample.dtype, per_row))
    return tuple(templates), leaves


def _template(name: str, one: Any, two: Any, parts: int, leaves: list[torch.Tensor], path: str = "") -> Any:
    """`one`, with the place of each tensor that has twice as many rows in `two`; those tensors are added to `leaves`."""
    where = f"{name} gives its denoiser {path or 'arguments'}"
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.ndim and len(one) == parts and two.shape == (2 * parts, *one.shape[1:]):
            leaves.append(one)
            return Rows(len(leaves) - 1)
        if one.shape == two.shape and torch.equal(one, two):
            return one.detach().clone()
        raise ValueError(
            f"{where} of shape {tuple(one.shape)} for one prompt and {tuple(two.shape)} for two: neither one row a prompt nor shared."
        )
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {key: _template(name, one[key], two[key], parts, leaves, str(key)) for key in one}
    if type(one) is type(two) and type(one) in (list, tuple):
        if len(one) == len(two):
            return type(one)(
                _template(name, a, b, parts, leaves, path or str(i)) for i, (a, b) in enumerate(zip(one, two, strict=True))
            )
        if (len(one), len(two)) == (parts, 2 * parts) and all(_same(value, one[0]) for value in (*one, *two)):
            return Repeated(one[0])
    elif _same(one, two):
        return one
    raise ValueError(f"{where}: {one!r} for one prompt, {two!r} for two.")


def _leaf_parts(calls: Sequence[CallTemplate]) -> list[int]:
    """How many parts each of the prompts' tensors has."""
    found: dict[int, int] = {}

    def look(tree: Any, parts: int) -> None:
        if isinstance(tree, Rows):
            found[tree.index] = parts
        for value in tree.values() if isinstance(tree, dict) else tree if type(tree) in (list, tuple) else ():
            look(value, parts)

    for call in calls:
        look((call.args, call.kwargs), call.parts)
    return [found[index] for index in range(len(found))]


def _times(name: str, faked: Replay, places: tuple[str, str, int]) -> Times:
    """The times that the denoiser was given, against the scheduler's; all else must stay the same from step to step."""
    grid, values, fixed = [], [], None
    for step in faked.steps:
        rest = []
        for call in step.calls:
            args, kwargs, _, time = _arguments(call, places)
            if not (time == time.flatten()[0]).all():
                raise ValueError(f"{name} gives its denoiser different times within one call.")
            rest.append((args, kwargs, time.flatten()[0]))
        if not _same(rest, [(args, kwargs, rest[0][2]) for args, kwargs, _ in (fixed or rest)]):
            raise ValueError(f"{name} changes what it gives its denoiser from step to step, which cannot be restated.")
        fixed = fixed or rest
        grid.append(float(step.t))
        values.append(rest[0][2].cpu())
    return Times(tuple(grid), torch.stack(values), _line(grid, torch.stack(values)))


def _line(grid: Sequence[float], values: torch.Tensor) -> tuple[float, float] | None:
    """(slope, offset) of the values over the grid, to four digits; None where that does not give them."""
    x, y = torch.tensor(grid, dtype=torch.float64), values.double()
    if len(x) == 1 or x.std() == 0:
        slope, offset = (y[0] / x[0]).item() if x[0] else 1.0, 0.0
    else:
        slope = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
        offset = (y.mean() - slope * x.mean()).item()
    scale = y.abs().max().item() or 1.0
    slope, offset = float(f"{slope:.4g}"), round(offset, 3 - math.ceil(math.log10(scale)))
    tolerance = 4 * torch.finfo(values.dtype).eps * scale if values.is_floating_point() else 0.0
    return (slope, offset) if (slope * x + offset - y).abs().max() <= tolerance else None


def _guidance(name: str, faked: Replay, arguments: dict[str, Any]) -> tuple[int, float | None, int]:
    """(number of the conditional part, s, sign) from what the pipeline made of random answers: weights (1 - s, s) in either order."""
    weights = []
    for step in faked.steps:
        parts, channels = _parts(step, 2), step.model_output.shape[1]
        if any(part.shape[1] < channels or part[:, :channels].shape != step.model_output[:2].shape for part in parts):
            raise ValueError(
                f"{name} gives its scheduler an output of shape {tuple(step.model_output.shape)} from denoiser outputs of shape "
                f"{tuple(parts[0].shape)}; only channels may be left out."
            )
        if len(parts) > 2:
            raise ValueError(f"{name} makes its output of {len(parts)} denoiser outputs; guidance of at most two is known.")
        matrix = torch.stack([part[:, :channels].double().flatten() for part in parts], dim=1)
        weights.append(torch.linalg.lstsq(matrix, step.model_output[:2].double().reshape(-1, 1)).solution.flatten())
    mean = torch.stack(weights).mean(0)
    sign = 1 if mean.sum() > 0 else -1
    if len(mean) == 1:
        return 0, None, sign
    mean = sign * mean
    conditional = int(mean.argmax())
    scale = mean[conditional].item()
    asked = [float(value) for value in arguments.values() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    close = [value for value in asked if abs(value - scale) <= 1e-2 * abs(scale)]
    return conditional, min(close, key=lambda value: abs(value - scale)) if close else scale, sign


def _parts(step: Step, rows: int) -> list[torch.Tensor]:
    """The denoiser's answers of a step, (rows, *) each, in order."""
    answers = [first(call.output) for call in step.calls]
    return [part for answer in answers for part in answer.split(rows)]


# -- the check --


def _check_start(name: str, pipe: DiffusionPipeline, step: Step) -> None:
    """The states must start from noise as training draws it; an image to start from would show."""
    sigma = float(pipe.scheduler.init_noise_sigma) if hasattr(pipe.scheduler, "init_noise_sigma") else 1.0
    state = step.state[:2].double() / sigma
    error = 1 / math.sqrt(state.numel())
    if abs(state.mean()) > 6 * error or abs(state.std() - 1) > 6 * error:
        raise ValueError(
            f"{name} starts from states of mean {state.mean():.3g} and standard deviation {state.std():.3g} (in units of {sigma:.3g}), "
            "not from noise: it cannot be trained from noise."
        )


@torch.no_grad()
def _verify(name: str, pipe: DiffusionPipeline, condition: Condition, single: Step, pair: Step, faked: Replay) -> None:
    """Raises ValueError unless the recording gives the outputs that the pipeline gave its scheduler: with the real denoiser for the
    last prompt alone and for the first and the last together, and at every step with random answers."""
    denoiser, both = denoiser_of(pipe)[1], condition[[0, len(condition) - 1]]
    rounding = torch.finfo(single.model_output.dtype).eps * max(1.0, condition.plan.cfg_scale or 1.0)

    def real(args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> torch.Tensor:
        return first(denoiser(*args, **kwargs))

    # in company a prompt is encoded with another rounding, which a denoiser may enlarge: there only rows in each other's place are sought
    steps = [(condition[-1:], single, real, 8 * rounding), (both, pair, real, 0.02 + 8 * rounding)]
    for step in faked.steps:
        answers = iter([first(call.output) for call in step.calls])
        steps.append((both, step, lambda args, kwargs, _, answers=answers: next(answers), 2 * rounding))
    for rows, step, call, tolerance in steps:
        found = rows.output(call, step.model_input[: len(rows)], step.t).double()
        for one in step.model_output.double().split(len(rows)):
            error = (found - one).norm() / one.norm()
            if not error <= tolerance:
                raise ValueError(
                    f"{name} gives its scheduler another output than was restated from its denoiser's calls (relative error "
                    f"{error:.2g} at timestep {float(step.t):g}): it does more than classifier-free guidance, or not the same twice (dropout in "
                    "a component that is not in eval mode), so its law cannot be tuned."
                )
