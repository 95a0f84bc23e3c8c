"""A run that is killed at any moment and resumed has the same weights, bit for bit, as one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from survivor import Run
from test_cli import settings as smoke_settings

from diffusers_ctrl.adapters import load_adapter
from diffusers_ctrl.checkpoints import find_checkpoints, read_checkpoint
from diffusers_ctrl.preemption import EXIT_PREEMPTED, FAILED_NAME, MARK_NAME, Preempted, marked


ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "adjoint_matching": {"objective": "adjoint_matching", "num_regression_steps": 3, "gradient_accumulation_steps": 2},
    "adjoint_matching, twice": {"objective": "adjoint_matching", "num_regression_steps": 2, "adjoint_passes": 2},
    "direct_backprop": {"objective": "direct_backprop", "coarse_updates": 5, "coarse_steps": 4},
    "policy_gradient": {"objective": "policy_gradient", "lookahead_critic": True, "gae_lambda": 0.5, "gamma_range": [0.5, 2.0]},
    "policy_gradient from coarse": {"objective": "policy_gradient", "coarse_updates": 5, "coarse_steps": 4, "ppo_epochs": 1},
    "bf16": {"objective": "adjoint_matching", "mixed_precision": "bf16"},
}
TIMES = ("seconds",)


def timeless(value):
    """The same JSON without the seconds, the only thing that two runs may differ in."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def assert_same_end(folder: Path, whole: Path) -> None:
    """Weights, optimizer, baseline, measurements and history at the end, and the checkpoints that are left."""
    ours, theirs = find_checkpoints(folder / "checkpoints"), find_checkpoints(whole / "checkpoints")
    assert [path.name for path in ours] == [path.name for path in theirs]
    found, wanted = read_checkpoint(ours[-1]), read_checkpoint(theirs[-1])
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, value in wanted.tensors.items():
        assert torch.equal(found.tensors[name], value), name
    assert timeless(found.state) == timeless(wanted.state)
    best = [json.loads((path / "checkpoints" / "best.json").read_text()) for path in (folder, whole)]
    assert best[0] == best[1]
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.previous"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of the cases, each run once. A run has 10 updates and writes 6 checkpoints, at 3, 4, 6, 8, 9 and 10 or fewer."""
    done = {}

    def get(case: str) -> Path:
        if case not in done:
            folder = tmp_path_factory.mktemp("whole")
            assert Run(folder, CASES[case]).join() == [0]
            done[case] = folder
        return done[case]

    return get


def kill_once(folder: Path, settings: dict, chance: random.Random) -> None:
    """One random moment: between the beginning of an update and the next, or at a file operation inside a checkpoint's write."""
    if chance.random() < 0.4:
        run = Run(folder, settings, write=(chance.randrange(3), chance.randrange(30)))
        run.join()  # ends by itself; where a write has fewer operations, a later moment is as good
        return
    run = Run(folder, settings)
    if run.reach(chance.randrange(10)):
        time.sleep(chance.random() * 0.05)
        run.kill()
    run.join()


def survives(case: str, folder: Path, whole: Path, seed: int, kills: int) -> int:
    """Kills a run so many times at random moments, and resumes it to the end. How many kills hit it."""
    chance, hits = random.Random(seed), 0
    for _ in range(kills):
        kill_once(folder, CASES[case], chance)
        hits += not (folder / "checkpoints" / "checkpoint-000010").is_dir()
    assert Run(folder, CASES[case]).join() == [0]
    assert_same_end(folder, whole)
    return hits


