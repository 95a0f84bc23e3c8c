"""A control head alone, without LoRA: one call of the denoiser serves the tuned model and the base, in training and in pipelines."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from diffusers_ctrl import Categorical, CTRLConfig, CTRLPipeline, CTRLTrainer, LabelSpace, Policy
from diffusers_ctrl.adapters import LORA_NAME, collect_adapter, load_adapter, save_adapter
from diffusers_ctrl.checkpoints import checkpoint_folder
from diffusers_ctrl.experience import collect
from diffusers_ctrl.export import export_lora
from diffusers_ctrl.heads import LABEL_WIDTH
from diffusers_ctrl.label_encoder import LabelEncoder
from diffusers_ctrl.objectives import adjoint_matching, direct_backprop, policy_gradient
from diffusers_ctrl.rollouts import rollout
from problems import cosine_scheduler, tiny_environment, tiny_policy


def alone(guidance_scale=1.0, perturb=0.3, **kwargs):
    return tiny_policy(guidance_scale, perturb, control_head=16, lora_rank=0, **kwargs)


class Calls:
    """Counts a denoiser's calls, and their rows, within the block."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, []

    def __enter__(self):
        # its first layer: the hooks of diffusers call the denoiser beneath its own `__call__`
        self.handle = self.denoiser.conv_in.register_forward_pre_hook(lambda _, args: self.rows.append(len(args[0])))
        return self.rows

    def __exit__(self, *error):
        self.handle.remove()


