"""What test_processes.py compares between one process and several: each check gives tensors that must not depend on their number.

torchrun --nproc_per_node N tests/process_worker.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file


sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "training"), str(Path(__file__).resolve().parent)]
from diffusers_ctrl import Categorical, CTRLConfig, CTRLTrainer, LabelSpace, Policy, processes  # noqa: E402
from diffusers_ctrl.baked import measure_baked  # noqa: E402
from diffusers_ctrl.evaluation import certify, draw_samples  # noqa: E402
from diffusers_ctrl.experience import NonFiniteError  # noqa: E402
from figures import sample_rows  # noqa: E402
from problems import (  # noqa: E402
    GaussianDenoiser,
    GaussianLikelihood,
    cosine_scheduler,
    perturbed,
    tiny_environment,
    tiny_policy,
)


OBJECTIVES = {
    "direct_backprop": {"objective": "direct_backprop"},
    "adjoint_matching": {"objective": "adjoint_matching", "num_regression_steps": 3},
    "adjoint_matching, twice": {"objective": "adjoint_matching", "num_regression_steps": 1, "adjoint_passes": 2},
    "policy_gradient": {"objective": "policy_gradient", "ppo_minibatches": 2},
    "policy_gradient with a critic": {"objective": "policy_gradient", "ppo_epochs": 1, "lookahead_critic": True, "gae_lambda": 0.5},
}
UPDATES = 10
# two processes have three and two of them, and differentiate two at a time: two calls, or one
ODD = {"objective": "adjoint_matching", "num_regression_steps": 3, "max_updates": 2, "global_batch_size": 5, "batch_size": 4}


def make_trainer(problem: str, folder: Path, dtype: torch.dtype = torch.float32, **settings) -> CTRLTrainer:
    """10 trajectories an update, so that neither 4 processes nor micro-batches of 3 come out even."""
    torch.manual_seed(0)
    config = CTRLConfig(
        **{
            "output_dir": str(folder),
            "num_inference_steps": 4,
            "global_batch_size": 10,
            "batch_size": 3,
            "max_updates": UPDATES,
            "checkpoint_every": 0,
            "sample_every": 0,
            "learning_rate": 1e-3,
            "report_to": "none",
            "gamma_range": [0.5, 2.0],
            **settings,
        }
    )
    if problem == "gaussian":
        scheduler = cosine_scheduler()
        policy = Policy(
            GaussianDenoiser(0.3, 0.8, scheduler),
            label_space=LabelSpace(y=Categorical(("low", "high"))),
            lora_rank=1,
            lora_targets=["slope", "shift", "linear_2"],
            gamma_range=(0.5, 2.0),
        )
        perturbed(policy, 0.1)
        return CTRLTrainer(policy, scheduler, GaussianLikelihood((-0.4, 1.0), 0.6), config, shape=(1,))
    environment = tiny_environment(4)
    trained_parts = {"lora_rank": 0, "control_head": 16} if problem == "head" else {"perturb": 0.05}
    return CTRLTrainer(
        tiny_policy(gamma_range=(0.5, 2.0), **trained_parts).to(dtype),
        cosine_scheduler(),
        lambda x, labels: environment.reward(x.double(), labels).float(),
        config,
        shape=environment.shape,
        labels=environment.labels,
        prompt_embeds=environment.prompt_embeds.to(dtype),
    )


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def trained(problem: str, folder: Path, **settings) -> dict[str, torch.Tensor]:
    """The gradients of the first update's optimizer steps, the weights after all updates, and what the history says."""
    trainer = make_trainer(problem, folder, **settings)
    gradients, clip = [], trainer.accelerator.clip_grad_norm_

    def seen(parameters, *args):
        if trainer.update == 0:
            gradients.append(flat(parameter.grad for parameter in parameters))
        return clip(parameters, *args)

    trainer.accelerator.clip_grad_norm_ = seen
    history = trainer.train()
    groups = trainer.policy.trainable_parameters()
    return {
        "gradients": torch.stack(gradients),
        **{name: flat(group) for name, group in groups.items()},
        "history": torch.tensor([[row[key] for key in ("reward", "kl", "objective")] for row in history], dtype=torch.float64),
    }


