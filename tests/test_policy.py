"""Policy and injection on real, tiny denoisers: the base bit for bit, guidance, gradients, LoRA and the label in and out."""

import pytest
import torch
from diffusers import UNet1DModel, UNet2DConditionModel, UNet2DModel
from peft.tuners.lora import LoraLayer

from diffusers_ctrl.injection import (
    add_label_hook,
    add_lora,
    find_injection_site,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    remove_label_hook,
    remove_lora,
)
from diffusers_ctrl.labels import Categorical, LabelSpace
from diffusers_ctrl.policy import Policy


NAN = float("nan")
T = torch.tensor(437)
SPACE = LabelSpace(stroke=Categorical(("thin", "regular", "bold")))
COMMON = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


# torch's matmul folds a batch by whether the weight requires a gradient, in no_grad too, and the two ways round
# differently: the bits are compared with a frozen base, as the policy freezes it
def conditional(dtype=torch.float32):
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**COMMON, **blocks, cross_attention_dim=8).to(dtype).eval().requires_grad_(False)


def unconditional(dtype=torch.float32):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    return UNet2DModel(**COMMON, **blocks).to(dtype).eval().requires_grad_(False)


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(batch_size=2, dtype=torch.float32):
    """sample, prompt_embeds, null_embeds."""
    x = normal(batch_size, 2, 8, 8, seed=1, dtype=dtype)
    prompt = normal(batch_size, 3, 8, seed=2, dtype=dtype)
    return x, prompt, normal(1, 3, 8, seed=3, dtype=dtype).expand(batch_size, 3, 8)


def labels(*values):
    return torch.tensor([[value] for value in values])


