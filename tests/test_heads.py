"""The control head: nothing without a label, the same in training and in pipelines, saved with the adapter; and its warm start, against quadrature."""

import copy
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from diffusers_ctrl import Categorical, CTRLConfig, CTRLPipeline, CTRLTrainer, LabelSpace, Policy
from diffusers_ctrl.adapters import collect_adapter, load_adapter, save_adapter
from diffusers_ctrl.checkpoints import checkpoint_folder, read_checkpoint
from diffusers_ctrl.critics import (
    EXACT,
    KEPT,
    Pool,
    _lesson,
    _of_rows,
    base_pool,
    critic_control,
    fit_critic,
    learn_control,
    warm_start,
)
from diffusers_ctrl.evaluation import draw_samples
from diffusers_ctrl.heads import LABEL_WIDTH, ControlHead, coarse_grid, seen
from diffusers_ctrl.label_encoder import LabelEncoder
from diffusers_ctrl.objectives import adjoint_matching, direct_backprop
from diffusers_ctrl.rollouts import Environment, Sampler, base_transition, tuned_transition
from diffusers_ctrl.surrogates import Surrogate, fit, fit_surrogate
from problems import cosine_scheduler, tiny_environment, tiny_policy


SPACE = LabelSpace(kind=Categorical(("a", "b", "c")))


def place(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 4), (3, 8)))


def headed(guidance_scale=1.0, perturb=0.3, gamma_range=None):
    return tiny_policy(guidance_scale, perturb, gamma_range=gamma_range, control_head=16)


def test_a_fresh_head_changes_nothing_and_moves_when_it_learns():
    policy = headed(perturb=0.0)
    x, prompt = place()
    labels = torch.tensor([[0.0], [1.0], [2.0]])
    tuned = policy(x, 500, labels, None, prompt)
    torch.testing.assert_close(tuned, policy.reference(x, 500, prompt), rtol=0, atol=0)
    tuned.square().sum().backward()
    (table,) = policy.label_encoder.tables
    assert table.grad[:, -LABEL_WIDTH:].abs().sum() > 0  # where the head begins to move


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_without_a_label_the_head_is_silent(guidance_scale):
    policy = headed(guidance_scale)
    x, prompt = place()
    null = torch.zeros(3, 3, 8, dtype=torch.float64)
    unlabelled = policy(x, 500, torch.full((3, 1), float("nan")), None, prompt, null)
    head, policy._hook.head = policy._hook.head, None
    torch.testing.assert_close(policy(x, 500, torch.full((3, 1), float("nan")), None, prompt, null), unlabelled, rtol=0, atol=0)
    labels = torch.tensor([[0.0], [1.0], [float("nan")]])
    without = policy(x, 500, labels, None, prompt, null)
    policy._hook.head = head
    moved = (policy(x, 500, labels, None, prompt, null) - without).flatten(1).abs().amax(dim=1)
    assert (moved[:2] > 1e-3).all() and moved[2] == 0


def test_it_acts_on_the_labelled_half_of_the_guidance():
    guided, plain = headed(3.0), headed(1.0)
    x, prompt = place()
    labels, null = torch.tensor([[0.0], [1.0], [2.0]]), torch.zeros(3, 3, 8, dtype=torch.float64)
    nothing = torch.full((3, 1), float("nan"))
    expected = plain(x, 500, nothing, None, null)
    expected = expected + 3 * (plain(x, 500, labels, None, prompt) - expected)
    torch.testing.assert_close(guided(x, 500, labels, None, prompt, null), expected, rtol=1e-4, atol=1e-5)


def test_any_size_of_image_and_learned_variances():
    torch.manual_seed(0)
    head = ControlHead((2, 4, 4), 16, 10)
    label, time = torch.randn(3, LABEL_WIDTH), torch.randn(3, 10)
    x, output = torch.randn(3, 2, 12, 20), torch.randn(3, 4, 12, 20)
    found = head(x, output, time, label)
    assert found.shape == output.shape
    torch.testing.assert_close(found[:, 2:], output[:, 2:], rtol=0, atol=0)
    assert (found[:, :2] != output[:, :2]).any()
    half = head(x.bfloat16(), output.bfloat16(), time.bfloat16(), label)
    assert half.dtype == torch.bfloat16


