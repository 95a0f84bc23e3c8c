"""A training run in a process of its own, small enough to be killed often, and what is needed to kill it at a chosen moment.

Processes are forked from a server that has imported everything, so that one costs a moment. What ends them is a real SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from diffusers_ctrl import Categorical, CTRLConfig, CTRLTrainer, LabelSpace, Policy, checkpoints, processes
from problems import GaussianDenoiser, GaussianLikelihood, cosine_scheduler


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["survivor", "pytest"])  # with pytest, which a child looks for as its main module
SEARCHED = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])


def started(target: Callable[..., None], *args: Any) -> multiprocessing.Process:
    """A process forked from the server. The first one starts the server, which finds this module by the environment only."""
    process, before = PROCESSES.Process(target=target, args=args), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = SEARCHED
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.__setitem__("PYTHONPATH", before)
    return process


def noisy(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A scorer that draws from the global generators, as one with random crops would."""
    shift = 0.01 * (torch.randn(()) + random.random())
    return GaussianLikelihood((-0.4, 1.0), 0.6)(x + shift, labels)


def build(folder: Path, reward=noisy, **settings: Any) -> CTRLTrainer:
    """Ten updates on a Gaussian prior and likelihood, with checkpoints, evaluations and everything that has a state."""
    torch.manual_seed(0)
    scheduler = cosine_scheduler()
    policy = Policy(
        GaussianDenoiser(0.3, 0.8, scheduler),
        label_space=LabelSpace(y=Categorical(("low", "high"))),
        lora_rank=1,
        lora_targets=["slope", "shift", "linear_2"],
    )
    config = CTRLConfig(
        **{
            "output_dir": str(folder),
            "num_inference_steps": 8,
            "batch_size": 8,
            "max_updates": 10,
            "checkpoint_every": 3,
            "checkpoints_total_limit": 2,
            "eval_every": 4,
            "eval_trajectories": 16,
            "sample_every": 0,
            "learning_rate": 1e-2,
            "report_to": "none",
            **settings,
        }
    )
    return CTRLTrainer(policy, scheduler, reward, config, shape=(1,))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Ends the process at the n-th file operation of a checkpoint's write: before it, or with a half-written file."""

    def __init__(self, operation: int) -> None:
        self.left, self.inside = operation, False

    def tick(self, half: Path | None = None) -> None:
        if self.inside:
            self.left -= 1
            if self.left < 0:
                if half is not None:
                    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
                die()

    def install(self, skip: int = 0) -> None:
        """skip: writes that are let through before."""

        def wrapped(owner: Any, name: str, file: int | None = None) -> None:
            original = getattr(owner, name)

            def call(*args, **kwargs):
                self.tick()
                result = original(*args, **kwargs)
                if file is not None:
                    self.tick(Path(args[file]))
                return result

            setattr(owner, name, call)

        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
            wrapped(os, name)
        wrapped(shutil, "rmtree")
        wrapped(checkpoints, "save_file", 1)
        wrapped(Path, "write_text", 0)
        write, calls = checkpoints.write_checkpoint, [0]

        def counted(*args, **kwargs):
            calls[0] += 1
            self.inside = calls[0] > skip
            try:
                return write(*args, **kwargs)
            finally:
                self.inside = False

        checkpoints.write_checkpoint = counted
        from diffusers_ctrl import trainer

        trainer.write_checkpoint = counted


def write_until(root: str, arguments: dict[str, Any], operation: int) -> None:
    """One write of a checkpoint that is killed at an operation; ends with 7 where it has fewer."""
    torch.set_num_threads(1)
    Countdown(operation).install()
    checkpoints.write_checkpoint(Path(root), **arguments)
    os._exit(7)


def nan_on_one(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A scorer that fails on one process, and there three times."""
    nan_on_one.calls = getattr(nan_on_one, "calls", 0) + 1
    bad = processes.index() == 1 and nan_on_one.calls in (2, 3, 6)
    return GaussianLikelihood((-0.4, 1.0), 0.6)(x, labels) * (float("nan") if bad else 1.0)


SCORERS = {"noisy": noisy, "nan_on_one": nan_on_one, "plain": GaussianLikelihood((-0.4, 1.0), 0.6)}


def train(
    folder: str, settings: dict[str, Any], write: tuple[int, int] | None, pipe: Any, rank: int = 0, ranks: int = 1, port: int = 0
) -> None:
    """A run from the latest checkpoint, which sends the number of each update before it begins, and its weights' digest at the end.

    write: (writes, operation) to die at. rank, ranks, port: of several processes.
    """
    torch.set_num_threads(1)
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    if write is not None:
        Countdown(write[1]).install(skip=write[0])
    settings = {"resume_from": "latest", **settings}
    trainer = build(Path(folder), SCORERS[settings.pop("scorer", "noisy")], **settings)
    step = trainer._step

    def announced():
        pipe.send(trainer.update)
        return step()

    trainer._step = announced
    trainer.train()
    pipe.send(checkpoints.fingerprint(trainer._named.items()))


class Run:
    """A run that may be ended in the middle: of one process, or of several that train together."""

    def __init__(self, folder: Path, settings: dict[str, Any], write: tuple[int, int] | None = None, ranks: int = 1) -> None:
        self.pipes, self.processes, self.digests = [], [], []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            pipe, other = PROCESSES.Pipe(duplex=False)
            self.processes.append(started(train, str(folder), settings, write, other, rank, ranks, port))
            other.close()
            self.pipes.append(pipe)

    def reach(self, update: int) -> bool:
        """Waits until the first process begins this update; False if it ended before."""
        try:
            while (found := self.pipes[0].recv()) != update:
                if isinstance(found, str):
                    self.digests.append(found)
        except EOFError:
            return False
        return True

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def join(self) -> list[int]:
        """The exit codes, negative for a signal; `digests` has the fingerprints of the weights that the processes ended with."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                while True:
                    if isinstance(found := pipe.recv(), str):
                        self.digests.append(found)
            except EOFError:
                process.join(60)
        return [process.exitcode for process in self.processes]
