"""CTRLTrainer: draw a batch, ask the objective for a loss, step, log, save, resume. There is no diffusion mathematics in it.

Every random number of trajectory i of update u comes from a generator seeded by (seed, u, i), and what a batch draws once from one seeded
by (seed, u). So a resumed run draws what the uninterrupted one would have drawn, with no generator state to save, and an update is the
same however its batch is cut into micro-batches and dealt out to processes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from tqdm.auto import tqdm

from . import processes
from .adjoints import Targets, collect_targets
from .checkpoints import (
    Checkpoint,
    check_resumable,
    checkpoint_folder,
    fingerprint,
    part,
    read_checkpoint,
    read_latest,
    write_checkpoint,
    write_file,
)
from .compiling import compile_in_place, compiles
from .conditions import Condition
from .config import FREE, LAW, CTRLConfig, make_sampler
from .critics import AT_A_TIME, check_critic, warm_start
from .evaluation import gamma_grid
from .experience import Baseline, Experience, LogLikelihood, NonFiniteError, checked, collect, less_baseline
from .labels import label_grid
from .monitoring import Monitor, measure
from .objectives import OBJECTIVES, random_steps
from .policy import Policy
from .preemption import EXIT_PREEMPTED, Preempted, Preemption
from .randomness import TrajectoryNoise, batch_seeds, global_generators_kept, seed_global_generators
from .rollouts import Batch, Environment, Sampler, in_chunks
from .tracking import BAR, finish_trackers, tracker_names


logger = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """Training met NaN or infinite numbers over and over; the message says where, and where the last good checkpoint is."""


class CTRLTrainer:
    """Fine-tunes a policy's LoRA, label encoder and control head for gamma · log p̂(y | x) minus the KL to the base.

    Args:
        policy: the denoiser as a policy.
        scheduler: the base's scheduler; with `config` it fixes the base law.
        reward: images in [0, 1], labels (B, A) -> (B,) nats.
        config: settings.
        shape: (C, H, W) of a latent. labels: (M, A), the labels to learn; by default `label_grid` of the policy's label space.
        decode, prompt_embeds, null_embeds: see `Environment`.
        log_partition: estimate of the mean log Z in nats, for the gap shown in the progress bar.
        save_images: called with (update, policy) at every `sample_every`, on every process.
        identity: whatever else makes the run what it is (data, prompts, scorer), for JSON. It is kept in the checkpoints; one with
            another identity is not resumed.
    """

    def __init__(
        self,
        policy: Policy,
        scheduler: Any,
        reward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        config: CTRLConfig,
        *,
        shape: tuple[int, ...],
        labels: torch.Tensor | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        prompt_embeds: torch.Tensor | Condition | None = None,
        null_embeds: torch.Tensor | None = None,
        log_partition: float | None = None,
        save_images: Callable[[int, Policy], None] | None = None,
        identity: Mapping[str, Any] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = accelerator or processes.make_accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker_names(config.report_to) or None,
            project_dir=str(self.output_dir),
        )
        self.batch_size = config.global_batch_size or config.batch_size * config.gradient_accumulation_steps * processes.count()
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"distributed_type {self.accelerator.distributed_type.value} of the accelerate config is not for an adapter's training: "
                "use MULTI_GPU, and --shard_base true where one GPU cannot hold the base."
            )
        # all have as many micro-batches, since they wait for each other in each
        if self.batch_size // processes.count() < -(-self.batch_size // (processes.count() * config.batch_size)):
            raise ValueError(
                f"global_batch_size = {self.batch_size} leaves one of {processes.count()} processes without work at batch_size = "
                f"{config.batch_size}: choose a multiple of their number."
            )
        self.at_a_time = config.differentiated_at_a_time
        if config.shard_base:
            self.at_a_time = processes.cut_alike(self.batch_size, config.batch_size, self.at_a_time)
        device = self.accelerator.device
        self.policy = policy.to(device)
        spread, names = None, None
        if labels is None:
            choices = label_grid(policy.label_space, config.label_bins, config.label_subsets)
            labels, spread, names = choices.labels, choices.spread.to(device) if choices.spread.any() else None, choices.names
        grid = prompt_embeds.grid if isinstance(prompt_embeds, Condition) else {}
        self.environment = Environment(
            make_sampler(scheduler, config, grid),
            tuple(shape),
            reward,
            labels.to(device),
            config.gamma,
            None if config.gamma_range is None else tuple(config.gamma_range),
            in_chunks(decode or (lambda x: x), config.reward_batch_size),
            None if prompt_embeds is None else prompt_embeds.to(device),
            None if null_embeds is None else null_embeds.to(device),
            spread,
            policy.label_space,
            config.reward_batch_size,
        )
        self.coarse = self.environment
        if config.coarse_updates:
            if grid:
                raise ValueError(
                    f"coarse_updates cannot be had here: the pipeline sets {sorted(grid)} of its own for its number of steps, and no "
                    "coarser grid follows from that."
                )
            own = type(scheduler).from_config(scheduler.config)  # a scheduler holds one grid of timesteps
            coarse = Sampler(own, config.coarse_steps, self.environment.sampler.options)
            self.coarse = replace(self.environment, sampler=coarse)
        if config.objective == "adjoint_matching":
            for sampler in (self.environment.sampler, self.coarse.sampler):
                fewer = config.regression_steps(len(sampler.noisy_steps)) < len(sampler.noisy_steps)
                if fewer and config.coarse_adjoint:
                    _ = sampler.held_weights  # raises here, not at the first update, where the scheduler does not say them
        if bool(config.control_head) != (policy.label_encoder.control_head is not None):
            raise ValueError(
                f"control_head = {config.control_head}, but the policy has {'a' if config.control_head == 0 else 'no'} control head: build it with the "
                "same, Policy(control_head=…, shape=…)."
            )
        if (config.lora_rank == 0) != policy.shares_base:
            raise ValueError(
                f"lora_rank = {config.lora_rank}, but the policy's control head is {'alone' if policy.shares_base else 'not alone'}: build it with the same, "
                "Policy(lora_rank=…, control_head=…, shape=…)."
            )
        if config.critic_trajectories:
            check_critic(self.environment, policy)  # raises here, not after the base samples
            if config.shard_base and processes.count() > 1:
                raise ValueError("critic_trajectories cannot be had with shard_base: the main process alone calls the base then.")
        if config.shard_base and processes.count() > 1 and compiles(self.accelerator):
            raise ValueError(
                "--dynamo_backend cannot be had with shard_base, which deals out the base's weights: leave out one of them."
            )
        self.log_partition = log_partition
        self.save_images = save_images
        groups = policy.trainable_parameters()
        trained = [parameter for group in groups.values() for parameter in group]
        # in float32, whatever the base is stored in
        for parameter in trained:
            parameter.data = parameter.data.float()
        processes.broadcast(parameter.data for parameter in trained)
        self._identity = json.loads(json.dumps({**(identity or {}), **self._law(scheduler)}, default=str))
        if config.shard_base and processes.count() > 1:
            processes.shard(policy.denoiser, trained)
        if compiles(self.accelerator):
            compile_in_place(policy.denoiser, self.accelerator)
        rates = {
            "lora": config.learning_rate,
            "label_encoder": config.label_learning_rate,
            "control_head": config.head_learning_rate,
        }
        self.peaks = [rates[name] for name in groups]
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": peak} for group, peak in zip(groups.values(), self.peaks, strict=True)],
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.optimizer = self.accelerator.prepare(optimizer)
        self.baseline: Baseline | None = None
        self.monitor = Monitor([str(row) for row in range(len(labels))] if names is None else names, config)
        self.update = 0
        self.seconds = 0.0
        self.smooth: float | None = None  # of J, for the gap shown in the progress bar
        self.warmed: dict[str, float] = {}  # what the warm start says of itself, once it is done
        self.bad_updates = self.bad_in_a_row = 0
        self.history: list[dict[str, float]] = []
        self.best_kept: int | None = None  # the update whose weights the run ended with, where they are not the last
        self._saved: tuple[int, int] | None = None

    @property
    def _named(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by name, in the optimizer's order."""
        names = {id(p): n for n, p in self.policy.named_parameters()}
        return {names[id(p)]: p for group in self.policy.trainable_parameters().values() for p in group}

    def train(self) -> list[dict[str, float]]:
        """Runs to `max_updates`, or to `kl_limit`. Returns the history, one dict of floats for each update that was not skipped.

        An update that meets a NaN or infinite number is skipped: weights, optimizer and baseline stay as they are.

        Raises:
            TrainingStopped: after `max_bad_updates` of them in a row; the weights before them are saved as a checkpoint.
            Preempted: SIGTERM or SIGUSR1 has arrived, and a checkpoint is written; as a SystemExit it ends the process with its status.
        """
        config, main = self.config, self.accelerator.is_main_process
        if config.resume_from:
            self._resume(config.resume_from)
        if config.report_to != "none":
            settings = {k: v for k, v in asdict(config).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("ctrl", config=settings)
        self.accelerator.print(
            f"{self.batch_size} trajectories an update, at most {config.batch_size} at a time on each of {processes.count()} process(es)"
        )
        if 0 < config.max_updates <= config.coarse_updates:
            self._tell(
                f"All {config.max_updates} updates are coarse (coarse_updates = {config.coarse_updates}): nothing is trained on the "
                f"{config.num_inference_steps} steps that are asked for. Give fewer coarse_updates, or more max_updates."
            )
        bar = tqdm(total=config.max_updates, initial=self.update, desc="training", bar_format=BAR, disable=not main)
        watched = 0 < config.eval_every <= config.max_updates
        if watched and self.monitor.base is None and self.update < config.max_updates:
            self._measure(tuned=False)
        if config.critic_trajectories and not self.warmed:
            self._warm_start()
        with Preemption() as preemption, global_generators_kept(), bar:
            while self.update < config.max_updates and self.monitor.over_limit() is None:
                started = time.perf_counter()
                seed_global_generators(5_000_003, config.seed, processes.index(), self.update)
                try:
                    metrics = self._step()
                except NonFiniteError as error:
                    self._skip(error)
                else:
                    self.update += 1
                    self.bad_in_a_row = 0
                    seconds = time.perf_counter() - started
                    self.seconds += seconds
                    rate, smooth = self.batch_size / seconds, metrics["objective"]
                    self.smooth = smooth if self.smooth is None else 0.9 * self.smooth + 0.1 * smooth
                    if self.log_partition is not None:
                        metrics["gap_estimate"] = self.log_partition - self.smooth
                    if self.bad_updates:
                        metrics["bad_updates"] = float(self.bad_updates)
                    last = self.update == config.max_updates
                    if watched and self.update > config.coarse_updates and (last or self.monitor.is_due(self.update)):
                        metrics |= self._measure()
                    self.history.append({"update": self.update, "seconds": self.seconds, **metrics})
                    if config.report_to != "none":
                        self.accelerator.log({**metrics, "samples_per_second": rate}, step=self.update)
                    shown = {"J": f"{self.smooth:.2f}", "reward": f"{metrics['reward']:.2f}", "KL": f"{metrics['kl']:.2f}"}
                    if self.log_partition is not None:
                        shown["gap~"] = f"{metrics['gap_estimate']:.2f}"
                    shown["samples/s"] = f"{rate:.3g}"
                    bar.set_postfix(shown, refresh=False)
                bar.update()
                is_best = self.monitor.best is not None and self.monitor.best["update"] == self.update
                if is_best or (config.checkpoint_every and self.update % config.checkpoint_every == 0):
                    self._save_checkpoint()
                if self.save_images is not None and config.sample_every and self.update % config.sample_every == 0:
                    self.save_images(self.update, self.policy)
                if processes.agree(preemption.asked is not None):
                    self._leave(preemption.asked)
        self._save_checkpoint()
        if (sentence := self.monitor.over_limit()) is not None:
            self._tell(sentence)
        if config.keep_best and (best := self.monitor.better_than_last()) is not None:
            self._keep(best)
        if config.report_to != "none":
            finish_trackers(self.accelerator)
        return self.history

    def _warm_start(self) -> None:
        """The control head's, on the main process, for all."""
        config, started = self.config, time.perf_counter()
        # tiny models on a CPU are drawn many at a time
        at_a_time = max(config.batch_size, AT_A_TIME) if self.accelerator.device.type == "cpu" else config.batch_size
        size, seed = (config.critic_trajectories, config.critic_updates), config.seed + 7_000_003
        with self.accelerator.autocast():
            self.warmed = processes.on_main(lambda: warm_start(self.policy, self.environment, *size, seed, at_a_time))
        processes.broadcast(parameter.data for parameter in self._named.values())
        self.seconds += time.perf_counter() - started

    def _tell(self, sentence: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(sentence)

    def _skip(self, error: NonFiniteError) -> None:
        """Counts an update that came to nothing; stops the training where there were too many in a row."""
        limit = self.config.max_bad_updates
        self.update += 1
        self.bad_updates += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row < limit:
            self._tell(f"Update {self.update} was skipped, {self.bad_in_a_row} in a row ({limit} stop the training): {error}.")
            return
        stopped_at = self.update
        self.update, self.bad_updates, self.bad_in_a_row = self.update - limit, self.bad_updates - limit, 0
        where = self._save_checkpoint()
        several = f"it and the {limit - 1} updates before met NaN or infinite numbers, the last time " if limit > 1 else ""
        raise TrainingStopped(
            f"Training stopped at update {stopped_at}: {several}{error}. The weights from before are in {where}."
        ) from error

    def _leave(self, signal_name: str | None) -> None:
        where = self._save_checkpoint()
        message = (
            f"{signal_name or 'A signal to another process'}: the checkpoint {where} is written; leaving with exit status "
            f"{EXIT_PREEMPTED}. resume_from latest goes on from there."
        )
        self.accelerator.print(message)
        if self.config.report_to != "none":
            finish_trackers(self.accelerator)
        raise Preempted(message)

    def _measure(self, tuned: bool = True) -> dict[str, float]:
        """J and what belongs to it on the fixed rows, for the history; or a look at the base."""
        config, accelerator = self.config, self.accelerator
        with global_generators_kept(), self.policy.merged(config.merge_lora), accelerator.autocast():
            seed_global_generators(6_000_003, config.seed, processes.index())  # for a scorer that draws: alike at every measurement
            found = measure(
                self.policy,
                self.environment,
                config.eval_trajectories,
                seed=config.seed,
                gammas=[config.gamma] if config.gamma_range is None else gamma_grid(tuple(config.gamma_range)),
                batch_size=config.batch_size,
                tuned=tuned,
            )
        if not tuned:
            self.monitor.take_base(found)
            return {}
        row, sentences = self.monitor.take(found, self.update, self.log_partition)
        for sentence in sentences:
            self._tell(sentence)
        return row

    def _keep(self, best: int) -> None:
        """Takes the weights of the best checkpoint, if it is whole."""

        def found() -> tuple[dict[str, torch.Tensor], str | None]:
            try:
                return part(read_checkpoint(checkpoint_folder(self._root, best)).tensors, "parameter."), None
            except ValueError as problem:
                return {}, f"The last weights are kept, though those of update {best} were better: {problem}"

        parameters, problem = processes.on_main(found)
        if problem is not None:
            return self._tell(problem)
        for name, parameter in self._named.items():
            parameter.data.copy_(parameters[name])
        self.best_kept = best
        self._tell(
            f"The weights are those of update {best}: J was {self.monitor.best['objective']:.2f} nats there, clearly above the last."
        )

    def learning_rate(self, update: int) -> float:
        """Fraction of the peak: linear warm-up, then a cosine to `lr_final`."""
        config = self.config
        warm = min(1.0, (update + 1) / max(config.lr_warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, update / config.max_updates)))
        return warm * (config.lr_final + (1 - config.lr_final) * cosine)

    def _step(self) -> dict[str, float]:
        """One update. Where it takes several optimizer steps and one fails, all are taken back."""
        if not self.config.reuses_trajectories:
            return self._update()
        weights = {p: p.detach().clone() for p in self._named.values()}
        optimizer, baseline = copy.deepcopy(self.optimizer.state_dict()), self.baseline
        learned = None if baseline is None else baseline.state()
        try:
            return self._update()
        except NonFiniteError:
            for parameter, value in weights.items():
                parameter.data.copy_(value)
            self.optimizer.load_state_dict(optimizer)
            self.baseline = baseline
            if baseline is not None:
                baseline.load(learned)
            raise

    def _update(self) -> dict[str, float]:
        config, device = self.config, self.accelerator.device
        environment = self.coarse if self.update < config.coarse_updates else self.environment
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.learning_rate(self.update)
        once, *each = batch_seeds(self.batch_size, config.seed, self.update)
        shared = torch.Generator(device).manual_seed(once)
        choice = environment.choose(self.batch_size, shared)
        passes = self._passes(environment, shared)

        def start(rows: range) -> tuple[Batch, TrajectoryNoise]:
            noise = TrajectoryNoise(each[rows.start : rows.stop], device)
            return environment.start(choice[rows.start : rows.stop], noise), noise

        micros = processes.rounds(self.batch_size, config.batch_size)
        work: Iterable[tuple[Batch, TrajectoryNoise, dict[str, Any]]]
        if config.reuses_trajectories:
            started = [start(rows) for rows in micros]
            if config.objective == "policy_gradient":
                kept = [{"experience": experience} for experience in self._experience(environment, started)]
            else:
                steps = [step for options in passes for step in options["steps"]]
                kept = [{"targets": targets} for targets in self._targets(environment, started, steps)]
            work = [(*one, own) for one, own in zip(started, kept, strict=True)]
        else:
            work = ((*start(rows), {}) for rows in micros)  # one pass: a micro-batch is made when its turn comes
        always = config.objective_options(self.at_a_time)
        found = [self._optimize(self._gradient(environment, work, len(micros), always | options)) for options in passes]
        return found[0]  # before the first of several optimizer steps the trajectories are the policy's own

    def _passes(self, environment: Environment, generator: torch.Generator) -> list[dict[str, Any]]:
        """The options of each optimizer step of an update that are drawn once for all of its batch: which steps it learns from."""
        config, count = self.config, len(environment.sampler.noisy_steps)
        if config.objective == "direct_backprop" and config.num_kl_steps is not None:
            return [{"kl_steps": random_steps(environment.sampler, config.num_kl_steps, generator, "num_kl_steps")}]
        if config.objective == "adjoint_matching":
            order = torch.tensor(random_steps(environment.sampler, config.regression_steps(count), generator))
            return [{"steps": part.tolist(), "coarse": config.coarse_adjoint} for part in order.tensor_split(config.adjoint_passes)]
        if config.objective != "policy_gradient":
            return [{}]
        passes = []
        for _ in range(config.ppo_epochs):
            order = torch.tensor(random_steps(environment.sampler, count, generator))
            passes += [{"steps": part.tolist()} for part in order.tensor_split(min(config.ppo_minibatches, count))]
        return passes

    def _gradient(
        self,
        environment: Environment,
        work: Iterable[tuple[Batch, TrajectoryNoise, dict[str, Any]]],
        count: int,
        options: dict[str, Any],
    ) -> dict[str, float]:
        """Adds this process's share to the gradient, `count` micro-batches; returns its share of the metrics."""
        totals: dict[str, float] = {}
        for micro, (batch, noise, own) in enumerate(work):
            share = len(batch) / self.batch_size
            with self._naming(micro, count), self.policy.merged(self.config.merge_lora):
                with self.accelerator.autocast():
                    loss, metrics = OBJECTIVES[self.config.objective](
                        self.policy, environment.sampler, batch, _agreed(environment), noise, **own, **options
                    )
                with processes.together(NonFiniteError):
                    if not torch.isfinite(loss):
                        raise NonFiniteError(f"the loss is {loss.item()}")
                self.accelerator.backward(loss * share)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value * share
        return totals

    def _experience(self, environment: Environment, started: list[tuple[Batch, TrajectoryNoise]]) -> list[Experience]:
        """policy_gradient's trajectories of each micro-batch."""
        lookahead = environment.log_likelihoods if self.config.lookahead_critic else None
        found = []
        for micro, (batch, noise) in enumerate(started):
            with self._naming(micro, len(started)), self.policy.merged(self.config.merge_lora), self.accelerator.autocast():
                found.append(collect(self.policy, environment.sampler, batch, _agreed(environment), noise, lookahead=lookahead))
        batches = [batch for batch, _ in started]
        return less_baseline(found, batches, self._baseline(environment), self.config.gae_lambda)

    def _targets(
        self, environment: Environment, started: list[tuple[Batch, TrajectoryNoise]], steps: list[int]
    ) -> Iterator[Targets]:
        """adjoint_matching's targets of each micro-batch, of all steps that any pass learns from."""
        for micro, (batch, noise) in enumerate(started):
            with self._naming(micro, len(started)), self.policy.merged(self.config.merge_lora), self.accelerator.autocast():
                yield collect_targets(
                    self.policy,
                    environment.sampler,
                    batch,
                    _agreed(environment),
                    noise,
                    steps=steps,
                    coarse=self.config.coarse_adjoint,
                    at_a_time=self.at_a_time,
                )

    def _baseline(self, environment: Environment) -> Baseline:
        shape = len(environment.labels), environment.num_prompts, len(environment.sampler.noisy_steps)
        features = 1 + len(environment.labels) if self.config.lookahead_critic else 0
        if self.baseline is None or (self.baseline.mean.shape, self.baseline.moments.shape[2]) != (shape, features):
            self.baseline = Baseline(*shape, features=features)
        self.baseline.gather = processes.gather_rows
        return self.baseline

    @contextlib.contextmanager
    def _naming(self, micro: int, count: int) -> Iterator[None]:
        """Adds the micro-batch to the message of a NaN, and leaves no half gradient."""
        try:
            yield
        except NonFiniteError as error:
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"in micro-batch {micro + 1} of {count}, {error}") from error

    def _optimize(self, totals: dict[str, float]) -> dict[str, float]:
        """One optimizer step from the gradients of all processes; the metrics with the gradient's norm."""
        config, accelerator = self.config, self.accelerator
        parameters = list(self._named.values())
        # not DistributedDataParallel: an objective calls the policy many times, and its reference, before one backward
        processes.sum_gradients(parameters)
        totals = dict(zip(totals, processes.sum_over(totals.values()), strict=True))
        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        # the norm is the same on all processes. fp16's scaler meets infinity while it looks for its scale, and skips the step itself
        finite, scaler = bool(torch.isfinite(torch.as_tensor(norm))), accelerator.scaler
        if finite or scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite and (scaler is None or scaler.get_scale() < 1):
            raise NonFiniteError(f"the gradient's norm is {float(norm)}")
        return {**totals, "grad_norm": float(norm)}

    # -- checkpoints --

    @property
    def _root(self) -> Path:
        return self.output_dir / "checkpoints"

    def _law(self, scheduler: Any) -> dict[str, Any]:
        """What is learned, beyond the config: the labels, the base and its scheduler."""
        frozen = [(name, value) for name, value in self.policy.denoiser.named_parameters() if not value.requires_grad]
        labels = [[None if math.isnan(value) else value for value in row] for row in self.environment.labels.tolist()]
        return {
            "label_space": self.policy.label_space.to_dict(),
            "labels": labels,
            "num_prompts": self.environment.num_prompts,
            "shape": list(self.environment.shape),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            "injection_site": self.policy.injection_site,
            "base": fingerprint(frozen, numbers=64),
        }

    def _settings(self) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        return settings | {"trajectories_per_update": self.batch_size}

    def _save_checkpoint(self) -> Path:
        monitor, folder = self.monitor, checkpoint_folder(self._root, self.update)
        if self.accelerator.is_main_process and self._saved != (self.update, monitor.measured_at):
            tensors = {f"monitor.{name}": value for name, value in monitor.tensors().items()}
            for name, parameter in self._named.items():
                tensors[f"parameter.{name}"] = parameter
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
            if self.baseline is not None:
                tensors |= {f"baseline.{name}": value for name, value in self.baseline.state().items()}
            state = {name: getattr(self, name) for name in STATE}
            state |= {"settings": self._settings(), "identity": self._identity, "monitor": monitor.state()}
            state["scaler"] = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            best = None if monitor.best is None else monitor.best["update"]
            write_checkpoint(self._root, state, tensors, keep=self.config.checkpoints_total_limit, best=best)
            self._point_to_best()
        self._saved = (self.update, monitor.measured_at)
        self.accelerator.wait_for_everyone()
        return folder

    def _point_to_best(self) -> None:
        """checkpoints/best.json, for people and scripts; training itself reads only what is in the checkpoints."""
        best = self.monitor.best
        if best is not None:
            named = {"checkpoint": checkpoint_folder(self._root, int(best["update"])).name, **best}
            write_file(self._root / "best.json", json.dumps(named, indent=2) + "\n")

    def _resume(self, name: str) -> None:
        """Takes up a checkpoint, which the main process reads for all."""

        def found() -> tuple[Checkpoint | None, list[str], str | None]:
            try:
                if name != "latest":
                    checkpoint, damaged = read_checkpoint(Path(name)), []
                else:
                    checkpoint, damaged = read_latest(self._root)
                if checkpoint is None:
                    return (
                        None,
                        [f"resume_from latest: there is no checkpoint in {self._root} yet; the run starts from the beginning."],
                        None,
                    )
                told = [f"{sentence} The one before it is used." for sentence in damaged]
                return checkpoint, told + self._check(checkpoint), None
            except ValueError as problem:
                return None, [], str(problem)

        checkpoint, told, problem = processes.on_main(found)
        if problem is not None:
            raise ValueError(problem)
        for sentence in told:
            self._tell(sentence)
        if checkpoint is not None:
            self._load(checkpoint)
            self.accelerator.print(f"resumed from {checkpoint.folder} at update {self.update}")

    def _check(self, found: Checkpoint) -> list[str]:
        return check_resumable(found, self._settings(), self._identity, self._named, LAW, asdict(CTRLConfig()))

    def _load(self, found: Checkpoint) -> None:
        tensors, state = found.tensors, found.state
        for name, parameter in self._named.items():
            parameter.data.copy_(tensors[f"parameter.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                with contextlib.suppress(KeyError):
                    value = tensors[f"optimizer.{key}.{name}"]
                    self.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        if learned := part(tensors, "baseline."):
            self.baseline = Baseline(*learned["mean"].shape)
            self.baseline.load(learned)
        self.monitor.load(state["monitor"], part(tensors, "monitor."))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in STATE:
            setattr(self, name, state.get(name, getattr(self, name)))  # what an older checkpoint does not have is as at the start
        if found.folder == checkpoint_folder(self._root, self.update):
            self._saved = (self.update, self.monitor.measured_at)
            if self.accelerator.is_main_process:
                self._point_to_best()  # the run may have ended between the two


# the plain numbers of a trainer that its checkpoints keep
STATE = ("update", "seconds", "warmed", "smooth", "bad_updates", "bad_in_a_row", "history")


def _agreed(environment: Environment) -> LogLikelihood:
    """The environment's log-likelihood; a NaN that one process meets is met by all, before they next wait for each other."""

    def log_likelihood(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        reward = environment.log_likelihood(x, labels)
        with processes.together(NonFiniteError):
            return checked(reward)

    return log_likelihood
