"""CTRLTrainer: resumed equals uninterrupted, bad numbers stop it with the weights kept, and settings are checked."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from diffusers_ctrl import Categorical, CTRLConfig, CTRLTrainer, LabelSpace, Policy
from diffusers_ctrl.checkpoints import MANIFEST_NAME, STATE_NAME, TENSORS_NAME, read_checkpoint
from diffusers_ctrl.config import make_sampler
from diffusers_ctrl.rollouts import Sampler
from diffusers_ctrl.trainer import TrainingStopped
from problems import GaussianDenoiser, GaussianLikelihood, cosine_scheduler


def make_trainer(folder, reward=None, *, identity=None, base=(0.3, 0.8), label_space=None, **settings) -> CTRLTrainer:
    torch.manual_seed(0)
    scheduler = cosine_scheduler()
    denoiser = GaussianDenoiser(*base, scheduler)
    denoiser.time_embedding.linear_1.weight.data[0] = base[1]  # so that another base has other weights
    policy = Policy(
        denoiser,
        label_space=label_space or LabelSpace(y=Categorical(("low", "high"))),
        lora_rank=1,
        lora_targets=settings.get("lora_targets", ["slope", "shift", "linear_2"]),
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
            "lora_targets": ["slope", "shift", "linear_2"],
            "report_to": "none",
            **settings,
        }
    )
    reward = reward or GaussianLikelihood((-0.4, 1.0), 0.6)
    return CTRLTrainer(policy, scheduler, reward, config, shape=(1,), identity=identity)


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
        {"objective": "adjoint_matching", "num_regression_steps": 2, "adjoint_passes": 3},
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


def test_adjoint_matching_may_learn_several_times_from_one_batch(tmp_path):
    """Each pass on other steps; the first is the update that there would be without the others, bit for bit."""
    settings = {"objective": "adjoint_matching", "num_regression_steps": 2, "max_updates": 1, "gradient_accumulation_steps": 2}
    settings["gradient_batch_size"] = 8  # all: by halves, the default, the two differ by a last bit (2e-10)
    once = make_trainer(tmp_path / "once", **settings)
    once.train()
    drawn, seen, found = [], [], []
    trainer = make_trainer(tmp_path / "thrice", adjoint_passes=3, **settings)
    reward, original, step = trainer.environment.reward, trainer._gradient, trainer.optimizer.step
    trainer.environment = replace(trainer.environment, reward=lambda *args: (drawn.append(1), reward(*args))[1])
    trainer.coarse = trainer.environment
    trainer._gradient = lambda *args: (seen.append(args[-1]["steps"]), original(*args))[1]
    trainer.optimizer.step = lambda: (step(), found.append({n: v.clone() for n, v in weights(trainer).items()}))
    (row,) = trainer.train()
    assert len(drawn) == 2 and len(seen) == len(found) == 3  # two micro-batches of trajectories
    assert len(set(sum(seen, []))) == 6
    assert all(torch.equal(value, found[0][name]) for name, value in weights(once).items())
    assert any(not torch.equal(value, found[0][name]) for name, value in found[1].items())
    assert {name: row[name] for name in ("reward", "kl", "objective")} == {
        name: once.history[0][name] for name in ("reward", "kl", "objective")
    }


def test_the_steps_whose_kl_is_counted_are_drawn_once_an_update(tmp_path):
    trainer = make_trainer(tmp_path, objective="direct_backprop", num_kl_steps=2, gradient_accumulation_steps=2, max_updates=2)
    seen, original = [], trainer._gradient
    trainer._gradient = lambda *args: (seen.append(args[-1]["kl_steps"]), original(*args))[1]
    assert len(trainer.train()) == 2
    assert [len(set(steps)) for steps in seen] == [2, 2] and seen[0] != seen[1]
    with pytest.raises(ValueError, match="num_kl_steps is for the whole gradient"):
        make_trainer(tmp_path, objective="direct_backprop", num_kl_steps=2, truncation=3)
    with pytest.raises(ValueError, match="num_kl_steps must be between 1 and the number of noisy steps, 9; got 10"):
        make_trainer(tmp_path, objective="direct_backprop", num_kl_steps=10).train()


def test_passes_that_find_too_few_steps_are_an_error(tmp_path):
    with pytest.raises(
        ValueError,
        match="adjoint_passes = 3 of num_regression_steps = 4 need 12 noisy steps, each its own; there are 9: ask for fewer",
    ):
        make_trainer(tmp_path, objective="adjoint_matching", num_regression_steps=4, adjoint_passes=3)
    with pytest.raises(ValueError, match="adjoint_passes = 10 needs 10 noisy steps, each its own; there are 9"):
        make_trainer(tmp_path, objective="adjoint_matching", adjoint_passes=10)
    with pytest.raises(ValueError, match="num_regression_steps must be at least 1, got -1"):
        make_trainer(tmp_path, num_regression_steps=-1)
    with pytest.raises(ValueError, match="adjoint_passes must be at least 1, got 0"):
        make_trainer(tmp_path, adjoint_passes=0)
    # without their number all steps are dealt out to the passes
    trainer = make_trainer(tmp_path, objective="adjoint_matching", adjoint_passes=2)
    passes = [options["steps"] for options in trainer._passes(trainer.environment, torch.Generator())]
    assert [len(steps) for steps in passes] == [5, 4] and sorted(sum(passes, [])) == list(range(9))


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "adjoint_matching", "num_regression_steps": 2, "adjoint_passes": 3},
        {"objective": "adjoint_matching", "merge_lora": True},
        {"objective": "direct_backprop", "checkpointing": True, "merge_lora": True},
    ],
)
def test_a_few_trajectories_differentiated_at_a_time_train_the_same(tmp_path, settings, monkeypatch):
    """Three of eight at a time, taken up from a run that had all at once: the weights are the same to rounding."""

    def trained(folder: str, **more) -> dict[str, torch.Tensor]:
        trainer = make_trainer(tmp_path / folder, max_updates=2, **settings, **more)
        trainer.policy.checkpointing = trainer.config.checkpointing
        trainer.train()
        return weights(trainer)

    whole = trained("whole", checkpoint_every=1)
    seen, original = set(), Policy._call
    monkeypatch.setattr(
        Policy, "_call", lambda self, f, x, *rest: (torch.is_grad_enabled() and seen.add(len(x)), original(self, f, x, *rest))[1]
    )
    first = str(tmp_path / "whole" / "checkpoints" / "checkpoint-000001")
    parts = trained("whole", resume_from=first, gradient_batch_size=3)
    assert seen == {3, 2}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"batch_size": 5}, {3, 2}),
        ({"batch_size": 5, "gradient_batch_size": 5}, {5}),
        ({"batch_size": 5, "adjoint_passes": 2}, {3, 2}),
        ({"batch_size": 4, "gradient_accumulation_steps": 2}, {2}),
        ({"batch_size": 1}, {1}),
        ({"batch_size": 5, "objective": "direct_backprop", "checkpointing": True}, {5}),
    ],
)
def test_adjoint_matching_differentiates_half_a_batch_at_a_time(settings, sizes, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **{"objective": "adjoint_matching", "max_updates": 1, **settings})
    trainer.policy.checkpointing = trainer.config.checkpointing
    seen, original = {True: set(), False: set()}, Policy._call
    monkeypatch.setattr(
        Policy, "_call", lambda self, f, x, *rest: (seen[torch.is_grad_enabled()].add(len(x)), original(self, f, x, *rest))[1]
    )
    trainer.train()
    assert seen[True] == sizes and settings["batch_size"] in seen[False]


def test_an_option_that_the_objective_ignores_is_said():
    with pytest.warns(
        UserWarning, match="clip_range = 0.1, ppo_epochs = 3: for policy_gradient only, and ignored by direct_backprop"
    ):
        CTRLConfig(objective="direct_backprop", ppo_epochs=3, clip_range=0.1, num_kl_steps=2)
    with pytest.warns(
        UserWarning, match="gradient_batch_size = 2: for adjoint_matching and direct_backprop only, and ignored by policy"
    ):
        CTRLConfig(objective="policy_gradient", gradient_batch_size=2)
    with pytest.raises(ValueError, match="direct_backprop needs checkpointing"):
        CTRLConfig(objective="direct_backprop", gradient_batch_size=2)
    with pytest.raises(ValueError, match="cannot be had with mixed_precision fp16"):
        CTRLConfig(mixed_precision="fp16", gradient_batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CTRLConfig(objective="policy_gradient", ppo_epochs=3, checkpointing=True)
        CTRLConfig(coarse_adjoint=False)


@pytest.mark.parametrize(("noisy", "asked", "expected"), [(49, None, 10), (19, None, 4), (3, None, 3), (19, 7, 7), (7, 1000, 7)])
def test_a_fifth_of_the_steps_is_regressed_on_by_default(noisy, asked, expected):
    assert CTRLConfig(num_regression_steps=asked).regression_steps(noisy) == expected


def test_the_coarse_adjoint_is_the_default_and_can_be_left(tmp_path, monkeypatch):
    seen = []
    trainer = make_trainer(tmp_path / "default", objective="adjoint_matching")
    assert [(len(one["steps"]), one["coarse"]) for one in trainer._passes(trainer.environment, torch.Generator())] == [(4, True)]
    held = Sampler.held
    monkeypatch.setattr(Sampler, "held", lambda self, base, k, end: (seen.append(end - k), held(self, base, k, end))[1])
    one = make_trainer(tmp_path / "coarse", objective="adjoint_matching", num_regression_steps=2, max_updates=1)
    one.train()
    assert max(seen) > 1
    seen.clear()
    other = make_trainer(
        tmp_path / "fine", objective="adjoint_matching", num_regression_steps=2, max_updates=1, coarse_adjoint=False
    )
    other.train()
    assert set(seen) == {1}
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


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


def test_a_run_that_is_coarse_throughout_is_told_of(tmp_path, caplog):
    make_trainer(tmp_path, coarse_updates=3, coarse_steps=4, max_updates=2).train()
    assert "All 2 updates are coarse (coarse_updates = 3): nothing is trained on the 10 steps" in caplog.text
    caplog.clear()
    make_trainer(tmp_path / "other", coarse_updates=1, coarse_steps=4, max_updates=2).train()
    assert "coarse" not in caplog.text


def test_old_checkpoints_are_pruned_and_nothing_is_half_written(tmp_path):
    make_trainer(tmp_path, checkpoint_every=1, checkpoints_total_limit=2).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-000005", "checkpoint-000006"]
    assert sorted(p.name for p in (tmp_path / "checkpoints" / names[0]).iterdir()) == [MANIFEST_NAME, STATE_NAME, TENSORS_NAME]


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "policy_gradient", "ppo_epochs": 1, "ppo_minibatches": 3},
        {"objective": "adjoint_matching", "num_regression_steps": 2, "adjoint_passes": 3},
    ],
)
def test_a_nan_in_a_later_step_of_an_update_takes_the_update_back(tmp_path, settings):
    """It steps several times an update: the checkpoint must hold the weights from before the first of them."""
    from diffusers_ctrl import trainer as module

    trainer = make_trainer(tmp_path, **settings, max_bad_updates=1)
    name, calls = settings["objective"], 0
    original = module.OBJECTIVES[name]

    def broken(*args, **kwargs):
        nonlocal calls
        calls += 1
        loss, metrics = original(*args, **kwargs)
        return loss * (float("nan") if calls == 8 else 1.0), metrics  # the second pass of update 3

    module.OBJECTIVES[name] = broken
    try:
        with pytest.raises(TrainingStopped, match="update 3: in micro-batch 1 of 1, the loss is nan.*checkpoint-000002"):
            trainer.train()
    finally:
        module.OBJECTIVES[name] = original
    reference = make_trainer(tmp_path / "reference", **settings, max_updates=6)
    for _ in range(2):
        reference._step()
        reference.update += 1
    resumed = make_trainer(tmp_path, **settings, resume_from="latest", max_updates=2)
    resumed.train()
    for name, value in weights(reference).items():
        assert torch.equal(weights(trainer)[name], value) and torch.equal(weights(resumed)[name], value), name
    if reference.baseline is not None:
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


OBJECTIVES = ("direct_backprop", "adjoint_matching", "policy_gradient")


class Broken:
    """The likelihood of these tests, with NaN at the given calls; for the objectives that call it once an update, with eval_every off."""

    def __init__(self, *calls: int, always: bool = False) -> None:
        self.calls, self.always, self.count = calls, always, 0

    def __call__(self, x, labels):
        self.count += 1
        bad = self.always or self.count in self.calls
        return GaussianLikelihood((-0.4, 1.0), 0.6)(x, labels) * (float("nan") if bad else 1.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bad_update_is_skipped_and_nothing_moves(tmp_path, objective, caplog):
    """Weights, optimizer and baseline are those of a run in which the update never was; later ones draw what they would have drawn."""
    trainer = make_trainer(tmp_path, Broken(3), objective=objective)
    history = trainer.train()
    reference = make_trainer(tmp_path / "reference", objective=objective)
    for update in (0, 1, 3, 4, 5):
        reference.update = update
        reference._step()
    for name, value in weights(reference).items():
        assert torch.equal(value, weights(trainer)[name]), name
    ours, theirs = trainer.optimizer.state_dict()["state"], reference.optimizer.state_dict()["state"]
    assert all(torch.equal(ours[key][name], theirs[key][name]) for key in theirs for name in theirs[key])
    if objective == "policy_gradient":
        assert torch.equal(trainer.baseline.mean, reference.baseline.mean)
    assert [row["update"] for row in history] == [1, 2, 4, 5, 6]
    assert [row.get("bad_updates") for row in history] == [None, None, 1.0, 1.0, 1.0]
    assert (
        "Update 3 was skipped, 1 in a row (10 stop the training): in micro-batch 1 of 1, the log-likelihood is NaN" in caplog.text
    )


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_bad_gradient_of_a_good_loss_is_skipped_too(tmp_path, bad, caplog):
    def reward(x, labels, calls=[0]):  # noqa: B006
        calls[0] += 1
        found = GaussianLikelihood((-0.4, 1.0), 0.6)(x, labels)
        if calls[0] == 2:
            found.register_hook(lambda gradient: gradient * float(bad))
        return found

    trainer = make_trainer(tmp_path, reward, max_updates=2)
    trainer.train()
    reference = make_trainer(tmp_path / "reference", max_updates=2)
    reference._step()
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(reference).items())
    assert "Update 2 was skipped" in caplog.text and "the gradient's norm is" in caplog.text


def test_a_reward_that_is_always_nan_stops_after_so_many_updates(tmp_path):
    trainer = make_trainer(tmp_path, Broken(always=True), max_bad_updates=4, max_updates=20)
    with pytest.raises(TrainingStopped) as raised:
        trainer.train()
    assert str(raised.value) == (
        "Training stopped at update 4: it and the 3 updates before met NaN or infinite numbers, the last time in micro-batch 1 of 1, the "
        f"log-likelihood is NaN or infinite for 8 of 8 samples (rows [0, 1, 2, 3, 4, 5, 6, 7]). The weights from before are in "
        f"{tmp_path / 'checkpoints' / 'checkpoint-000000'}."
    )


def test_only_bad_updates_in_a_row_stop_and_the_last_good_weights_are_kept(tmp_path):
    """Five bad ones, but at most three in a row, go through; the checkpoint of a stop is of the update before the first of them."""
    make_trainer(tmp_path / "a", Broken(2, 3, 5, 6, 8), max_bad_updates=3, max_updates=9).train()
    trainer = make_trainer(tmp_path / "b", Broken(2, 3, 5, 6, 7), max_bad_updates=3, max_updates=9, checkpoint_every=1)
    with pytest.raises(TrainingStopped, match="at update 7: .*checkpoint-000004"):
        trainer.train()
    names = [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()]
    assert max(names) == "checkpoint-000004"
    resumed = make_trainer(tmp_path / "b", max_bad_updates=3, max_updates=9, resume_from="latest")
    resumed.train()  # with a scorer that was mended
    reference = make_trainer(tmp_path / "c", max_updates=9)
    for update in (0, 3, 4, 5, 6, 7, 8):
        reference.update = update
        reference._step()
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(reference).items())
    assert resumed.bad_updates == 2


def test_the_scaler_of_fp16_may_skip_but_not_for_ever(tmp_path, caplog):
    """A scale that is too large overflows and is halved, which is no bad update; an overflow at a scale below 1 is one."""
    trainer = make_trainer(tmp_path, max_updates=12, max_bad_updates=3, checkpoint_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)  # as prepare() does it for fp16 on a GPU
    backward = scaler.scale
    scaler.scale = lambda loss: backward(loss) * float("inf") if trainer.update < 3 else backward(loss)
    trainer.accelerator.backward = lambda loss: scaler.scale(loss).backward()
    norm = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda *args: (scaler.unscale_(trainer.optimizer.optimizer), norm(*args))[1]
    before = weights(trainer)
    step, seen = trainer._step, []
    trainer._step = lambda: (step(), seen.append((scaler.get_scale(), weights(trainer))))[0]
    history = trainer.train()
    assert [scale for scale, _ in seen[:4]] == [4.0, 2.0, 1.0, 1.0] and not math.isfinite(history[0]["grad_norm"])
    assert all(torch.equal(value, before[name]) for name, value in seen[2][1].items())
    assert any(not torch.equal(value, before[name]) for name, value in seen[3][1].items())
    assert "skipped" not in caplog.text
    # the scale goes with the checkpoint
    again = make_trainer(tmp_path, max_updates=12, resume_from="latest")
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again._resume("latest")
    assert again.accelerator.scaler.get_scale() == 1.0
    scaler.scale = lambda loss: backward(loss) * float("inf")
    trainer.config.max_updates = 20
    with pytest.raises(TrainingStopped, match="at update 15: .*gradient's norm is.*checkpoint-000012"):
        trainer.train()


# -- measurements in a run --


def test_measurements_are_in_the_history_and_change_nothing(tmp_path):
    history = make_trainer(tmp_path, eval_every=2, eval_trajectories=16).train()
    plain = make_trainer(tmp_path / "plain", eval_every=0).train()
    measured = [row["update"] for row in history if "eval_objective" in row]
    assert measured == [2, 4, 6]
    last = history[-1]
    # up to the noise of the log-ratio, which J is freed of
    assert last["eval_objective"] == pytest.approx(last["eval_reward"] - last["eval_kl"], abs=0.05)
    assert {"by_label.low.kl", "by_label.high.reward", "by_label.low.objective", "eval_ess", "eval_spread"} <= set(last)
    for row, bare in zip(history, plain, strict=True):
        assert all(row[name] == value for name, value in bare.items() if name != "seconds")


def spoiled(folder, after: int, **settings) -> CTRLTrainer:
    """A run whose weights are spoiled from an update on."""
    trainer = make_trainer(folder, eval_every=2, eval_trajectories=32, max_updates=8, **settings)
    step = trainer._step

    def spoiling():
        found = step()
        if trainer.update >= after:
            for parameter in trainer._named.values():
                parameter.data += 0.05
        return found

    trainer._step = spoiling
    return trainer


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_best_checkpoint_is_kept_and_its_weights_end_the_run(tmp_path, keep_best, caplog):
    trainer = spoiled(tmp_path, after=4, keep_best=keep_best, checkpoints_total_limit=1)
    trainer.log_partition = -1.0
    trainer.train()
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert (
        best["checkpoint"] == "checkpoint-000004" and best["gap"] == pytest.approx(-1.0 - best["objective"]) and best["gap_se"] > 0
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-000004",
        "checkpoint-000008",
    ]
    assert "Alarm at update 8: J has fallen" in caplog.text  # which is why
    saved = {update: read_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{update:06d}").tensors for update in (4, 8)}
    ours = weights(trainer)
    assert all(torch.equal(saved[4 if keep_best else 8][f"parameter.{name}"], value) for name, value in ours.items())
    assert trainer.best_kept == (4 if keep_best else None)
    assert ("The weights are those of update 4" in caplog.text) == keep_best
    # a finished run that is resumed ends the same, and one that goes on does so from its last weights
    again = make_trainer(tmp_path, eval_every=2, eval_trajectories=32, max_updates=8, keep_best=keep_best, resume_from="latest")
    again.train()
    assert all(torch.equal(value, weights(again)[name]) for name, value in ours.items())
    more = make_trainer(tmp_path, max_updates=9, resume_from="latest")
    more._resume("latest")
    assert all(torch.equal(saved[8][f"parameter.{name}"], value) for name, value in weights(more).items())


def test_a_best_checkpoint_that_is_damaged_leaves_the_last_weights(tmp_path, caplog):
    trainer = spoiled(tmp_path, after=4, max_bad_updates=1)
    save = trainer._save_checkpoint

    def damaging():
        folder = save()
        if trainer.update == 8:
            (tmp_path / "checkpoints" / "checkpoint-000004" / TENSORS_NAME).write_bytes(b"")
        return folder

    trainer._save_checkpoint = damaging
    trainer.train()
    assert trainer.best_kept is None and "last weights are kept, though those of update 4 were better: " in caplog.text


def test_the_last_weights_stay_where_the_best_are_not_clearly_better(tmp_path):
    trainer = make_trainer(tmp_path, eval_every=2, eval_trajectories=32, learning_rate=1e-6, label_learning_rate=1e-6)
    trainer.train()
    assert trainer.best_kept is None and trainer.monitor.best is not None


def test_a_limit_on_the_kl_ends_a_run(tmp_path, caplog):
    settings = {"eval_every": 2, "eval_trajectories": 16, "max_updates": 20, "learning_rate": 0.1, "label_learning_rate": 0.1}
    trainer = make_trainer(tmp_path, kl_limit=0.05, **settings)
    history = trainer.train()
    assert 2 <= trainer.update < 20 and trainer.update % 2 == 0
    kls = {name: history[-1][f"by_label.{name}.kl"] for name in ("low", "high")}
    assert (
        max(kls.values()) > 0.05 >= max(history[-3][f"by_label.{n}.kl"] for n in kls if trainer.update > 2)
        if trainer.update > 2
        else True
    )
    worst = max(kls, key=kls.get)
    assert (
        f"stopped after update {trainer.update}: the KL of label {worst!r} is {kls[worst]:.2f} nats, above kl_limit = 0.05"
        in caplog.text
    )
    folder = tmp_path / "checkpoints" / f"checkpoint-{trainer.update:06d}"
    assert read_checkpoint(folder).state["update"] == trainer.update
    # it stays ended when resumed, and goes on with a higher limit
    again = make_trainer(tmp_path, kl_limit=0.05, resume_from="latest", **settings)
    assert len(again.train()) == len(history) and again.update == trainer.update
    on = make_trainer(tmp_path, kl_limit=100.0, resume_from="latest", **settings)
    on.train()
    assert on.update == 20


def test_a_run_that_goes_too_far_is_told_so_once(tmp_path, caplog):
    settings = {"eval_every": 2, "eval_trajectories": 16, "learning_rate": 1.0, "label_learning_rate": 1.0, "max_updates": 10}
    trainer = make_trainer(tmp_path, kl_alarm=1.0, max_grad_norm=100.0, **settings)
    trainer.train()
    assert "the KL of label 'high' is" in caplog.text and "Lower learning_rate" in caplog.text
    assert caplog.text.count("the KL of label 'high' is") == 1


# -- what may change when a run is resumed --


def test_unusable_checkpoints_are_named(tmp_path):
    make_trainer(tmp_path, max_updates=1).train()
    folder = tmp_path / "checkpoints" / "checkpoint-000001"
    with pytest.raises(ValueError, match=r"cannot be resumed: seed = 1 \(0 in the checkpoint\)"):
        make_trainer(tmp_path, seed=1, resume_from="latest").train()
    data = (folder / TENSORS_NAME).read_bytes()
    (folder / TENSORS_NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="checkpoint-000001 is not a whole checkpoint"):
        make_trainer(tmp_path, resume_from=str(folder)).train()


def test_the_one_before_is_used_where_the_last_is_damaged(tmp_path, caplog):
    make_trainer(tmp_path, max_updates=6, checkpoint_every=3).train()
    (tmp_path / "checkpoints" / "checkpoint-000006" / STATE_NAME).write_text("{}")
    resumed = make_trainer(tmp_path, max_updates=6, resume_from="latest")
    resumed._resume("latest")
    assert resumed.update == 3
    (sentence,) = [record.message for record in caplog.records]
    assert (
        "checkpoint-000006 is not a whole checkpoint: trainer_state.json has 2 bytes" in sentence
        and "The one before it is used." in sentence
    )


@pytest.mark.parametrize(
    "changed, names",
    [
        ({"gamma": 2.0}, "gamma = 2.0 (1.0 in the checkpoint)"),
        ({"num_inference_steps": 8}, "num_inference_steps = 8 (10 in the checkpoint)"),
        ({"lora_targets": ["slope"]}, "lora_targets = ['slope'] (['slope', 'shift', 'linear_2'] in the checkpoint)"),
        ({"identity": {"prompts": ["a dog"]}}, "prompts = ['a dog'] (['a cat'] in the checkpoint)"),
        ({"label_space": LabelSpace(y=Categorical(("low", "high", "more")))}, "label_space = "),
        ({"base": (0.3, 0.9)}, "base = "),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_run_is_not_resumed_as_another(tmp_path, changed, names):
    """The weights would not mean the same. The trainer is left as it was."""
    make_trainer(tmp_path, max_updates=1, identity={"prompts": ["a cat"]}).train()
    trainer = make_trainer(tmp_path, **{"max_updates": 1, "identity": {"prompts": ["a cat"]}, "resume_from": "latest", **changed})
    before = weights(trainer)
    with pytest.raises(ValueError, match="checkpoint-000001 is of another run, and cannot be resumed: ") as raised:
        trainer.train()
    assert names in str(raised.value) and "\n" not in str(raised.value)
    assert trainer.update == 0 and all(torch.equal(value, weights(trainer)[name]) for name, value in before.items())


def test_other_settings_are_named_and_taken(tmp_path, caplog):
    make_trainer(tmp_path, max_updates=2).train()
    make_trainer(
        tmp_path,
        max_updates=3,
        learning_rate=0.5,
        batch_size=4,
        gradient_accumulation_steps=2,
        checkpoint_every=1,
        resume_from="latest",
    ).train()
    (sentence,) = [record.message for record in caplog.records]
    assert sentence == (
        "Resumed with other settings, so the weights will not be those of one run: max_updates = 3 (2 in the checkpoint); "
        "learning_rate = 0.5 (0.01 in the checkpoint)."
    )
    caplog.clear()
    make_trainer(tmp_path, max_updates=3, learning_rate=0.5, batch_size=9, resume_from="latest").train()
    assert "trajectories_per_update = 9 (8 in the checkpoint)" in caplog.text


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
        ({"kl_limit": 1.0, "eval_every": 0}, "kl_limit must be positive and needs an eval_every"),
        ({"kl_limit": 1.0, "eval_every": 50, "max_updates": 6}, "eval_every = 50 and max_updates = 6"),
        ({"max_bad_updates": 0}, "max_bad_updates must be at least 1, got 0"),
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
