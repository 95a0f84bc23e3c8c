"""Every denoiser family through the same battery: the base bit for bit, labels, guidance, files, two adapters, img2img, compile."""

import functools
import inspect
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
)
from diffusers.hooks import apply_group_offloading
from PIL import Image

from diffusers_ctrl import Categorical, Classifier, CTRLPipeline, LabelSpace, Policy
from diffusers_ctrl.adapters import Adapter, AdapterConfig, collect_adapter, denoiser_sha256, load_adapter
from diffusers_ctrl.bases import denoiser_of
from diffusers_ctrl.injection import find_injection_sites
from diffusers_ctrl.transitions import is_supported
from families import BUILDERS, Family, build


pytestmark = pytest.mark.filterwarnings("ignore:The label acts, but not as certified")

STEPS = 4
SPACES = {
    "stroke": LabelSpace(stroke=Categorical(("thin", "regular", "bold"))),
    "slant": LabelSpace(slant=Categorical(("left", "right"))),
}


def make_adapter(name: str, attribute: str = "stroke", **changes) -> Adapter:
    """An adapter for the family as training would leave it: nothing in it is zero."""
    family = build(name)
    torch.manual_seed(len(attribute))
    sha256, (component, denoiser) = denoiser_sha256(family.denoiser), denoiser_of(family.pipe)
    policy = Policy(denoiser, label_space=SPACES[attribute], lora_rank=2, gamma_range=changes.pop("gamma_range", None))
    for parameters in policy.trainable_parameters().values():
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.3)
    sampler = {
        "scheduler": type(family.noisy).__name__,
        "scheduler_config": {k: v for k, v in family.noisy.config.items() if not k.startswith("_")},
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "options": family.options,
    }
    config = AdapterConfig(
        base={"id": name, "revision": None, "denoiser_sha256": sha256},
        pipeline_class=type(family.pipe).__name__,
        denoiser=component,
        label_space=SPACES[attribute].to_dict(),
        gamma=1.0,
        gamma_range=policy.label_encoder.config.gamma_range,
        sampler=sampler | changes,
        injection_site=policy.injection_site,
    )
    classifier = Classifier(SPACES[attribute].to_dict(), image_size=8, widths=(4, 8), temperatures=(1.5,)).eval()
    return collect_adapter(config, denoiser, policy.label_encoder, classifier)


def fresh(name: str) -> Family:
    """The family with its scheduler that has noise."""
    family = build(name)
    family.pipe.scheduler = family.noisy
    return family


def controlled(name: str, *adapters: Adapter) -> CTRLPipeline:
    """A CTRL pipeline of the family, with adapters named after their attributes."""
    pipe = CTRLPipeline.from_pipe(fresh(name).pipe)
    pipe.set_progress_bar_config(disable=True)
    for adapter in adapters:
        pipe.load_ctrl_adapter(adapter, next(iter(adapter.config.label_space)))
    return pipe


def draw(pipe, family: Family, seed: int = 0, **kwargs) -> torch.Tensor:
    """Images (2, H, W, C): a call with its random numbers fixed, those that the pipeline takes from torch's own state included."""
    torch.manual_seed(seed)
    arguments = {**family.call, **family.options, "num_inference_steps": STEPS, "output_type": "np", **kwargs}
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return torch.as_tensor(pipe(**arguments).images)


def first_output(pipe, family: Family, monkeypatch, **kwargs) -> torch.Tensor:
    """What the pipeline hands to its scheduler at the first step."""
    seen, cls = [], type(pipe.scheduler)
    step = cls.step
    with monkeypatch.context() as patch:

        @functools.wraps(step)
        def keep(self, model_output, *args, **kwargs):
            seen.append(model_output.clone())
            return step(self, model_output, *args, **kwargs)

        patch.setattr(cls, "step", keep)
        draw(pipe, family, **kwargs)
    return seen[0][:2]


def takes(pipe, *names: str) -> bool:
    return set(names) <= set(inspect.signature(type(pipe).__mro__[2].__call__).parameters)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-4)


@pytest.fixture(scope="module", params=list(BUILDERS))
def family(request) -> Family:
    """The plain pipeline of the family. Shared: nothing changes it."""
    return fresh(request.param)