def test_states_that_are_no_images():
    assert coarse_grid((4, 64, 96)) == (4, 8, 8)
    with pytest.raises(ValueError, match="no images"):
        coarse_grid((1024, 64))
    with pytest.raises(ValueError, match="no images"):
        Policy(tiny_policy().denoiser, label_space=SPACE, lora_rank=None, control_head=16, shape=(16, 4, 8, 8))


@pytest.mark.parametrize("objective", [direct_backprop, adjoint_matching])
def test_path_wise_gradients_reach_the_head(objective):
    """Against finite differences of the same loss on the same noise, where the loss is a number of the parameters alone."""
    policy, environment = headed(gamma_range=(0.5, 4.0)), tiny_environment()

    def loss():
        return objective(
            policy,
            environment.sampler,
            environment.draw(6, torch.Generator().manual_seed(3)),
            environment.log_likelihood,
            torch.Generator().manual_seed(4),
        )[0]

    loss().backward()
    weight = policy.label_encoder.control_head.out.weight
    assert weight.grad.abs().sum() > 0
    if objective is adjoint_matching:
        return  # its trajectories depend on the parameters, and its gradient leaves that out
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ends = []
    for size in (1e-5, -2e-5):
        weight.data += size * direction
        ends.append(loss().item())
    assert math.isclose((ends[0] - ends[1]) / 2e-5, (weight.grad * direction).sum().item(), rel_tol=1e-5)


def test_answers_that_are_known_are_not_asked_again():
    policy, environment = headed(2.0), tiny_environment()
    batch = environment.draw(5, torch.Generator().manual_seed(0))
    for layer in policy._lora:  # the answers are the base's, and so must be the tuned model's but for the head
        layer.lora_B["default"].weight.data.zero_()
    policy.label_encoder.tables[0].data[:, :-LABEL_WIDTH] = 0
    with policy.noted() as answers:
        base = base_transition(policy, environment.sampler, batch, 1, batch.noise)
    asked = tuned_transition(policy, environment.sampler, batch, 1, batch.noise)
    calls = []
    hook = policy.denoiser.register_forward_hook(lambda *_: calls.append(1))
    with policy.known(answers):
        known = tuned_transition(policy, environment.sampler, batch, 1, batch.noise)
    hook.remove()
    assert len(answers) == 1 and not calls
    torch.testing.assert_close(known.mean, asked.mean, rtol=1e-5, atol=1e-6)
    assert (known.mean - base.mean).abs().max() > 1e-3


# -- adapters and pipelines --


@pytest.fixture(scope="module")
def with_head(sd_folder, sd_adapter, tmp_path_factory):
    """The folder of an adapter with a head, nothing in it zero."""
    adapter = load_adapter(sd_adapter)
    head = {"grid": [4, 8, 8], "width": 16}
    encoder = LabelEncoder(adapter.label_encoder.label_space.to_dict(), adapter.label_encoder.config.embedding_dim, None, head)
    generator = torch.Generator().manual_seed(3)
    for parameter in encoder.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return save_adapter(tmp_path_factory.mktemp("headed") / "adapter", replace(adapter, label_encoder=encoder))


def test_it_is_saved_with_the_label_encoder(with_head, sd_adapter):
    config = json.loads((with_head / "label_encoder/config.json").read_text())
    assert config["head"] == {"grid": [4, 8, 8], "width": 16}
    assert "head" not in json.loads((sd_adapter / "label_encoder/config.json").read_text())
    first, again = load_adapter(with_head), load_adapter(with_head)
    for key, value in first.label_encoder.state_dict().items():
        torch.testing.assert_close(again.label_encoder.state_dict()[key], value, rtol=0, atol=0)