@pytest.mark.parametrize("case", [case for case in CASES if "from coarse" not in case])
def test_killed_and_resumed_is_uninterrupted(case, whole, tmp_path):
    assert survives(case, tmp_path, whole(case), seed=len(case), kills=2) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_20_random_moments(case, whole, tmp_path):
    """20 runs of each case, each killed at one random moment and resumed: 20 of 20 are the same, bit for bit."""
    hits = sum(survives(case, tmp_path / str(seed), whole(case), seed, kills=1) for seed in range(20))
    assert hits >= 10  # the others were over before the moment came
    print(f"{case}: 20 of 20 bit-identical, {hits} killed before their last checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_20_times_in_one_run(case, whole, tmp_path):
    survives(case, tmp_path, whole(case), seed=1, kills=20)


# -- preemption --


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_run_leaves_a_checkpoint_of_the_update_it_was_in(number, whole, tmp_path):
    case = "adjoint_matching"
    run = Run(tmp_path, CASES[case] | {"checkpoint_every": 100})
    assert run.reach(2)
    os.kill(run.processes[0].pid, number)
    assert run.join() == [EXIT_PREEMPTED] == [75]
    (folder,) = find_checkpoints(tmp_path / "checkpoints")
    assert read_checkpoint(folder).state["update"] >= 3
    assert Run(tmp_path, CASES[case]).join() == [0]
    assert_same_end(tmp_path, whole(case))


# -- several processes --


TWO = {"objective": "policy_gradient", "batch_size": 4, "scorer": "plain"}


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run = Run(folder, TWO, ranks=2)
    assert run.join() == [0, 0] and len(set(run.digests)) == 1
    return folder


def test_one_process_is_asked_and_all_leave_at_the_same_update(whole_of_two, tmp_path):
    run = Run(tmp_path, TWO | {"checkpoint_every": 0, "eval_every": 0}, ranks=2)
    assert run.reach(2)
    os.kill(run.processes[1].pid, signal.SIGUSR1)
    assert run.join() == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    (folder,) = find_checkpoints(tmp_path / "checkpoints")
    assert 3 <= read_checkpoint(folder).state["update"] < 10
    resumed, plain = Run(tmp_path, TWO | {"eval_every": 0}, ranks=2), Run(tmp_path / "plain", TWO | {"eval_every": 0}, ranks=2)
    assert resumed.join() == plain.join() == [0, 0]
    assert len({*resumed.digests, *plain.digests}) == 1


def test_two_processes_are_killed_and_resumed(whole_of_two, tmp_path):
    run = Run(tmp_path, TWO, ranks=2)
    assert run.reach(6)
    run.kill()
    assert run.join() == [-signal.SIGKILL] * 2
    assert Run(tmp_path, TWO, ranks=2).join() == [0, 0]
    assert_same_end(tmp_path, whole_of_two)


def test_a_nan_on_one_process_is_skipped_on_both(tmp_path):
    """And three in all, two of them in a row, do not stop a run that may have two."""
    run = Run(tmp_path, TWO | {"scorer": "nan_on_one", "eval_every": 0, "max_bad_updates": 3}, ranks=2)
    assert run.join() == [0, 0] and len(set(run.digests)) == 1
    state = read_checkpoint(find_checkpoints(tmp_path / "checkpoints")[-1]).state
    assert [row["update"] for row in state["history"]] == [1, 4, 5, 7, 8, 9, 10] and state["bad_updates"] == 3


# -- the command itself --


@pytest.fixture
def command(sd_folder, tmp_path):
    """Starts training/train_ctrl.py with a smoke config in a process of its own."""

    def start(name: str, launcher=(), **changes) -> subprocess.Popen:
        config = smoke_settings(
            sd_folder, tmp_path / name, **{"max_updates": 8, "eval_every": 3, "objective": "policy_gradient", **changes}
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        script = [*launcher, str(ROOT / "training" / "train_ctrl.py"), "--config", str(path), "--resume_from", "latest"]
        log = (tmp_path / f"{name}.log").open("a")
        return subprocess.Popen([sys.executable, *script], env=environment, cwd=tmp_path, stdout=log, stderr=log)

    return start


def same_adapters(one: Path, other: Path) -> None:
    ours, theirs = load_adapter(one), load_adapter(other)
    assert ours.lora.keys() == theirs.lora.keys() and all(torch.equal(ours.lora[key], theirs.lora[key]) for key in theirs.lora)
    for name in ("label_encoder", "classifier"):
        found, wanted = getattr(ours, name).state_dict(), getattr(theirs, name).state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), f"the process ended with {process.poll()} before"


def updates_shown(log: Path) -> int:
    """How often a progress bar has shown J, which it does after an update."""
    return log.read_text().count(", J=") + log.read_text().count("[J=") if log.is_file() else 0


@pytest.mark.slow
def test_the_command_is_killed_and_resumed(command, tmp_path, datasets_cache):
    """While the classifier is fitted, before the first checkpoint, twice between updates, and while it evaluates."""
    whole = command("whole")
    assert whole.wait() == 0
    output = tmp_path / "cut"
    moments = [
        lambda: (output / "classifier").is_dir(),
        lambda: (output / "classifier" / "calibration.json").is_file(),
        lambda: (output / "checkpoints" / "checkpoint-000002").is_dir(),
        lambda: (output / "checkpoints" / "checkpoint-000005").is_dir(),
        lambda: (output / "checkpoints" / "checkpoint-000008").is_dir(),
    ]
    for moment in moments:
        run = command("cut")
        wait_for(moment, run)
        run.kill()
        run.wait()
    assert command("cut").wait() == 0
    same_adapters(output, tmp_path / "whole")
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("cut", "whole")]
    for name in ("log_partition", "base_log_partition", "objective", "gap", "weights_of_update", "updates"):
        assert metrics[0][name] == metrics[1][name], name
    log = (tmp_path / "cut.log").read_text()
    assert "there is no checkpoint" in log and "resumed from" in log