@pytest.fixture(scope="module")
def adapter(family) -> Adapter:
    return make_adapter(family.name)


@pytest.fixture(scope="module")
def slant(family) -> Adapter:
    return make_adapter(family.name, "slant")


@pytest.fixture(scope="module")
def pipe(family, adapter) -> CTRLPipeline:
    """The family with the adapter "stroke". Shared: each test leaves it clean."""
    return controlled(family.name, adapter)


@pytest.fixture(scope="module")
def guidances(family) -> list[dict]:
    return [{}] if family.guided is None else [{}, family.guided]


# -- the base, bit for bit --


def test_the_samples_differ(family):
    """Of the battery itself: pictures that are all alike would hide everything."""
    images = draw(family.pipe, family)
    assert images.std() > 0.05 and differ(images[0], images[1])
    assert torch.equal(draw(family.pipe, family), images)
    if family.guided:
        assert differ(draw(family.pipe, family, **family.guided), images)


def test_no_label_is_the_base(family, adapter, guidances):
    pipe = controlled(family.name)
    keys = list(pipe.denoiser.state_dict())
    for state in ("fresh", "loaded", "unloaded", "loaded again"):
        if state.startswith("loaded"):
            pipe.load_ctrl_adapter(adapter)
        elif state == "unloaded":
            draw(pipe, family, label="bold")
            pipe.unload_ctrl_adapter()
            assert list(pipe.denoiser.state_dict()) == keys
        for guidance in guidances:
            assert torch.equal(draw(pipe, family, **guidance), draw(family.pipe, family, **guidance)), state


def test_unload_restores_every_weight_and_module(family, adapter, slant):
    pipe, plain = controlled(family.name, adapter, slant), build(family.name).denoiser
    pipe.unload_ctrl_adapter()
    ours, theirs = pipe.denoiser.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [type(m) for m in pipe.denoiser.modules()] == [type(m) for m in plain.modules()]
    assert [p.requires_grad for p in pipe.denoiser.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert pipe.label_space is None and pipe.ctrl_adapters == {}


def test_strength_zero_is_the_base(family, pipe, guidances):
    for guidance in guidances:
        found = draw(pipe, family, label="bold", strength=0, **guidance)
        assert torch.equal(found, draw(family.pipe, family, **guidance))


def test_the_family_in_half_precision(family, adapter):
    half = torch.float16 if family.name == "ddpm" else torch.bfloat16  # DDPMPipeline gives numpy only, which has no bfloat16
    plain = fresh(family.name).pipe.to(half)
    pipe = CTRLPipeline.from_pipe(fresh(family.name).pipe.to(half))
    assert pipe.denoiser.dtype == half
    pipe.load_ctrl_adapter(adapter)
    base = draw(plain, family)
    assert torch.equal(draw(pipe, family), base)
    assert torch.equal(draw(pipe, family, label="bold", strength=0), base)
    assert differ(draw(pipe, family, label="bold"), base)


# -- labels --


def test_each_sample_has_its_own_label(family, pipe, guidances):
    for guidance in guidances:
        images = draw(pipe, family, label=["thin", "bold"], **guidance)
        base = draw(family.pipe, family, **guidance)
        assert differ(images[0], base[0]) and differ(images[1], base[1])
        for changed in (0, 1):
            labels = ["thin", "bold"]
            labels[changed] = "regular"
            found = draw(pipe, family, label=labels, **guidance)
            torch.testing.assert_close(found[1 - changed], images[1 - changed], rtol=0, atol=1e-5)
            assert differ(found[changed], images[changed])
        assert torch.equal(draw(pipe, family, label="bold", **guidance), draw(pipe, family, label=["bold", "bold"], **guidance))


def test_the_label_is_in_the_conditional_part_alone(family, pipe, monkeypatch):
    """The guided output is u + s (c - u); c is the output without guidance. So u can be solved for, and no label must be in it."""
    if family.guided is None:
        pytest.skip("this family has no classifier-free guidance")
    scale = max(value for value in family.guided.values() if isinstance(value, float))
    conditional, unconditional = {}, {}
    for label in ("thin", "bold"):
        c = first_output(pipe, family, monkeypatch, label=label)
        guided = first_output(pipe, family, monkeypatch, label=label, **family.guided)
        conditional[label], unconditional[label] = c, (guided - scale * c) / (1 - scale)
    torch.testing.assert_close(unconditional["thin"], unconditional["bold"], rtol=1e-4, atol=1e-5)
    assert differ(conditional["thin"], conditional["bold"])
    assert differ(conditional["bold"], unconditional["bold"])


def test_guidance_is_found_once_and_leaves_no_trace(family, adapter):
    """The first guided call is begun twice; random numbers, scheduler and later calls must not show it."""
    if family.guided is None:
        pytest.skip("this family has no classifier-free guidance")
    pipe = controlled(family.name, adapter)
    type(pipe)._ctrl_roles.clear()
    scheduler = pipe.scheduler
    first = draw(pipe, family, label="bold", **family.guided)
    assert type(pipe)._ctrl_roles
    assert torch.equal(draw(pipe, family, label="bold", **family.guided), first)
    assert pipe.scheduler is scheduler and not {"step", "scale_model_input"} & set(vars(scheduler))
    assert torch.equal(draw(pipe, family), draw(family.pipe, family))


def test_images_per_prompt(family, pipe, guidances):
    if not takes(pipe, "num_images_per_prompt"):
        pytest.skip("this pipeline has no num_images_per_prompt")
    for guidance in guidances:
        images = draw(pipe, family, label=["thin", "bold"], num_images_per_prompt=2, **guidance)
        assert len(images) == 4
        found = draw(pipe, family, label=["thin", "regular"], num_images_per_prompt=2, **guidance)
        torch.testing.assert_close(found[:2], images[:2], rtol=0, atol=1e-5)
        assert differ(found[2], images[2]) and differ(found[3], images[3])


def test_generator_lists(family, pipe, monkeypatch):
    """Each sample is what it would be alone. Steps' noise is zero here, since some pipelines take it from torch's own state."""
    for module in {inspect.getmodule(type(pipe.scheduler)), inspect.getmodule(type(family.pipe.scheduler))}:
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: torch.zeros(shape, dtype=kwargs.get("dtype")))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    together = draw(pipe, family, label=["thin", "bold"], generator=generators)
    for i, (seed, label) in enumerate(((3, "thin"), (4, "bold"))):
        generator = [torch.Generator().manual_seed(seed)] if family.samples != "batch_size" else torch.Generator().manual_seed(seed)
        alone = draw(pipe, family, label=label, generator=generator, **family.one(i))
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-4)