def call(pipe, **kwargs):
    arguments = {
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe("seven", **{**arguments, **kwargs}).images


def test_in_a_pipeline(with_head, sd_folder):
    plain, pipe = DiffusionPipeline.from_pretrained(sd_folder), CTRLPipeline.from_pretrained(with_head)
    for one in (plain, pipe):
        one.set_progress_bar_config(disable=True)
    base = call(plain, eta=1.0)
    torch.testing.assert_close(call(pipe, eta=1.0), base, rtol=0, atol=0)
    labelled = call(pipe, label="bold")
    control = pipe._ctrl_controls["default"]
    kept, control.label.head = control.label.head, None
    without = call(pipe, label="bold")
    control.label.head = kept
    assert (labelled - without).abs().max() > 1e-3 and (without - base).abs().max() > 1e-3
    torch.testing.assert_close(call(pipe, label="bold"), labelled, rtol=0, atol=0)
    torch.testing.assert_close(call(pipe, label="bold", strength=0.0), base, rtol=0, atol=0)
    assert (call(pipe, label="bold", guidance_scale=3.0) - call(plain, eta=1.0, guidance_scale=3.0)).abs().max() > 1e-3
    pipe.unload_ctrl_adapter()
    torch.testing.assert_close(call(pipe, eta=1.0), base, rtol=0, atol=0)


def test_the_policy_and_the_pipeline_say_the_same(with_head, sd_folder):
    adapter, pipe = load_adapter(with_head), CTRLPipeline.from_pretrained(with_head)
    seen = {}

    def note(_, args, kwargs, output):
        seen["x"], seen["t"] = args[0], args[1]
        seen["prompt"], seen["output"] = kwargs["encoder_hidden_states"], output[0]

    handle = pipe.denoiser.register_forward_hook(note, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    call(pipe, label="bold", callback_on_step_end=lambda p, i, t, k: handle.remove() or k)
    plain = DiffusionPipeline.from_pretrained(sd_folder).unet.requires_grad_(False)
    from diffusers_ctrl.injection import load_lora_state_dict

    load_lora_state_dict(plain, adapter.lora)
    policy = Policy(plain, adapter.label_encoder, lora_rank=None)
    with torch.no_grad():
        expected = policy(seen["x"], seen["t"], torch.tensor([[2.0]]), None, seen["prompt"])
    torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)


def test_it_cannot_be_exported(with_head, tmp_path):
    pipe = CTRLPipeline.from_pretrained(with_head)
    exports = (lambda: pipe.export_label("bold", tmp_path / "a"), lambda: pipe.export_lora(tmp_path / "b.safetensors", "bold"))
    for export in exports:
        with pytest.raises(ValueError, match="control head, and its labels"):
            export()
    assert not any(tmp_path.iterdir())
    assert pipe.export_lora(tmp_path / "no-label.safetensors").is_file()  # the LoRA alone draws no label anyway


@pytest.mark.parametrize(
    "head",
    [
        {"grid": [4, 8, 8, 1], "width": 16},
        {"grid": [4, True, 8], "width": 16},
        {"grid": [4, 8, -8], "width": 16},
        {"width": 16},
        "all",
    ],
)
def test_a_foreign_head(with_head, tmp_path, head):
    shutil.copytree(with_head, tmp_path / "a")
    file = tmp_path / "a" / "label_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"head": head}))
    with pytest.raises(ValueError, match="head must"):
        load_adapter(tmp_path / "a")


def test_a_head_for_more_channels_than_the_base_has(with_head, tmp_path):
    adapter = load_adapter(with_head)
    encoder = adapter.label_encoder
    head = {"grid": [5, 8, 8], "width": 16}
    wider = LabelEncoder(encoder.label_space.to_dict(), encoder.config.embedding_dim, None, head)
    with pytest.raises(ValueError, match="states of 5 channels"):
        CTRLPipeline.from_pretrained(save_adapter(tmp_path / "a", replace(adapter, label_encoder=wider)))


def test_a_pipeline_saves_it_again(with_head, tmp_path):
    pipe = CTRLPipeline.from_pretrained(with_head)
    again = load_adapter(pipe.save_ctrl_adapter(tmp_path / "again"))
    assert collect_adapter(again.config, pipe.denoiser, again.label_encoder).label_encoder.control_head is not None
    for key, value in load_adapter(with_head).label_encoder.state_dict().items():
        torch.testing.assert_close(again.label_encoder.state_dict()[key], value, rtol=0, atol=0)


# -- the warm start --


class Normal(nn.Module):
    """The exact v-prediction for images of one number x ~ N(0, 1), which is zero, and a layer for LoRA that changes nothing yet."""

    def __init__(self):
        super().__init__()
        self.time_embedding, self.layer = TimestepEmbedding(32, 32), nn.Linear(1, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, sample, timestep):
        self.time_embedding(get_timestep_embedding(torch.full((len(sample),), int(timestep)), 32))
        return self.layer(sample)


SHARPNESS, STEPS = 3.0, 10


def sigmoid_reward(images, labels):
    """log p̂ of "low" and "high": logistic in the only pixel."""
    return nn.functional.logsigmoid(SHARPNESS * images.flatten(1)[:, 0] * (2 * labels[:, 0] - 1))


def normal_problem(gamma_range=None):
    torch.manual_seed(0)
    space = LabelSpace(side=Categorical(("low", "high")))
    policy = Policy(
        Normal(), label_space=space, lora_rank=1, lora_targets=["layer"], control_head=32, shape=(1, 1, 1), gamma_range=gamma_range
    )
    sampler = Sampler(cosine_scheduler(), STEPS, {"eta": 1.0})
    return policy, Environment(sampler, (1, 1, 1), sigmoid_reward, torch.tensor([[0.0], [1.0]]), gamma_range=gamma_range)


def exact_log_h(environment, k, gamma=1.0):
    """x -> log E[p̂(high)^gamma | x_k = x]: the base's steps are affine, so x_K given x_k is normal, and one quadrature is exact."""
    sampler, slope, variance = environment.sampler, 1.0, 0.0
    for t in sampler.timesteps[k:]:
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        step = sampler.transition(torch.zeros_like(one), t, one)
        slope, variance = slope * step.mean.item(), variance * step.mean.item() ** 2 + step.std.item() ** 2
    nodes, weights = (torch.tensor(value, dtype=torch.float64) for value in np.polynomial.hermite_e.hermegauss(60))

    def log_h(x):
        ends = slope * x.unsqueeze(1) + math.sqrt(variance) * nodes
        return (gamma * nn.functional.logsigmoid(SHARPNESS * ends) + (weights / weights.sum()).log()).logsumexp(dim=1)

    return log_h


@pytest.fixture(scope="module")
def fitted():
    """(policy, environment, critic, its held-out losses, the pool, the generator) for gamma from 1 to 4."""
    policy, environment = normal_problem(gamma_range=(1.0, 4.0))
    generator = torch.Generator().manual_seed(0)
    pool = base_pool(policy, environment, 20_000, generator)
    critic, losses = fit_critic(environment, pool, 300, generator)
    return policy, environment, critic, losses, pool, generator


@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_the_critic_is_the_conditional_expectation(fitted, gamma):
    _, environment, critic, losses, *_ = fitted
    assert losses["critic_loss"] < math.log(2)
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    for k in (1, 4, 7, STEPS):
        level, rows = torch.full((7,), k), torch.zeros(7, dtype=torch.long)
        found = nn.functional.logsigmoid(critic(x.float().view(-1, 1, 1, 1), level, rows, torch.full((7,), gamma)))[:, 1]
        torch.testing.assert_close(found.double().exp(), exact_log_h(environment, k, gamma)(x).exp(), rtol=0, atol=0.06)


def test_the_surrogate_is_the_bases_own_estimate(fitted):
    """`Normal` gives it in closed form; at the last level a state is its own estimate."""
    policy, environment, critic, losses, pool, _ = fitted
    assert losses["surrogate_error"] < 0.01
    surrogate, sampler = critic.surrogate, environment.sampler
    batch = environment.draw(200, torch.Generator().manual_seed(5))
    for k in (0, 3, STEPS - 1, STEPS):
        x = pool.states[k, -200:]
        if k < STEPS:
            expected = base_transition(policy, sampler, batch, k, x.view(-1, 1, 1, 1)).denoised.flatten(1)
            torch.testing.assert_close(pool.denoised[k, -200:], expected, rtol=1e-5, atol=1e-6)
        else:
            expected = x
            assert torch.equal(pool.denoised[k, -200:], x)
        rows = torch.full((200,), k)
        found = surrogate(x, rows, torch.zeros_like(rows)) * surrogate.estimate_width + surrogate.estimate_middle
        assert (found - expected).square().mean() < 0.02 * pool.denoised.var(), k


def test_the_critic_sees_a_state_through_the_surrogate_alone(fitted):
    critic = copy.deepcopy(fitted[2])
    x, rows = torch.linspace(-1, 1, 5).view(-1, 1, 1, 1), torch.full((5,), 4)
    told = (rows, torch.zeros_like(rows), torch.full((5,), 2.0))
    before = critic(x, *told)
    assert before.std(dim=0).min() > 0.1
    critic.surrogate.forward = lambda x, level, prompt: torch.full_like(x, 0.3)
    blind = critic(x, *told)
    assert blind.std(dim=0).max() < 1e-6
    critic.surrogate.forward = lambda x, level, prompt: torch.where(x > 0, 0.3, -0.7)
    assert (critic(x, *told)[3:] - blind[3:]).abs().max() < 1e-6 and (critic(x, *told)[:2] - blind[:2]).abs().max() > 0.1


def test_held_out_trajectories_are_not_fitted_to():
    """They alone have the second prompt: its row of the table is as it was drawn, but for the weight decay."""
    generator = torch.Generator().manual_seed(0)
    states, held = torch.randn(3, 400, 2, generator=generator), torch.arange(40)
    prompts = (torch.arange(400) < 40).long()
    torch.manual_seed(0)
    drawn = Surrogate(states, -states, 2).net.prompt.weight
    torch.manual_seed(0)
    surrogate, error = fit_surrogate(states, -states, prompts, 2, held, 100, generator)
    alike = nn.functional.cosine_similarity(surrogate.net.prompt.weight, drawn, dim=1)
    assert alike[1] > 0.99999 and alike[0] < 0.9995, alike
    # the error is that of the held-out ones
    every = torch.cat([surrogate(states[k, held], torch.full((40,), k), prompts[held]) for k in range(3)])
    expected = (-states[:, held].flatten(0, 1) - surrogate.estimate_middle) / surrogate.estimate_width
    assert error == pytest.approx((every - expected).square().mean().item(), rel=1e-4)


def test_a_fit_that_is_never_finite_says_so():
    line = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="critic: fit: none of its losses .* critic_updates"):
        fit(line, lambda: line.weight.sum() * math.nan, lambda: math.nan, 2, "critic: fit", 1e-3)


