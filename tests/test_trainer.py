"""CTRLTrainer: resumed equals uninterrupted, bad numbers stop it with the weights kept, and settings are checked."""

import json
import math
import warnings

import pytest
import torch

from diffusers_ctrl import Categorical, CTRLConfig, CTRLTrainer, LabelSpace, Policy
from diffusers_ctrl.checkpoints import MANIFEST_NAME, STATE_NAME, TENSORS_NAME
from diffusers_ctrl.trainer import TrainingStopped, make_sampler
from problems import GaussianDenoiser, GaussianLikelihood, cosine_scheduler


def make_trainer(folder, reward=None, **settings) -> CTRLTrainer:
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
            "num_inference_steps": 10,
            "objective": "direct_backprop",
            "batch_size": 8,
            "max_updates": 6,
            "checkpoint_every": 0,
            "sample_every": 0,
            "learning_rate": 1e-2,
            "report_to": "none",
            **settings,
        }
    )
    return CTRLTrainer(policy, scheduler, reward or GaussianLikelihood((-0.4, 1.0), 0.6), config, shape=(1,))


def weights(trainer: CTRLTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer._named.items()}


def test_training_moves_only_lora_and_label_encoder(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
    history = trainer.train()
    moved = {n for n, p in trainer.policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n or n.startswith("label_encoder")}
    assert len(history) == 6 and all(math.isfinite(v) for row in history for v in row.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "direct_backprop"},
        {"objective": "policy_gradient"},
        {"objective": "policy_gradient", "lookahead_critic": True, "gae_lambda": 0.5},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, settings):
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    first = make_trainer(tmp_path / "cut", checkpoint_every=2, **settings)
    calls = 0

    def interrupted(*args, original=first._step):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*args)

    first._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(tmp_path / "cut", resume_from="latest", **settings)
    history = second.train()
    assert second.update == 6 and [row["update"] for row in history] == [1, 2, 3, 4, 5, 6]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_a_run_may_be_resumed_with_a_critic_it_did_not_have(tmp_path):
    make_trainer(tmp_path, objective="policy_gradient", max_updates=2).train()
    resumed = make_trainer(tmp_path, objective="policy_gradient", max_updates=4, lookahead_critic=True, resume_from="latest")
    resumed.train()
    assert resumed.update == 4 and resumed.baseline.moments.any()


def test_accumulated_micro_batches_average(tmp_path):
    """Two micro-batches give the mean of their gradients: the update differs from either's own, and is reproducible."""
    one = make_trainer(tmp_path / "a", gradient_accumulation_steps=2, max_updates=2)
    two = make_trainer(tmp_path / "b", gradient_accumulation_steps=2, max_updates=2)
    single = make_trainer(tmp_path / "c", max_updates=2)
    for trainer in (one, two, single):
        trainer.train()
    assert all(torch.equal(v, weights(two)[n]) for n, v in weights(one).items())
    assert any(not torch.equal(v, weights(single)[n]) for n, v in weights(one).items())


def test_policy_gradient_steps_several_times_on_one_batch(tmp_path):
    """Each update collects once and takes epochs x minibatches optimizer steps, which between them see every pair once an epoch."""
    trainer = make_trainer(tmp_path, objective="policy_gradient", ppo_epochs=2, ppo_minibatches=3, max_updates=1, batch_size=16)
    seen, steps = [], []
    original, step = trainer._gradient, trainer.optimizer.step
    trainer._gradient = lambda *args: (seen.append(args[-1]["steps"]), original(*args))[1]
    trainer.optimizer.step = lambda: (steps.append(1), step())
    trainer.train()
    assert len(steps) == len(seen) == 6
    for epoch in (seen[:3], seen[3:]):
        assert sorted(sum(epoch, [])) == list(range(len(trainer.environment.sampler.noisy_steps)))


def test_gamma_is_drawn_over_its_range(tmp_path):
    trainer = make_trainer(tmp_path, gamma_range=[0.5, 4.0])
    gammas = trainer.environment.draw(400, torch.Generator().manual_seed(0)).gamma
    assert 0.5 <= gammas.min() < 0.51 and 3.9 < gammas.max() <= 4.0
    assert abs(gammas.log().mean() - math.log(2) / 2) < 0.01  # log-uniform
    assert (trainer.environment.grid(3, None).gamma == 1).all()


def test_a_coarse_start_runs_on_fewer_steps_and_then_on_all(tmp_path):
    trainer = make_trainer(tmp_path, coarse_updates=2, coarse_steps=4, max_updates=3)
    seen = []
    denoise = trainer.policy._denoise
    trainer.policy._denoise = lambda args, *rest: (seen.append((trainer.update, int(args[1]))), denoise(args, *rest))[1]
    trainer.train()
    grids = [sorted({t for update, t in seen if update == u}, reverse=True) for u in range(3)]
    assert grids[0] == grids[1] == [999, 749, 499, 249]
    assert grids[2] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert trainer.environment.sampler.scheduler.num_inference_steps == 10


