"""A scheduler of ours: the memoryless stochastic sampler of flow models, as a diffusers scheduler that pipelines use by `from_config`."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,  # noqa: F401 (a pipeline's component loads only if its base is found beside it)
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


def posterior_coefficients(now: tuple[float, float], following: tuple[float, float]) -> tuple[float, float, float]:
    """Weights of the clean sample and of the state in the mean, and the std, of q(x_{k+1} | x_k, clean), a Gaussian.

    With x = a·clean + s·noise at both ends, (a, s) = `now` and (a', s') = `following`, and r = (a / s) / (a' / s') <= 1:

        q = N(a'(1 − r²)·clean + r (s'/s)·x, s'²(1 − r²))

    is what Bayes' rule gives for a Markov noising process with these marginals: DDPM eq. 7, DDIM eq. 12 at eta = 1, and the first-order
    step of SDE-DPM-Solver++ (arXiv 2211.01095), where r = e^{-h}. Where the signal to noise does not change, but for the rounding of float32,
    there is no step: (0, 1, 0).
    """
    (a, s), (a_next, s_next) = now, following
    # a_next = 0: a schedule shifted so far that the second state is still nothing but noise
    r = 1.0 if a_next <= 1e-6 else a * s_next / (a_next * s)
    if r >= 1 - 1e-6:
        return 0.0, 1.0, 0.0
    return a_next * (1 - r * r), r * s_next / s, s_next * math.sqrt(max(1 - r * r, 0.0))


def check_direction(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    """Raises ValueError for `invert_sigmas`, with which diffusers' stochastic steps end on noise."""
    if scheduler.config.invert_sigmas:
        raise ValueError(f"{type(scheduler).__name__} with invert_sigmas=True ends on noise, not on the sample: set it to False.")


class MemorylessFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Samples a flow model with noise, so that the end of a trajectory does not remember its start.

    A flow model's state is x = (1 − s)·clean + s·noise and its output the velocity v = noise − clean, so that clean ≈ x − s·v. In the time
    t = 1 − s, in which it generates, there is one noise level for which an SDE with the flow's marginals is memoryless (arXiv 2409.08861;
    alpha = t, beta = 1 − t): sigma(t)² = 2·eta_t with eta_t = beta_t (alpha'_t/alpha_t · beta_t − beta'_t) = (1 − t)/t. Hence

        dx = (−2 v − x / t) dt + sqrt(2 (1 − t) / t) dB,

    whose coefficients are infinite at t = 0, where sampling starts. It is therefore not stepped by Euler's method but as DDIM is at
    eta = 1: with the clean sample estimated and held, the next state is drawn from its exact law given the two,
    N(a'(1 − r²)·clean + r (s'/s)·x, s'²(1 − r²)), r = (a / s)·(s'/a'), a = 1 − s; see `posterior_coefficients`. That is finite at both ends, has
    the SDE above as its limit, has the right law whatever the step if the clean sample is known, and is memoryless by construction: on the
    first step, from s = 1, r = 0, so that x_0 enters through its clean sample alone, which is the constant E[clean] for an exact model.
    The last step, to s = 0, is without noise: the clean sample. In few steps its samples are somewhat too narrow, as DDIM's are at eta = 1.
    Euler's method, with h added to the zeros of eta, is less so for an exact velocity; but its states carry 1.5 to 2.9 times the
    noise that the model expects, and more of the gap is out of any control's reach (benchmarks/flow_steps.py measures both).

    Configuration and shifting, the dynamic one included, are those of FlowMatchEulerDiscreteScheduler; `stochastic_sampling` has no meaning
    here. Without given sigmas or timesteps, K steps go from 1 to 1/K before the shift, as FluxPipeline gives them, and then to 0: the
    parent's own go to 0.001, with a last but one step of so little noise that its KL is needlessly sharp.

        pipe.scheduler = MemorylessFlowMatchScheduler.from_config(pipe.scheduler.config)
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the parent's; see the class for the sigmas where none are given."""
        if sigmas is None and timesteps is None and num_inference_steps is not None:
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    def law(self, output: torch.Tensor, index: int, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean (B, *), std (one number) and clean estimate (B, *) of the step from `sigmas[index]`; nothing of the scheduler changes.

        Raises:
            ValueError: for `invert_sigmas`, which turns the direction of time round.
        """
        check_direction(self)
        s, s_next = self.sigmas[index].item(), self.sigmas[index + 1].item()
        clean_weight, state_weight, std = posterior_coefficients((1 - s, s), (1 - s_next, s_next))
        clean = sample - s * output
        return clean_weight * clean + state_weight * sample, torch.tensor(std, dtype=sample.dtype), clean

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple:
        """One step, with the signature of the parent, which ignores the four `s_…` as well.

        Raises:
            ValueError: for an integer timestep (pass one of `timesteps`), and for per_token_timesteps.
        """
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"{type(self).__name__}.step needs one of scheduler.timesteps, not an index; got {timestep}.")
        if per_token_timesteps is not None:
            raise ValueError(f"{type(self).__name__} has one timestep for the whole sample: per_token_timesteps is not supported.")
        if self.step_index is None:
            self._init_step_index(timestep)
        # half precision would lose the small steps
        mean, std, _ = self.law(model_output.float(), self.step_index, sample.float())
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=mean.dtype)
        following = (mean + std * noise).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=following) if return_dict else (following,)
