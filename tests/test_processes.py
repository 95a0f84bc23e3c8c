"""n processes compute what one computes: gradients, weights, samples, certificates; on CPU over gloo, launched as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import process_worker
import pytest
import torch
from process_worker import OBJECTIVES, make_trainer, sampling, trained, training
from safetensors.torch import load_file

from diffusers_ctrl import processes
from diffusers_ctrl.randomness import TrajectoryNoise, batch_seeds


WORKER = Path(process_worker.__file__)
ROOT = WORKER.parents[1]


def launch(count: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def load(folder: Path, name: str, count: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}-{index}.safetensors") for index in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process computes."""
    return training(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"processes-{request.param}")
    launch(request.param, str(WORKER), str(folder))
    return folder, request.param


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def compare(found: list[dict[str, torch.Tensor]], alone: dict[str, torch.Tensor]) -> dict[str, float]:
    """Raises AssertionError unless all processes end alike, and as one process does."""
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), f"{name} has drifted apart"
    assert set(found[0]) == set(alone)
    errors = {}
    for name, value in found[0].items():
        errors[name] = off(value, alone[name])
        if name.endswith("gradients"):
            # the first is taken at the same weights; Adam may stretch a rounding error in the later ones of policy_gradient
            first = off(value[0], alone[name][0])
            assert first < 1e-6 and errors[name] < 1e-5, f"{name} is off by {first}, {errors[name]}"
        assert errors[name] < 1e-4, f"{name} is off by {errors[name]}"
    return errors


def test_gradients_and_weights_are_those_of_one_process(several, alone):
    compare(load(several[0], "training", several[1]), alone)


@pytest.mark.parametrize("left_out", ["lora", "label_encoder"])
def test_the_comparison_notices_a_group_that_is_not_synchronised(several, tmp_path, left_out):
    alone = trained("gaussian", tmp_path, objective="adjoint_matching", max_updates=2)
    found = [
        {name.removeprefix(f"{left_out}/"): value for name, value in process.items() if name.startswith(f"{left_out}/")}
        for process in load(several[0], "half", several[1])
    ]
    with pytest.raises(AssertionError, match="gradients has drifted apart"):
        compare(found, alone)
    for process in found:  # at the main process alone it shows too: there the gradient is only a part
        with pytest.raises(AssertionError, match="gradients is off by"):
            compare([process], alone)


def test_samples_certificates_and_grids_are_those_of_one_process(several, tmp_path):
    found, alone = load(several[0], "sampling", several[1]), sampling(tmp_path)
    assert set(found[0]) == set(alone)
    for name, value in alone.items():
        if not value.is_floating_point():
            assert torch.equal(found[0][name], value), name
        else:
            torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-9, msg=name, equal_nan=True)
    # images are on the main process only; the numbers, and what is computed from them, on all
    images = {name for name in alone if name.endswith("images")} | {"rows"}
    for other in found[1:]:
        assert set(other) == set(alone) - images
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_log_z_of_unequal_shards_is_not_a_mean_of_logs(several):
    """What the processes agree on is the log of the mean over all samples; their own logs, averaged, are another number."""
    drawn = load(several[0], "sampling", several[1])[0]
    log_w = 1.3 * drawn["samples/True/log_likelihood"] - drawn["samples/True/log_ratio"]
    shards = [len(part) for part in log_w.tensor_split(several[1])]
    assert len(set(shards)) > 1
    whole = log_w.logsumexp(0) - torch.tensor(float(len(log_w))).log()
    means = torch.stack([part.logsumexp(0) - torch.tensor(float(len(part))).log() for part in log_w.tensor_split(several[1])])
    assert abs(means.mean() - whole) > 1e-3


# -- one process --


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_make_no_difference(tmp_path, objective):
    whole = trained("gaussian", tmp_path, max_updates=3, global_batch_size=8, batch_size=8, **OBJECTIVES[objective])
    for settings in (
        {"global_batch_size": None, "batch_size": 1, "gradient_accumulation_steps": 8},
        {"global_batch_size": 8, "batch_size": 3},
    ):
        compare([trained("gaussian", tmp_path, max_updates=3, **settings, **OBJECTIVES[objective])], whole)


def test_trajectories_do_not_depend_on_the_size_of_the_batch():
    seeds = batch_seeds(6, 3, 17)
    assert batch_seeds(4, 3, 17) == seeds[:5] and len(set(seeds) | set(batch_seeds(6, 3, 18))) == 14
    whole, part = TrajectoryNoise(seeds[1:]), TrajectoryNoise(seeds[3:5])
    drawn = []
    for step in range(TrajectoryNoise.AHEAD + 3):  # some steps are drawn ahead, the next ones another time
        shape, dtype = ((2, 3), torch.float64) if step < 5 else ((4,), torch.float32)
        drawn.append(whole.normal((6, *shape), dtype))
        assert torch.equal(drawn[-1][2:4], part.normal((2, *shape), dtype)) and drawn[-1].dtype == dtype
    numbers = torch.cat([x.flatten() for x in drawn]).double()
    assert len(numbers.unique()) == len(numbers)
    assert abs(numbers.mean()) < 4 / len(numbers) ** 0.5 and abs(numbers.std() - 1) < 4 / (2 * len(numbers)) ** 0.5
    with pytest.raises(ValueError, match="There are 2 trajectories, and noise was asked for 3"):
        part.normal((3, 4), torch.float32)


def test_shares_are_even_and_in_order(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 4)
    dealt = []
    for index in range(4):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        dealt.append(list(processes.share(10)))
    assert sum(dealt, []) == list(range(10)) and [len(part) for part in dealt] == [3, 3, 2, 2]


def test_batches_that_cannot_be_dealt_out_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="global_batch_size must be at least 1, got 0"):
        make_trainer("gaussian", tmp_path, global_batch_size=0)
    with pytest.raises(ValueError, match="Give global_batch_size or gradient_accumulation_steps, not both"):
        make_trainer("gaussian", tmp_path, gradient_accumulation_steps=2)
    monkeypatch.setattr(processes, "count", lambda: 12)
    with pytest.raises(ValueError, match="global_batch_size = 10 leaves some of the 12 processes without work"):
        make_trainer("gaussian", tmp_path)