def test_a_fit_ends_with_the_weights_that_were_best():
    """Here those of the first look, after which it is driven away."""
    line, seen_weights = torch.nn.Linear(1, 1, bias=False), []

    def held_out():
        seen_weights.append(line.weight.item())
        return float(len(seen_weights))

    best = fit(line, lambda: line.weight.sum(), held_out, 40, "critic: fit", 0.1)
    assert best == 1 and line.weight.item() == seen_weights[0] != seen_weights[-1] and not line.weight.requires_grad


def test_the_head_that_learned_from_it_has_the_exact_law(fitted):
    """log Z by quadrature, for two gammas; LoRA and the label in the time embedding are left as they were."""
    policy, environment, critic, _, pool, generator = fitted

    def gap(gamma):
        found = draw_samples(policy, replace(environment, gamma=gamma), 4000, torch.Generator().manual_seed(1), progress=False)
        log_h = exact_log_h(environment, 1, gamma)
        # x_1 is normal, of the first step's moments
        step = environment.sampler.transition(
            torch.zeros(1, 1, 1, 1, dtype=torch.float64),
            environment.sampler.timesteps[0],
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
        )
        std = math.hypot(step.mean.item(), step.std.item())
        nodes, weights = (torch.tensor(value, dtype=torch.float64) for value in np.polynomial.hermite_e.hermegauss(60))
        log_z = (log_h(std * nodes) + (weights / weights.sum()).log()).logsumexp(dim=0).item()
        return log_z - (gamma * found.log_likelihood - found.kl).mean().item()

    before = [gap(1.0), gap(4.0)]
    lora = [p.clone() for p in policy.trainable_parameters()["lora"]]
    embedding = policy.label_encoder.tables[0].detach().unflatten(1, (3, -1))[..., :-LABEL_WIDTH].clone()
    off = learn_control(policy, environment, critic, pool, 250, generator)
    after = [gap(1.0), gap(4.0)]
    assert before[0] > 0.5 and before[1] > 2
    assert -0.02 < after[0] < 0.1 and -0.05 < after[1] < 0.3 and off < 0.1, f"{before} -> {after} nats, {off}"
    for was, parameter in zip(lora, policy.trainable_parameters()["lora"], strict=True):
        torch.testing.assert_close(parameter, was, rtol=0, atol=0)
    left = policy.label_encoder.tables[0].unflatten(1, (3, -1))[..., :-LABEL_WIDTH]
    torch.testing.assert_close(left, embedding, rtol=0, atol=0)