def test_old_checkpoints_are_pruned_and_nothing_is_half_written(tmp_path):
    make_trainer(tmp_path, checkpoint_every=1, checkpoints_total_limit=2).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-000005", "checkpoint-000006"]
    assert sorted(p.name for p in (tmp_path / "checkpoints" / names[0]).iterdir()) == [MANIFEST_NAME, STATE_NAME, TENSORS_NAME]


def test_a_nan_in_a_later_step_of_an_update_takes_the_update_back(tmp_path):
    """policy_gradient steps several times an update: the checkpoint must hold the weights from before the first of them."""
    from diffusers_ctrl import trainer as module

    trainer = make_trainer(tmp_path, objective="policy_gradient", ppo_epochs=1, ppo_minibatches=3, max_bad_updates=1)
    original, calls = module.OBJECTIVES["policy_gradient"], 0

    def broken(*args, **kwargs):
        nonlocal calls
        calls += 1
        loss, metrics = original(*args, **kwargs)
        return loss * (float("nan") if calls == 8 else 1.0), metrics  # the second pass of update 3

    module.OBJECTIVES["policy_gradient"] = broken
    try:
        with pytest.raises(TrainingStopped, match="update 3: in micro-batch 1 of 1, the loss is nan.*checkpoint-000002"):
            trainer.train()
    finally:
        module.OBJECTIVES["policy_gradient"] = original
    reference = make_trainer(tmp_path / "reference", objective="policy_gradient", ppo_epochs=1, ppo_minibatches=3, max_updates=6)
    for _ in range(2):
        reference._step()
        reference.update += 1
    resumed = make_trainer(
        tmp_path, objective="policy_gradient", ppo_epochs=1, ppo_minibatches=3, resume_from="latest", max_updates=2
    )
    resumed.train()
    for name, value in weights(reference).items():
        assert torch.equal(weights(trainer)[name], value) and torch.equal(weights(resumed)[name], value), name
    assert torch.equal(resumed.baseline.mean, reference.baseline.mean)


def test_a_nan_reward_stops_with_the_last_good_weights_saved(tmp_path):
    good, calls = GaussianLikelihood((-0.4, 1.0), 0.6), 0

    def broken(x, labels):
        nonlocal calls
        calls += 1
        return good(x, labels) * (float("nan") if calls == 4 else 1.0)

    trainer = make_trainer(tmp_path, broken, max_bad_updates=1)
    with pytest.raises(TrainingStopped, match=r"update 4: in micro-batch 1 of 1, the log-likelihood is NaN.*checkpoint-000003"):
        trainer.train()
    reference = make_trainer(tmp_path / "reference", max_updates=6)
    for _ in range(3):
        reference._step()
        reference.update += 1
    resumed = make_trainer(tmp_path, resume_from="latest")
    resumed._resume("latest")
    assert resumed.update == 3
    for name, value in weights(reference).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_unusable_checkpoints_are_named(tmp_path):
    make_trainer(tmp_path, max_updates=1).train()
    folder = tmp_path / "checkpoints" / "checkpoint-000001"
    with pytest.raises(ValueError, match=r"cannot be resumed: seed = 1 \(0 in the checkpoint\)"):
        make_trainer(tmp_path, seed=1, resume_from="latest").train()
    data = (folder / TENSORS_NAME).read_bytes()
    (folder / TENSORS_NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="checkpoint-000001 is not a whole checkpoint"):
        make_trainer(tmp_path, resume_from=str(folder)).train()


def test_trackers_and_images_are_called(tmp_path):
    trainer = make_trainer(tmp_path, report_to="tensorboard", sample_every=3)
    seen = []
    trainer.save_images = lambda update, policy: seen.append((update, policy is trainer.policy))
    trainer.train()
    assert seen == [(3, True), (6, True)]
    assert any("tfevents" in path.name for path in tmp_path.rglob("*"))


def test_state_is_json(tmp_path):
    make_trainer(tmp_path, max_updates=1).train()
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-000001" / STATE_NAME).read_text())
    assert state["update"] == 1 and len(state["history"]) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "ppo"}, "Unknown objective 'ppo'"),
        ({"mixed_precision": "int8"}, "mixed_precision must be"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"gae_lambda": 1.5, "lookahead_critic": True}, "gae_lambda must be from 0 to 1, got 1.5"),
        ({"gae_lambda": 0.5}, "gae_lambda = 0.5 needs lookahead_critic"),
        ({"eta": 0.0}, "adds no noise at any step"),
    ],
)
def test_bad_settings_are_one_clear_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_eta_below_one_warns_of_its_bias():
    with pytest.warns(UserWarning, match="not memoryless"):
        make_sampler(cosine_scheduler(), CTRLConfig(eta=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_sampler(cosine_scheduler(), CTRLConfig(eta=1.0))