def training(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for problem, updates in (("gaussian", UPDATES), ("unet", 2)):
        for name, settings in OBJECTIVES.items():
            result = trained(problem, folder, max_updates=updates, **settings)
            found |= {f"{problem}/{name}/{key}": value for key, value in result.items()}
    found |= {f"unet/odd/{key}": value for key, value in trained("unet", folder, **ODD).items()}
    # a control head alone, which the main process warms for all
    warmed = {"lora_rank": 0, "control_head": 16, "critic_trajectories": 60, "critic_updates": 4, "objective": "direct_backprop"}
    result = trained("head", folder, max_updates=2, **warmed)
    return found | {f"head/{key}": value for key, value in result.items()}


def half_synchronised(folder: Path) -> dict[str, torch.Tensor]:
    """Training in which one group's gradients stay each process's own: what the comparison must notice."""
    found, original = {}, processes.sum_gradients
    for left_out in ("lora", "label_encoder"):
        encoder = [name.startswith("label_encoder.") for name in make_trainer("gaussian", folder)._named]

        def without(parameters, encoder=encoder, left_out=left_out):
            original(p for p, own in zip(parameters, encoder, strict=True) if own != (left_out == "label_encoder"))

        processes.sum_gradients = without
        try:
            result = trained("gaussian", folder, objective="adjoint_matching", max_updates=2)
        finally:
            processes.sum_gradients = original
        found |= {f"{left_out}/{key}": value for key, value in result.items()}
    return found


def weights_held(policy: Policy) -> int:
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in policy.denoiser.parameters())


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """The same, with the base's weights dealt out to the processes."""
    found = {}
    for name, settings in OBJECTIVES.items():
        result = trained("unet", folder, max_updates=2, shard_base=True, **settings)
        found |= {f"unet/{name}/{key}": value for key, value in result.items()}
    return found | {f"unet/odd/{key}": value for key, value in trained("unet", folder, shard_base=True, **ODD).items()}


def sampling(folder: Path, shard: bool = False) -> dict[str, torch.Tensor]:
    """Samples, certificates and grids, of counts that do not come out even; perhaps from a base that is dealt out to the processes."""
    policy, environment = tiny_policy(perturb=0.1), tiny_environment(4)
    if shard:
        whole = weights_held(policy)
        kept = sum(policy.trainable_parameters().values(), [])
        processes.shard(policy.denoiser, kept)
        frozen = whole - sum(p.numel() for p in kept if p not in set(policy.label_encoder.parameters()))
        assert weights_held(policy) < whole - 0.9 * frozen * (1 - 1 / processes.count())
    found, generator = {}, torch.Generator().manual_seed(3)
    for tuned in (True, False):
        drawn = draw_samples(policy, environment, 5, generator, tuned=tuned, batch_size=4, progress=False, distributed=True)
        found |= {f"samples/{tuned}/{name}": value for name, value in vars(drawn).items() if value is not None}
    few = draw_samples(policy, environment, 1, generator, progress=False, distributed=True)
    found |= {f"few/{name}": value for name, value in vars(few).items() if value is not None}
    whole, by_label = certify(policy, environment, 7, generator, batch_size=2, progress=False, distributed=True)
    for name, one in {"all": whole, **dict(enumerate(by_label))}.items():
        found[f"certificate/{name}"] = torch.tensor([float(value) for value in vars(one).values()], dtype=torch.float64)
    rows = sample_rows(policy, environment, columns=3, distributed=True)
    guided = tiny_policy(guidance_scale=3.0, perturb=0.1)
    if shard:
        processes.shard(guided.denoiser, sum(guided.trainable_parameters().values(), []))
    baked = measure_baked(guided, environment, 3, 0, (1.0, 2.0), distributed=True)
    if rows is None:
        assert baked == {}
        return found
    return found | {"rows": rows, "baked": torch.tensor(list(baked.values()), dtype=torch.float64)}