def test_the_control_to_learn_is_the_gradient():
    policy, environment = normal_problem()
    generator = torch.Generator().manual_seed(0)
    critic, _ = fit_critic(environment, base_pool(policy, environment, 500, generator), 5, generator)
    batch = environment.draw(6, generator)
    base = base_transition(policy, environment.sampler, batch, 3, batch.noise)
    found = critic_control(critic, base, 3, batch)

    mean, size = base.mean.double(), 1e-4
    slope = (log_h(critic, mean + size, batch) - log_h(critic, mean - size, batch)) / (2 * size)
    torch.testing.assert_close(found.flatten().double(), base.std.flatten().double() * slope, rtol=1e-2, atol=1e-4)


def log_h(critic, mean, batch):
    logits = critic(mean.float(), torch.full((6,), 4), torch.zeros(6, dtype=torch.long), batch.gamma)
    return nn.functional.logsigmoid(logits.double()).gather(1, batch.label_rows.unsqueeze(1)).squeeze(1)


def trainer(tmp_path, environment_of=normal_problem, **settings):
    policy, environment = environment_of()
    config = CTRLConfig(
        **{
            "output_dir": str(tmp_path),
            "num_inference_steps": STEPS,
            "control_head": 32,
            "critic_trajectories": 500,
            "critic_updates": 20,
            "objective": "direct_backprop",
            "batch_size": 8,
            "max_updates": 2,
            "report_to": "none",
            **settings,
        }
    )
    return CTRLTrainer(policy, environment.sampler.scheduler, sigmoid_reward, config, shape=(1, 1, 1))


