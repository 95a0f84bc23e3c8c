"""Tiny pipelines with random weights, and an adapter with non-zero random weights, written once a session. No network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only cost
os.environ.setdefault("TQDM_DISABLE", "1")

import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import diffusers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402


TRAINING = Path(__file__).resolve().parents[1] / "training"
sys.path.insert(0, str(TRAINING))

from pretrain_digits import build_tokenizer  # noqa: E402

from diffusers_ctrl import Categorical, Classifier, LabelSpace, Policy  # noqa: E402
from diffusers_ctrl.adapters import (  # noqa: E402
    Adapter,
    AdapterConfig,
    collect_adapter,
    denoiser_sha256,
    load_adapter,
    package_versions,
    save_adapter,
)
from families import tiny_unet, tiny_vae  # noqa: E402


diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

SPACE = LabelSpace(stroke=Categorical(("thin", "regular", "bold")))
STEPS = 4


def write_sd(folder: Path) -> Path:
    """A StableDiffusionPipeline for 16x16 pictures: latents 4x8x8, about 50,000 weights."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet, vae = tiny_unet(cross_attention_dim=16), tiny_vae()
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def write_ddpm(folder: Path) -> Path:
    """A DDPMPipeline for 8x8 pictures."""
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def make_adapter(base: Path, pipe: diffusers.DiffusionPipeline, options: dict, gamma_range=None) -> Adapter:
    """An adapter for `pipe`, loaded from `base`, as training would leave it: nothing in it is zero. It takes `pipe` over."""
    torch.manual_seed(2)
    sha256 = denoiser_sha256(pipe.unet)
    policy = Policy(pipe.unet, label_space=SPACE, lora_rank=2, gamma_range=gamma_range)
    for parameters in policy.trainable_parameters().values():
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.3)
    config = AdapterConfig(
        base={"id": str(base), "revision": None, "denoiser_sha256": sha256},
        pipeline_class=type(pipe).__name__,
        denoiser="unet",
        label_space=SPACE.to_dict(),
        gamma=1.0,
        gamma_range=None if gamma_range is None else list(gamma_range),
        sampler={
            "scheduler": type(pipe.scheduler).__name__,
            "scheduler_config": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
            "num_inference_steps": STEPS,
            "guidance_scale": 1.0,
            "options": options,
        },
        injection_site=policy.injection_site,
        versions=package_versions(),
        metrics={"gap": 0.25, "gap_se": 0.01},
        training={
            "data": [{"attribute": "stroke", "dataset": "none: random weights", "images": 0, "labels": {"thin": 0, "bold": 0}}],
            "settings": {"prompts": ["one", "seven"], "lora_rank": 2, "merge_lora": False},
            "compute": {"device": "cpu", "processes": 1},
        },
    )
    classifier = Classifier(SPACE.to_dict(), image_size=8, widths=(4, 8), temperatures=(1.5,)).eval()
    return collect_adapter(config, pipe.unet, policy.label_encoder, classifier)


def pytest_addoption(parser):
    parser.addoption("--fuzz-seed", default="0", help="seed of the spoilt files in test_fuzz.py")


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def same_threads():
    """Experiments of benchmarks/ take one thread for their process, and the number of threads changes bits of later tests."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def fuzz_seed(request) -> str:
    return request.config.getoption("--fuzz-seed")


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory) -> Path:
    return write_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def ddpm_folder(tmp_path_factory) -> Path:
    return write_ddpm(tmp_path_factory.mktemp("models") / "tiny-ddpm")


@pytest.fixture(scope="session")
def sd_adapter(sd_folder, tmp_path_factory) -> Path:
    """An adapter folder for `sd_folder`: 4 steps, guidance 1, eta 1, gamma fixed at 1."""
    adapter = make_adapter(sd_folder, StableDiffusionPipeline.from_pretrained(sd_folder), {"eta": 1.0})
    return save_adapter(tmp_path_factory.mktemp("adapters") / "tiny-stroke", adapter)


@pytest.fixture(scope="session")
def sd_gamma_adapter(sd_folder) -> Adapter:
    """The same, in memory, for gamma from 0.5 to 8."""
    return make_adapter(sd_folder, StableDiffusionPipeline.from_pretrained(sd_folder), {"eta": 1.0}, gamma_range=(0.5, 8.0))


@pytest.fixture(scope="session")
def ddpm_adapter(ddpm_folder, tmp_path_factory) -> Path:
    adapter = make_adapter(ddpm_folder, DDPMPipeline.from_pretrained(ddpm_folder), {})
    return save_adapter(tmp_path_factory.mktemp("adapters") / "tiny-ddpm-stroke", adapter)


@pytest.fixture
def adapter(sd_adapter) -> Adapter:
    """The adapter of `sd_adapter` in memory, afresh for each test."""
    return load_adapter(sd_adapter)


@pytest.fixture
def fresh_accelerate():
    """What the first Accelerator of a process was told (precision, compiling) is told to all the later ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory) -> None:
    """Keeps the `datasets` cache of a test run out of the user's, and its progress bars off."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


# -- a Hub on this machine, and a user of it --


@pytest.fixture(scope="session")
def hub(sd_folder):
    from hub_client import BASE, OTHER, TOKEN, contents
    from hub_server import HubServer

    with HubServer({TOKEN: "user", OTHER: "other"}, part_size=4096) as hub:
        hub.create(BASE, contents(sd_folder))
        yield hub


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    from hub_client import SNIPPET, Client

    client = Client(hub.url, tmp_path_factory.mktemp("home"))
    client.ok(SNIPPET)
    yield client
    client.close()


@pytest.fixture(scope="session")
def trained(hub, sd_adapter, tmp_path_factory):
    """The tiny adapter as one would be that was trained on the Hub's base, at a commit."""
    from hub_client import BASE

    adapter = load_adapter(sd_adapter)
    base = {**adapter.config.base, "id": BASE, "revision": hub.repos[BASE].refs["main"]}
    folder = save_adapter(tmp_path_factory.mktemp("trained") / "run", replace(adapter, config=replace(adapter.config, base=base)))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
    (folder / "samples.png").write_bytes(b"\x89PNG")
    (folder / "metrics.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.safetensors").write_bytes(b"not for sharing")
    (folder / "notes.txt").write_text("not for sharing either")
    return folder


@pytest.fixture(scope="session")
def pushed(hub, client, trained):
    """The adapter's repository, pushed as the trainer does: from its output folder."""
    from hub_client import ADAPTER, TOKEN

    url = client.ok(
        "from diffusers_ctrl.sharing import push_adapter; result = push_adapter(folder, repo, token=token)",
        folder=str(trained),
        repo=ADAPTER,
        token=TOKEN,
    )
    assert url.startswith(f"{hub.url}/{ADAPTER}/commit/")
    return ADAPTER
