"""Datasets written in shards: interrupted anywhere and resumed they are the same; what is in them; what is said of bad input."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import sampled_data
from labelled_data import load_labelled_images, open_dataset, shard_paths
from sampled_data import label_image_folder, main, write_sampled_dataset


pytestmark = pytest.mark.usefixtures("datasets_cache")

PROMPTS = ["a handwritten one", "a handwritten two", "a handwritten three"]
SHADES = ("dark", "light")
CALLS: list[int] = []  # how many images the labellers below saw, call by call


def brightness(images):
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    assert (images * 255 - (images * 255).round()).abs().max() < 1e-3  # what is stored
    return images.mean(dim=(1, 2, 3))


def shade(images):
    CALLS.append(len(images))
    return (brightness(images) > 0.5).long()


def half_shade(images):
    return shade(images) / 2


LABELLERS = {"shade": shade, "brightness": brightness}
NAMES = {"shade": SHADES}
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 2.0, "eta": 1.0}


@pytest.fixture
def pipe(sd_folder):
    CALLS.clear()
    return StableDiffusionPipeline.from_pretrained(sd_folder)


def write(folder, pipe, **changes):
    """11 images in shards of 4, in batches of 3: shards of 4, 4 and 3, calls for 3, 1, 3, 1 and 3."""
    given = {"prompts": PROMPTS, "labellers": LABELLERS, "label_names": NAMES, "num_images": 11, "batch_size": 3, "shard_size": 4}
    given |= {"seed": 5, "prompt_column": "prompt", **SAMPLING, **changes}
    return write_sampled_dataset(folder, pipe, **given)


def contents(folder):
    """Every file of a dataset, and nothing else may be in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def pixels_of(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


@pytest.fixture(scope="module")
def whole(sd_folder, tmp_path_factory):
    """The dataset of an uninterrupted call."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    return contents(write(folder, StableDiffusionPipeline.from_pretrained(sd_folder)))


# -- what is written --


def test_images_prompts_and_labels(tmp_path, pipe):
    folder = write(tmp_path / "dataset", pipe)
    assert sorted(contents(folder)) == ["manifest.json", *(path.name for path in shard_paths(folder, 3))]
    assert CALLS == [3, 1, 3, 1, 3]  # never more than a batch at a time
    rows = rows_of(folder)
    assert len(rows) == 11 and list(rows[0]) == ["image", "prompt", "shade", "brightness"]
    assert [row["prompt"] for row in rows] == [PROMPTS[i % 3] for i in range(11)]
    pictures = np.stack([pixels_of(row) for row in rows])
    assert pictures.shape == (11, 16, 16, 3)
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 4)
    drawn = pipe([PROMPTS[1], PROMPTS[2], PROMPTS[0]], generator=generator, output_type="np", **SAMPLING).images
    assert np.array_equal(pictures[4:7], (drawn * 255).round().astype(np.uint8))  # lossless
    stored = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    assert [row["shade"] for row in rows] == shade(stored).tolist() and {row["shade"] for row in rows} == {0, 1}
    torch.testing.assert_close(torch.tensor([row["brightness"] for row in rows]), brightness(stored))

    table = open_dataset(str(folder))
    assert table.features["shade"].names == list(SHADES) and table.features["brightness"].dtype == "float32"
    data = load_labelled_images(str(folder), 16, label_column=["shade", "brightness"], kind=["categorical", "continuous"])
    assert torch.equal(data.images, stored) and data.names == (SHADES, ())
    torch.testing.assert_close(data.labels, torch.stack([shade(stored).float(), brightness(stored)], dim=1))


def test_the_prompt_is_left_out_unless_wanted(tmp_path, pipe):
    folder = write(tmp_path / "dataset", pipe, prompt_column=None, labellers={"label": shade}, label_names={"label": SHADES})
    assert list(rows_of(folder)[0]) == ["image", "label"]
    assert load_labelled_images(str(folder), 16).names == SHADES


def test_a_base_without_prompts(tmp_path, ddpm_folder):
    pipe = DDPMPipeline.from_pretrained(ddpm_folder)
    folder = write_sampled_dataset(tmp_path / "dataset", pipe, [""], LABELLERS, NAMES, 5, batch_size=2, num_inference_steps=2)
    assert [pixels_of(row).shape for row in rows_of(folder)] == [(8, 8, 3)] * 5


def test_a_safety_checker_does_not_paint_the_dataset_black(tmp_path, pipe, whole):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.fill_(-10.0)  # every image is refused
    with torch.no_grad():
        checker.special_care_embeds_weights.fill_(-10.0)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    checked = StableDiffusionPipeline(
        **pipe.components | {"safety_checker": checker, "feature_extractor": CLIPImageProcessorPil(**sizes)}
    )
    checked.set_progress_bar_config(disable=True)
    assert not checked(PROMPTS[0], output_type="np", **SAMPLING).images.any()
    assert contents(write(tmp_path / "dataset", checked)) == whole
    assert checked.safety_checker is checker


# -- interrupted and resumed --


class Interrupted(BaseException):
    """What no `except Exception` catches, as Ctrl-C."""


@pytest.mark.parametrize("call", range(5))
def test_interrupted_while_drawing(tmp_path, pipe, whole, monkeypatch, call):
    def stop_there(images):
        if len(CALLS) == call:
            raise Interrupted
        return shade(images)

    stop_there.__module__, stop_there.__qualname__ = shade.__module__, shade.__qualname__  # the same function, for the manifest
    with pytest.raises(Interrupted):
        write(tmp_path / "dataset", pipe, labellers=LABELLERS | {"shade": stop_there})
    finished = call // 2
    assert len(list((tmp_path / "dataset").glob("*.parquet"))) == finished
    with pytest.raises(ValueError, match=f"not complete: {3 - finished} of its 3 shards are missing.*goes on where it stopped"):
        open_dataset(str(tmp_path / "dataset"))
    CALLS.clear()
    assert contents(write(tmp_path / "dataset", pipe)) == whole
    assert CALLS == [3, 1, 3, 1, 3][2 * finished :]  # finished shards are not drawn again


@pytest.mark.parametrize("file", range(4))
def test_interrupted_before_a_file_has_its_name(tmp_path, pipe, whole, monkeypatch, file):
    """The manifest is file 0, the shards are 1 to 3."""
    replace, moved = os.replace, []

    def stop_there(source, target):
        if len(moved) == file:
            raise Interrupted
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(sampled_data.os, "replace", stop_there)
        with pytest.raises(Interrupted):
            write(tmp_path / "dataset", pipe)
    assert len(moved) == file
    assert contents(write(tmp_path / "dataset", pipe)) == whole


def test_interrupted_while_a_shard_is_written(tmp_path, pipe, whole):
    folder = write(tmp_path / "dataset", pipe)
    last = shard_paths(folder, 3)[-1]
    half = last.read_bytes()[:500]
    last.unlink()
    (folder / f".{last.name}.tmp").write_bytes(half)
    assert contents(write(folder, pipe)) == whole


def test_a_finished_dataset_is_left_as_it_is(tmp_path, pipe):
    folder = write(tmp_path / "dataset", pipe)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    CALLS.clear()
    write(folder, pipe)
    assert not CALLS and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


# -- a changed setting --


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 6}, "made with seed = 5, not 6"),
        ({"num_images": 12}, "made with num_images = 11, not 12"),
        ({"batch_size": 2}, "made with batch_size = 3, not 2"),
        ({"shard_size": 5}, "made with shard_size = 4, not 5"),
        ({"prompts": PROMPTS[:2]}, "made with prompts = "),
        ({"prompt_column": None}, "made with prompt_column = 'prompt', not None"),
        ({"num_inference_steps": 4}, "made with call_kwargs = "),
        ({"height": 32}, "made with call_kwargs = "),
        ({"label_names": {"shade": SHADES[::-1]}}, "made with label_names = "),
        ({"labellers": LABELLERS | {"shade": half_shade}}, "made with labellers = "),
        ({"labellers": {"shade": shade}}, "made with labellers = "),
    ],
)
def test_a_changed_setting_is_refused(tmp_path, pipe, whole, changes, message):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{message}.*another folder, or remove this one"):
        write(tmp_path, pipe, **changes)
    assert contents(tmp_path) == whole


def test_a_changed_base_is_refused(tmp_path, pipe, whole):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path, pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match="made with scheduler = "):
        write(tmp_path, pipe)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="made with scheduler = "):
        write(tmp_path, pipe)
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1e-3
    with pytest.raises(ValueError, match="made with weights = "):
        write(tmp_path, pipe)


def test_folders_that_hold_something_else(tmp_path, pipe):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="already holds mine.parquet, which was not written here"):
        write(tmp_path / "foreign", pipe)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text('{"settings": ')
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        write(tmp_path / "broken", pipe)
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        open_dataset(str(tmp_path / "broken"))
    assert not CALLS


# -- bad input --


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"labellers": LABELLERS | {"shade": half_shade}},
            "labeller of 'shade' gave 0.5 for sample .*an index into .*'dark', 'light'",
        ),
        ({"label_names": {"shade": ["dark"]}}, "labeller of 'shade' gave 1.0 for sample .*an index into"),
        (
            {"labellers": LABELLERS | {"brightness": lambda x: x.mean(dim=(1, 2, 3)).log() * 0 / 0}},
            "'brightness' gave nan for sample 0",
        ),
        ({"labellers": LABELLERS | {"brightness": lambda x: x.mean()}}, r"'brightness' gave shape \(\) for 3 images"),
        ({"labellers": {}}, "at least one attribute"),
        ({"label_names": NAMES | {"mood": ("good", "bad")}}, "'mood', which has no labeller"),
        ({"labellers": LABELLERS | {"prompt": shade}}, "'prompt' cannot have the name of another column"),
        ({"labellers": LABELLERS | {"image": shade}}, "'image' cannot have the name of another column"),
        ({"num_images": 0}, "must be positive, got 0"),
        ({"prompts": []}, "prompts must not be empty"),
    ],
)
def test_bad_settings(tmp_path, pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "dataset", pipe, **changes)
    with pytest.raises(ValueError, match="not complete|could not be opened"):
        open_dataset(str(tmp_path / "dataset"))


def test_samples_that_are_not_finite(tmp_path, pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="samples 0 to 2 are not finite"):
        write(tmp_path / "dataset", pipe)


# -- image folders --


def write_images(folder, count=11):
    """Grey pictures of several sizes and kinds, two folders deep; the brightness is in the name."""
    for i in range(count):
        path = folder / ("deep/er" if i % 2 else ".") / f"{i:02d}.{('png', 'webp', 'PNG')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i, 12), (20 * i,) * 3).save(path, lossless=True)
    (folder / "notes.txt").write_text("not an image")
    return folder


def label(folder, out, **changes):
    return label_image_folder(
        folder, out, **{"labellers": LABELLERS, "label_names": NAMES, "size": 8, "batch_size": 3, "shard_size": 4} | changes
    )


def test_an_image_folder(tmp_path):
    images = write_images(tmp_path / "images")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = rows_of(label(images, tmp_path / "out"))
    assert list(rows[0]) == ["image", "file_name", "shade", "brightness"]
    assert [row["file_name"] for row in rows] == sorted(p.relative_to(images).as_posix() for p in images.rglob("*.[pPw]*"))
    for row in rows:
        level = 20 * int(Path(row["file_name"]).stem)
        assert (pixels_of(row) == level).all() and pixels_of(row).shape == (8, 8, 3)
        assert row["shade"] == (level > 127) and row["brightness"] == pytest.approx(level / 255)


def test_some_of_an_image_folder(tmp_path):
    assert len(rows_of(label(write_images(tmp_path / "images"), tmp_path / "out", max_images=5))) == 5


def test_an_unreadable_image(tmp_path):
    images = write_images(tmp_path / "images")
    (images / "06.png").write_bytes((images / "06.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="file 06.png cannot be read.*skip_unreadable"):
        label(images, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 0
    with pytest.warns(UserWarning, match="1 images were skipped. The image in file 06.png"):
        label(images, tmp_path / "out", skip_unreadable=True)
    names = [row["file_name"] for row in rows_of(tmp_path / "out")]
    assert len(names) == 10 and "06.png" not in names
    assert len(load_labelled_images(str(tmp_path / "out"), 8, label_column="shade").labels) == 10


def test_a_shard_of_unreadable_images(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"") if i < 4 else Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="4 images were skipped"):
        label(tmp_path, tmp_path / "out", skip_unreadable=True)
    assert len(load_labelled_images(str(tmp_path / "out"), 8, label_column="shade").labels) == 2


def test_an_image_folder_is_resumed_but_not_when_it_changed(tmp_path):
    images = write_images(tmp_path / "images")
    wanted = contents(label(images, tmp_path / "whole"))
    label(images, tmp_path / "out")
    shard_paths(tmp_path / "out", 3)[1].unlink()
    CALLS.clear()
    assert contents(label(images, tmp_path / "out")) == wanted and CALLS == [3, 1]
    with pytest.raises(ValueError, match="made with size = 8, not 16"):
        label(images, tmp_path / "out", size=16)
    (images / "02.PNG").rename(images / "2.png")
    with pytest.raises(ValueError, match="made with files = "):
        label(images, tmp_path / "out")


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is not a folder"):
        label(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="has no images"):
        label(tmp_path, tmp_path / "out")


def test_the_command(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    function = f"{__name__}:shade"
    arguments = [
        str(images),
        str(tmp_path / "out"),
        "--size",
        "8",
        "--labeller",
        f"shade={function}",
        "--names",
        "shade=dark|light",
    ]
    main([*arguments, "--labeller", f"brightness={__name__}:brightness", "--max_images", "7"])
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 7 and list(rows[0]) == ["image", "file_name", "shade", "brightness"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["labellers"]["shade"] == function
    assert str(tmp_path / "out") in capsys.readouterr().out
    with pytest.raises(ValueError, match="--names 'shade' must be attribute=value"):
        main([*arguments[:-1], "shade"])
    with pytest.raises(ValueError, match="nothing:here"):
        main([*arguments[:4], "--labeller", "shade=nothing:here"])


# -- several processes --

LABELLER = """
import os
from pathlib import Path

def shade(images):
    with open(Path(__file__).with_name(f"rank-{os.environ.get('RANK', 0)}"), "a") as calls:
        calls.write(f"{len(images)}\\n")
    return (images.mean(dim=(1, 2, 3)) > 0.5).long()
"""


def test_two_processes_share_the_shards(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images")
    (tmp_path / "some_labeller.py").write_text(LABELLER)
    monkeypatch.syspath_prepend(tmp_path)
    import some_labeller

    sizes = {"batch_size": 2, "shard_size": 3}
    one = label_image_folder(images, tmp_path / "one", {"shade": some_labeller.shade}, NAMES, 8, **sizes)
    (tmp_path / "rank-0").unlink()
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(sampled_data.__file__).parent)!r}]\n"
        "from sampled_data import label_image_folder\nfrom some_labeller import shade\n"
        f"label_image_folder({str(images)!r}, {str(tmp_path / 'two')!r}, {{'shade': shade}}, {NAMES!r}, 8, **{sizes!r})\n"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "run.py")]
    done = subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "two") == contents(one)
    # shards of 3, 3, 3 and 2 images: the first process labels the first and the third
    assert (tmp_path / "rank-0").read_text().split() == ["2", "1", "2", "1"]
    assert (tmp_path / "rank-1").read_text().split() == ["2", "1", "2"]