def test_the_trainer_warms_it_once(tmp_path):
    first = trainer(tmp_path, checkpoint_every=1)
    rates = [group["lr"] for group in first.optimizer.param_groups]
    assert rates == [first.config.learning_rate, first.config.label_learning_rate, first.config.head_learning_rate]
    first.train()
    kept = {name: value.clone() for name, value in first._named.items()}
    assert any("control_head" in name for name in kept)
    assert set(first.warmed) == {"surrogate_error", "critic_loss", "head_nats_off"}
    resumed = trainer(tmp_path, resume_from=str(checkpoint_folder(tmp_path / "checkpoints", 1)))
    resumed.train()
    for name, value in resumed._named.items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)


class Blind(Sampler):
    def transition(self, *given):
        return replace(super().transition(*given), denoised=None)


def test_what_a_warm_start_needs(tmp_path):
    with pytest.raises(ValueError, match="needs a control_head"):
        CTRLConfig(critic_trajectories=100)
    with pytest.raises(ValueError, match="control_head must be 0 or more"):
        CTRLConfig(control_head=-1)

    def headless():
        policy, environment = normal_problem()
        return Policy(Normal(), label_space=policy.label_space, lora_rank=1, lora_targets=["layer"]), environment

    with pytest.raises(ValueError, match="but the policy has no control head"):
        trainer(tmp_path, headless)
    with pytest.raises(ValueError, match="at least 20"):
        CTRLConfig(control_head=8, critic_trajectories=5)
    policy, environment = normal_problem()
    with pytest.raises(ValueError, match="log-probabilities"):
        warm_start(policy, replace(environment, reward=lambda images, labels: images.flatten(1)[:, 0]), 500, 5, 0)
    with pytest.raises(ValueError, match="DDIMScheduler gives no denoised estimate"):
        warm_start(policy, replace(environment, sampler=Blind(cosine_scheduler(), STEPS, {"eta": 1.0})), 500, 5, 0)
    policy.trainable_parameters()["lora"][1].data += 1
    with pytest.raises(ValueError, match="for a fresh policy"):
        warm_start(policy, environment, 500, 5, 0)


def test_the_warm_start_under_guidance_and_checkpointing():
    """The answers of both halves are kept, and nothing is computed again that the denoiser would have to be asked for."""
    policy, environment = tiny_policy(2.0, checkpointing=True, control_head=16), tiny_environment(steps=4)
    before = policy.label_encoder.control_head.out.weight.clone()
    found = warm_start(policy, environment, 40, 3, seed=0, at_a_time=16)
    assert all(math.isfinite(value) for value in found.values())
    assert (policy.label_encoder.control_head.out.weight != before).any()


def test_a_checkpoint_from_before_there_were_heads(tmp_path):
    plain = {"control_head": 0, "critic_trajectories": 0, "critic_updates": CTRLConfig.critic_updates, "checkpoint_every": 1}

    def headless():
        policy, environment = normal_problem()
        return Policy(Normal(), label_space=policy.label_space, lora_rank=1, lora_targets=["layer"]), environment

    trainer(tmp_path, headless, **plain).train()
    folder = checkpoint_folder(tmp_path / "checkpoints", 1)
    again = trainer(tmp_path, headless, **plain)
    found = read_checkpoint(folder)
    for name in ("control_head", "critic_trajectories", "critic_updates", "head_learning_rate"):
        del found.state["settings"][name]
    assert again._check(found) == []
    del found.state["warmed"]
    again._load(found)
    assert again.update == 1 and again.warmed == {}