def test_the_denoiser_is_frozen_and_told_nothing():
    policy = alone()
    assert list(policy.trainable_parameters()) == ["label_encoder", "control_head"]
    assert not any(p.requires_grad for p in policy.denoiser.parameters())
    (table,) = policy.label_encoder.tables
    assert table.shape[1] == LABEL_WIDTH
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    prompt, labels = torch.randn(3, 3, 8, dtype=torch.float64), torch.tensor([[0.0], [1.0], [float("nan")]])
    with policy.noted() as answers:
        tuned = policy(x, 500, labels, None, prompt)
    base = policy.reference(x, 500, prompt)
    torch.testing.assert_close(answers[0][0], base, rtol=0, atol=0)
    moved = (tuned - base).flatten(1).abs().amax(dim=1)
    assert (moved[:2] > 1e-3).all() and moved[2] == 0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_one_call_a_step_prices_a_trajectory(guidance_scale):
    policy, environment = alone(guidance_scale, gamma_range=(0.5, 4.0)), tiny_environment()
    batch = environment.draw(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        with Calls(policy.denoiser) as shared:
            found = rollout(policy, environment.sampler, batch, torch.Generator().manual_seed(1))
        policy.shares_base = False  # as if there were LoRA: the base is asked beside
        with Calls(policy.denoiser) as apart:
            expected = rollout(policy, environment.sampler, batch, torch.Generator().manual_seed(1))
    steps, noisy = len(environment.sampler.timesteps), len(environment.sampler.noisy_steps)
    assert len(shared) == steps and len(apart) == steps + noisy
    torch.testing.assert_close(found.sample, expected.sample, rtol=0, atol=0)
    torch.testing.assert_close(found.kl, expected.kl, rtol=0, atol=0)
    torch.testing.assert_close(found.log_ratio, expected.log_ratio, rtol=0, atol=0)
    assert (found.kl > 1e-3).all()


@pytest.mark.parametrize(
    ("objective", "checkpointing", "options"),
    [
        (direct_backprop, False, {}),
        (direct_backprop, True, {}),
        (direct_backprop, True, {"kl_steps": [1, 3], "gradient_batch_size": 4}),
        (direct_backprop, False, {"truncation": 3}),
        (adjoint_matching, False, {}),
        (adjoint_matching, False, {"steps": [3, 1], "coarse": True, "gradient_batch_size": 4}),
        (policy_gradient, False, {}),
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_same_gradient_as_with_calls_of_its_own(objective, checkpointing, options, guidance_scale):
    environment, found = tiny_environment(), []
    for shares in (True, False):
        policy = alone(guidance_scale, checkpointing=checkpointing)
        policy.shares_base = shares
        batch = environment.draw(6, torch.Generator().manual_seed(3))
        loss, metrics = objective(
            policy, environment.sampler, batch, environment.log_likelihood, torch.Generator().manual_seed(4), **options
        )
        policy.shares_base = True  # what is trained is told by it
        loss.backward()
        found.append((loss, metrics, [p.grad for group in policy.trainable_parameters().values() for p in group]))
    (loss, metrics, gradients), (expected, others, apart) = found
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert metrics == pytest.approx(others, rel=1e-10) and metrics["kl"] > 1e-3
    for one, other in zip(gradients, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_path_wise_gradient_is_that_of_the_loss():
    """Against finite differences, through the shared call."""
    policy, environment = alone(), tiny_environment()

    def loss():
        batch = environment.draw(6, torch.Generator().manual_seed(3))
        return direct_backprop(policy, environment.sampler, batch, environment.log_likelihood, torch.Generator().manual_seed(4))[0]

    loss().backward()
    weight, ends = policy.label_encoder.control_head.state.weight, []
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for size in (1e-5, -2e-5):
        weight.data += size * direction
        ends.append(loss().item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((weight.grad * direction).sum().item(), rel=1e-5)


def test_experience_is_collected_by_one_call_a_step():
    policy, environment = alone(), tiny_environment()
    with torch.no_grad(), Calls(policy.denoiser) as calls:
        collect(policy, environment.sampler, environment.draw(6, torch.Generator()), environment.log_likelihood)
    assert len(calls) == len(environment.sampler.timesteps)


def test_the_states_that_are_regressed_on_are_not_asked_about_again():
    environment, calls = tiny_environment(), []
    for shares in (True, False):
        policy = alone()
        policy.shares_base = shares
        batch = environment.draw(6, torch.Generator().manual_seed(3))
        with Calls(policy.denoiser) as rows:
            adjoint_matching(policy, environment.sampler, batch, environment.log_likelihood, torch.Generator().manual_seed(4))
        calls.append(len(rows))
    assert calls[1] - calls[0] == len(environment.sampler.noisy_steps)


def test_what_leaves_it_alone():
    denoiser, space = tiny_policy().denoiser, alone().label_space
    with pytest.raises(ValueError, match="lora_rank = 0 leaves a control head alone, and there is none"):
        Policy(copy.deepcopy(alone().denoiser), label_space=space, lora_rank=0)
    with pytest.raises(ValueError, match="control head is alone, and LoRA is not for it"):
        Policy(denoiser, alone().label_encoder, lora_rank=None)
    with pytest.raises(ValueError, match="whose control head is alone, and this one's is not"):
        Policy(copy.deepcopy(alone().denoiser), tiny_policy(control_head=16).label_encoder, lora_rank=0)
    with pytest.raises(ValueError, match="control_head is 0"):
        CTRLConfig(lora_rank=0)
    with pytest.raises(ValueError, match="lora_rank must be 0 or more"):
        CTRLConfig(lora_rank=-1, control_head=8)
    with pytest.raises(ValueError, match="alone must be true"):
        LabelEncoder(space.to_dict(), 8, None, {"grid": [1, 1, 1], "width": 2, "alone": False})


# -- the trainer --


def trainer(folder, **settings):
    policy, environment = alone(perturb=0.0), tiny_environment()
    config = CTRLConfig(
        **{
            "output_dir": str(folder),
            "num_inference_steps": 4,
            "lora_rank": 0,
            "control_head": 16,
            "objective": "direct_backprop",
            "batch_size": 8,
            "max_updates": 4,
            "checkpoint_every": 2,
            "merge_lora": True,
            "eval_every": 2,
            "eval_trajectories": 12,
            "report_to": "none",
            **settings,
        }
    )
    return CTRLTrainer(
        policy.float(),
        cosine_scheduler(),
        lambda x, labels: environment.reward(x.double(), labels).float(),
        config,
        shape=(2, 4, 4),
        labels=environment.labels,
        prompt_embeds=environment.prompt_embeds.float(),
    )


@pytest.mark.parametrize("objective", ["direct_backprop", "adjoint_matching", "policy_gradient"])
def test_it_trains_and_resumes(tmp_path, objective):
    whole = trainer(tmp_path / "whole", objective=objective)
    assert [group["lr"] for group in whole.optimizer.param_groups] == [
        whole.config.label_learning_rate,
        whole.config.head_learning_rate,
    ]
    whole.train()
    resumed = trainer(
        tmp_path / "again", objective=objective, resume_from=str(checkpoint_folder(tmp_path / "whole" / "checkpoints", 2))
    )
    resumed.train()
    assert resumed.update == 4
    for name, value in resumed._named.items():
        torch.testing.assert_close(value, whole._named[name], rtol=1e-5, atol=1e-7)
    assert any(bool(value.any()) for name, value in whole._named.items() if "tables" in name)
    with pytest.raises(ValueError, match="lora_rank = 4, but the policy's control head is alone"):
        trainer(tmp_path / "wrong", lora_rank=4)
    with pytest.raises(ValueError, match="lora_rank"):
        other = trainer(tmp_path / "other", resume_from=str(checkpoint_folder(tmp_path / "whole" / "checkpoints", 2)))
        other.config.lora_rank = 4
        other.train()


# -- adapters and pipelines --


def lonely(adapter):
    """The adapter with a head alone in place of what it had, nothing in it zero."""
    encoder = adapter.label_encoder
    head = {"grid": [4, 8, 8], "width": 16, "alone": True}
    encoder = LabelEncoder(encoder.label_space.to_dict(), encoder.config.embedding_dim, None, head)
    generator = torch.Generator().manual_seed(3)
    for parameter in encoder.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return replace(adapter, lora={}, label_encoder=encoder)


@pytest.fixture(scope="module")
def folder(sd_adapter, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("alone") / "adapter", lonely(load_adapter(sd_adapter)))


@pytest.fixture(scope="module")
def slant(sd_adapter):
    """A second adapter, with LoRA on the time embedding too, for another attribute."""
    space, adapter = LabelSpace(slant=Categorical(("left", "right"))), load_adapter(sd_adapter)
    encoder = LabelEncoder(space.to_dict(), adapter.label_encoder.config.embedding_dim)
    torch.nn.init.normal_(encoder.tables[0], std=0.3)
    generator, time = torch.Generator().manual_seed(4), "time_embedding.linear_1"
    shapes = {
        "lora_A": (2, adapter.label_encoder.config.embedding_dim // 4),
        "lora_B": (adapter.label_encoder.config.embedding_dim, 2),
    }
    lora = adapter.lora | {f"{time}.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return replace(
        adapter, config=replace(adapter.config, label_space=space.to_dict()), lora=lora, label_encoder=encoder, classifier=None
    )


def call(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe("seven", **{**arguments, "generator": torch.Generator().manual_seed(0), **kwargs}).images


def test_it_is_read_and_written_without_lora(folder, tmp_path):
    adapter = load_adapter(folder)
    assert adapter.lora == {} and adapter.label_encoder.control_head.alone
    pipe = CTRLPipeline.from_pretrained(folder)
    again = load_adapter(pipe.save_ctrl_adapter(tmp_path / "again"))
    assert again.lora == {}
    for key, value in adapter.label_encoder.state_dict().items():
        torch.testing.assert_close(again.label_encoder.state_dict()[key], value, rtol=0, atol=0)
    collected = collect_adapter(adapter.config, pipe.denoiser, adapter.label_encoder)
    assert collected.lora == {}
    for export in (pipe.export_lora, partial(export_lora, folder)):
        with pytest.raises(ValueError, match="has no LoRA to write"):
            export(tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_files_of_two_adapters(folder, sd_adapter, tmp_path):
    mixed = save_adapter(tmp_path / "mixed", lonely(load_adapter(sd_adapter)))
    (mixed / LORA_NAME).write_bytes((sd_adapter / LORA_NAME).read_bytes())
    with pytest.raises(ValueError, match="has LoRA weights, though the control head of label_encoder/ is alone"):
        load_adapter(mixed)
    emptied = save_adapter(tmp_path / "emptied", load_adapter(sd_adapter))
    save_file({}, emptied / LORA_NAME)
    with pytest.raises(ValueError, match="has no LoRA weights, and no control head that is alone"):
        load_adapter(emptied)


def test_a_lora_of_the_users_own(folder, sd_folder):
    """It stays on, is never taken for the adapter's, and stays in when the adapter leaves."""
    pipe = CTRLPipeline.from_pretrained(sd_folder)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    base = call(pipe, eta=1.0)
    pipe.load_ctrl_adapter(folder)
    torch.testing.assert_close(call(pipe, label="bold", strength=0.0), base, rtol=0, atol=0)
    assert (call(pipe, label="bold") - base).abs().max() > 1e-3
    pipe.unload_ctrl_adapter()
    with pytest.raises(ValueError, match="already carries a LoRA named 'mine'"):
        pipe.load_ctrl_adapter(folder, "mine")
    torch.testing.assert_close(call(pipe, eta=1.0), base, rtol=0, atol=0)
    mixed = replace(load_adapter(folder), lora={"conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3)})
    with pytest.raises(ValueError, match="has LoRA, and its control head is alone"):
        pipe.load_ctrl_adapter(mixed)
    torch.testing.assert_close(call(pipe, eta=1.0), base, rtol=0, atol=0)


def test_the_base_is_called_once_a_step_whatever_is_asked(folder):
    pipe = CTRLPipeline.from_pretrained(folder)
    base = call(pipe, eta=1.0)
    labelled = call(pipe, label="bold")
    assert (labelled - base).abs().max() > 1e-3
    for arguments in ({}, {"label": "bold"}, {"label": "bold", "strength": 0.5}, {"label": "bold", "strength": 0.0}):
        with Calls(pipe.denoiser) as rows:
            call(pipe, **arguments)
        assert rows == [1] * 4, arguments
    with Calls(pipe.denoiser) as rows:  # the weights need the base's answer too
        call(pipe, label="bold", num_particles=3, output_type="pt")
    assert sum(rows) == 3 * 4
    torch.testing.assert_close(call(pipe, label="bold", strength=0.0), base, rtol=0, atol=0)
    torch.testing.assert_close(call(pipe, label="bold", strength=1.0), labelled, rtol=0, atol=0)
    pipe.unload_ctrl_adapter()
    torch.testing.assert_close(call(pipe, eta=1.0), base, rtol=0, atol=0)


def test_the_policy_and_the_pipeline_say_the_same(folder):
    adapter, pipe, seen = load_adapter(folder), CTRLPipeline.from_pretrained(folder), {}

    def note(_, args, kwargs, output):
        seen.update(x=args[0], t=args[1], prompt=kwargs["encoder_hidden_states"], output=output[0])

    handle = pipe.denoiser.register_forward_hook(note, with_kwargs=True)
    call(pipe, label="bold", callback_on_step_end=lambda p, i, t, k: handle.remove() or k)
    pipe.unload_ctrl_adapter()
    policy = Policy(pipe.unet, adapter.label_encoder, lora_rank=0)
    with torch.no_grad():
        expected = policy(seen["x"], seen["t"], torch.tensor([[2.0]]), None, seen["prompt"])
    torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)


def test_beside_an_adapter_with_lora(folder, slant, sd_folder):
    """Each adds what it adds alone; the order of loading does not matter."""
    found, orders = [], ((folder, slant), (slant, folder))
    for first, second in orders:
        pipe = CTRLPipeline.from_pretrained(sd_folder)
        pipe.load_ctrl_adapter(first, "first")
        pipe.load_ctrl_adapter(second, "second")
        with Calls(pipe.denoiser) as rows:
            found.append(call(pipe, label={"stroke": "bold", "slant": "left"}))
        assert rows == [1] * 7  # the base's and that of the other's LoRA at each step but the last, which has no noise
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    alone, base = call(pipe, label={"stroke": "bold"}), call(pipe, eta=1.0)
    assert (found[0] - alone).abs().max() > 1e-3 and (alone - base).abs().max() > 1e-3
