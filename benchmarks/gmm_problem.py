"""The inverse problem of benchmark A: a mixture of 25 Gaussians seen through a noisy linear map, with everything about it in closed form.

Problem and metric are those of gabrielvc/benchopts_inverse_problem_diffusion_prior (the authors of MCGdiff, arXiv 2308.07983). The random
numbers are drawn in the order in which that benchmark draws them, with this torch's generators. Whether seed 27 is then the very instance
of its stored results cannot be known: `published_dps` in gmm_peers.py falls into their range for d_y = 1, and is twice theirs for 2 and 4.

States are diffused in units of `scale`, the prior's root mean square: z = x / scale has unit second moment, so that the variance
preserving process forgets z by its end, which eta = 1 needs to be memoryless.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from torch.distributions import Categorical as Choice
from torch.distributions import MixtureSameFamily, MultivariateNormal


@dataclass(frozen=True)
class GMMProblem:
    """Prior Σ_m weights_m N(means_m, I) of x, label y = A x + noise · e, in float64.

    weights: (M,), means: (M, d), matrix: A, (d_y, d), observation: y, (d_y,), noise: s, a standard deviation.
    """

    weights: Tensor
    means: Tensor
    matrix: Tensor
    observation: Tensor
    noise: float

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]

    @cached_property
    def scale(self) -> float:
        """Root mean square of the prior's coordinates: the unit of the diffused states."""
        return math.sqrt(1 + (self.weights @ self.means.square().sum(dim=1)).item() / self.dimensions)

    @cached_property
    def prior(self) -> MixtureSameFamily:
        return MixtureSameFamily(
            Choice(probs=self.weights), MultivariateNormal(self.means, torch.eye(self.dimensions, dtype=self.means.dtype))
        )

    @cached_property
    def _evidence(self) -> Tensor:
        """log weights_m + log N(y; A means_m, s² I + A Aᵀ), (M,) nats."""
        covariance = self.matrix @ self.matrix.T + self.noise**2 * torch.eye(len(self.matrix), dtype=self.means.dtype)
        return self.weights.log() + MultivariateNormal(self.means @ self.matrix.T, covariance).log_prob(self.observation)

    @property
    def log_partition(self) -> float:
        """log Z = log E_prior[p(y | x)], nats."""
        return self._evidence.logsumexp(0).item()

    @cached_property
    def posterior(self) -> MixtureSameFamily:
        """p(x | y): a mixture again, each component by Gaussian conditioning, with the components' evidences as new weights."""
        d = self.dimensions
        covariance = torch.linalg.inv(torch.eye(d, dtype=self.means.dtype) + self.matrix.T @ self.matrix / self.noise**2)
        means = (self.means + self.observation @ self.matrix / self.noise**2) @ covariance
        return MixtureSameFamily(Choice(logits=self._evidence), MultivariateNormal(means, (covariance + covariance.T) / 2))

    def log_likelihood(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(y | x = scale · z), (B, d) -> (B,) nats, in the precision of z. There is one label, so `labels` are not read."""
        matrix, observation = self.matrix.to(z), self.observation.to(z)
        residual = (observation - self.scale * z @ matrix.T) / self.noise
        return -residual.square().sum(dim=1) / 2 - len(observation) * math.log(self.noise * math.sqrt(2 * math.pi))

    def exact_samples(self, count: int, seed: int) -> Tensor:
        """(count, d) independent draws from p(x | y), x not in units of `scale`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.posterior.sample((count,))


def gmm_problem(seed: int, d_y: int, d_x: int = 8) -> GMMProblem:
    """The instance of a seed, drawn in the published order and precision (float32) and kept in float64.

    The prior's weights are drawn first from the same seed: they differ between seeds and are shared by the rows of one seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grid = range(-2, 3)
        means = torch.stack([torch.tensor([-8.0 * i, -8.0 * j] * (d_x // 2)) for i in grid for j in grid])
        weights = torch.randn(len(means)) ** 2
        weights = weights / weights.sum()
        u, values, v = torch.linalg.svd(torch.randn(d_y, d_x), full_matrices=True)
        values = torch.rand_like(values).sort(descending=True).values
        matrix = u @ (values.diag() @ v[:d_y])
        components = MultivariateNormal(means, torch.eye(d_x).repeat(len(means), 1, 1), validate_args=False)
        truth = MixtureSameFamily(Choice(weights, validate_args=False), components, validate_args=False).sample()
        noise = torch.rand(1)[0] * values.max()
        observation = matrix @ truth
        observation = observation + torch.randn_like(observation) * noise
    return GMMProblem(weights.double(), means.double(), matrix.double(), observation.double(), noise.item())


def geometric_scheduler(low: float = 0.012, high: float = 80.0, length: int = 1000) -> DDIMScheduler:
    """DDIM on a grid that is geometric in noise / signal, from `low` to `high` in units of the diffused state.

    A component is about 0.09 wide there (1 / scale): a cosine schedule spends few of its steps at that level and below.
    """
    ratio = torch.logspace(math.log10(low), math.log10(high), length, dtype=torch.float64)
    alphas = 1 / (1 + ratio.square())
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    scheduler = DDIMScheduler(
        num_train_timesteps=length,
        trained_betas=betas.numpy(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    # diffusers multiplies 1 − beta in float32, where betas below 6e-8 are lost and neighbouring levels become one
    scheduler.alphas_cumprod = alphas
    return scheduler


@dataclass(frozen=True)
class Moments:
    """What a denoiser knows at (z_t, t), in units of the diffused state.

    clean: E[z_0 | z_t], (B, d). shares: responsibilities, (B, M). within: variance of one component's z_0 given z_t.
    between: factor of the spread of the means in Cov[z_0 | z_t] = within · I + between² · Cov_shares[means].
    """

    clean: Tensor
    shares: Tensor
    within: float
    between: float


class GMMDenoiser(nn.Module):
    """The exact v-prediction of the mixture, plus a control head that is zero until LoRA moves it.

    The head may look at the prior's denoiser and at the likelihood, never at the mixture's posterior. Its features are two
    look-ahead estimates of how y moves E[z_0 | z_t]. Both take z_0 given z_t for ONE Gaussian, which it is not where modes compete:

        (a) moment matching: covariance Cov[z_0 | z_t], the denoiser's own Jacobian (TMPD, arXiv 2310.06721; MMPS, arXiv 2405.13712),
        (b) covariance r_t² I with r_t² for unit-covariance data (ΠGDM), which is right within one mode and blind to the others.

    With h the time (and label) embedding, g linear in it, and n an MLP of z_t, E[z_0 | z_t], the residual in its predicted standard
    deviations, (a) and h, all with last layers of zero, E[z_0 | z_t] moves by

        (g_a(h) + n_a) · (a) + (g_b(h) + n_b) · (b) + B · n_1 + (tr B / d)^½ · n_2,     B = Cov[z_0 | z_t] − within · I.

    B is what competing modes add to the covariance. It vanishes once z_t has settled on a mode, where (a) = (b) is the exact move.
    """

    HEAD_LAYERS = ("gain", "first", "from_time", "second", "last", "time_embedding.linear_1", "time_embedding.linear_2")

    def __init__(self, problem: GMMProblem, scheduler: DDIMScheduler, width: int = 96) -> None:
        super().__init__()
        self.alphas, self.width, self.std = scheduler.alphas_cumprod.double(), width, 1 / problem.scale
        d, d_y = problem.dimensions, len(problem.matrix)
        means, matrix = problem.means / problem.scale, problem.matrix * problem.scale / problem.noise
        # y and its map in standard deviations of the label's noise: the likelihood is N(label; map · z, I)
        fixed = {"means": means, "log_weights": problem.weights.log(), "map": matrix, "label": problem.observation / problem.noise}
        # Σ_m shares_m means_m (map · means_m)ᵀ for all rows is then one product
        fixed["cross"] = (means.unsqueeze(2) * (means @ matrix.T).unsqueeze(1)).flatten(1)
        for name, value in fixed.items():
            self.register_buffer(name, value.float(), persistent=False)
        self.time_embedding = TimestepEmbedding(width, width)
        self.gain = nn.Linear(width, 2)
        self.first = nn.Linear(3 * d + d_y, width)
        self.from_time = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 2 * d + 2)
        for linear in (self.gain, self.last):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def levels(self, timestep: Tensor | int) -> tuple[float, float]:
        """Signal a and noise b at the timestep: z_t = a z_0 + b e."""
        alpha = self.alphas[int(timestep)].item()
        return math.sqrt(alpha), math.sqrt(1 - alpha)

    def moments(self, z: Tensor, a: float, b: float) -> Moments:
        """(B, d) at signal a and noise b -> the mixture's moments of z_0 given z_t."""
        variance = (a * self.std) ** 2 + b**2
        logits = z @ self.means.T * (a / variance) + (self.log_weights - self.means.square().sum(dim=1) * (a**2 / (2 * variance)))
        shares = logits.softmax(dim=1)
        gain, between = a * self.std**2 / variance, b**2 / variance
        return Moments(gain * z + between * (shares @ self.means), shares, (self.std * b) ** 2 / variance, between)

    def times_spread(self, moments: Moments, vectors: Tensor) -> Tensor:
        """B · vectors, (B, d) -> (B, d), without forming the matrix B = Cov[z_0 | z_t] − within · I."""
        along = vectors @ self.means.T
        centred = along - (moments.shares * along).sum(dim=1, keepdim=True)
        return moments.between**2 * (moments.shares * centred) @ self.means

    def features(self, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """(a), (b): (B, d) moves of E[z_0 | z_t]; and the residual of the label in its predicted standard deviations, (B, d_y)."""
        d_y = len(self.map)
        mean = moments.shares @ self.means
        spread = (moments.shares @ self.cross).unflatten(1, (-1, d_y)) - mean.unsqueeze(2) * (mean @ self.map.T).unsqueeze(1)
        cross = moments.within * self.map.T + moments.between**2 * spread  # Cov[z_0, map · z_0], (B, d, d_y)
        unit = torch.eye(d_y, dtype=mean.dtype, device=mean.device)
        total = unit + self.map @ cross
        residual = self.label - moments.clean @ self.map.T
        if d_y == 1:
            matched = (cross * (residual / total.squeeze(2)).unsqueeze(2)).squeeze(2)
        else:
            matched = (cross @ torch.linalg.solve(total, residual.unsqueeze(2))).squeeze(2)
        local = residual @ torch.linalg.solve(unit + moments.within * self.map @ self.map.T, moments.within * self.map)
        return matched, local, residual / total.diagonal(dim1=1, dim2=2).sqrt()

    def _head_is_zero(self) -> bool:
        """True where the last layers are still (or again, with LoRA bypassed) zero: the base need not pay for the head.

        Weights that take a gradient are run even at zero: those of `Policy.merged` before the first update.
        """
        for layer in (self.gain, self.last):
            base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            if not getattr(layer, "disable_adapters", True) or base.weight.requires_grad or base.weight.any():
                return False
        return True

    def forward(self, sample: Tensor, timestep: Tensor | int) -> Tensor:
        """v-prediction a E[e | z_t] − b E[z_0 | z_t] at z_t = `sample`, (B, d) -> (B, d)."""
        a, b = self.levels(timestep)
        moments = self.moments(sample, a, b)
        velocity = (a * sample - moments.clean) / b
        if self._head_is_zero():
            return velocity
        matched, local, residual = self.features(moments)
        embedded = get_timestep_embedding(torch.full((1,), int(timestep)), self.width).to(sample)
        hidden = nn.functional.silu(self.time_embedding(embedded.expand(len(sample), -1)))
        gains = self.gain(hidden)
        inputs = torch.cat([sample, moments.clean, matched, residual.asinh()], dim=1)
        hidden = nn.functional.silu(self.first(inputs) + self.from_time(hidden))
        hidden = nn.functional.silu(self.second(hidden))
        steep, flat, own_gains = self.last(hidden).split([sample.shape[1], sample.shape[1], 2], dim=1)
        gains = gains + own_gains
        mean = moments.shares @ self.means
        trace = (moments.shares @ self.means.square().sum(dim=1) - mean.square().sum(dim=1)).clamp_min(1e-12)
        size = moments.between * (trace / sample.shape[1]).sqrt().unsqueeze(1)
        move = gains[:, :1] * matched + gains[:, 1:] * local + self.times_spread(moments, steep) + size * flat
        return velocity - move / b
