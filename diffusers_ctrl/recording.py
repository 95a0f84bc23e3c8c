"""Recording what a pipeline gives its denoiser, and what it makes of the answers, from the pipeline's own call, for any family.

`record_conditions` runs the pipeline with the training prompts, mostly with a stand-in for the denoiser, and keeps

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
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .bases import call_arguments, denoiser_of
from .conditions import CallTemplate, Condition, Plan, Repeated, Rows, Slot, Times, same
from .replay import Call, Replay, Step, first, replay, stand_in


def record_conditions(
    pipe: DiffusionPipeline,
    prompts: Sequence[str | int],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    **call: Any,
) -> Condition:
    """The conditions of `prompts`, one row each, as `pipe(prompt, num_inference_steps=…, guidance_scale=…, **call)` makes them.

    The pipeline's scheduler must be the one that training samples with. Costs four calls of the denoiser and
    each prompt's encoding; the tensors that belong to a prompt are kept, nothing else.

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

    seen = replay(pipe, arguments(0, last), max_steps=1)
    real = seen.steps[0]
    _check_start(name, real.state[:2], seen.start_std)
    faked = replay(pipe, arguments(0, last), answer=stand_in(real))
    # each prompt alone: its tensors are those that grow with the batch; the last one with the real denoiser, to be compared with
    singles = [replay(pipe, arguments(row), answer=stand_in(real), max_steps=1).steps[0] for row in range(last)]
    singles.append(replay(pipe, arguments(last), max_steps=1).steps[0])
    places = _places(pipe)
    found = [_templates(name, single, real, places) for single in singles]
    calls, leaves = found[0]
    for other, its_leaves in found[1:]:
        if not same(other, calls) or [leaf.shape for leaf in its_leaves] != [leaf.shape for leaf in leaves]:
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


def _arguments(call: Call, places: tuple[str, str, int]) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor, torch.Tensor]:
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
        if (len(one), len(two)) == (parts, 2 * parts) and all(same(value, one[0]) for value in (*one, *two)):
            return Repeated(one[0])
    elif same(one, two):
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
        if not same(rest, [(args, kwargs, rest[0][2]) for args, kwargs, _ in (fixed or rest)]):
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


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """(P, *) of the prompts' rows (1, *); one row seen P times where all are equal, as those of the empty prompt."""
    if all(torch.equal(row, rows[0]) for row in rows):
        return rows[0].detach().clone().expand(len(rows), *rows[0].shape[1:])
    return torch.cat(rows).detach()


# -- the check --


def _check_start(name: str, states: torch.Tensor, sigma: float) -> None:
    """The states must start from noise as training draws it; an image to start from would show."""
    state = states.double() / sigma
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
