"""CTRLPipeline over Stable Diffusion and DDPM: the base bit for bit, the label, strength, defaults, errors, save and load."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from PIL import Image

from diffusers_ctrl import Categorical, Classifier, CTRLPipeline, LabelEncoder, LabelSpace, controls, injection
from diffusers_ctrl.adapters import load_adapter, save_adapter


PROMPT = "a handwritten seven"
BASE = {"num_inference_steps": 4, "guidance_scale": 1.0, "eta": 1.0, "output_type": "pt"}  # what the adapter's own settings are


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt=PROMPT, seed=0, **kwargs):
    return pipe(prompt, generator=generator(seed), **{"output_type": "pt", **kwargs}).images


def draw_base(pipe, prompt=PROMPT, seed=0, **kwargs):
    return draw(pipe, prompt, seed, **{**BASE, **kwargs})


def latents_of(pipe, **kwargs):
    """The latents after each step, a list."""
    seen = []

    def keep(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    draw(pipe, callback_on_step_end=keep, **kwargs)
    return seen


def forwards(pipe, **kwargs):
    """How often the denoiser runs in one call."""
    count = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: count.append(1))
    try:
        draw(pipe, **kwargs)
    finally:
        handle.remove()
    return len(count)


def structure(module):
    """Every submodule and weight of a denoiser, and whether it would train: what a failed load must leave as it was."""
    modules = [(name, type(m).__name__) for name, m in module.named_modules()]
    return modules, [(name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()]


@pytest.fixture(scope="module")
def plain(sd_folder):
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(sd_adapter):
    """The pipeline with the adapter. Shared: each test must leave it clean, and some check that."""
    pipe = CTRLPipeline.from_pretrained(sd_adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def bare(sd_folder):
    """A CTRL pipeline of the base alone."""
    pipe = CTRLPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- the base, bit for bit --


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_no_label_is_the_base(pipe, plain, guidance_scale, eta):
    options = {"guidance_scale": guidance_scale, "eta": eta, "num_images_per_prompt": 2}
    assert torch.equal(draw_base(pipe, **options), draw_base(plain, **options))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_strength_zero_is_the_base(pipe, plain, guidance_scale):
    found = draw_base(pipe, label="bold", strength=0, guidance_scale=guidance_scale)
    assert torch.equal(found, draw_base(plain, guidance_scale=guidance_scale))


def test_no_label_has_the_bases_own_defaults(pipe, plain):
    assert torch.equal(draw(pipe), draw(plain))


def test_without_an_adapter_it_is_the_base(bare, plain):
    assert type(bare).__name__ == "CTRLStableDiffusionPipeline"
    assert isinstance(bare, StableDiffusionPipeline)
    assert bare.label_space is None and bare.classifier is None
    assert torch.equal(draw_base(bare), draw_base(plain))


def test_the_base_in_half_precision(sd_folder, sd_adapter):
    pipe = CTRLPipeline.from_pretrained(sd_adapter, torch_dtype=torch.bfloat16)
    plain = StableDiffusionPipeline.from_pretrained(sd_folder, torch_dtype=torch.bfloat16)
    assert pipe.unet.conv_in.weight.dtype == torch.bfloat16
    base = draw_base(plain)
    assert torch.equal(draw_base(pipe), base)
    assert torch.equal(draw_base(pipe, label="bold", strength=0), base)
    assert not torch.equal(draw_base(pipe, label="bold"), base)


# -- labels --


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_labels_change_the_image(pipe, guidance_scale):
    images = [draw_base(pipe, label=label, guidance_scale=guidance_scale) for label in (None, "thin", "regular", "bold")]
    for i in range(4):
        for j in range(i):
            assert (images[i] - images[j]).abs().max() > 1e-3


def test_name_index_and_dict_are_the_same(pipe):
    image = draw(pipe, label="bold")
    assert torch.equal(draw(pipe, label=2), image)
    assert torch.equal(draw(pipe, label={"stroke": "bold"}), image)
    assert torch.equal(draw(pipe, label=["bold"]), image)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_list_gives_each_prompt_its_label(pipe, guidance_scale):
    prompts, labels = [f"a handwritten {n}" for n in ("one", "two", "three")], ["bold", 0, {"stroke": "regular"}]
    options = {"guidance_scale": guidance_scale, "output_type": "pt"}
    together = pipe(prompts, label=labels, generator=[generator(i) for i in range(3)], **options).images
    for i in range(3):
        alone = pipe(prompts[i], label=labels[i], generator=generator(i), **options).images
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
        assert (together[i] - together[i - 1]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_prompt_without_label_is_the_bases(pipe, plain, guidance_scale):
    """Beside labelled ones, or alone: not the tuned model without a label, which has drifted from the base."""
    prompts, options = ["a handwritten one", "a handwritten two"], {"guidance_scale": guidance_scale, "output_type": "pt"}

    def both(pipe, **kwargs):
        return pipe(prompts, generator=[generator(0), generator(1)], **options, **kwargs).images

    base = both(plain, num_inference_steps=BASE["num_inference_steps"], eta=1.0)
    settings = {"num_inference_steps": BASE["num_inference_steps"], "eta": 1.0}
    for label in ({}, [None, None], [{}, {"stroke": None}]):
        assert torch.equal(both(pipe, label=label, **settings), base)
    mixed = both(pipe, label=["bold", None], **settings)
    assert torch.equal(mixed[1], base[1]) and (mixed[0] - base[0]).abs().max() > 1e-3
    torch.testing.assert_close(mixed[0], both(pipe, label="bold", **settings)[0], rtol=0, atol=1e-5)


def test_images_per_prompt_share_the_prompts_label(pipe):
    prompts, labels = ["a handwritten one", "a handwritten two"], ["thin", "bold"]
    together = pipe(
        prompts, label=labels, num_images_per_prompt=2, generator=[generator(i) for i in range(4)], output_type="pt"
    ).images
    assert len(together) == 4
    for i in range(4):
        alone = draw(pipe, prompts[i // 2], seed=i, label=labels[i // 2])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_guidance_acts_between_the_label_and_no_label(bare, adapter):
    """One DDIM step is affine in the output: with guidance it lies on the line from the null label, empty prompt, through the label."""
    bare.load_ctrl_adapter(adapter)
    (table,) = bare.ctrl_adapters["default"].label_encoder.tables

    def first(prompt, **kwargs):
        return latents_of(bare, prompt=prompt, label="bold", **kwargs)[0]

    conditional, bold = first(PROMPT), table[2].clone()
    with torch.no_grad():
        table[2] = 0
        unconditional = first("")
        table[2] = bold
    assert (conditional - unconditional).abs().max() > 1e-2
    found = first(PROMPT, guidance_scale=3.0)
    torch.testing.assert_close(found, torch.lerp(unconditional, conditional, 3.0), rtol=1e-4, atol=1e-5)


def test_one_label_serves_all_prompts(pipe):
    images = draw(pipe, [PROMPT, "a handwritten one"], label="thin")
    assert torch.equal(images, draw(pipe, [PROMPT, "a handwritten one"], label=["thin", "thin"]))


def test_the_prompt_is_optional(pipe):
    image = pipe(label="bold", generator=generator(), output_type="pt").images
    assert torch.equal(image, draw(pipe, "", label="bold"))
    two = pipe(label=["bold", "thin"], generator=[generator(), generator(1)], output_type="pt").images
    assert len(two) == 2
    torch.testing.assert_close(two[:1], image, rtol=0, atol=1e-5)


def test_a_prompt_of_none_is_no_prompt(pipe):
    image = draw(pipe, "", label="bold")
    assert torch.equal(pipe(prompt=None, label="bold", generator=generator(), output_type="pt").images, image)
    assert torch.equal(pipe(None, label="bold", generator=generator(), output_type="pt").images, image)


def test_prompt_embeds_in_place_of_a_prompt(pipe):
    embeds, _ = pipe.encode_prompt([PROMPT, "a handwritten one"], "cpu", 1, False)
    options = {"label": ["thin", "bold"], "output_type": "pt"}
    found = pipe(prompt_embeds=embeds, generator=generator(), **options).images
    assert torch.equal(found, pipe([PROMPT, "a handwritten one"], generator=generator(), **options).images)


# -- strength --


def test_strength_interpolates_the_outputs(pipe):
    """One DDIM step is affine in the denoiser's output, so the first latents are, in strength, on a line."""
    first = {w: latents_of(pipe, label="bold", strength=w)[0] for w in (0, 0.5, 1, 2)}
    assert (first[1] - first[0]).abs().max() > 1e-2
    for w in (0.5, 2):
        torch.testing.assert_close(first[w], torch.lerp(first[0], first[1], float(w)), rtol=1e-4, atol=1e-5)


