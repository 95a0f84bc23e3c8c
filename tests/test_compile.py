"""A compiled denoiser says what it says as it is: the label, the LoRA and gradients are read anew in every call, nothing of them is compiled in.

Dynamo's `eager` backend traces and guards as any other does, and then runs the very operations: what differs is a fault of the tracing.
"""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel

from diffusers_ctrl import CTRLConfig, CTRLPipeline, CTRLTrainer, Policy
from problems import cosine_scheduler, tiny_environment, tiny_policy


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs of other tests would count towards the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None


def answers(policy: Policy) -> list[torch.Tensor]:
    """Of both models for several labels and batches, and their gradients; with LoRA beside the weights and, where there is any, merged into them."""
    environment, found = tiny_environment(), []
    for merged in (False, True) if policy.lora_up() else (False,):
        with policy.merged(merged):
            for label, rows in ((0.0, 2), (1.0, 2), (2.0, 3)):
                x = torch.randn(rows, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
                labels, prompts = torch.full((rows, 1), label), environment.prompt_embeds[:1].expand(rows, -1, -1)
                given = (1.0, prompts, environment.null_embeds.expand(rows, -1, -1))
                with torch.no_grad():
                    found += [policy(x, 500, labels, *given), policy.reference(x, 500, *given[1:])]
                if rows == 3:  # another batch is traced once more: without gradients will do
                    continue
                tuned, base = policy(x, 500, labels, *given), policy.reference(x, 500, *given[1:])
                found += torch.autograd.grad(base.square().sum(), x)
                gradients = torch.autograd.grad(tuned.square().sum(), [x, *policy.roots()], allow_unused=True)
                found += [gradient for gradient in gradients if gradient is not None]
    return found


CASES = {
    "LoRA": {},
    "LoRA, blocks recomputed": {"blocks": True},
    "control head alone": {"control_head": 16, "lora_rank": 0},
    "LoRA, calls recomputed": {"checkpointing": True},
    "control head, blocks recomputed": {"control_head": 16, "blocks": True},
}
SLOW = ("LoRA, calls recomputed", "control head, blocks recomputed")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES])
def test_a_compiled_denoiser_answers_as_it_is(case):
    def made(blocks: bool = False, **parts) -> Policy:
        policy = tiny_policy(guidance_scale=2.0, perturb=0.1, **parts)
        if blocks:
            policy.denoiser.enable_gradient_checkpointing()
        return policy

    plain, compiled = made(**CASES[case]), made(**CASES[case])
    compiled.denoiser.compile(backend="eager")
    found, expected = answers(compiled), answers(plain)
    assert len(found) == len(expected) and (found[0] - found[1]).abs().max() > 1e-4  # the label does something
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_compiled_pipeline_takes_every_label_and_strength(sd_folder, sd_gamma_adapter):
    def drawn(compiled: bool) -> list[torch.Tensor]:
        torch._dynamo.utils.counters.clear()
        pipe, images, graphs = CTRLPipeline.from_pretrained(sd_folder), [], []
        pipe.load_ctrl_adapter(sd_gamma_adapter)
        if compiled:
            pipe.unet.compile(backend="eager")
        for given in (
            {"label": "thin"},
            {"label": "bold", "gamma": 4.0},
            {"label": "bold"},
            {},
            {"label": "thin", "strength": 0.5},
        ):
            images.append(pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="pt", **given).images)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert is_compiled(pipe.unet) == compiled
        # one for the noisy steps and one for the last, which is the base's: another label or gamma is not compiled anew
        assert graphs[:3] == [2, 2, 2] if compiled else not any(graphs)
        return images

    found, expected = drawn(True), drawn(False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert min((a - b).abs().max() for i, a in enumerate(found) for b in found[:i]) > 1e-3


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_trainer(folder, policy: Policy) -> CTRLTrainer:
    environment = tiny_environment()
    config = CTRLConfig(
        output_dir=str(folder),
        num_inference_steps=5,
        batch_size=4,
        max_updates=2,
        lora_rank=2,
        merge_lora=True,
        lora_targets=["to_q", "to_v", "conv1", "time_emb_proj"],
        checkpoint_every=0,
        report_to="none",
    )
    embeds = {"prompt_embeds": environment.prompt_embeds.float(), "null_embeds": environment.null_embeds.float()}
    scheduler, reward = cosine_scheduler(), lambda x, labels: environment.reward(x.double(), labels)
    return CTRLTrainer(policy.float(), scheduler, reward, config, shape=environment.shape, **embeds)


def test_accelerate_says_whether_training_compiles(tmp_path, monkeypatch, fresh_accelerate):
    """`accelerate launch --dynamo_backend` is these variables."""
    plain = make_trainer(tmp_path / "plain", tiny_policy(perturb=0.1))
    before = {name: value.detach().clone() for name, value in plain._named.items()}
    plain.train()
    assert not is_compiled(plain.policy.denoiser)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = make_trainer(tmp_path / "compiled", tiny_policy(perturb=0.1))
    compiled.train()
    assert is_compiled(compiled.policy.denoiser)
    for name, value in plain._named.items():
        torch.testing.assert_close(compiled._named[name], value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, before[name]), name


def test_regional_compilation_is_of_the_blocks(tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    denoiser = make_trainer(tmp_path, tiny_policy()).policy.denoiser
    compiled = {type(module).__name__ for module in denoiser.modules() if is_compiled(module)}
    assert compiled == set(denoiser._repeated_blocks) == {"BasicTransformerBlock"}
    monkeypatch.setattr(UNet2DConditionModel, "_repeated_blocks", [])
    with pytest.raises(
        ValueError, match="UNet2DConditionModel names no repeated blocks: leave out --dynamo_use_regional_compilation"
    ):
        make_trainer(tmp_path, tiny_policy())