def test_lessons_are_at_the_exact_laws_states(fitted):
    """Seven in ten in proportion to p̂^gamma, label and gamma each drawn alike."""
    _, environment, _, _, pool, generator = fitted
    chosen, batch = _lesson(environment, pool, 40_000, generator)
    scores = pool.scores[: len(pool.kept[0][0])].double()
    assert len(scores) == KEPT and chosen.max() < KEPT
    for label in (0, 1):
        for low, high in ((1.0, 1.5), (3.0, 4.0)):
            rows = (batch.label_rows == label) & (batch.gamma >= low) & (batch.gamma < high)
            gamma = batch.gamma[rows].double().unsqueeze(1)
            weights = (gamma * scores[:, label]).softmax(dim=1)
            expected = (EXACT * weights @ scores[:, label].exp()).mean() + (1 - EXACT) * scores[:, label].exp().mean()
            found = scores[chosen[rows], label].exp()
            assert abs(found.mean() - expected) < 5 * found.std() / math.sqrt(len(found))
            assert expected > scores[:, label].exp().mean() + 0.1


def test_kept_answers_are_the_denoisers_own_under_guidance():
    """Drawn seven at a time, so that each answer is put together of four batches of two halves."""
    policy, environment = tiny_policy(2.0, control_head=16), tiny_environment(steps=4)
    generator = torch.Generator().manual_seed(0)
    pool = base_pool(policy, environment, 25, generator, at_a_time=7)
    assert list(pool.kept) == list(environment.sampler.noisy_steps)
    chosen, batch = _lesson(environment, pool, 9, generator)
    for k, (states, answers) in pool.kept.items():
        assert len(states) == 25
        torch.testing.assert_close(seen(states.float(), (2, 4, 4)), pool.states[k], rtol=1e-5, atol=1e-6)
        x = states[chosen]
        asked = base_transition(policy, environment.sampler, batch, k, x)
        with policy.known([_of_rows(answer, chosen, 25, torch.device("cpu")) for answer in answers]):
            known = base_transition(policy, environment.sampler, batch, k, x)
        torch.testing.assert_close(known.mean, asked.mean, rtol=1e-5, atol=1e-6)


def test_every_prompt_is_learned_alike():
    """A prompt whose images seldom have the label is not left out for that: it is where most is to be learned."""
    environment = replace(tiny_environment(), labels=torch.tensor([[0.0]]), gamma=4.0)
    prompts = (torch.arange(1000) % 5 >= 2).long()  # 400 and 600
    scores = torch.where(prompts == 0, -0.1, -4.0) - torch.linspace(0, 1, 1000)
    nothing = torch.zeros(1, 1000, 1)
    pool = Pool(nothing, nothing, prompts, scores.unsqueeze(1), {0: (torch.zeros(1000, 2, 4, 4), [])})
    chosen, batch = _lesson(environment, pool, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(batch.prompts, prompts[chosen])
    for prompt in (0, 1):
        rows = prompts[chosen] == prompt
        assert abs(rows.double().mean() - (prompts == prompt).double().mean()) < 0.02
        weights = (4 * scores[prompts == prompt].double()).softmax(dim=0)
        expected = EXACT * weights @ scores[prompts == prompt].double() + (1 - EXACT) * scores[prompts == prompt].double().mean()
        assert abs(scores[chosen[rows]].double().mean() - expected) < 0.02


def test_the_warm_start_in_half_precision():
    """Autocast keeps copies of the weights that it has seen; what was learned must be what is there afterwards."""
    policy, environment = normal_problem()
    with torch.autocast("cpu", torch.bfloat16):
        found = warm_start(policy, environment, 1000, 60, seed=0)
    generator = torch.Generator().manual_seed(1)
    pool = base_pool(policy, environment, 1000, generator)
    critic, _ = fit_critic(environment, pool, 60, generator)
    left = learn_control(policy, environment, critic, pool, 1, generator)  # one update of a rate that has hardly begun
    assert found["head_nats_off"] < 0.5 and left < 0.5, (found, left)