def test_strength_one_is_the_default(pipe):
    assert torch.equal(draw(pipe, label="bold", strength=1.0), draw(pipe, label="bold"))


def test_strength_half_lies_between_and_differs(pipe):
    images = [draw(pipe, label="bold", strength=w) for w in (0, 0.5, 1)]
    assert not torch.equal(images[1], images[0]) and not torch.equal(images[1], images[2])


def test_what_strength_costs(pipe, plain):
    steps = 4
    assert forwards(plain, num_inference_steps=steps, guidance_scale=1.0, eta=1.0) == steps
    assert forwards(pipe, label="bold") == steps
    assert forwards(pipe, label="bold", strength=0) == steps
    # one more for each step that has noise; the last has none and is the base's
    assert forwards(pipe, label="bold", strength=0.5) == steps + steps - 1


@pytest.mark.parametrize("given", [{"strength": 0.5}, {"label_strength": 0.5}, {"strength": {"stroke": 0.5}}, {"gamma": 2.0}])
def test_what_is_of_a_label_needs_one(pipe, bare, sd_gamma_adapter, given):
    bare.load_ctrl_adapter(sd_gamma_adapter)  # which takes a gamma
    (name,) = given
    for each in (pipe, bare):
        with pytest.raises(ValueError, match=rf"^{name} = .* is of a label, and no label was given: .*leave {name} out"):
            draw(each, **given)


def test_the_strength_of_an_image_needs_no_label(pipe):
    image, own = Image.new("RGB", (16, 16)), StableDiffusionImg2ImgPipeline
    plain, ours = own(**pipe.components, requires_safety_checker=False), CTRLPipeline.from_pipe(pipe, own)
    call = {"image": image, "strength": 0.6, "num_inference_steps": 10}
    assert torch.equal(draw(ours, **call), draw(plain, **call))
    with pytest.raises(ValueError, match="label_strength = 0.5 is of a label"):
        draw(ours, **call, label_strength=0.5)


# -- gamma --


def test_gamma_needs_an_adapter_trained_for_it(pipe, plain):
    with pytest.raises(ValueError, match="strength"):
        draw(pipe, label="bold", gamma=2.0)
    assert torch.equal(draw_base(pipe), draw_base(plain))


def test_gamma_of_an_adapter_with_a_range(bare, sd_gamma_adapter):
    bare.load_ctrl_adapter(sd_gamma_adapter)
    default = draw(bare, label="bold")
    assert torch.equal(draw(bare, label="bold", gamma=1.0), default)
    assert (draw(bare, label="bold", gamma=4.0) - default).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="0.5 to 8"):
        draw(bare, label="bold", gamma=9.0)
    with pytest.raises(ValueError, match="gamma must be positive"):
        draw(bare, label="bold", gamma=-1.0)


# -- the call's other arguments --


