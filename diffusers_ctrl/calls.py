"""One labelled call of a pipeline, followed from outside: which step comes next, and which samples a forward of the denoiser is for.

A pipeline's loop is its own affair. Two things about it matter here and are read off while it runs, so that no family needs a table:

- **The step.** The steps without noise belong to the base (see rollouts). They are found on the timesteps that the pipeline itself has set
  on its scheduler, whatever shift or sigmas it chose.
- **The guidance.** Classifier-free guidance runs the denoiser on a batch [null, conditional] or [conditional, null], or calls it twice a
  step; the label belongs to the conditional part alone. The parts are told apart by what the pipeline makes of them: it hands its
  scheduler Σ_j a_j · part_j, and with u + s·(c − u), s > 1, only the conditional part has a positive coefficient. The first
  time that a pipeline class shows a second part, the call is stopped at its first step, the coefficients are fitted, and the call begins again.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any

import torch

from .rollouts import Sampler


Roles = dict[tuple[int, int], tuple[bool, ...]]  # (number of the call in its step, parts of its batch) -> which parts get the label


class GuidanceFound(Exception):
    """Ends a pipeline's call: the parts are known now, and the call can begin again."""


class CallWatch:
    """Watches a scheduler through one call of a pipeline: `with CallWatch(…) as watch: pipe(…)`.

    Args:
        scheduler: the pipeline's; its `step` and `scale_model_input` are wrapped on the object while the block lasts.
        samples: how many samples the call draws.
        options: the transition's, such as eta, for telling which steps have no noise. The step gets the eta where the pipeline gives none.
        roles: what is known of this pipeline class's guidance; added to.
    """

    def __init__(self, scheduler: Any, samples: int, options: dict[str, Any], roles: Roles) -> None:
        self.scheduler, self.samples, self.options, self.roles = scheduler, samples, options, roles
        self.calls: list[int] = []  # of the denoiser since the last step: the parts of each one's batch
        self.parts: list[torch.Tensor] = []  # of their outputs
        self.guidance_is_unknown = False
        self._announced: Any = None
        self._last: Any = None
        self._deterministic: frozenset[int] | None = None

    def __enter__(self) -> CallWatch:
        self._before = {name: vars(self.scheduler).get(name) for name in ("step", "scale_model_input")}
        step, scale = self.scheduler.step, getattr(self.scheduler, "scale_model_input", None)
        signature = inspect.signature(step)
        # a pipeline whose call takes no eta (DiT, DDPM) gives none, and the step's own default is no noise
        eta = {"eta": self.options["eta"]} if "eta" in signature.parameters and "eta" in self.options else {}

        @functools.wraps(step)
        def watched_step(model_output: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            if self.guidance_is_unknown:
                self._find_roles(model_output)
                raise GuidanceFound
            self.calls, self.parts, self._announced, self._last = [], [], None, timestep
            given = signature.bind(model_output, timestep, *args, **kwargs).arguments
            return step(model_output, timestep, *args, **({} if "eta" in given else eta), **kwargs)

        self.scheduler.step = watched_step
        if scale is not None:

            @functools.wraps(scale)
            def watched_scale(sample: torch.Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Any:
                self._announced = timestep
                return scale(sample, timestep, *args, **kwargs)

            self.scheduler.scale_model_input = watched_scale
        return self

    def __exit__(self, *error: Any) -> None:
        for name, value in self._before.items():
            vars(self.scheduler).pop(name, None)
            if value is not None:
                setattr(self.scheduler, name, value)

    # -- the step --

    @property
    def index(self) -> int:
        """Index of the coming step in the scheduler's timesteps."""
        if self._announced is not None:
            return self._index_of(self._announced)
        for name in ("step_index", "begin_index"):
            if getattr(self.scheduler, name, None) is not None:
                return getattr(self.scheduler, name)
        return 0 if self._last is None else self._index_of(self._last) + 1

    def _index_of(self, timestep: Any) -> int:
        timesteps = self.scheduler.timesteps
        return int((timesteps - torch.as_tensor(timestep, device=timesteps.device)).abs().argmin())

    # these three are asked in each call of the denoiser, of the sampler's state, which must not be compiled in with it

    @torch.compiler.disable
    def is_deterministic(self) -> bool:
        """Whether the coming step adds no noise, and so is the base's. Where no step has noise (eta = 0), all are the label's."""
        if self._deterministic is None:
            self._deterministic = self._find_deterministic()
        return bool(self._deterministic) and self.index in self._deterministic

    def _find_deterministic(self) -> frozenset[int]:
        try:
            sampler = Sampler(as_set(self.scheduler), len(self.scheduler.timesteps), self.options)
        except ValueError as error:
            warnings.warn(f"The label acts, but not as certified: {error}", stacklevel=2)
            return frozenset()
        return frozenset(range(len(sampler.timesteps))).difference(sampler.noisy_steps)

    # -- the guidance --

    @torch.compiler.disable
    def begin_call(self, rows: int) -> tuple[bool, ...]:
        """A forward of the denoiser with this many rows begins: which of its parts get the label."""
        parts, rest = divmod(rows, self.samples)
        if rest or parts not in (1, 2):
            raise ValueError(f"Got {self.samples} labels for a denoiser batch of {rows}: one a sample is needed.")
        key = (len(self.calls), parts)
        self.calls.append(parts)
        if key in self.roles:
            return self.roles[key]
        if key == (0, 1) or (parts == 1 and self.calls[0] == 2):
            return (True,)  # no guidance, or a variation of the conditional part beside a guided batch
        self.guidance_is_unknown = True
        return (True,) * parts

    @torch.compiler.disable
    def end_call(self, output: torch.Tensor) -> torch.Tensor:
        """The same forward's output; noise in its place while the guidance is being found, so that its parts cannot be confused."""
        if self.guidance_is_unknown:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(len(self.calls)))
            output = noise.to(output)
        self.parts += output.split(self.samples)
        return output

    def _find_roles(self, model_output: torch.Tensor) -> None:
        target = model_output[: self.samples].double().cpu()
        try:
            columns = [part[:, : target.shape[1]].double().cpu().reshape_as(target).flatten() for part in self.parts]
            found = torch.linalg.lstsq(torch.stack(columns, dim=1), target.reshape(-1, 1)).solution.flatten().tolist()
        except RuntimeError:  # the scheduler is handed something of another shape
            found = []
        batched = self.calls[0] == 2
        positive = [a > 0 for a in (found[:2] if batched else found)]
        if sum(positive) != 1:
            raise ValueError(
                f"The denoiser ran on {len(self.parts)} batches a step, and which of them has the condition cannot be told (their "
                f"coefficients: {[round(a, 3) for a in found]}): a label works with the guidance u + s·(c − u), s > 1, or with none."
            )
        self.roles.update({(0, 2): tuple(positive)} if batched else {(j, 1): (given,) for j, given in enumerate(positive)})


def as_set(scheduler: Any) -> Any:
    """A copy of a scheduler, on the CPU and not begun, that keeps the timesteps it has: for asking what its steps are like."""
    found = copy.copy(scheduler)
    for name, value in vars(found).items():
        if isinstance(value, torch.Tensor):
            setattr(found, name, value.cpu())
    for name in ("_step_index", "_begin_index"):
        if hasattr(found, name):
            setattr(found, name, None)
    found.set_timesteps = lambda *args, **kwargs: None
    for name in ("step", "scale_model_input"):
        vars(found).pop(name, None)
    return found
