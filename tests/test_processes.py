"""n processes compute what one computes: gradients, weights, samples, certificates; on CPU over gloo, launched as a user would."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import process_worker
import pytest
import torch
from accelerate import Accelerator, DistributedType
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


def test_a_base_that_is_dealt_out_to_the_processes_gives_the_same(several, alone):
    part = {name: value for name, value in alone.items() if name.startswith("unet/")}
    compare(load(several[0], "sharded", several[1]), part)


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


@pytest.mark.parametrize("name", ["sampling", "sampling-sharded"])
def test_samples_certificates_and_grids_are_those_of_one_process(several, tmp_path, name):
    found, alone = load(several[0], name, several[1]), sampling(tmp_path)
    assert set(found[0]) == set(alone)
    for name, value in alone.items():
        if not value.is_floating_point():
            assert torch.equal(found[0][name], value), name
        else:
            torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-9, msg=name, equal_nan=True)
    # images are on the main process only; the numbers, and what is computed from them, on all
    images = {name for name in alone if name.endswith("images")} | {"rows", "baked"}
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


@pytest.mark.parametrize("count", [2, 3, 4])
def test_calls_are_as_many_on_every_process(count, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: count)
    for total, size, at_a_time in itertools.product(range(1, 30), range(1, 9), range(1, 9)):
        if total // count < -(-total // (count * size)) or at_a_time > size:
            continue  # a process without work, which the trainer refuses; or all at once
        rows = processes.cut_alike(total, size, at_a_time)
        calls = []
        for index in range(count):
            monkeypatch.setattr(processes, "index", lambda index=index: index)
            calls.append([-(-len(own) // rows) for own in processes.rounds(total, size)])
        assert calls == [calls[0]] * count and 0 not in calls[0]
        assert rows == at_a_time or total % count  # nothing else where all have as many
        assert rows <= max(at_a_time, size)
    assert processes.cut_alike(5, 4, None) is None and processes.cut_alike(8 * count, 4, 2) == 2


def test_what_the_launcher_says_of_precision_is_not_passed_over(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match="mixed_precision is no, whatever the launcher says .bf16.: give --mixed_precision bf16"):
        processes.make_accelerator(mixed_precision="no")


def test_processes_wait_long_for_each_other(tmp_path):
    """Whatever makes the group: one of them may have all the work of an interrupted dataset."""
    script = tmp_path / "patience.py"
    script.write_text(
        "import sys, torch.distributed as dist\nfrom diffusers_ctrl import processes\nprocesses.make_state()\n"
        "assert dist.group.WORLD._get_backend(processes.torch.device('cpu')).options._timeout == processes.PATIENCE\n"
    )
    launch(2, str(script))


def test_batches_that_cannot_be_dealt_out_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="global_batch_size must be at least 1, got 0"):
        make_trainer("gaussian", tmp_path, global_batch_size=0)
    with pytest.raises(ValueError, match="Give global_batch_size or gradient_accumulation_steps, not both"):
        make_trainer("gaussian", tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="merge_lora needs the base's weights whole"):
        make_trainer("gaussian", tmp_path, merge_lora=True, shard_base=True)
    monkeypatch.setattr(processes, "count", lambda: 12)
    with pytest.raises(ValueError, match="global_batch_size = 10 leaves one of 12 processes without work"):
        make_trainer("gaussian", tmp_path)
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(ValueError, match="global_batch_size = 10 leaves one of 4 processes without work at batch_size = 1"):
        make_trainer("gaussian", tmp_path, batch_size=1)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_wrappers_that_want_a_whole_model_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError, match=f"distributed_type {kind.value} of the accelerate config .* --shard_base true"):
        make_trainer("gaussian", tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_float32_whatever_the_base_is_stored_in(tmp_path, dtype):
    """A step is far below what bfloat16 or float16 can tell apart at these weights, and still moves all of them."""
    trainer = make_trainer("unet", tmp_path, dtype=dtype, learning_rate=1e-6, label_learning_rate=1e-6)
    before = {name: parameter.detach().clone() for name, parameter in trainer._named.items()}
    base = [p for p in trainer.policy.denoiser.parameters() if not p.requires_grad]
    trainer._step()
    assert {p.dtype for p in base} == {dtype}
    assert {p.dtype for p in trainer._named.values()} == {torch.float32}
    assert {value.dtype for state in trainer.optimizer.state.values() for value in state.values()} == {torch.float32}
    for name, parameter in trainer._named.items():
        moved = (parameter - before[name]).abs()
        assert 0 < moved.max() < 1e-6, name
        assert torch.equal(parameter.to(dtype), before[name].to(dtype)) or moved.max() < torch.finfo(dtype).eps * 0.05


# -- the commands, launched as a user would --

CONFIGS = ROOT / "training" / "configs" / "accelerate"
LABELLER = "def parity(images):\n    return (images.flatten(1).sum(1) * 10).long() % 2\n"
COMMANDS = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import evaluate, train_classifier, train_ctrl
from diffusers_ctrl import processes
report = train_classifier.main({train!r})  # the same classifier as the training's own
train_ctrl.main({train!r})
processes.on_main(lambda: None)  # the adapter is written
evaluate.main({evaluate!r})
Path({out!r}, f"process-{{processes.index()}}-of-{{processes.count()}}").touch()
"""