def test_output_types(pipe):
    image = draw(pipe, label="bold")
    array = draw(pipe, label="bold", output_type="np")
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), image, rtol=0, atol=1e-6)
    (picture,) = draw(pipe, label="bold", output_type="pil")
    assert isinstance(picture, Image.Image) and picture.size == (16, 16)
    assert draw(pipe, label="bold", output_type="latent").shape == (1, 4, 8, 8)


def test_return_dict_false(pipe):
    out = pipe(PROMPT, label="bold", generator=generator(), output_type="pt", return_dict=False)
    assert isinstance(out, tuple) and torch.equal(out[0], draw(pipe, label="bold"))


def test_settings_default_to_the_adapters(pipe):
    assert torch.equal(draw(pipe, label="bold"), draw_base(pipe, label="bold"))
    assert len(latents_of(pipe, label="bold")) == 4


@pytest.mark.parametrize("setting", [{"num_inference_steps": 6}, {"guidance_scale": 4.0}, {"eta": 0.5}])
def test_settings_that_are_given_win(pipe, setting):
    given = draw(pipe, label="bold", **setting)
    assert torch.equal(given, draw_base(pipe, label="bold", **setting))
    assert not torch.equal(given, draw(pipe, label="bold"))


def test_positional_settings_win(pipe):
    found = pipe(PROMPT, 16, 16, 6, label="bold", generator=generator(), output_type="pt").images
    assert torch.equal(found, draw(pipe, label="bold", num_inference_steps=6))


def test_callbacks_see_every_step(pipe):
    steps = []

    def keep(pipe, step, t, tensors):
        steps.append((step, int(t), tensors["latents"].shape))
        return tensors

    draw(pipe, label="bold", callback_on_step_end=keep)
    assert steps == [(k, t, (1, 4, 8, 8)) for k, t in enumerate((999, 749, 499, 249))]


def end_from(pipe, step, **kwargs):
    """The image when the latents after `step` are replaced by fixed ones."""

    def replace_latents(pipe, k, t, tensors):
        if k == step:
            tensors["latents"] = torch.randn(tensors["latents"].shape, generator=generator(5))
        return tensors

    return draw_base(pipe, callback_on_step_end=replace_latents, **kwargs)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_last_step_without_noise_is_the_bases(pipe, plain, strength):
    base = end_from(plain, 2)
    for label in ("thin", "bold"):
        assert torch.equal(end_from(pipe, 2, label=label, strength=strength), base)
        assert not torch.equal(end_from(pipe, 1, label=label, strength=strength), end_from(plain, 1))


def test_eta_zero_warns_and_works(pipe, plain):
    with pytest.warns(UserWarning, match="not as certified"):
        image = draw(pipe, label="bold", eta=0.0)
    base = draw_base(plain, eta=0.0)
    assert (image - base).abs().max() > 1e-3
    with pytest.warns(UserWarning):
        assert torch.equal(draw(pipe, label="bold", eta=0.0, strength=0), base)


def test_a_scheduler_without_noise_gives_way_while_there_is_a_label(sd_folder, sd_adapter, pipe):
    """SD v1.5 comes with PNDM, which adds no noise: a label is drawn with the scheduler that the adapter was trained with."""
    other, plain = CTRLPipeline.from_pretrained(sd_adapter), StableDiffusionPipeline.from_pretrained(sd_folder)
    for each in (other, plain):
        each.scheduler = PNDMScheduler.from_config(each.scheduler.config, skip_prk_steps=True)
    scheduler = other.scheduler
    assert torch.equal(draw(other, label="bold"), draw(pipe, label="bold"))
    assert other.scheduler is scheduler
    with pytest.raises(ValueError, match="Unknown label"):
        draw(other, label="fat")
    with pytest.raises(ZeroDivisionError):
        draw(other, label="bold", callback_on_step_end=lambda *_: 1 / 0)
    assert other.scheduler is scheduler
    assert torch.equal(draw(other, num_inference_steps=4), draw(plain, num_inference_steps=4))