def test_the_prompt_is_optional(family, pipe):
    if family.samples != "prompt":
        pytest.skip("this pipeline has no prompt")
    found = draw(pipe, family, label=["thin", "bold"], prompt=None)
    assert torch.equal(found, draw(pipe, family, label=["thin", "bold"], prompt=["", ""]))


@pytest.mark.parametrize(
    "label, message",
    [("fat", "Unknown label 'fat'.*thin"), ({"slant": "left"}, "Unknown attribute 'slant'"), (["thin"] * 3, "Got 3 labels for 2")],
)
def test_bad_labels(family, pipe, label, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, family, label=label)
    assert torch.equal(draw(pipe, family), draw(family.pipe, family))


# -- the call's other arguments --


def test_output_types(family, pipe):
    image = draw(pipe, family, label="bold")
    torch.manual_seed(0)
    call = {**family.call, **family.options, "num_inference_steps": STEPS, "label": "bold"}
    pictures = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert isinstance(pictures[0], Image.Image) and pictures[0].size == image.shape[1:3]
    if family.name != "ddpm":  # knows "pil", and takes anything else for "np"
        tensor = draw(pipe, family, label="bold", output_type="pt")
        torch.testing.assert_close(tensor.permute(0, 2, 3, 1).float(), image, rtol=0, atol=1e-6)
    if family.name not in ("ddpm", "dit"):  # the others know "latent"
        assert draw(pipe, family, label="bold", output_type="latent").shape[0] == 2


def test_return_dict_false(family, pipe):
    torch.manual_seed(0)
    call = {**family.call, **family.options, "num_inference_steps": STEPS, "label": "bold", "output_type": "np"}
    out = pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert isinstance(out, tuple) and torch.equal(torch.as_tensor(out[0]), draw(pipe, family, label="bold"))


