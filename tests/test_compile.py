"""A compiled denoiser says what it says as it is: the label, the LoRA and gradients are read anew in every call, nothing of them is compiled in.

Dynamo's `eager` backend traces and guards as any other does, and then runs the very operations: what differs is a fault of the tracing. Blocks that
are recomputed need `aot_eager`, whose backward is traced too.
"""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from test_training_families import gradient

from diffusers_ctrl import CTRLConfig, CTRLPipeline, CTRLTrainer, Policy, compiling, processes
from families import BUILDERS
from problems import cosine_scheduler, tiny_environment, tiny_policy


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs of other tests would count towards the limit of recompilations, beyond which a denoiser would run as it is, unseen."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


PLAIN = {"num_inference_steps": 4, "guidance_scale": 1.0, "eta": 1.0}  # the adapter's own settings, for the base too


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
    "control head alone": {"control_head": 16, "lora_rank": 0},
    "LoRA, calls recomputed": {"checkpointing": True},
}


@pytest.mark.parametrize("case", [*list(CASES)[:2], pytest.param(list(CASES)[2], marks=pytest.mark.slow)])
def test_a_compiled_denoiser_answers_as_it_is(case):
    plain, compiled = (tiny_policy(guidance_scale=2.0, perturb=0.1, **CASES[case]) for _ in range(2))
    compiled.denoiser.compile(backend="eager")
    found, expected = answers(compiled), answers(plain)
    assert len(found) == len(expected) and (found[0] - found[1]).abs().max() > 1e-4  # the label does something
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert graphs() > 0


@pytest.mark.filterwarnings("ignore:.*memoryless")
@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS if name != "dit")])
def test_blocks_that_are_recomputed_in_a_compiled_denoiser(name, tmp_path, monkeypatch):
    """Each block of `dit` embeds the time and the label anew, and tells the control head of it, which breaks its graph."""
    head = {"control_head": 16} if name == "dit" else {}
    expected = gradient(name, tmp_path, blocks=True, **head)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    found = gradient(name, tmp_path, blocks=True, **head)
    assert graphs() > 0 and expected.keys() == found.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * value.abs().max().item())


def test_a_compiled_pipeline_takes_every_label_and_strength(sd_folder, sd_gamma_adapter):
    """Compiled and used before its adapter is loaded."""

    def drawn(compiled: bool) -> tuple[list[torch.Tensor], list[int]]:
        pipe, images, counts = CTRLPipeline.from_pretrained(sd_folder), [], []
        if compiled:
            pipe.unet.compile(backend="eager")
        for given in (
            {},
            {"label": "thin"},
            {"label": "bold", "gamma": 4.0},
            {"label": "bold"},
            {"label": "thin", "strength": 0.5},
        ):
            if given and not counts[1:]:
                pipe.load_ctrl_adapter(sd_gamma_adapter)
            images.append(pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="pt", **PLAIN, **given).images)
            counts.append(graphs())
        assert is_compiled(pipe.unet) == compiled
        return images, counts

    (found, counts), (expected, _) = drawn(True), drawn(False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert min((a - b).abs().max() for i, a in enumerate(found) for b in found[:i]) > 1e-3
    # one of the base alone; with the adapter one of the noisy steps, and one of the last, which is the base's: no other for another label or gamma
    assert counts[:4] == [1, 3, 3, 3]


def make_trainer(folder, policy: Policy, **settings) -> CTRLTrainer:
    environment = tiny_environment()
    config = CTRLConfig(
        output_dir=str(folder),
        num_inference_steps=5,
        batch_size=4,
        max_updates=2,
        lora_rank=2,
        lora_targets=["to_q", "to_v", "conv1", "time_emb_proj"],
        checkpoint_every=0,
        report_to="none",
        **settings,
    )
    embeds = {"prompt_embeds": environment.prompt_embeds.float(), "null_embeds": environment.null_embeds.float()}
    scheduler, reward = cosine_scheduler(), lambda x, labels: environment.reward(x.double(), labels)
    return CTRLTrainer(policy.float(), scheduler, reward, config, shape=environment.shape, **embeds)


def test_accelerate_says_whether_training_compiles(tmp_path, monkeypatch):
    """`accelerate launch --dynamo_backend` is these variables."""
    plain = make_trainer(tmp_path / "plain", tiny_policy(perturb=0.1), merge_lora=True)
    before = {name: value.detach().clone() for name, value in plain._named.items()}
    plain.train()
    assert not is_compiled(plain.policy.denoiser)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = make_trainer(tmp_path / "compiled", tiny_policy(perturb=0.1), merge_lora=True)
    compiled.train()
    assert is_compiled(compiled.policy.denoiser)
    for name, value in plain._named.items():
        torch.testing.assert_close(compiled._named[name], value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, before[name]), name


def test_regional_compilation_is_of_the_blocks(tmp_path, monkeypatch):
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


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(compiling, "is_torch_version", lambda _, version: version == "2.5")
    with pytest.raises(ValueError, match="--dynamo_backend needs torch 2.5 or later: this is "):
        make_trainer(tmp_path, tiny_policy())
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="--dynamo_backend cannot be had with shard_base, which deals out the base's weights"):
        make_trainer(tmp_path, tiny_policy(), shard_base=True)