@pytest.mark.slow
def test_the_command_leaves_at_once_where_there_is_nothing_to_save(command, tmp_path, datasets_cache):
    """While it draws the base's samples, say. Nothing is lost that is not simply done again."""
    run = command("early", base_samples=30_000)
    wait_for(lambda: "base samples:" in (tmp_path / "early.log").read_text(), run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == EXIT_PREEMPTED
    assert "SIGTERM arrived" in (tmp_path / "early" / MARK_NAME).read_text()
    assert not (tmp_path / "early" / "checkpoints").exists()


@pytest.mark.slow
def test_torchrun_hands_the_request_on(command, tmp_path, datasets_cache):
    """With two processes under torchrun: both leave, and the mark says so, since torchrun ends with a status of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = command("launched", launcher, checkpoint_every=0, max_updates=200)
    wait_for(lambda: updates_shown(tmp_path / "launched.log") > 0, run)
    run.terminate()
    assert run.wait(120) != 0
    assert "resume_from latest goes on" in (tmp_path / "launched" / MARK_NAME).read_text()
    (folder,) = find_checkpoints(tmp_path / "launched" / "checkpoints")
    assert 0 < read_checkpoint(folder).state["update"] < 200


FAILS = """
import sys, time
from pathlib import Path
from diffusers_ctrl import processes
from diffusers_ctrl.preemption import Preemption, marked
with Preemption(at_once=True), marked(Path(sys.argv[1])):
    processes.make_state().wait_for_everyone()
    if processes.index() == 1:
        raise RuntimeError("no room")
    time.sleep(60)
"""


def test_leaving_because_another_process_failed_is_no_preemption(tmp_path):
    """The launcher asks the others to leave as a cluster would; a job script that starts preempted runs again must not go on for ever."""
    script, out = tmp_path / "fails.py", tmp_path / "run"
    script.write_text(FAILS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, str(script), str(out)], env=environment, capture_output=True, timeout=300)
    assert run.returncode != 0
    assert [path.name for path in out.iterdir()] == [FAILED_NAME]
    assert (out / FAILED_NAME).read_text() == "process 1: RuntimeError: no room\n"
    # what an earlier start left says nothing of this one
    os.utime(out / FAILED_NAME, (0, 0))
    with pytest.raises(Preempted), marked(out):
        raise Preempted("SIGTERM arrived")
    assert [path.name for path in out.iterdir()] == [MARK_NAME]
    with pytest.raises(RuntimeError), marked(out):  # one process alone ends with its error
        raise RuntimeError("no room")
    assert not list(out.iterdir())


@pytest.mark.slow
def test_the_command_leaves_when_asked(command, tmp_path, datasets_cache):
    whole = command("whole")
    assert whole.wait() == 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        run = command("asked", checkpoint_every=0)
        done = updates_shown(tmp_path / "asked.log")
        wait_for(lambda done=done: updates_shown(tmp_path / "asked.log") > done, run)
        run.send_signal(number)
        assert run.wait() == EXIT_PREEMPTED
        assert "resume_from latest goes on" in (tmp_path / "asked" / MARK_NAME).read_text()
    assert command("asked", checkpoint_every=0).wait() == 0
    assert not (tmp_path / "asked" / MARK_NAME).exists()
    same_adapters(tmp_path / "asked", tmp_path / "whole")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