def test_another_scheduler_with_noise_is_kept(sd_adapter, pipe):
    """It may be wanted; but its law is not the certified one, and the warning says how to get that."""
    other = CTRLPipeline.from_pretrained(sd_adapter)
    other.scheduler = DDPMScheduler.from_config(other.scheduler.config)
    with pytest.warns(
        UserWarning, match="has DDPMScheduler, and the adapter 'default' was trained and measured with DDIMScheduler"
    ) as told:
        assert not torch.equal(draw(other, label="bold"), draw(pipe, label="bold"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = draw(other, num_inference_steps=4, guidance_scale=1.0)
        assert torch.equal(draw(other, label={}), base)
    with pytest.warns(UserWarning, match="DDIMScheduler"):
        assert not torch.equal(draw(other, label="bold"), base)
    exec(str(told[0].message).split("`")[1], {"pipe": other, "DDIMScheduler": DDIMScheduler})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(draw(other, label="bold"), draw(pipe, label="bold"))


def test_a_labelled_call_gives_no_warning(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, label="bold")


def test_no_gradient_is_kept(pipe):
    assert not draw(pipe, label="bold").requires_grad


# -- errors, and what they leave behind --


@pytest.mark.parametrize(
    "prompt, label, message",
    [
        (PROMPT, "fat", "Unknown label 'fat'.*thin.*regular.*bold"),
        (PROMPT, 3, "Unknown label 3.*0 to 2"),
        (PROMPT, -1, "Unknown label -1"),
        (PROMPT, {"slant": "left"}, "Unknown attribute 'slant'.*stroke"),
        (PROMPT, ["thin", "bold"], "Got 2 labels for 1 prompt"),
        ([PROMPT, PROMPT, PROMPT], ["thin", "bold"], "Got 2 labels for 3 prompts"),
        (PROMPT, [], "Got 0 labels for 1 prompt"),
    ],
)
def test_bad_labels(pipe, plain, prompt, label, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, prompt, label=label)
    assert torch.equal(draw_base(pipe), draw_base(plain))


def test_a_label_without_an_adapter(bare, plain):
    with pytest.raises(ValueError, match="load_ctrl_adapter"):
        draw(bare, label="bold")
    assert torch.equal(draw_base(bare), draw_base(plain))


def test_an_error_inside_the_base_call_leaves_no_label(pipe, plain):
    class Interrupted(Exception):
        pass

    def stop(pipe, step, t, tensors):
        raise Interrupted

    with pytest.raises(Interrupted):
        draw(pipe, label="bold", strength=0.5, callback_on_step_end=stop)
    assert torch.equal(draw_base(pipe), draw_base(plain))


def test_a_second_adapter_is_refused(pipe, plain, sd_adapter):
    with pytest.raises(ValueError, match="unload_ctrl_adapter"):
        pipe.load_ctrl_adapter(sd_adapter)
    with pytest.raises(ValueError, match="unload_ctrl_adapter"):
        pipe.load_ctrl_adapter(sd_adapter, adapter_name="second")
    assert torch.equal(draw_base(pipe), draw_base(plain))
    assert not torch.equal(draw_base(pipe, label="bold"), draw_base(plain))


# -- load, unload --


@pytest.mark.parametrize("adapter_name", ["default", "stroke"])
def test_unload_gives_the_base_back(bare, plain, pipe, sd_adapter, adapter_name):
    before = structure(plain.unet)
    for _ in range(2):
        bare.load_ctrl_adapter(sd_adapter, adapter_name=adapter_name)
        assert torch.equal(draw(bare, label="bold"), draw(pipe, label="bold"))
        assert bare.label_space == LabelSpace(stroke=Categorical(("thin", "regular", "bold")))
        bare.unload_ctrl_adapter()
        assert structure(bare.unet) == before
        assert bare.label_space is None and bare.classifier is None
        assert torch.equal(draw_base(bare), draw_base(plain))
        with pytest.raises(ValueError, match="no label adapter"):
            draw(bare, label="bold")
    bare.unload_ctrl_adapter()  # nothing to do is no error


def test_three_ways_to_load(sd_folder, sd_adapter, bare, pipe):
    image = draw(pipe, label="bold")
    both = CTRLPipeline.from_pretrained(sd_folder, adapter=sd_adapter)
    assert torch.equal(draw(both, label="bold"), image)
    bare.load_ctrl_adapter(str(sd_adapter))
    assert torch.equal(draw(bare, label="bold"), image)
    assert isinstance(pipe.classifier.log_prob(torch.rand(1, 3, 16, 16), torch.zeros(1, 1)), torch.Tensor)


def refuse(pipe, adapter, message, **kwargs):
    """Loading raises, and leaves the pipeline as it was."""
    before = structure(pipe.unet)
    with pytest.raises(ValueError, match=message):
        pipe.load_ctrl_adapter(adapter, **kwargs)
    assert structure(pipe.unet) == before
    assert pipe.label_space is None
    assert not getattr(pipe.unet, "peft_config", None)


def test_another_base_is_refused(sd_folder, ddpm_folder, sd_adapter, adapter, bare, plain, pipe):
    other = replace(adapter, config=replace(adapter.config, base={**adapter.config.base, "denoiser_sha256": "0" * 64}))
    refuse(bare, other, "does not match")
    refuse(CTRLPipeline.from_pretrained(ddpm_folder), sd_adapter, "tiny-sd.*does not match")
    with pytest.raises(ValueError, match="does not match"):
        CTRLPipeline.from_pretrained(ddpm_folder, adapter=sd_adapter)
    assert torch.equal(draw_base(bare), draw_base(plain))
    bare.load_ctrl_adapter(sd_adapter)  # and it still takes the right one
    assert torch.equal(draw(bare, label="bold"), draw(pipe, label="bold"))


def lora_with(lora, case):
    """A LoRA with one thing wrong, and what the error says of it."""
    key = next(k for k in lora if k.endswith("to_q.lora_A.weight"))
    layer = key.removesuffix(".lora_A.weight")
    if case == "no such layer":
        return {**lora, **{f"nowhere.lora_{m}.weight": lora[f"{layer}.lora_{m}.weight"] for m in "AB"}}, "nowhere"
    if case == "wrong shape":
        return {**lora, key: torch.ones(2, 5)}, "does not fit"
    if case == "not a layer for LoRA":  # which peft finds out when the attention layers are wrapped already
        return {**lora, "conv_norm_out.lora_A.weight": torch.ones(2, 8), "conv_norm_out.lora_B.weight": torch.ones(8, 2)}, "Norm"
    if case == "half a pair":
        return {k: v for k, v in lora.items() if k != f"{layer}.lora_B.weight"}, "lora_B"
    if case == "another weight":
        return {**lora, "conv_in.bias": torch.ones(8)}, "pairs"
    return {}, "pairs"


@pytest.mark.parametrize("adapter_name", ["default", "stroke"])
@pytest.mark.parametrize("case", ["no such layer", "wrong shape", "not a layer for LoRA", "half a pair", "another weight", "empty"])
def test_a_lora_that_does_not_fit_is_refused(bare, plain, sd_adapter, adapter, adapter_name, case):
    lora, message = lora_with(adapter.lora, case)
    refuse(bare, replace(adapter, lora=lora), message, adapter_name=adapter_name)
    assert torch.equal(draw_base(bare), draw_base(plain))
    bare.load_ctrl_adapter(sd_adapter, adapter_name=adapter_name)  # and it still takes a good one
    assert not torch.equal(draw(bare, label="bold"), draw_base(plain))


def test_an_injection_site_that_does_not_exist_is_refused(bare, plain, adapter):
    refuse(bare, replace(adapter, config=replace(adapter.config, injection_site="nowhere.at_all")), "nowhere.at_all")
    assert torch.equal(draw_base(bare), draw_base(plain))


def test_a_label_encoder_of_another_width_is_refused(bare, adapter):
    refuse(bare, replace(adapter, label_encoder=LabelEncoder(adapter.config.label_space, 1)), "label.encoder|width|embedding_dim")


def test_a_failed_load_names_the_file(sd_adapter, bare, plain, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(sd_adapter, broken)
    weights = broken / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(bare, broken, "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="pytorch_lora_weights.safetensors"):
        CTRLPipeline.from_pretrained(broken)
    assert torch.equal(draw_base(bare), draw_base(plain))


def test_names_that_are_nothing(bare):
    with pytest.raises(ValueError, match="no/such-model"):
        CTRLPipeline.from_pretrained("no/such-model")
    refuse(bare, "no/such-adapter", "no/such-adapter")


def test_an_adapter_whose_base_cannot_be_found(adapter, tmp_path):
    config = replace(adapter.config, base={**adapter.config.base, "id": "no/such-base"})
    save_adapter(tmp_path / "orphan", replace(adapter, config=config))
    with pytest.raises(ValueError, match="no/such-base"):
        CTRLPipeline.from_pretrained(tmp_path / "orphan")


# -- two adapters (that they add up is in test_families.py) --

SLANT = LabelSpace(slant=Categorical(("left", "right")))


@pytest.fixture
def slant(adapter):
    """An adapter with another attribute: the same LoRA, an encoder of its own."""
    torch.manual_seed(3)
    encoder = LabelEncoder(SLANT.to_dict(), adapter.label_encoder.config.embedding_dim)
    torch.nn.init.normal_(encoder.tables[0], std=0.3)
    classifier = Classifier(SLANT.to_dict(), image_size=8, widths=(4, 8), temperatures=(1.5,)).eval()
    return replace(
        adapter, config=replace(adapter.config, label_space=SLANT.to_dict()), label_encoder=encoder, classifier=classifier
    )


@pytest.fixture
def two(bare, adapter, slant):
    bare.load_ctrl_adapter(adapter, adapter_name="first")
    bare.load_ctrl_adapter(slant, adapter_name="second")
    return bare


BOTH = {"stroke": "bold", "slant": "left"}


def test_what_two_adapters_cost(two, plain):
    """One forward of the base and one an adapter, on the steps that have noise; an adapter that is not asked for costs nothing."""
    assert forwards(two, label=BOTH) == 3 * 3 + 1
    assert forwards(two, label={"stroke": "bold"}) == 4
    assert forwards(two, label=BOTH, strength={"second": 0}) == 4
    assert forwards(two, label={}) == 4
    assert torch.equal(draw_base(two, label={}), draw_base(plain))


def test_strength_by_adapter_or_attribute(two):
    image = draw(two, label=BOTH, strength={"first": 1.0, "second": 0.5})
    assert torch.equal(draw(two, label=BOTH, strength={"slant": 0.5}), image)
    assert not torch.equal(draw(two, label=BOTH, strength=0.5), image)
    with pytest.raises(ValueError, match="strength names 'third'.*first.*second"):
        draw(two, label=BOTH, strength={"third": 1.0})


def test_one_adapter_of_two_attributes_has_one_strength(bare, adapter):
    space = LabelSpace(stroke=Categorical(("thin", "regular", "bold")), slant=Categorical(("left", "right")))
    torch.manual_seed(3)
    encoder = LabelEncoder(space.to_dict(), adapter.label_encoder.config.embedding_dim)
    for table in encoder.tables:
        torch.nn.init.normal_(table, std=0.3)
    config = replace(adapter.config, label_space=space.to_dict())
    bare.load_ctrl_adapter(replace(adapter, config=config, label_encoder=encoder, classifier=None), "joint")
    half = draw(bare, label=BOTH, strength=0.5)
    for same in ({"stroke": 0.5, "slant": 0.5}, {"slant": 0.5}, {"joint": 0.5, "stroke": 0.5}):
        assert torch.equal(draw(bare, label=BOTH, strength=same), half)
    with pytest.raises(ValueError, match="different numbers for 'stroke', 'slant', which are of one adapter, 'joint'"):
        draw(bare, label=BOTH, strength={"stroke": 1.0, "slant": 0.5})


@pytest.mark.parametrize(
    "label, message", [("bold", "which attribute it belongs to"), ({"mood": 1}, "Unknown attribute 'mood'.*stroke.*slant")]
)
def test_labels_of_two_adapters_are_checked(two, plain, label, message):
    with pytest.raises(ValueError, match=message):
        draw(two, label=label)
    assert torch.equal(draw_base(two), draw_base(plain))


def test_names_of_two_adapters(two, adapter, tmp_path):
    assert list(two.ctrl_adapters) == ["first", "second"] and list(two.label_space.attributes) == ["stroke", "slant"]
    with pytest.raises(ValueError, match="'stroke' already belongs to the loaded adapter 'first'"):
        two.load_ctrl_adapter(adapter, adapter_name="third")
    with pytest.raises(ValueError, match="already has a label adapter named 'first'"):
        two.load_ctrl_adapter(adapter, adapter_name="first")
    for name in (None, "third"):
        with pytest.raises(ValueError, match="one of the loaded adapters.*first.*second"):
            two.save_ctrl_adapter(tmp_path / "which", name)
    with pytest.raises(ValueError, match="one of the loaded adapters"):
        two.unload_ctrl_adapter("third")
    with pytest.raises(ValueError, match="a pipeline's folder has place for one"):
        two.save_pretrained(tmp_path / "whole")
    assert not list(tmp_path.iterdir())
    again = load_adapter(two.save_ctrl_adapter(tmp_path / "second", "second"))
    assert again.label_encoder.label_space == SLANT


def test_samplers_that_differ(bare, adapter, slant):
    """The first adapter's settings, and a warning unless the call gives what differs."""
    bare.load_ctrl_adapter(adapter)
    bare.load_ctrl_adapter(
        replace(slant, config=replace(slant.config, sampler={**slant.config.sampler, "num_inference_steps": 8})), "slant"
    )
    with pytest.warns(UserWarning, match="different samplers .num_inference_steps.*uses that of 'default'"):
        assert forwards(bare, label=BOTH) == 3 * 3 + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(bare, label=BOTH, num_inference_steps=4)
        assert forwards(bare, label={"slant": "left"}) == 8


def test_gamma_goes_to_the_adapter_that_takes_it(bare, sd_gamma_adapter, slant):
    bare.load_ctrl_adapter(sd_gamma_adapter)
    bare.load_ctrl_adapter(slant, "slant")
    assert not torch.equal(draw(bare, label=BOTH, gamma=4.0), draw(bare, label=BOTH))
    with pytest.raises(ValueError, match="trained for gamma = 1.0 only"):
        draw(bare, label={"slant": "left"}, gamma=4.0)


def test_exact_sampling_with_two_adapters_adds_the_log_likelihoods(two, monkeypatch):
    def weights():
        return two(PROMPT, label=BOTH, num_particles=3, generator=generator(), output_type="pt").log_weights

    before, classifier = weights(), two.ctrl_adapters["second"].classifier
    assert before.shape == (1, 3) and before.isfinite().all()
    log_prob = classifier.log_prob
    monkeypatch.setattr(classifier, "log_prob", lambda images, labels: 2 * log_prob(images, labels))
    images = two(PROMPT, label=BOTH, num_particles=3, generator=generator(), output_type="pt")
    assert (images.log_weights < before).all()  # log-likelihoods are negative: twice the second one is less
    assert two.classifier is None


def test_a_style_lora_beside_the_label(bare, plain, sd_folder, sd_adapter, adapter):
    """A user's own LoRA stays on, below the label: it is part of the base."""
    styled = StableDiffusionPipeline.from_pretrained(sd_folder)
    style = {f"unet.{key}": 0.5 * value for key, value in adapter.lora.items()}
    styled.load_lora_weights(dict(style), adapter_name="style")
    base = draw_base(styled)
    assert not torch.equal(base, draw_base(plain))
    bare.load_lora_weights(dict(style), adapter_name="style")
    bare.load_ctrl_adapter(sd_adapter)
    assert torch.equal(draw_base(bare), base)
    assert torch.equal(draw_base(bare, label="bold", strength=0), base)
    labelled = draw(bare, label="bold")
    assert not torch.equal(labelled, base)
    bare.set_adapters("style")  # which switches other adapters off, as far as diffusers knows
    assert torch.equal(draw(bare, label="bold"), labelled) and torch.equal(draw_base(bare), base)
    bare.unload_ctrl_adapter()
    assert torch.equal(draw_base(bare), base)


@pytest.mark.parametrize("style_first", [True, False])
def test_a_fused_style_lora_leaves_the_label_its_lora(bare, sd_folder, sd_adapter, adapter, monkeypatch, style_first):
    """`fuse_lora` puts the style into the weights, and nothing of the label, on shared layers or others; `unfuse_lora` takes it out."""
    style = {f"unet.{key}": 0.5 * value for key, value in adapter.lora.items() if "to_q" in key or "to_out" in key}

    def styled(pipe):
        pipe.load_lora_weights(dict(style), adapter_name="style")

    right, plain = CTRLPipeline.from_pretrained(sd_folder), StableDiffusionPipeline.from_pretrained(sd_folder)
    for pipe in (right, plain):
        styled(pipe)
        pipe.fuse_lora()
    right.unload_lora_weights()  # the weights keep what was fused into them
    right.load_ctrl_adapter(sd_adapter)
    for put_in in (styled, lambda pipe: pipe.load_ctrl_adapter(sd_adapter))[:: 1 if style_first else -1]:
        put_in(bare)
    before = draw(bare, label="bold")
    bare.fuse_lora()
    base = draw_base(plain)
    assert torch.equal(draw_base(bare), base)
    for options in ({}, {"strength": 0.5}):
        assert torch.equal(draw(bare, label="bold", **options), draw(right, label="bold", **options))
    with monkeypatch.context() as patch:
        patch.setattr(injection, "MERGED_BYTES", 0)
        assert torch.equal(draw(bare, label="bold"), draw(right, label="bold"))
    assert (draw(bare, label="bold") - before).abs().max() < 1e-5 < 1e-3 < (before - base).abs().max()
    bare.unfuse_lora()
    assert (draw(bare, label="bold") - before).abs().max() < 1e-5
    for pipe in (bare, plain):  # diffusers takes what is fused out again in the next call
        pipe.fuse_lora()
        pipe.disable_lora()
    labelled = draw(bare, label="bold")
    assert (draw_base(bare) - draw_base(plain)).abs().max() < 1e-5 < 1e-3 < (draw_base(bare) - base).abs().max()
    assert (draw(bare, label="bold") - labelled).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unload_lora_weights_leaves_the_label_in(sd_adapter, adapter, dtype, tmp_path):
    """diffusers' own takes all LoRA out, the label's too, which would leave the label embedding alone, with no word of it."""
    pipe = CTRLPipeline.from_pretrained(sd_adapter, torch_dtype=dtype)
    labelled, base, before = draw(pipe, label="bold"), draw_base(pipe), structure(pipe.unet)
    pipe.load_lora_weights({f"unet.{key}": 0.5 * value for key, value in adapter.lora.items()}, adapter_name="style")
    assert not torch.equal(draw(pipe, label="bold"), labelled)
    pipe.unload_lora_weights()
    assert structure(pipe.unet) == before
    assert torch.equal(draw(pipe, label="bold"), labelled) and torch.equal(draw_base(pipe), base)
    saved = load_adapter(pipe.save_ctrl_adapter(tmp_path / "saved"))
    assert all(torch.equal(value, adapter.lora[key].to(dtype)) for key, value in saved.lora.items())


@pytest.mark.parametrize(
    "take_out, message",
    [
        (lambda pipe: pipe.unet.unload_lora(), "'default' was taken out of this UNet2DConditionModel.*load_ctrl_adapter"),
        (lambda pipe: StableDiffusionPipeline(**pipe.components).unload_lora_weights(), "'default' was taken out"),
        (lambda pipe: pipe.delete_adapters("default"), "'default' was taken out"),
        (lambda pipe: pipe.unet.fuse_lora(adapter_names=["default"]), "'default' was fused into.*unfuse_lora"),
    ],
    ids=["unload_lora", "a pipeline that shares it", "delete_adapters", "fuse_lora"],
)
def test_a_labels_lora_that_was_taken_out_is_missed(bare, plain, pipe, sd_adapter, tmp_path, take_out, message):
    bare.load_ctrl_adapter(sd_adapter)
    take_out(bare)
    for use in (
        lambda: draw(bare, label="bold"),
        lambda: draw(bare, label="bold", num_particles=2),
        lambda: bare.save_ctrl_adapter(tmp_path / "adapter"),
        lambda: bare.save_pretrained(tmp_path / "whole"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert not list(tmp_path.iterdir())
    if "fused" in message:
        bare.unfuse_lora()
        assert (draw(bare, label="bold") - draw(pipe, label="bold")).abs().max() < 1e-5
        return
    bare.unload_ctrl_adapter()
    assert torch.equal(draw_base(bare), draw_base(plain))
    bare.load_ctrl_adapter(sd_adapter)
    assert torch.equal(draw(bare, label="bold"), draw(pipe, label="bold"))


@pytest.fixture
def styled(bare, adapter):
    """The base with a user's own LoRA on it."""
    bare.load_lora_weights({f"unet.{key}": 0.5 * value for key, value in adapter.lora.items()}, adapter_name="style")
    return bare


@pytest.mark.parametrize(
    "change",
    [lambda pipe: None, lambda pipe: pipe.fuse_lora(), lambda pipe: pipe.disable_lora()],
    ids=["loaded", "fused", "disabled"],
)
def test_a_folder_has_no_place_for_a_style_lora(styled, sd_adapter, tmp_path, change):
    """Its layers' keys would be peft's: plain diffusers would start those weights at random, and draw NaN."""
    change(styled)
    message = r"The unet has a LoRA that is no label adapter's.*unload_lora_weights\(\) to leave it out"
    with pytest.raises(ValueError, match=message):
        styled.save_pretrained(tmp_path / "base")
    styled.load_ctrl_adapter(sd_adapter)
    labelled = draw(styled, label="bold")
    for save in (styled.save_pretrained, lambda folder: styled.export_label("bold", folder)):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "labelled")
    assert not list(tmp_path.iterdir())
    assert torch.equal(draw(styled, label="bold"), labelled)
    styled.delete_adapters("style")  # which leaves peft's layers in, and the label's LoRA in them
    styled.save_pretrained(tmp_path / "labelled")
    styled.unload_ctrl_adapter()
    styled.save_pretrained(tmp_path / "base")
    assert torch.equal(draw_base(DiffusionPipeline.from_pretrained(tmp_path / "base")), draw_base(styled))


def test_a_folder_keeps_a_fused_style(styled, sd_adapter, tmp_path):
    styled.load_ctrl_adapter(sd_adapter)
    base, labelled = draw_base(styled), latents_of(styled, label="bold")
    styled.fuse_lora()
    styled.unload_lora_weights()
    styled.save_pretrained(tmp_path / "whole")
    whole = CTRLPipeline.from_pretrained(tmp_path / "whole")
    exported = DiffusionPipeline.from_pretrained(styled.export_label("bold", tmp_path / "label"))
    assert (draw_base(whole) - base).abs().max() < 1e-5
    torch.testing.assert_close(latents_of(whole, label="bold"), labelled, rtol=1e-4, atol=1e-4)
    # its last step has no noise, and is `pipe(label=…)`'s base's
    torch.testing.assert_close(latents_of(exported, **BASE)[:3], labelled[:3], rtol=1e-4, atol=1e-4)


# -- files --


def test_the_lora_file_alone_in_plain_diffusers(sd_folder, sd_adapter, bare, adapter, plain):
    other = StableDiffusionPipeline.from_pretrained(sd_folder)
    other.load_lora_weights(sd_adapter, weight_name="pytorch_lora_weights.safetensors")
    assert (draw_base(other) - draw_base(plain)).abs().max() > 1e-3
    # the same LoRA at the same scale as with a label whose embedding is zero
    bare.load_ctrl_adapter(adapter)
    (table,) = bare.ctrl_adapters["default"].label_encoder.tables
    with torch.no_grad():
        bold, table[2] = table[2].clone(), 0
        ours = latents_of(bare, label="bold")
        table[2] = bold
    theirs = latents_of(other, num_inference_steps=4, guidance_scale=1.0, eta=1.0)
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-4, atol=1e-5)


def test_save_ctrl_adapter_and_load_again(pipe, tmp_path):
    folder = pipe.save_ctrl_adapter(tmp_path / "saved")
    again = CTRLPipeline.from_pretrained(folder)
    for label in ("thin", "bold"):
        assert torch.equal(draw(again, label=label), draw(pipe, label=label))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.classifier.log_probs(images)[0], pipe.classifier.log_probs(images)[0])
    assert load_adapter(folder).config == pipe.ctrl_adapters["default"].config


def test_save_ctrl_adapter_here(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_ctrl_adapter(".")
    assert torch.equal(draw(CTRLPipeline.from_pretrained("."), label="bold"), draw(pipe, label="bold"))


def test_saving_needs_an_adapter(bare, tmp_path):
    with pytest.raises(ValueError, match="no label adapter"):
        bare.save_ctrl_adapter(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_save_pretrained_whole(pipe, plain, tmp_path):
    image = draw(pipe, label="bold")
    pipe.save_pretrained(tmp_path / "whole")
    assert torch.equal(draw(pipe, label="bold"), image)  # saving left the pipeline as it was
    again = CTRLPipeline.from_pretrained(tmp_path / "whole")
    assert torch.equal(draw(again, label="bold"), image)
    assert torch.equal(draw_base(again), draw_base(plain))
    base = draw_base(plain)
    for cls in (StableDiffusionPipeline, DiffusionPipeline):
        other = cls.from_pretrained(tmp_path / "whole")
        assert type(other) is StableDiffusionPipeline
        assert torch.equal(draw_base(other), base)


def test_save_pretrained_without_an_adapter(bare, plain, tmp_path):
    bare.save_pretrained(tmp_path / "base")
    other = DiffusionPipeline.from_pretrained(tmp_path / "base")
    assert type(other) is StableDiffusionPipeline
    assert torch.equal(draw_base(other), draw_base(plain))
    assert CTRLPipeline.from_pretrained(tmp_path / "base").label_space is None


# -- an unconditional pipeline --


@pytest.fixture(scope="module")
def ddpm(ddpm_adapter):
    pipe = CTRLPipeline.from_pretrained(ddpm_adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_ddpm(pipe, seed=0, **kwargs):
    return torch.from_numpy(pipe(generator=generator(seed), output_type="np", **kwargs).images)


def test_ddpm_without_a_label_is_the_base(ddpm, ddpm_folder):
    plain = DDPMPipeline.from_pretrained(ddpm_folder)
    base = draw_ddpm(plain, num_inference_steps=4, batch_size=2)
    assert torch.equal(draw_ddpm(ddpm, num_inference_steps=4, batch_size=2), base)
    assert torch.equal(draw_ddpm(ddpm, num_inference_steps=4, batch_size=2, label="bold", strength=0), base)


def test_ddpm_labels(ddpm):
    assert type(ddpm).__name__ == "CTRLDDPMPipeline" and isinstance(ddpm, DDPMPipeline)
    base = draw_ddpm(ddpm, num_inference_steps=4)
    bold, thin = draw_ddpm(ddpm, label="bold"), draw_ddpm(ddpm, label="thin")
    assert bold.shape == (1, 8, 8, 3)
    for a, b in ((base, bold), (bold, thin), (thin, base)):
        assert (a - b).abs().max() > 1e-3
    assert torch.equal(draw_ddpm(ddpm, label="bold", num_inference_steps=4), bold)  # the adapter's number of steps


def test_ddpm_batches(ddpm):
    together = ddpm(label=["bold", "thin"], generator=[generator(0), generator(1)], output_type="np").images
    assert len(together) == 2
    for seed, label in enumerate(("bold", "thin")):
        alone = draw_ddpm(ddpm, seed, label=label)
        torch.testing.assert_close(torch.from_numpy(together[seed : seed + 1]), alone, rtol=0, atol=1e-5)
    assert len(ddpm(label="bold", batch_size=3).images) == 3
    assert len(ddpm(3, label="bold").images) == 3
    with pytest.raises(ValueError, match="Got 2 labels for 3"):
        ddpm(label=["bold", "thin"], batch_size=3)


def test_ddpm_saved_whole_loads_in_plain_diffusers(ddpm, ddpm_folder, tmp_path):
    ddpm.save_pretrained(tmp_path / "whole")
    other = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(other) is DDPMPipeline
    plain = DDPMPipeline.from_pretrained(ddpm_folder)
    assert torch.equal(draw_ddpm(other, num_inference_steps=4), draw_ddpm(plain, num_inference_steps=4))
    again = CTRLPipeline.from_pretrained(tmp_path / "whole")
    assert torch.equal(draw_ddpm(again, label="bold"), draw_ddpm(ddpm, label="bold"))


def merged_calls(pipe, monkeypatch):
    """What `merged_weights` gave, call by call."""
    found = []
    real = controls.merged_weights

    def watched(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(controls, "merged_weights", watched)
    return found


def test_a_call_merges_the_adapter_once(pipe, plain, monkeypatch):
    """Same picture as with LoRA beside the weights, merged once a call, nothing left behind."""
    found = merged_calls(pipe, monkeypatch)
    merged = draw(pipe, label="bold")
    assert len(found) == 1 and found[0]
    monkeypatch.setattr(injection, "MERGED_BYTES", 0)
    beside = draw(pipe, label="bold")
    assert len(found) == 2 and found[1] is None
    assert 0 < (merged - beside).abs().max() < 1e-4 < (merged - draw_base(plain)).abs().max()
    assert pipe._ctrl_hook._merged == {} and torch.equal(draw_base(pipe), draw_base(plain))


def test_weights_that_others_may_change_are_not_merged(pipe, monkeypatch):
    """A user's own LoRA on the same layers, weights of half precision, and a call that wants gradients."""
    layer = pipe._ctrl_hook.layers[0]
    layers, names, cpu = pipe._ctrl_hook.layers, pipe._ctrl_controls, torch.device("cpu")
    assert injection.merged_weights(layers, names, "default", cpu)
    assert injection.merged_weights(layers, names, "default", torch.device("meta")) is None
    weight = layer.get_base_layer().weight
    monkeypatch.setattr(weight, "data", weight.data.bfloat16())
    assert injection.merged_weights(layers, names, "default", cpu) is None
    monkeypatch.undo()
    with torch.enable_grad():
        assert pipe._ctrl_hook._weights("default", cpu) is None
    layer.update_layer("mine", 4, lora_alpha=4, config=LoraConfig(r=4, lora_alpha=4))
    layer.set_adapter(["mine"])
    assert injection.merged_weights(layers, names, "default", cpu) is None
    layer.set_adapter(["default"])
    layer.delete_adapter("mine")
    layer.requires_grad_(False)