def test_callbacks_see_every_step(family, pipe):
    if not takes(pipe, "callback_on_step_end"):
        pytest.skip("this pipeline has no callback_on_step_end")
    seen = []

    def keep(pipe, step, t, tensors):
        seen.append((step, float(t), tensors["latents"].clone()))
        return tensors

    draw(pipe, family, label="bold", callback_on_step_end=keep)
    labelled, seen[:] = list(seen), []
    draw(family.pipe, family, callback_on_step_end=keep)
    assert [entry[:2] for entry in labelled] == [entry[:2] for entry in seen] and len(seen) == STEPS
    assert differ(labelled[0][2], seen[0][2])


def test_the_step_without_noise_is_the_bases(family, pipe, guidances):
    """Found on the timesteps that the pipeline sets, shifted ones included, and whatever it makes of them for its denoiser."""
    if not takes(pipe, "callback_on_step_end"):
        pytest.skip("this pipeline has no callback_on_step_end")

    def from_fixed(pipe, step, **kwargs):
        def replace_latents(pipe, k, t, tensors):
            fixed = torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(5))
            return {"latents": fixed if k == step else tensors["latents"]}

        return draw(pipe, family, callback_on_step_end=replace_latents, **kwargs)

    for guidance in guidances:
        assert torch.equal(from_fixed(pipe, STEPS - 2, label="bold", **guidance), from_fixed(family.pipe, STEPS - 2, **guidance))
        assert differ(from_fixed(pipe, STEPS - 3, label="bold", **guidance), from_fixed(family.pipe, STEPS - 3, **guidance))


def test_a_scheduler_without_noise_gives_way_while_there_is_a_label(family, pipe):
    """What the family's checkpoints come with (PNDM, Euler, a flow's ODE, DPM-Solver++) mostly adds none."""
    other = controlled(family.name, pipe._collect("stroke"))
    other.scheduler = build(family.name).pipe.scheduler
    scheduler = other.scheduler
    expected = family.pipe if is_supported(scheduler) else pipe
    found = draw(other, family, label="bold", **({"eta": 1.0} if "eta" in family.options else {}))
    if expected is pipe:
        assert torch.equal(found, draw(pipe, family, label="bold"))
    assert other.scheduler is scheduler


def test_interrupt(family, pipe):
    if not hasattr(pipe, "interrupt"):
        pytest.skip("this pipeline cannot be interrupted")
    latents = []

    def stop(pipe, step, t, tensors):
        latents.append(tensors["latents"].clone())
        pipe._interrupt = step == 1
        return tensors

    draw(pipe, family, label="bold", callback_on_step_end=stop)
    assert len(latents) == 2 and differ(latents[0], latents[1])
    assert torch.equal(draw(pipe, family), draw(family.pipe, family))


def test_an_error_in_the_middle_leaves_nothing_behind(family, pipe, monkeypatch):
    cls = type(pipe.scheduler)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "step", functools.wraps(cls.step)(lambda *args, **kwargs: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            draw(pipe, family, label="bold", strength=0.5)
    assert pipe._ctrl_hook.active == () and pipe._ctrl_hook.watch is None and "step" not in vars(pipe.scheduler)
    assert torch.equal(draw(pipe, family), draw(family.pipe, family))


def test_settings_are_the_adapters(family, pipe):
    torch.manual_seed(0)
    call = {name: value for name, value in family.call.items() if name != "guidance_scale"}
    found = pipe(**call, label="bold", generator=torch.Generator().manual_seed(0), output_type="np").images
    guidance = {} if "guidance_scale" not in inspect.signature(type(family.pipe).__call__).parameters else {"guidance_scale": 1.0}
    assert torch.equal(torch.as_tensor(found), draw(pipe, family, label="bold", **guidance))


@pytest.mark.parametrize("name", ["dit", "ddpm"])
def test_eta_reaches_the_step_of_a_pipeline_that_takes_none(name, monkeypatch):
    """Their call has no eta, and DDIM's step would take its own default, 0: not the law that was trained."""
    scheduler = DDIMScheduler(clip_sample=False)
    ddim = {"scheduler": "DDIMScheduler", "scheduler_config": dict(scheduler.config), "options": {"eta": 1.0}}
    family, pipe = fresh(name), controlled(name, make_adapter(name, **ddim))
    family.pipe.scheduler = pipe.scheduler = scheduler
    base, labelled, used = draw(family.pipe, family), draw(pipe, family, label="bold"), []
    assert torch.equal(draw(pipe, family), base)
    step = DDIMScheduler.step

    @functools.wraps(step)
    def with_noise(self, *args, eta=None, **kwargs):
        used.append(eta)
        return step(self, *args, eta=1.0, **kwargs)

    monkeypatch.setattr(DDIMScheduler, "step", with_noise)
    assert torch.equal(draw(pipe, family, label="bold"), labelled)
    assert used == [1.0] * STEPS
    draw(pipe, family)
    assert used[STEPS:] == [None] * STEPS
    if name == "ddpm":
        assert draw_particles(pipe, family).isfinite().all() and used[2 * STEPS :] == [1.0] * STEPS


def draw_particles(pipe, family: Family) -> torch.Tensor:
    """Log-weights (2, 2)."""
    call = {**family.call, **family.options, "num_inference_steps": STEPS, "label": "bold", "num_particles": 2}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).log_weights