def collectives() -> None:
    """The functions of processes.py where every process has something else to say."""
    own, several = processes.index(), processes.count()
    mine = processes.share(2 * several + 1)
    assert processes.gather_rows(torch.tensor(mine)).tolist() == list(range(2 * several + 1))
    assert processes.gather_rows(torch.ones(own, 2)).shape == (several * (several - 1) // 2, 2)
    assert (processes.gather_rows(torch.ones(own, 2), to_main=True) is None) == (own > 0)
    assert processes.gather_rows(torch.zeros(0) if own < several - 1 else torch.ones(3, 2, dtype=torch.long)).shape == (3, 2)
    assert processes.gather_rows(torch.zeros(0, 4)).shape == (0, 4)
    original, processes.CHUNK = processes.CHUNK, 4  # two rows at a time
    assert torch.equal(processes.gather_rows(torch.full((own + 3, 2), own)).unique(), torch.arange(several))
    processes.CHUNK = original
    parts = processes.rounds(2 * several + 1, 2)
    assert [row for part in parts for row in part] == list(mine) and all(len(part) <= 2 for part in parts) and len(parts) == 2
    assert [len(part) for part in processes.rounds(1)] == [int(own == 0)]
    assert processes.sum_over([1.0, own]) == [several, several * (several - 1) / 2]
    assert processes.agree(own == several - 1) and not processes.agree(False)
    # a gradient that only the last process has, one that all have, one that nobody has
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[1].grad = torch.full((2, 3), float(own))
    if own == several - 1:
        parameters[0].grad = torch.ones(2, 3)
    processes.sum_gradients(parameters)
    assert parameters[2].grad is None and torch.equal(parameters[0].grad, torch.ones(2, 3))
    assert torch.equal(parameters[1].grad, torch.full((2, 3), several * (several - 1) / 2))
    tensor = torch.full((2,), float(own))
    processes.broadcast([tensor])
    assert tensor.tolist() == [0.0, 0.0] and processes.on_main(lambda: own) == 0

    def fails() -> None:
        raise ValueError(f"process {own} says no")

    said = _message(lambda: processes.on_main(fails))
    assert "process 0 says no" in said
    said = _message(lambda: _together(own == several - 1, fails))
    assert f"process {several - 1} says no" in said
    _together(False, fails)
    assert processes.gather_objects(own) == list(range(several))


def _together(failing: bool, fails) -> None:
    with processes.together(ValueError):
        if failing:
            fails()


def _message(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError("no error")


def bad_number(folder: Path) -> None:
    """A reward that is NaN on the last process only must be an error on all."""
    trainer = make_trainer("gaussian", folder, objective="policy_gradient")
    good, last = trainer.environment.reward, processes.index() == processes.count() - 1
    object.__setattr__(trainer.environment, "reward", lambda x, labels: good(x, labels) * (float("nan") if last else 1.0))
    try:
        trainer._update()
    except NonFiniteError as error:
        assert "in micro-batch 1 of" in str(error)
        assert last or f"on process {processes.count() - 1}" in str(error), error
    else:
        raise AssertionError("no error")
    assert all(parameter.grad is None for parameter in trainer._named.values())


def training_with_a_tracker(folder: Path) -> None:
    """The processes must go on together after it, and one of them alone has written."""
    several = processes.count()
    make_trainer("gaussian", folder / "tracked", max_updates=2, report_to="tensorboard").train()
    assert processes.count() == several > 1 and processes.sum_over([1.0]) == [several]
    assert len(list((folder / "tracked").rglob("events.out.tfevents.*"))) == 2  # the settings and the numbers


def scorers_that_draw() -> None:
    """Rows of different processes must not be scored with the same random numbers, and those of the program stay where they were."""
    environment, drawn = tiny_environment(4), []
    object.__setattr__(environment, "reward", lambda x, labels: drawn.append(torch.rand(())) or x.flatten(1)[:, 0])
    policy = tiny_policy()
    torch.manual_seed(0)
    draw_samples(policy, environment, 2, torch.Generator().manual_seed(1), progress=False, distributed=True)
    found = processes.gather_objects([value.item() for value in drawn])
    assert len(set(sum(found, []))) == len(sum(found, [])) >= processes.count()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    processes.make_accelerator()
    assert processes.count() > 1
    collectives()
    bad_number(folder)
    training_with_a_tracker(folder)
    scorers_that_draw()
    for name, check in {
        "training": training,
        "sharded": sharded,
        "half": half_synchronised,
        "sampling": sampling,
        "sampling-sharded": partial(sampling, shard=True),
    }.items():
        found = check(folder)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}-{processes.index()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
