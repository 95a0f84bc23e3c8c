"""Exact sampling: trajectories of the tuned model as an importance proposal for p(x | c) p̂(y | x)^gamma.

A trajectory of the tuned model has the weight w = p̂(y | x_K)^gamma · Π_k p_pre/p_theta, and E_theta[w f(x_K)] = Z · E_p_gamma[f]
whatever the tuned model is. Drawing one of n trajectories in proportion to w (sampling importance resampling, Rubin 1988) therefore
tends to the exact conditional law as n grows. How large n must be is exp of the *other* divergence, KL(exact ‖ tuned) (Chatterjee
and Diaconis, arXiv 1511.01437), which the gap does not bound: look at the effective sample size.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from .calls import as_set
from .controls import StrengthHook
from .rollouts import Sampler
from .transitions import transition


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    """(Σw)² / Σw² over the last dimension, from log-weights in nats: between 1 and n."""
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


class PathRecorder:
    """Follows a pipeline's own denoising loop and adds up Σ_k log p_theta/p_pre of the steps it takes, in nats.

    The denoiser's hook keeps the base's output beside the tuned one; a copy of the scheduler with a watched `step` compares the
    two transitions. So any pipeline whose guidance is u + s · (c − u) is served, its code untouched. The step's
    own arguments (DDIM's eta) are those of the transitions.

    Args:
        hook: the denoiser's. options: of the transitions of the law that the call samples. guidance_scale: of the call; None where
            there is none.
    """

    def __init__(self, hook: StrengthHook, options: dict[str, Any], guidance_scale: float | None) -> None:
        self.hook, self.options = hook, options
        self._deterministic_timesteps: frozenset[float] | None = None
        self.guidance_scale = 1.0 if guidance_scale is None else float(guidance_scale)
        self.log_ratio: torch.Tensor | float = 0.0

    def __enter__(self) -> PathRecorder:
        self.hook.keeps_base = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.hook.keeps_base, self.hook.base_output = False, None

    def reset(self) -> None:
        self.log_ratio = 0.0

    def watched(self, scheduler: Any) -> Any:
        """A copy of the scheduler whose `step` also records; same signature, same result.

        The step raises ValueError where it has no noise and should have, so that no weight can be given.
        """
        watched = copy.copy(scheduler)
        step = scheduler.__class__.step.__get__(watched)
        signature = inspect.signature(step)
        takes_eta = "eta" in signature.parameters

        @functools.wraps(step)
        def recording_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = step(model_output, timestep, sample, *args, **kwargs)
            following = result[0] if isinstance(result, tuple) else result.prev_sample
            given = signature.bind(model_output, timestep, sample, *args, **kwargs).arguments
            options = {"eta": given.get("eta", signature.parameters["eta"].default)} if takes_eta else {}
            # in half precision the two means would differ by rounding, over thousands of dimensions and in units of the std
            taken = transition(watched, _wide(model_output), timestep, _wide(sample), **options)
            if not taken.is_deterministic:
                other = self._guided(self.hook.base_output, len(sample))
                base = transition(watched, _wide(other), timestep, _wide(sample), **options)
                self.log_ratio = self.log_ratio + taken.log_ratio(base, following)
            elif not self._is_bases(watched, float(timestep)):
                raise ValueError(f"The step at timestep {float(timestep):g} has no noise ({options}), so no weight can be given.")
            return result

        watched.step = recording_step
        return watched

    def _is_bases(self, scheduler: Any, timestep: float) -> bool:
        """Whether the law itself has no noise at this timestep, of those that the call has set: with its size's shift, for instance."""
        if self._deterministic_timesteps is None:
            sampler = Sampler(as_set(scheduler), len(scheduler.timesteps), self.options)
            self._deterministic_timesteps = sampler.deterministic_timesteps
        return timestep in self._deterministic_timesteps

    def _guided(self, output: torch.Tensor, rows: int) -> torch.Tensor:
        if len(output) == rows:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class ParticlePool:
    """Draws one of each image's particles in proportion to its weight, keeping only the one that leads so far.

    The leader is the largest of log w + Gumbel noise, which is a draw from the normalised weights; memory does not grow with n.
    """

    def __init__(self, images: int, generator: torch.Generator | list[torch.Generator] | None) -> None:
        self.generators = generator if isinstance(generator, list) else [generator] * images
        self.count = 0
        self.best = torch.full((images,), -torch.inf, dtype=torch.float64)
        self.images: torch.Tensor | None = None
        self.extras: dict[str, list[Any] | None] = {}
        self.kind: type | None = None
        self.log_weights: list[torch.Tensor] = []

    def add(self, images: torch.Tensor, log_weights: torch.Tensor, output: Any) -> None:
        """images: (rows · share, …), each row's `share` particles side by side. output: the call's own, for its other fields."""
        rows = len(self.best)
        log_weights = log_weights.view(rows, -1)
        share = log_weights.shape[1]
        if not torch.isfinite(log_weights).all():
            raise ValueError("a particle's weight is NaN or infinite: the classifier or the denoiser gave no finite number.")
        uniform = torch.stack([_uniform(share, generator) for generator in self.generators])
        score, winner = (log_weights - (-uniform.log()).log()).max(dim=1)
        better = score > self.best
        self.best = torch.where(better, score, self.best)
        index = torch.arange(rows) * share + winner
        if self.images is None:
            self.images, self.kind = images[index].clone(), type(output)
        else:
            self.images[better] = images[index][better]
        for name in (field.name for field in fields(output) if field.name != "images"):
            value = getattr(output, name)
            kept = self.extras.setdefault(name, None if value is None else [None] * rows)
            if kept is not None:
                for row in better.nonzero().flatten().tolist():
                    kept[row] = value[int(index[row])]
        self.log_weights.append(log_weights)
        self.count += share

    def output(self, output_type: str | None, return_dict: bool, to_pil: Callable[[Any], list[Any]]) -> Any:
        """The base's output class with the images drawn, and on it `log_weights` (images, n) and `ess` (images,)."""
        images: Any = self.images
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().numpy()
            images = to_pil(images) if output_type == "pil" else images
        if not return_dict:
            return (images, *self.extras.values())
        found = self.kind(images=images, **self.extras)
        weights = torch.cat(self.log_weights, dim=1)
        object.__setattr__(found, "log_weights", weights)
        object.__setattr__(found, "ess", effective_sample_size(weights))
        return found


def _uniform(count: int, generator: torch.Generator | None) -> torch.Tensor:
    device = "cpu" if generator is None else generator.device
    tiny = torch.finfo(torch.float64).tiny
    return torch.rand(count, generator=generator, device=device, dtype=torch.float64).clamp_min(tiny).cpu()
