"""CTRLConfig: the settings of a fine-tuning, which of them a resumed run must share with its checkpoint, and the base law they fix."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

from .objectives import OBJECTIVES
from .rollouts import Sampler
from .transitions import start_snr


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help, from which HfArgumentParser makes a command-line option."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help}, **factory)


# what only some objectives read
OWN = {
    ("direct_backprop",): ("truncation", "num_kl_steps"),
    ("adjoint_matching",): ("num_regression_steps", "coarse_adjoint", "adjoint_passes"),
    ("adjoint_matching", "direct_backprop"): ("gradient_batch_size",),
    ("policy_gradient",): ("clip_range", "ppo_epochs", "ppo_minibatches", "lookahead_critic", "gae_lambda"),
}


@dataclass
class CTRLConfig:
    """Settings of the fine-tuning. Each field's help is its documentation; units where there are any."""

    output_dir: str = option("runs/ctrl", "Folder of everything the run writes.")
    seed: int = option(0, "Seed of every random number.")
    num_inference_steps: int = option(20, "K, denoising steps of the law that is tuned.")
    eta: float = option(1.0, "DDIM's noise: 1 is memoryless and unbiased, below 1 biased, 0 refused. Ignored by other schedulers.")
    guidance_scale: float = option(1.0, "Classifier-free guidance of the law that is tuned; 1 is none, at half the cost.")
    gamma: float = option(1.0, "Exponent of p(y|x): 1 is Bayes' posterior. With a range, the one that a call without gamma= gets.")
    gamma_range: list[float] | None = option(None, "LOW HIGH: train for all gamma in between (log-uniform), chosen at the call.")
    label_bins: int = option(5, "A continuous attribute is drawn from so many equal intervals alike, and judged at their centres.")
    label_subsets: bool = option(True, "With several attributes: also train for every subset of them, the others left free.")
    lora_rank: int = option(
        16, "Rank of LoRA on each target; 0 for none, with a control_head alone: the base's calls then serve the adapter too."
    )
    lora_targets: list[str] = option(["to_q", "to_k", "to_v", "to_out.0"], "Suffixes of the module names that get LoRA.")
    injection_site: str | None = option(None, "Module path of the time embedding, where it is not found by itself.")
    control_head: int = option(
        0,
        "Width of a control head, a small network beside the denoiser that learns what LoRA learns slowly; 0 for none. 512 is tried. For images "
        "only; the adapter's labels then need this package's pipelines, and cannot be exported.",
    )
    critic_trajectories: int = option(
        0, "Warm start of the control head: so many base samples, from which a critic of noisy states is fitted; 0 for none."
    )
    critic_updates: int = option(
        1500,
        "critic_trajectories: updates of the critic, as many of the head, and three times as many of the surrogate that the critic sees through.",
    )
    objective: str = option("adjoint_matching", f"One of {sorted(OBJECTIVES)}.")
    truncation: int | None = option(None, "direct_backprop: differentiate the last so many steps only (biased).")
    num_kl_steps: int | None = option(
        None,
        "direct_backprop: count the KL at so many random steps, scaled to stand for all (unbiased, and cheaper); all by default.",
    )
    num_regression_steps: int | None = option(
        None,
        "adjoint_matching: regress on so many random steps of each trajectory, or on all, where there are fewer with noise; a fifth of them "
        "by default, at least 4.",
    )
    coarse_adjoint: bool = option(
        True,
        "adjoint_matching: solve the adjoint where the regressed steps need it only, with the clean sample held in between: faster, a per "
        "cent off or less on a small random U-Net. false: at every step.",
    )
    adjoint_passes: int = option(
        1,
        "adjoint_matching: optimizer steps that a batch of trajectories serves, each on other random steps of it (by default all are dealt "
        "out). Cheaper a step; the later ones learn from trajectories a little out of date.",
    )
    clip_range: float = option(0.2, "policy_gradient: PPO's clipping of a step's density ratio.")
    ppo_epochs: int = option(2, "policy_gradient: passes over each batch of trajectories.")
    ppo_minibatches: int = option(
        4, "policy_gradient: optimizer steps a pass; each takes its share of the (trajectory, step) pairs."
    )
    lookahead_critic: bool = option(
        False, "policy_gradient: a baseline from the score of the denoised estimate at each step; costs a scoring a label and step."
    )
    gae_lambda: float = option(1.0, "policy_gradient with lookahead_critic: below 1, less noise and some bias.")
    coarse_updates: int = option(0, "First so many updates run on the coarser law of `coarse_steps` denoising steps, for speed.")
    coarse_steps: int = option(8, "Denoising steps of the coarse start; what is learned there carries over.")
    merge_lora: bool = option(False, "Compute W + BA once an update: a third less time on small float32 models.")
    checkpointing: bool = option(
        False, "direct_backprop: compute each step again on the way back, in memory that does not grow with K; a quarter more time."
    )
    gradient_batch_size: int | None = option(
        None,
        "adjoint_matching, and direct_backprop with checkpointing: trajectories that are differentiated at a time, by default half of batch_size "
        "in the first, all in the second. Same gradient, less memory, and they are still drawn all at once. Not with fp16.",
    )
    reward_batch_size: int | None = option(
        None, "Samples decoded and scored at a time; all by default. Same gradient, less memory."
    )
    shard_base: bool = option(
        False,
        "Deal the frozen base's weights out to the processes (FSDP2), for a base that one GPU cannot hold; more communication.",
    )
    batch_size: int = option(64, "Trajectories at a time on each process: a micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per update on each process.")
    global_batch_size: int | None = option(
        None,
        "Trajectories per update on all processes together, in as many micro-batches as it takes: the same update on any number.",
    )
    max_updates: int = option(300, "Optimizer updates.")
    learning_rate: float = option(1e-3, "AdamW learning rate of LoRA, at its peak.")
    label_learning_rate: float = option(1e-2, "AdamW learning rate of the label encoder, at its peak.")
    head_learning_rate: float = option(5e-4, "AdamW learning rate of the control head, at its peak.")
    lr_warmup: int = option(5, "Updates of linear warm-up.")
    lr_final: float = option(0.02, "Learning rate at the end of the cosine, as a fraction of the peak.")
    adam_beta2: float = option(0.99, "AdamW's second-moment decay.")
    weight_decay: float = option(0.0, "AdamW weight decay.")
    max_grad_norm: float = option(1.0, "Gradient norm above which gradients are scaled down.")
    mixed_precision: str = option("no", "no, bf16 or fp16 (autocast; LoRA and label encoder stay float32).")
    checkpoint_every: int = option(100, "Updates between checkpoints; 0 for none but the best and the last.")
    checkpoints_total_limit: int = option(2, "How many checkpoints are kept; the best is kept besides.")
    resume_from: str | None = option(
        None, "A checkpoint folder, or 'latest': the last one that is whole, or the beginning where there is none yet."
    )
    max_bad_updates: int = option(
        10, "An update with a NaN or infinite reward, loss or gradient is skipped; so many in a row stop the training."
    )
    eval_every: int = option(
        50, "Updates between measurements of J on fixed noise, for the best checkpoint and the alarms; 0 for none."
    )
    eval_trajectories: int = option(128, "Trajectories of such a measurement, of all labels together.")
    keep_best: bool = option(
        True, "End with the weights of the best J, not the last, where it is better by more than twice the error of the difference."
    )
    kl_limit: float | None = option(
        None, "Stop, and keep the adapter, once a measurement finds a label's mean KL above so many nats."
    )
    kl_alarm: float | None = option(
        None, "Warn of a label's mean KL above so many nats; by default three times what the exact law has, 3 nats at least."
    )
    diversity_alarm: float = option(0.25, "Warn where samples of a label vary less than this fraction of the base's.")
    sample_every: int = option(100, "Updates between sample grids; 0 for none.")
    report_to: str = option("tensorboard", "Tracker known to accelerate, several as 'tensorboard,wandb', or 'none'.")

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Unknown objective {self.objective!r}: use one of {sorted(OBJECTIVES)}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}.")
        if self.gamma_range is not None:
            if len(self.gamma_range) != 2 or not 0 < self.gamma_range[0] < self.gamma_range[1]:
                raise ValueError(f"gamma_range must be two numbers, 0 < LOW < HIGH; got {self.gamma_range}.")
            if not self.gamma_range[0] <= self.gamma <= self.gamma_range[1]:
                raise ValueError(f"gamma = {self.gamma} lies outside gamma_range {self.gamma_range}.")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda must be from 0 to 1, got {self.gae_lambda}.")
        if self.gae_lambda < 1 and not self.lookahead_critic:
            raise ValueError(f"gae_lambda = {self.gae_lambda} needs lookahead_critic: only its baseline knows the state.")
        for objectives, names in OWN.items():
            ignored = [
                name for name in names if self.objective not in objectives and getattr(self, name) != getattr(CTRLConfig, name)
            ]
            if ignored:
                given = ", ".join(f"{name} = {getattr(self, name)}" for name in ignored)
                warnings.warn(f"{given}: for {' and '.join(objectives)} only, and ignored by {self.objective}.", stacklevel=3)
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "global_batch_size",
            "max_updates",
            "num_inference_steps",
            "critic_updates",
            "label_bins",
            "num_regression_steps",
            "adjoint_passes",
            "num_kl_steps",
            "ppo_epochs",
            "ppo_minibatches",
            "gradient_batch_size",
            "reward_batch_size",
            "checkpoints_total_limit",
            "max_bad_updates",
            "eval_trajectories",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lora_rank", "control_head", "critic_trajectories"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if 0 < self.critic_trajectories < 20:
            raise ValueError(
                f"critic_trajectories must be 0 or at least 20, of which a tenth is held out; got {self.critic_trajectories}."
            )
        if self.lora_rank == 0 and not self.control_head:
            raise ValueError("lora_rank = 0 leaves a control head alone, and control_head is 0: give its width, 512.")
        if self.critic_trajectories and not self.control_head:
            raise ValueError(f"critic_trajectories = {self.critic_trajectories} needs a control_head to warm: give its width, 512.")
        if self.kl_limit is not None and not (self.kl_limit > 0 and 0 < self.eval_every <= self.max_updates):
            raise ValueError(
                f"kl_limit must be positive and needs an eval_every of at most max_updates, since measurements find it; got {self.kl_limit} with "
                f"eval_every = {self.eval_every} and max_updates = {self.max_updates}."
            )
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError("Give global_batch_size or gradient_accumulation_steps, not both: the one follows from the other.")
        if self.num_kl_steps is not None and self.truncation is not None:
            raise ValueError("num_kl_steps is for the whole gradient: leave it out with truncation, or the other way round.")
        if self.gradient_batch_size is not None and self.mixed_precision == "fp16":
            raise ValueError(
                "gradient_batch_size cannot be had with mixed_precision fp16, which keeps all graphs until the loss is scaled."
            )
        if self.gradient_batch_size is not None and self.objective == "direct_backprop" and not self.checkpointing:
            raise ValueError(
                "gradient_batch_size with direct_backprop needs checkpointing: without it the trajectory is one graph."
            )
        if self.shard_base and self.merge_lora:
            raise ValueError("merge_lora needs the base's weights whole: leave it out with shard_base.")

    def regression_steps(self, noisy: int) -> int:
        """Of so many noisy steps, how many adjoint_matching regresses on in an update, in all passes together.

        Raises ValueError where the passes cannot have steps of their own.
        """
        each, passes = self.num_regression_steps, self.adjoint_passes
        if passes == 1:
            return min(noisy, max(4, round(noisy / 5)) if each is None else each)
        if passes * (each or 1) > noisy:
            asked = f"adjoint_passes = {passes}" + ("" if each is None else f" of num_regression_steps = {each}")
            raise ValueError(
                f"{asked} need{'s' if each is None else ''} {passes * (each or 1)} noisy steps, each its own; there are {noisy}: ask for fewer."
            )
        return noisy if each is None else passes * each

    @property
    def reuses_trajectories(self) -> bool:
        """Whether a batch of trajectories serves several optimizer steps."""
        return self.objective == "policy_gradient" or (self.objective == "adjoint_matching" and self.adjoint_passes > 1)

    @property
    def differentiated_at_a_time(self) -> int | None:
        """How many trajectories a call with a gradient has; None is all.

        By default adjoint_matching gives it half a batch: a third less memory for a twelfth more time on a small model (benchmarks/step_time.py).
        direct_backprop differentiates every call, and float16 keeps all graphs.
        """
        if self.gradient_batch_size is None and self.objective == "adjoint_matching" and self.mixed_precision != "fp16":
            return -(-self.batch_size // 2)
        return self.gradient_batch_size

    def objective_options(self, at_a_time: int | None) -> dict[str, Any]:
        """The chosen objective's own options. at_a_time: how many trajectories a call with a gradient has; None is all."""
        own = {
            "direct_backprop": {"truncation": self.truncation, "gradient_batch_size": at_a_time},
            "adjoint_matching": {"gradient_batch_size": at_a_time},
            "policy_gradient": {"clip_range": self.clip_range},
        }
        return own.get(self.objective, {})


# what a resumed run must have in common with its checkpoint: its weights would not mean the same
LAW = ("seed", "num_inference_steps", "eta", "guidance_scale", "gamma", "gamma_range", "lora_rank", "lora_targets", "control_head")
# what changes neither the law nor the way to it. Labels and site are compared as they were found, batches by their size over all processes
FREE = (
    "output_dir",
    "resume_from",
    "label_bins",
    "label_subsets",
    "injection_site",
    "batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "merge_lora",
    "shard_base",
    "checkpointing",
    "gradient_batch_size",
    "reward_batch_size",
    "checkpoint_every",
    "checkpoints_total_limit",
    "max_bad_updates",
    "eval_every",
    "keep_best",
    "kl_limit",
    "kl_alarm",
    "diversity_alarm",
    "sample_every",
    "report_to",
)


# from here on about a percent of what a label should move is lost, on a Gaussian prior and likelihood (tests/test_memoryless.py)
START_SNR = 0.02


def make_sampler(scheduler: Any, config: CTRLConfig, grid: dict[str, Any] | None = None) -> Sampler:
    """The base law of a config. `eta` goes to schedulers whose step takes it, `grid` to `set_timesteps` (see `Sampler`).

    Warns where the law is known not to be memoryless: with eta < 1, and where the first timestep is one at which there should be signal in
    the state, which is pure noise.

    Raises:
        ValueError: if the scheduler has no Gaussian transition, or eta = 0.
    """
    takes_eta = "eta" in inspect.signature(scheduler.step).parameters
    if takes_eta and 0 < config.eta < 1:
        warnings.warn(
            f"eta = {config.eta} < 1 is not memoryless: the optimum is biased away from p(x|c) p(y|x)^gamma; eta = 1 is not.",
            stacklevel=2,
        )
    sampler = Sampler(scheduler, config.num_inference_steps, {"eta": config.eta} if takes_eta else {}, grid or {})
    if (snr := start_snr(scheduler)) > START_SNR:
        warnings.warn(
            f"{type(scheduler).__name__} starts at timestep {float(sampler.timesteps[0]):g}, where the model expects a signal-to-noise ratio "
            f"of {snr:.2g}, from pure noise. That is not memoryless: the optimum is biased away from p(x|c) p(y|x)^gamma. Use more steps, "
            "timestep_spacing='trailing', or sigmas from the largest on.",
            stacklevel=2,
        )
    return sampler