def commands(folder: Path, base: Path) -> str:
    """A script that trains and then evaluates, on a dataset that is drawn from the base first."""
    (folder / "own_labeller.py").write_text(LABELLER)
    options = {
        "base": base,
        "attribute": "parity",
        "dataset": "base-samples",
        "labeller": "own_labeller:parity",
        "label_names": "even odd",
        "num_labels": 70,  # two shards
        "prompts": "one two",
        "classifier_size": 8,
        "classifier_widths": "4 4",
        "classifier_epochs": 2,
        "classifier_members": 2,
        "eval_samples": 5,
        "base_samples": 14,
        "num_inference_steps": 4,
        "lora_rank": 2,
        "batch_size": 2,
        "global_batch_size": 5,
        "max_updates": 2,
        "gamma_range": "0.5 2",
        "sample_every": 2,
        "report_to": "tensorboard",
    }
    (folder / "empty.yaml").write_text("{}\n")
    arguments = ["--config", str(folder / "empty.yaml")]
    for name, value in options.items():
        arguments += [f"--{name}", *str(value).split()]
    script = COMMANDS.format(
        paths=[str(folder), str(ROOT / "training")],
        train=[*arguments, "--output_dir", str(folder / "run")],
        evaluate=["--adapter", str(folder / "run"), *arguments, "--output_dir", str(folder / "again")],
        out=str(folder),
    )
    (folder / "script.py").write_text(script)
    return str(folder / "script.py")


def accelerate(config: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *arguments]


def written(folder: Path) -> list[str]:
    """The files of a run; trackers name theirs by time and process."""
    files = [path for path in folder.rglob("*") if path.is_file() and "process-" not in path.name]
    return sorted(re.sub(r"ctrl/[\d.]+/|tfevents.*", "", str(path.relative_to(folder))) for path in files)


def test_training_and_evaluation_on_two_processes_are_those_on_one(tmp_path, sd_folder):
    results = []
    for config in ("single.yaml", "cpu_2.yaml"):
        folder = tmp_path / config
        folder.mkdir()
        # one thread in both: sums are then taken in the same order
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *accelerate(config, commands(folder, sd_folder))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "5 trajectories an update, at most 2 at a time" in done.stdout
        results.append(folder)
    one, two = results
    assert sorted(path.name for path in two.glob("process-*")) == ["process-0-of-2", "process-1-of-2"]
    assert (one / "process-0-of-1").is_file()
    assert written(one) == written(two) and any("events" in name for name in written(one))
    assert len(list((two / "run").rglob("*.parquet"))) == 2
    for path in sorted((two / "run").rglob("*.parquet")):
        assert path.read_bytes() == (one / path.relative_to(two)).read_bytes()
    fitted = "classifier/diffusion_pytorch_model.safetensors"
    assert (two / "run" / fitted).read_bytes() == (one / "run" / fitted).read_bytes()
    for name in ("pytorch_lora_weights", "label_encoder/diffusion_pytorch_model"):
        found, expected = (load_file(folder / "run" / f"{name}.safetensors") for folder in (two, one))
        for key, value in expected.items():
            # the first gradient is tiny here, and Adam stretches it and its rounding alike
            assert off(found[key], value) < 5e-3 if value.any() else not found[key].any(), f"{name} {key}"
    for name in ("run", "again"):
        found, expected = (json.loads((folder / name / "metrics.json").read_text()) for folder in (two, one))
        assert set(found) == set(expected) and any(key.startswith("by_gamma.") for key in found)
        for key, value in expected.items():
            if isinstance(value, float) and not key.startswith("seconds"):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), key


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_accelerate_takes_the_configs(config, monkeypatch):
    """As far as a machine without GPUs can go: accelerate reads the file and makes of it the command that would start the processes."""
    from accelerate.commands import launch

    arguments = launch.launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "train_ctrl.py"])
    started = []
    for launcher in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, launcher, lambda args, launcher=launcher: started.append((launcher, args)))
    launch.launch_command(arguments)
    ((launcher, args),) = started
    count = {"single.yaml": 1, "cpu_2.yaml": 2, "multi_gpu.yaml": 8, "multi_node.yaml": 32}[config]
    assert launcher == ("simple_launcher" if count == 1 else "multi_gpu_launcher") and args.num_processes == count
    assert args.num_machines == (4 if count == 32 else 1) and args.mixed_precision == "no"


@pytest.mark.slow
def test_two_machines_find_each_other(tmp_path):
    """multi_node.yaml with two machines of one process, both of them here."""
    script = tmp_path / "count.py"
    script.write_text(
        "from diffusers_ctrl import processes\nprocesses.make_accelerator()\n"
        "print('found', processes.index(), processes.count(), processes.sum_over([1.0 + processes.index()]))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for rank in range(2):
        changes = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--main_process_port", str(port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = accelerate("multi_node.yaml", *changes, str(script))
        machines.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    for rank, text in enumerate(said):
        assert f"found {rank} 2 [3.0]" in text, text[-3000:]