def perturb(policy, seed=4):
    """Random LoRA and label encoder, as after training, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for group in policy.trainable_parameters().values():
        for parameter in group:
            parameter.data.normal_(0.0, 0.5, generator=generator)
    return policy


def tuned_policy(denoiser, **kwargs):
    return perturb(Policy(denoiser, label_space=SPACE, lora_rank=2, **kwargs).to(denoiser.dtype))


def call_with(denoiser, batch_size=2):
    x, prompt, _ = inputs(batch_size, denoiser.dtype)
    return (x, prompt) if isinstance(denoiser, UNet2DConditionModel) else (x, None)


def plain(denoiser, x, prompt):
    kwargs = {} if prompt is None else {"encoder_hidden_states": prompt}
    return denoiser(x, T, **kwargs).sample.detach()


BOTH = pytest.mark.parametrize("build", [conditional, unconditional])


@BOTH
def test_a_fresh_policy_is_the_base_bit_for_bit(build):
    denoiser = build()
    x, prompt = call_with(denoiser)
    base = plain(denoiser, x, prompt)
    policy = Policy(denoiser, label_space=SPACE, lora_rank=2)
    assert torch.equal(policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt), base)
    assert torch.equal(policy(x, T, labels(NAN, NAN), prompt_embeds=prompt), base)
    assert torch.equal(policy.reference(x, T, prompt), base)


@BOTH
def test_the_reference_is_the_base_bit_for_bit_whatever_was_learned(build):
    denoiser = build()
    x, prompt = call_with(denoiser)
    base = plain(denoiser, x, prompt)
    policy = tuned_policy(denoiser)
    tuned = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
    assert (tuned - base).abs().max() > 1e-2
    assert torch.equal(policy.reference(x, T, prompt), base)
    assert torch.equal(policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt), tuned)  # the reference left no trace


def test_the_guided_reference_is_the_guided_base_bit_for_bit():
    denoiser = conditional()
    x, prompt, null = inputs()
    output = denoiser(torch.cat([x, x]), T, encoder_hidden_states=torch.cat([null, prompt])).sample.detach()
    without, with_prompt = output.chunk(2)
    policy = tuned_policy(denoiser, guidance_scale=3.0)
    assert torch.equal(policy.reference(x, T, prompt, null), without + 3.0 * (with_prompt - without))


@BOTH
def test_state_dict_keys_of_the_base_stay_what_they_were(build):
    denoiser = build()
    before = set(denoiser.state_dict())
    Policy(denoiser, label_space=SPACE, lora_rank=2)
    after = {key.replace(".base_layer.", ".") for key in denoiser.state_dict() if "lora_" not in key}
    assert after == before


@BOTH
def test_no_label_is_a_zero_embedding_with_the_lora_on(build):
    denoiser = build()
    x, prompt = call_with(denoiser)
    policy = tuned_policy(denoiser)
    base = policy.reference(x, T, prompt)
    null = policy(x, T, labels(NAN, NAN), prompt_embeds=prompt)
    assert (null - base).abs().max() > 1e-2
    with torch.no_grad():
        for table in policy.label_encoder.tables:
            table.zero_()
    assert torch.equal(policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt), null)


@BOTH
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_of_eight_is_eight_of_one(build, guidance_scale):
    denoiser = build(torch.float64)
    x, prompt, null = inputs(8, torch.float64)
    if build is unconditional:
        prompt = null = None
    policy = tuned_policy(denoiser, guidance_scale=guidance_scale)
    given = labels(0.0, 1.0, 2.0, NAN, 2.0, 1.0, 0.0, NAN)
    together = policy(x, T, given, None, prompt, null)
    one = [slice(i, i + 1) for i in range(8)]
    parts = (
        [policy(x[i], T, given[i]) for i in one]
        if prompt is None
        else [policy(x[i], T, given[i], None, prompt[i], null[i]) for i in one]
    )
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-10, atol=1e-12)
    relabelled = policy(x, T, labels(0.0, 1.0, 0.0, NAN, 2.0, 1.0, 0.0, NAN), None, prompt, null)
    changed = (relabelled - together).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, False, True, False, False, False, False, False]


def test_gamma_reaches_the_denoiser_row_by_row():
    policy = tuned_policy(unconditional(torch.float64), gamma_range=(0.5, 8.0))
    x = inputs(dtype=torch.float64)[0]
    one, both = policy(x, T, labels(1.0, 1.0), 1.0), policy(x, T, labels(1.0, 1.0), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(both[0], one[0], rtol=1e-10, atol=1e-12)
    assert (both[1] - one[1]).abs().max() > 1e-4


def test_guidance_is_by_hand_with_the_null_label_on_the_unconditional_half():
    denoiser = conditional(torch.float64)
    x, prompt, null = inputs(dtype=torch.float64)
    policy = tuned_policy(denoiser)
    with_prompt = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
    without = policy(x, T, labels(NAN, NAN), prompt_embeds=null)
    labelled_without = policy(x, T, labels(0.0, 2.0), prompt_embeds=null)
    policy.guidance_scale = 3.0
    guided = policy(x, T, labels(0.0, 2.0), None, prompt, null)
    torch.testing.assert_close(guided, without + 3.0 * (with_prompt - without), rtol=1e-10, atol=1e-12)
    wrong = labelled_without + 3.0 * (with_prompt - labelled_without)
    assert (guided - wrong).abs().max() > 1e-3


def test_guidance_without_null_embeds_is_an_error():
    policy = tuned_policy(conditional(), guidance_scale=3.0)
    x, prompt, _ = inputs()
    with pytest.raises(ValueError, match="guidance_scale=3.0.*null_embeds"):
        policy(x, T, labels(0.0, 2.0), None, prompt)
    with pytest.raises(ValueError, match="null_embeds"):
        policy.reference(x, T, prompt)


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_labels_as_samples_are_needed(count):
    policy = tuned_policy(unconditional())
    with pytest.raises(ValueError, match="labels"):
        policy(inputs()[0], T, labels(*[2.0] * count))


def test_a_failed_call_leaves_no_label_behind():
    policy = tuned_policy(conditional())
    x, prompt, _ = inputs()
    base = policy.reference(x, T, prompt)
    with pytest.raises((ValueError, RuntimeError)):
        policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt[..., :5])
    assert torch.equal(policy.reference(x, T, prompt), base)


@BOTH
def test_only_lora_and_label_encoder_are_trained_and_both_are(build):
    denoiser = build().requires_grad_(True)
    x, prompt = call_with(denoiser)
    policy = tuned_policy(denoiser)
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name or name.startswith("label_encoder.") for name in names)
    groups = policy.trainable_parameters()
    assert len(names) == sum(len(group) for group in groups.values())
    policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt).square().sum().backward()
    for group in groups.values():
        assert all(torch.isfinite(parameter.grad).all() for parameter in group)
        assert all(parameter.grad.any() for parameter in group)
    assert all(parameter.grad is None for parameter in policy.parameters() if not parameter.requires_grad)


def test_a_fresh_policy_has_a_gradient_to_start_from():
    denoiser = conditional()
    x, prompt = call_with(denoiser)
    policy = Policy(denoiser, label_space=SPACE, lora_rank=2)
    policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt).square().sum().backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in lora_layers(denoiser).values())
    assert policy.label_encoder.tables[0].grad.any()


def test_the_reference_gives_gradients_to_the_sample_only():
    policy = tuned_policy(conditional())
    x, prompt, _ = inputs()
    x.requires_grad_()
    policy.reference(x, T, prompt).square().sum().backward()
    assert x.grad.any()
    assert all(parameter.grad is None for parameter in policy.parameters())


def gradients(checkpointing, guidance_scale, merged=False):
    """Of a loss through two tuned calls with different labels, and a base call in between that needs a gradient too."""
    policy = tuned_policy(conditional(torch.float64), checkpointing=checkpointing, guidance_scale=guidance_scale)
    x, prompt, null = inputs(dtype=torch.float64)
    x.requires_grad_()
    with policy.merged(merged):
        first = policy(x, T, labels(0.0, 2.0), None, prompt, null)
        base = policy.reference(first, T, prompt, null)
        second = policy(base + first, T, labels(1.0, NAN), None, prompt, null)
        loss = (second - base).square().sum()
        loss.backward()
    return loss.detach(), [x.grad, *(p.grad for group in policy.trainable_parameters().values() for p in group)]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_checkpointing_changes_no_gradient(guidance_scale):
    loss, expected = gradients(False, guidance_scale)
    again, recomputed = gradients(True, guidance_scale)
    assert torch.equal(loss, again)
    assert len(expected) == len(recomputed) > 3
    for a, b in zip(expected, recomputed, strict=True):
        assert a.any()
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_merged_lora_changes_no_gradient(checkpointing):
    loss, expected = gradients(False, 3.0)
    again, merged = gradients(checkpointing, 3.0, merged=True)
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=0)
    for a, b in zip(expected, merged, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_merged_lora_leaves_the_base_bit_for_bit_and_ends_with_its_block():
    denoiser = conditional()
    x, prompt = call_with(denoiser)
    base = plain(denoiser, x, prompt)
    policy = tuned_policy(denoiser)
    before = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
    with policy.merged():
        inside = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
        assert torch.equal(policy.reference(x, T, prompt), base)
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        next(iter(lora_layers(denoiser).values())).lora_B["default"].weight.add_(1.0)
    after = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
    assert (after - before).abs().max() > 1e-3
    with policy.merged():
        torch.testing.assert_close(policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt), after, rtol=1e-4, atol=1e-5)


def test_merged_lora_leaves_a_tied_weight_as_it_is():
    """LoRA is on one of two layers that share a weight: merged into that one alone, as beside it."""
    denoiser, (x, prompt, _) = conditional(torch.float64), inputs(dtype=torch.float64)
    tuned, tied = (f"{block}.attentions.0.transformer_blocks.0.attn1.to_q" for block in ("down_blocks.0", "up_blocks.1"))
    denoiser.get_submodule(tied).weight = denoiser.get_submodule(tuned).weight
    policy = perturb(Policy(denoiser, label_space=SPACE, lora_rank=2, lora_targets=[tuned]))
    beside = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
    with policy.merged():
        inside = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
    torch.testing.assert_close(inside, beside, rtol=1e-9, atol=1e-12)


def unusual():
    """A real denoiser whose time embedding is called `time_mlp`."""
    torch.manual_seed(0)
    model = UNet1DModel(
        sample_size=16,
        in_channels=2,
        out_channels=2,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
        act_fn="swish",
    )
    return model.eval().requires_grad_(False)


def test_a_time_embedding_of_another_name_is_asked_for_and_then_found():
    denoiser = unusual()
    with pytest.raises(ValueError, match=r"(?s)UNet1DModel.*injection_site=.*Candidates:.*time_proj.*time_mlp"):
        Policy(denoiser, label_space=SPACE, lora_rank=None)
    x = normal(2, 2, 16, seed=1)
    t = T.expand(2)  # this model embeds one timestep as one row, not as one a sample
    base = denoiser(x, t).sample.detach()
    policy = Policy(denoiser, label_space=SPACE, lora_rank=None, injection_site="time_mlp")
    assert policy.injection_site == "time_mlp"
    assert torch.equal(policy(x, t, labels(0.0, 2.0)), base)
    perturb(policy)
    output = policy(x, t, labels(NAN, 2.0))
    assert (output[1] - base[1]).abs().max() > 1e-3
    assert torch.equal(output[0], base[0])


@pytest.mark.parametrize("site", ["time_mlp", "", "time_embedding.linear_9"])
def test_a_wrong_injection_site_lists_candidates_and_changes_nothing(site):
    denoiser = conditional()
    with pytest.raises(ValueError, match=r"(?s)UNet2DConditionModel.*Candidates:.*time_embedding"):
        Policy(denoiser, label_space=SPACE, lora_rank=2, injection_site=site)
    assert not lora_layers(denoiser)


@BOTH
def test_the_site_is_the_time_embedding(build):
    denoiser = build()
    assert find_injection_site(denoiser) == ("time_embedding", denoiser.time_embedding)
    policy = Policy(denoiser, label_space=SPACE, lora_rank=2)
    assert policy.label_encoder.config.embedding_dim == 32
    assert policy.label_space == SPACE


def test_a_policy_needs_a_label_space_or_an_encoder():
    with pytest.raises(ValueError, match="label_encoder, or a label_space"):
        Policy(conditional())


def test_a_second_hook_is_an_error_and_a_removed_one_makes_room():
    denoiser = conditional()
    add_label_hook(denoiser)
    with pytest.raises(ValueError, match="already carries"):
        add_label_hook(denoiser)
    remove_label_hook(denoiser)
    add_label_hook(denoiser)


def test_a_second_policy_on_one_denoiser_is_an_error_and_the_first_still_works():
    denoiser = conditional()
    x, prompt, _ = inputs()
    policy = tuned_policy(denoiser)
    before = policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt)
    with pytest.raises(ValueError, match="already carries"):
        Policy(denoiser, label_space=SPACE, lora_rank=2)
    assert torch.equal(policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt), before)


@BOTH
def test_saved_lora_on_a_fresh_copy_gives_the_identical_output(build):
    denoiser, fresh = build(), build()
    x, prompt = call_with(denoiser)
    policy = tuned_policy(denoiser)
    expected = policy(x, T, labels(0.0, NAN), prompt_embeds=prompt)
    state = lora_state_dict(denoiser)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) and not value.requires_grad for key, value in state.items())
    load_lora_state_dict(fresh, state)
    other = Policy(fresh, policy.label_encoder, lora_rank=None)
    assert torch.equal(other(x, T, labels(0.0, NAN), prompt_embeds=prompt), expected)
    again = lora_state_dict(fresh)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_saved_lora_with_a_rank_a_layer_and_a_few_layers_is_restored_as_it_was():
    denoiser, fresh = conditional(), conditional()
    add_lora(denoiser, 2, ["to_q", "conv1"], rank_pattern={"attn2.to_q": 3})
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) for key, value in lora_state_dict(denoiser).items()}
    assert {len(value) for key, value in state.items() if "lora_A" in key} == {2, 3}
    x, prompt = call_with(denoiser)
    remove_lora(denoiser)
    load_lora_state_dict(denoiser, state)
    load_lora_state_dict(fresh, state)
    assert {f"{name}.lora_A.weight" for name in lora_layers(fresh)} == {key for key in state if "lora_A" in key}
    assert all(layer.scaling["default"] == 1.0 for layer in lora_layers(fresh).values())
    assert torch.equal(plain(fresh, x, prompt), plain(denoiser, x, prompt))


def good_state():
    denoiser = conditional()
    tuned_policy(denoiser)
    return lora_state_dict(denoiser)


def wrong_width(state):
    key = next(key for key in state if key.endswith("lora_A.weight"))
    state[key] = state[key][:, :-1].contiguous()


def wrong_rank(state):
    key = next(key for key in state if key.endswith("lora_B.weight"))
    state[key] = state[key][:, :-1].contiguous()


def unknown_layer(state):
    for part in ("A", "B"):
        state[f"down_blocks.7.to_q.lora_{part}.weight"] = torch.zeros(2, 2)


def layer_without_lora(state):
    for part in ("A", "B"):
        state[f"conv_norm_out.lora_{part}.weight"] = torch.zeros(2, 2)


def missing_half(state):
    del state[next(key for key in state if key.endswith("lora_B.weight"))]


def stray_key(state):
    state["conv_in.weight"] = torch.zeros(1)


def nothing(state):
    state.clear()


@pytest.mark.parametrize("adapter_name", ["default", "style"])
@pytest.mark.parametrize(
    "damage",
    [wrong_width, wrong_rank, unknown_layer, layer_without_lora, missing_half, stray_key, nothing],
)
def test_a_lora_that_does_not_fit_is_an_error_and_leaves_the_base(damage, adapter_name):
    denoiser = conditional()
    x, prompt = call_with(denoiser)
    base = plain(denoiser, x, prompt)
    keys = list(denoiser.state_dict())
    state = good_state()
    damage(state)
    with pytest.raises(ValueError, match="LoRA"):
        load_lora_state_dict(denoiser, state, adapter_name)
    assert not any(isinstance(module, LoraLayer) for module in denoiser.modules())
    assert list(denoiser.state_dict()) == keys
    assert torch.equal(plain(denoiser, x, prompt), base)


@BOTH
def test_removing_the_lora_gives_back_plain_modules_and_the_base(build):
    denoiser = build()
    x, prompt = call_with(denoiser)
    base, keys = plain(denoiser, x, prompt), list(denoiser.state_dict())
    types = [type(module) for module in denoiser.modules()]
    tuned_policy(denoiser)
    assert not torch.equal(plain(denoiser, x, prompt), base)
    remove_lora(denoiser)
    remove_label_hook(denoiser)
    assert [type(module) for module in denoiser.modules()] == types
    assert list(denoiser.state_dict()) == keys
    assert not hasattr(denoiser, "peft_config")
    assert torch.equal(plain(denoiser, x, prompt), base)
    Policy(denoiser, label_space=SPACE, lora_rank=2)  # and there is room for another


def test_removing_one_lora_leaves_the_other():
    denoiser = conditional()
    x, prompt = call_with(denoiser)
    base = plain(denoiser, x, prompt)
    add_lora(denoiser, 2, adapter_name="first")
    add_lora(denoiser, 3, adapter_name="second")
    remove_lora(denoiser, "first")
    assert not lora_layers(denoiser, "first") and len(lora_layers(denoiser, "second")) > 3
    assert list(denoiser.peft_config) == ["second"]
    remove_lora(denoiser, "second")
    assert not hasattr(denoiser, "peft_config")
    assert torch.equal(plain(denoiser, x, prompt), base)


@pytest.mark.parametrize("targets", [["nothing_here"], "nothing.*", ["conv_norm_out", "to_q"]])
def test_lora_targets_that_match_no_layer_are_an_error_and_leave_the_base(targets):
    denoiser = conditional()
    keys = list(denoiser.state_dict())
    with pytest.raises(ValueError, match="LoRA cannot be put on UNet2DConditionModel"):
        add_lora(denoiser, 2, targets)
    assert list(denoiser.state_dict()) == keys


def test_a_policy_that_failed_leaves_room_for_another():
    denoiser = conditional()
    x, prompt = call_with(denoiser)
    base = plain(denoiser, x, prompt)
    with pytest.raises(ValueError, match="nothing_here"):
        Policy(denoiser, label_space=SPACE, lora_rank=2, lora_targets=["nothing_here"])
    policy = Policy(denoiser, label_space=SPACE, lora_rank=2)
    assert torch.equal(policy(x, T, labels(0.0, 2.0), prompt_embeds=prompt), base)