# -- memory --


def test_slicing(family, adapter):
    pipe = controlled(family.name, adapter)
    before = draw(pipe, family, label=["thin", "bold"])
    if hasattr(pipe, "enable_attention_slicing"):
        pipe.enable_attention_slicing(1)
    if hasattr(pipe, "vae"):
        pipe.vae.enable_slicing()
        assert pipe.vae.use_slicing
    torch.testing.assert_close(draw(pipe, family, label=["thin", "bold"]), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_group_offload(family, adapter, kind, first):
    """Onto the CPU, the only device here: the hooks and their order are the real ones, the transfers are not."""
    pipe = controlled(family.name, *([adapter] if first == "adapter" else []))
    apply_group_offloading(
        pipe.denoiser,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
    )
    if first == "offload":
        pipe.load_ctrl_adapter(adapter)
    assert torch.equal(draw(pipe, family), draw(family.pipe, family))
    guidance = family.guided or {}
    assert torch.equal(
        draw(pipe, family, label="bold", strength=0.5, **guidance),
        draw(controlled(family.name, adapter), family, label="bold", strength=0.5, **guidance),
    )
    pipe.unload_ctrl_adapter()
    assert torch.equal(draw(pipe, family), draw(family.pipe, family))


# -- where the label goes in --

SITES = {
    "stable_diffusion": "time_embedding",
    "stable_diffusion_xl": "time_embedding",
    "stable_diffusion_3": "time_text_embed.timestep_embedder",
    "flux": "time_text_embed.timestep_embedder",
    "flux_true_cfg": "time_text_embed.timestep_embedder",
    "pixart_sigma": "adaln_single.emb.timestep_embedder",
    "sana": "time_embed.emb.timestep_embedder",
    "dit": "transformer_blocks.*.norm1.emb.timestep_embedder",
    "ddpm": "time_embedding",
}


def test_the_site_is_found(family):
    path, modules = find_injection_sites(family.denoiser)
    assert path == SITES[family.name] and len(modules) == (2 if family.name == "dit" else 1)
    assert find_injection_sites(family.denoiser, path) == (path, modules)


def test_the_label_reaches_every_use_of_the_time(family, adapter):
    """Adding the difference of two times' embeddings as a label turns the one time into the other, so no use of it was missed."""
    pipe = controlled(family.name, adapter)
    denoiser, label = pipe.denoiser, pipe._ctrl_hook.controls["stroke"].label
    _, sites = find_injection_sites(denoiser)
    for site in sites[1:]:  # an embedder a block, each with its own weights: with equal ones a single difference serves all
        site.load_state_dict(sites[0].state_dict())
    calls, embedded = [], []
    denoiser.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    draw(pipe, family)
    args, kwargs = calls[0]
    sites[0].register_forward_hook(lambda module, args, output: embedded.append(output))

    def run(time: float) -> torch.Tensor:
        embedded.clear()
        first = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        t = torch.full((2,), time) * (0.001 if first.max() <= 1 else 1.0)
        output = denoiser(*args, **kwargs | {"timestep": t}) if "timestep" in kwargs else denoiser(args[0], t, *args[2:], **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    with torch.no_grad():
        late, at_late = run(300.0), embedded[0]
        early = run(800.0)
        label.embedding = at_late - embedded[0]
        shifted = run(800.0)
    torch.testing.assert_close(shifted, late, rtol=1e-4, atol=1e-5)
    assert differ(early, late)


def test_a_denoiser_whose_time_embedding_has_another_name():
    denoiser = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    with pytest.raises(ValueError, match=r"AuraFlowTransformer2DModel: pass injection_site=.*Candidates:.*time_step_proj"):
        Policy(denoiser, label_space=SPACES["stroke"], lora_rank=2)
    policy = Policy(denoiser, label_space=SPACES["stroke"], lora_rank=2, injection_site="time_step_proj")
    torch.nn.init.normal_(policy.label_encoder.tables[0])
    call = {"encoder_hidden_states": torch.randn(2, 5, 16), "timestep": torch.tensor([0.5, 0.5]), "return_dict": False}
    found, x = [], torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        for label in (None, 0.0, 2.0):
            policy._hook.embedding = None if label is None else policy.label_encoder(torch.full((2, 1), label))
            found.append(denoiser(x, **call)[0])
    assert differ(found[0], found[1]) and differ(found[1], found[2])


# -- torch.compile --


COMPILED = {
    "stable_diffusion": None,  # the blocks that the model itself declares
    "stable_diffusion_xl": None,
    "flux": None,
    "stable_diffusion_3": ["JointTransformerBlock"],
    "dit": ["BasicTransformerBlock"],  # which embed the time, so that the label's hook is compiled too
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks(name, monkeypatch):
    """Whole graphs (fullgraph=True fails on a graph break), the adapter in them; the same pictures as without."""
    family, pipe = fresh(name), controlled(name, make_adapter(name))
    before = [draw(pipe, family, label=label, num_inference_steps=2) for label in (["thin", "bold"], None)]
    torch.compiler.reset()
    if COMPILED[name]:
        monkeypatch.setattr(type(pipe.denoiser), "_repeated_blocks", COMPILED[name])
    pipe.denoiser.compile_repeated_blocks(backend="eager", fullgraph=True)
    for label, image in zip((["thin", "bold"], None), before, strict=True):
        torch.testing.assert_close(draw(pipe, family, label=label, num_inference_steps=2), image, rtol=0, atol=1e-4)


# -- files --


def test_save_and_load_an_adapter(family, pipe, tmp_path):
    again = controlled(family.name)
    again.load_ctrl_adapter(pipe.save_ctrl_adapter(tmp_path / "adapter"))
    for guidance in [{}, family.guided or {}]:
        assert torch.equal(
            draw(again, family, label=["thin", "bold"], **guidance), draw(pipe, family, label=["thin", "bold"], **guidance)
        )


def test_save_and_load_the_whole_pipeline(family, adapter, tmp_path):
    pipe = controlled(family.name, adapter)
    image = draw(pipe, family, label="bold")
    pipe.save_pretrained(tmp_path / "whole")
    assert torch.equal(draw(pipe, family, label="bold"), image)
    plain = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(plain) is type(family.pipe)
    assert torch.equal(draw(plain, family), draw(family.pipe, family))
    again = CTRLPipeline.from_pretrained(tmp_path / "whole")
    assert torch.equal(draw(again, family, label="bold"), image)
    assert load_adapter(tmp_path / "whole").config == adapter.config


def test_export_a_label(family, adapter, slant, tmp_path, monkeypatch):
    """One label baked into an ordinary pipeline: what that hands to its scheduler is what the label gave, to rounding."""
    pipe = controlled(family.name, adapter, slant)
    plain = DiffusionPipeline.from_pretrained(pipe.export_label("bold", tmp_path / "baked", adapter_name="stroke"))
    assert type(plain) is type(family.pipe) and type(plain.scheduler) is type(family.noisy)
    expected, found, base = (
        first_output(p, family, monkeypatch, **label)
        for p, label in ((pipe, {"label": {"stroke": "bold"}}), (plain, {}), (family.pipe, {}))
    )
    assert (found - expected).norm() < 1e-5 * expected.norm() and differ(expected, base)
    assert list(pipe.ctrl_adapters) == ["stroke", "slant"]


# -- two adapters --


def test_two_adapters_add_up(family, adapter, slant, monkeypatch):
    """base + Σ strength · (tuned − base), of the outputs as the scheduler gets them: guidance is linear too."""
    pipe, single = controlled(family.name, adapter, slant), controlled(family.name, slant)
    assert pipe.label_space == LabelSpace(stroke=SPACES["stroke"].attributes["stroke"], slant=SPACES["slant"].attributes["slant"])
    guidance, labels = family.guided or {}, {"stroke": "bold", "slant": "left"}

    def output(pipe=pipe, **kwargs):
        return first_output(pipe, family, monkeypatch, **guidance, **kwargs)

    base, stroke, left = output(family.pipe), output(label={"stroke": "bold"}), output(single, label="left")
    torch.testing.assert_close(output(label={"slant": "left"}), left, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(label=labels), stroke + left - base, rtol=1e-4, atol=1e-4)
    weighed = output(label=labels, strength={"stroke": 1.0, "slant": 0.5})
    torch.testing.assert_close(weighed, stroke + 0.5 * (left - base), rtol=1e-4, atol=1e-4)
    assert torch.equal(output(), base) and torch.equal(output(label=labels, strength=0), base)


def test_of_two_adapters_one_leaves_the_other_as_it_was(family, adapter, slant, pipe):
    two = controlled(family.name, adapter, slant)
    for guidance in [{}, family.guided or {}]:
        expected = draw(pipe, family, label="bold", **guidance)
        assert torch.equal(draw(two, family, label={"stroke": "bold"}, **guidance), expected)
    two.unload_ctrl_adapter("slant")
    assert torch.equal(draw(two, family, label="bold", **guidance), expected)
    assert torch.equal(draw(two, family), draw(family.pipe, family))
    two.load_ctrl_adapter(slant, "slant")
    two.unload_ctrl_adapter("stroke")
    assert torch.equal(draw(two, family, label="left"), draw(controlled(family.name, slant), family, label="left"))


def test_two_adapters_by_sample(family, adapter, slant, pipe):
    """A sample whose label leaves an adapter out is drawn without that adapter, beside one that has both."""
    two = controlled(family.name, adapter, slant)
    guidance = family.guided or {}
    images = draw(two, family, label=[{"stroke": "bold"}, {"stroke": "bold", "slant": "left"}], **guidance)
    torch.testing.assert_close(images[0], draw(pipe, family, label="bold", **guidance)[0], rtol=0, atol=1e-4)
    both = draw(two, family, label={"stroke": "bold", "slant": "left"}, **guidance)
    torch.testing.assert_close(images[1], both[1], rtol=0, atol=1e-4)
    assert differ(images[0], both[0])
    base = draw(family.pipe, family, **guidance)
    torch.testing.assert_close(draw(two, family, label=[{}, {"slant": "left"}], **guidance)[0], base[0], rtol=0, atol=1e-4)


# -- image to image, AutoPipeline --


@pytest.fixture(scope="module")
def img2img(family) -> Family:
    """The family's image-to-image pipeline, plain, and how to call it."""
    if family.img2img is None:
        pytest.skip("diffusers has no image-to-image pipeline of this family")
    plain = getattr(diffusers, family.img2img).from_pipe(fresh(family.name).pipe)
    plain.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    known = inspect.signature(type(plain).__call__).parameters
    return replace(
        family, pipe=plain, call={k: v for k, v in family.call.items() if k in known} | {"image": image, "strength": 0.75}
    )


def image_pipe(pipe, img2img: Family) -> CTRLPipeline:
    """The image-to-image pipeline of a CTRL pipeline, on the same weights."""
    found = CTRLPipeline.from_pipe(pipe, type(img2img.pipe))
    found.set_progress_bar_config(disable=True)
    return found


def test_image_to_image(img2img, pipe, guidances):
    """`from_pipe` takes the adapter along: it is in the denoiser, which the two pipelines share."""
    ours = image_pipe(pipe, img2img)
    assert isinstance(ours, type(img2img.pipe)) and ours.denoiser is pipe.denoiser and ours.label_space == pipe.label_space
    for guidance in guidances:
        base = draw(img2img.pipe, img2img, **guidance)
        assert torch.equal(draw(ours, img2img, **guidance), base)
        images = draw(ours, img2img, label=["thin", "bold"], **guidance)
        assert differ(images[0], base[0]) and differ(images[1], base[1])
        found = draw(ours, img2img, label=["thin", "regular"], **guidance)
        torch.testing.assert_close(found[0], images[0], rtol=0, atol=1e-5)
        assert differ(found[1], images[1])
        assert torch.equal(draw(ours, img2img, label=["thin", "bold"], label_strength=0, **guidance), base)
        assert differ(draw(ours, img2img, label=["thin", "bold"], label_strength=0.5, **guidance), images)


def test_guidance_from_image_to_image(img2img, pipe, monkeypatch):
    """As for text to image: the label is in the conditional part alone, though these loops tell nothing of their calls."""
    if img2img.guided is None:
        pytest.skip("this family has no classifier-free guidance")
    ours, scale = image_pipe(pipe, img2img), max(value for value in img2img.guided.values() if isinstance(value, float))
    unconditional = []
    for label in ("thin", "bold"):
        c = first_output(ours, img2img, monkeypatch, label=label)
        guided = first_output(ours, img2img, monkeypatch, label=label, **img2img.guided)
        unconditional.append((guided - scale * c) / (1 - scale))
    torch.testing.assert_close(*unconditional, rtol=1e-4, atol=1e-5)


def test_plain_image_to_image_from_a_ctrl_pipeline_is_the_bases(family, img2img, pipe):
    theirs = type(img2img.pipe).from_pipe(pipe)
    theirs.set_progress_bar_config(disable=True)
    assert torch.equal(draw(theirs, img2img), draw(img2img.pipe, img2img))
    back = CTRLPipeline.from_pipe(theirs, type(family.pipe))  # the adapter is still in the denoiser
    assert torch.equal(draw(back, family, label="bold"), draw(pipe, family, label="bold"))


def test_auto_pipelines(family, img2img, adapter, tmp_path):
    """A saved folder is the base's to AutoPipeline; from a pipeline with adapters it makes others with the same adapters."""
    pipe = controlled(family.name, adapter)
    pipe.save_pretrained(tmp_path)
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is type(family.pipe)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other).__name__ == f"CTRL{family.img2img}" and other.label_space == pipe.label_space
    assert torch.equal(draw(other, img2img, label="bold"), draw(image_pipe(pipe, img2img), img2img, label="bold"))
    assert type(AutoPipelineForInpainting.from_pipe(pipe)).__name__.startswith("CTRL")
    assert torch.equal(draw(AutoPipelineForText2Image.from_pipe(other), family, label="bold"), draw(pipe, family, label="bold"))


# -- exact sampling --


@pytest.mark.parametrize(
    "name, guided, message",
    [
        ("dit", True, "the condition first"),
        ("dit", False, "predicts variances"),
        ("pixart_sigma", False, "predicts variances"),
        ("stable_diffusion", False, None),
        ("stable_diffusion", True, None),
        ("stable_diffusion_xl", True, None),
        ("ddpm", False, None),
        ("flux", False, None),
        ("stable_diffusion_3", False, None),
        ("stable_diffusion_3", True, None),
        ("sana", False, None),
        ("flux_true_cfg", True, "two calls"),
    ],
)
def test_exact_sampling_or_a_clear_refusal(name, guided, message):
    family = fresh(name)
    pipe = controlled(name, make_adapter(name))
    guidance = family.guided if guided else {}
    call = {**family.call, **family.options, "num_inference_steps": STEPS, **guidance, "label": "bold", "num_particles": 2}
    if message is not None:
        with pytest.raises(ValueError, match=message):
            pipe(**call)
        assert not pipe._ctrl_hook.keeps_base and pipe._ctrl_hook.base_output is None
    else:
        assert pipe(**call).log_weights.isfinite().all()
    assert torch.equal(draw(pipe, family), draw(controlled(name), family))


def test_guidance_by_two_calls_is_refused_by_exact_sampling():
    """Its weights compare one output of the base with one of the tuned model a step."""
    family = fresh("flux_true_cfg")
    pipe = controlled("flux_true_cfg", make_adapter("flux_true_cfg"))
    pipe._ctrl_hook.keeps_base = True
    draw(pipe, family, label="bold")
    with pytest.raises(ValueError, match="two calls of the denoiser"):
        draw(pipe, family, label="bold", **family.guided)
