"""Labelled images in: the digits as written by the recipes, image folders, parquet files; and what is said of bad ones."""

import hashlib
import io
import itertools
import json
import struct
import warnings
import zlib

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ctrl.classifiers import _shift
from digits_data import (
    ATTRIBUTES,
    PROMPTS,
    drawn_digits,
    label_attribute,
    measure_slant,
    measure_stroke,
    oracle,
    prompt_oracle,
    slant_value,
    thresholds,
    write_digits_dataset,
)
from labelled_data import load_labelled_images


pytestmark = pytest.mark.usefixtures("datasets_cache")

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
LABELS = ["red", "green", "blue", "green", "red", "blue"]


def picture(name, size=(8, 8)):
    return Image.new("RGB", size, COLOURS[name])


def write_folder(folder, labels=LABELS, key="label", pictures=None):
    """An image folder with metadata.jsonl."""
    folder.mkdir()
    lines = []
    for i, label in enumerate(labels):
        image = picture(LABELS[i]) if pictures is None else pictures[i]
        image.save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", key: label}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(path, labels=LABELS, cells=None, names=None):
    feature = datasets.Value("string") if names is None else datasets.ClassLabel(names=names)
    cells = [picture(label) for label in LABELS[: len(labels)]] if cells is None else cells
    features = datasets.Features(image=datasets.Image(), label=feature)
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(path)
    return path


def colours_of(data):
    """Colour of each image, measured."""
    means = data.images.mean(dim=(2, 3))
    return [list(COLOURS)[row.argmax()] for row in means]


def labels_of(data):
    return [data.names[i] for i in data.labels]


def load(path, size=8, **kwargs):
    """Loads, and a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return load_labelled_images(str(path), size, **kwargs)


# -- what can be read --


@pytest.mark.parametrize("attribute", ["stroke", "slant", "lean"])
def test_digits(tmp_path, attribute):
    folder = write_digits_dataset(tmp_path / "digits", attribute, 120, seed=1)
    assert [path.name for path in folder.iterdir()] == ["train.parquet"]
    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    assert table.column_names == ["image", "label"]  # neither a prompt nor the digit
    assert table.features["label"].names == list(ATTRIBUTES[attribute])
    data = load(folder, 32)
    assert data.images.shape == (120, 3, 32, 32) and data.images.dtype == torch.float32
    assert data.names == ATTRIBUTES[attribute]
    assert torch.equal(data.labels.bincount(minlength=3) > 20, torch.ones(3).bool())  # terciles
    # PNG rounds to 1/255, which can carry a digit that sits on a border over it
    assert (oracle(attribute, data.images) == data.labels).float().mean() >= 0.98
    distances = torch.cdist(data.images.flatten(1), drawn_digits()[0].flatten(1)).min(dim=1).values
    assert distances.max() < 0.2  # each is one of the real digits


def test_digits_are_drawn_by_the_seed(tmp_path):
    first, same, other = (
        load(write_digits_dataset(tmp_path / str(i), "stroke", 20, seed=seed), 32).images for i, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "attribute, num_labels, message", [("colour", 10, "colour"), ("stroke", 0, "1797"), ("stroke", 1798, "1797")]
)
def test_digits_that_cannot_be_had(tmp_path, attribute, num_labels, message):
    with pytest.raises(ValueError, match=message):
        write_digits_dataset(tmp_path / "digits", attribute, num_labels)
    assert not (tmp_path / "digits").exists()


@pytest.mark.parametrize("specs", [("stroke@0/2", "slant@1/2"), ("stroke@0/3", "slant_value@1/3", "lean@2/3")])
def test_parts_have_no_digit_in_common(tmp_path, specs):
    """Two digits may be alike, so rows are compared by what the seed drew: all of the parts together are all of the digits, once each."""
    pictures = []
    for spec in specs:
        folder = write_digits_dataset(tmp_path / spec.replace("/", "-"), spec, seed=4)
        table = datasets.Dataset.from_parquet(str(folder / "train.parquet")).cast_column("image", datasets.Image(decode=False))
        pictures.append([hashlib.sha256(cell["bytes"]).hexdigest() for cell in table["image"]])
    together = [picture for part in pictures for picture in part]
    whole = datasets.Dataset.from_parquet(str(write_digits_dataset(tmp_path / "whole", "stroke", seed=0) / "train.parquet"))
    every = [hashlib.sha256(c["bytes"]).hexdigest() for c in whole.cast_column("image", datasets.Image(decode=False))["image"]]
    assert sorted(together) == sorted(every) and len(together) == 1797
    assert max(map(len, pictures)) - min(map(len, pictures)) <= 1
    if len(every) == len(set(every)):
        assert all(not set(a) & set(b) for a, b in itertools.combinations(pictures, 2))


def test_a_part_of_one_is_the_whole_and_smaller_sets_are_its_first(tmp_path):
    whole = load(write_digits_dataset(tmp_path / "a", "stroke", 50, seed=2), 32)
    same = load(write_digits_dataset(tmp_path / "b", "stroke@0/1", 30, seed=2), 32)
    assert torch.equal(whole.images[:30], same.images) and torch.equal(whole.labels[:30], same.labels)


@pytest.mark.parametrize(
    "spec", ["stroke@", "stroke@2/2", "stroke@0", "stroke@-1/2", "stroke@a/2", "stroke@0/0", "stroke@0/2/3", "@0/2"]
)
def test_parts_that_cannot_be_had(tmp_path, spec):
    with pytest.raises(ValueError, match="stroke@0/2|Unknown digits attribute"):
        write_digits_dataset(tmp_path / "digits", spec, 10)
    with pytest.raises(ValueError, match="between 1 and 898"):
        write_digits_dataset(tmp_path / "digits", "stroke@1/2", 899)
    assert not (tmp_path / "digits").exists()


@pytest.mark.parametrize("attribute", ["slant_value", "lean_value"])
def test_a_measured_number_as_a_label(tmp_path, attribute):
    table = datasets.Dataset.from_parquet(str(write_digits_dataset(tmp_path / "digits", attribute, seed=1) / "train.parquet"))
    assert table.features["label"] == datasets.Value("float32")
    values = torch.tensor(table["label"][:])
    space = label_attribute(attribute)
    assert (space.low, space.high) == (-2.5, 2.5) and "standard deviations" in space.unit
    assert values.min() >= space.low and values.max() <= space.high
    measured = oracle(attribute, drawn_digits()[0])
    assert measured.mean().abs() < 1e-9 and measured.std(correction=0).item() == pytest.approx(1)
    assert 0 < (measured.abs() > 2.5).sum() < 0.03 * 1797  # the labels are clipped, the oracle is not
    order = np.random.default_rng(1).permutation(1797)
    torch.testing.assert_close(values, measured[order].clamp(-2.5, 2.5).float())


def test_a_sheared_digit_has_the_slant_it_was_given():
    """x' = x + shear · (row above the middle): the moment is what it was, plus the shear; ink stays, and a shift changes nothing."""
    images = drawn_digits()[0][:40]
    shear = 0.2
    grid = F.affine_grid(torch.tensor([[1.0, shear, 0.0], [0.0, 1.0, 0.0]]).expand(40, -1, -1), images.shape, align_corners=False)
    sheared = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    real = measure_slant(drawn_digits()[0])
    moved = (slant_value(sheared) - slant_value(images)) * real.std(correction=0)
    assert (moved - shear).abs().max() < 0.03
    torch.testing.assert_close(measure_stroke(sheared), measure_stroke(images), rtol=0, atol=5e-3)
    shifted = torch.roll(F.pad(images, (4,) * 4, value=1.0), (2, -3), dims=(2, 3))
    torch.testing.assert_close(measure_slant(shifted), measure_slant(images), rtol=0, atol=1e-9)


def test_the_shifts_of_the_augmentation_keep_the_labels():
    images = drawn_digits()[0][:200]
    for seed in range(5):
        shifted = _shift(images, torch.Generator().manual_seed(seed))
        for attribute in ("stroke", "slant"):
            assert (oracle(attribute, shifted) == oracle(attribute, images)).float().mean() > 0.98
        assert (slant_value(shifted) - slant_value(images)).abs().max() < 0.2


def test_lean_is_to_be_had_of_every_digit_and_slant_is_not():
    images, target = drawn_digits()
    digits = torch.from_numpy(target)
    for attribute, borne in (("slant", False), ("lean", True)):
        labels = oracle(attribute, images)
        rarest = min((labels[digits == d] == c).float().mean().item() for d in range(10) for c in range(3))
        assert rarest > 0.2 if borne else rarest < 0.01


def test_the_prompt_oracle_says_which_prompt_it_cannot_judge():
    images, target = drawn_digits()
    prompts = [PROMPTS[digit] for digit in target[:50]]
    assert prompt_oracle(images[:50], prompts).all() and not prompt_oracle(images[:50], prompts[1:] + prompts[:1]).all()
    with pytest.raises(
        ValueError, match="cannot judge the prompt 'a digit': use 'a handwritten zero' to 'a handwritten nine', or no"
    ):
        prompt_oracle(images[:2], [PROMPTS[0], "a digit"])


def test_what_a_label_space_says_of_the_digits():
    stroke = label_attribute("stroke")
    assert stroke.names == ATTRIBUTES["stroke"] and stroke.thresholds == thresholds("stroke") and stroke.unit
    low, high = stroke.thresholds
    ink = measure_stroke(drawn_digits()[0])
    assert torch.equal(oracle("stroke", drawn_digits()[0]), (ink > low).long() + (ink > high).long())
    with pytest.raises(ValueError, match="colour"):
        label_attribute("colour")


def test_image_folder(tmp_path):
    data = load(write_folder(tmp_path / "images"))
    assert data.images.shape == (6, 3, 8, 8)
    assert data.names == ("blue", "green", "red")
    assert labels_of(data) == colours_of(data) == LABELS
    assert data.images.min() == 0 and data.images.max() == 1


def test_one_parquet_file(tmp_path):
    data = load(write_parquet(tmp_path / "some.parquet"))
    assert labels_of(data) == colours_of(data) == LABELS


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-0.parquet", LABELS[:4])
    write_parquet(tmp_path / "data" / "train-1.parquet", LABELS[:2])
    data = load(tmp_path / "data")
    assert labels_of(data) == colours_of(data) == LABELS[:4] + LABELS[:2]


def test_class_label_names(tmp_path):
    names = ["green", "red", "blue"]
    data = load(write_parquet(tmp_path / "some.parquet", [names.index(label) for label in LABELS], names=names))
    assert data.names == ("green", "red", "blue")
    assert labels_of(data) == colours_of(data) == LABELS


@pytest.mark.parametrize("order", [["red", "green", "blue"], ["blue", "red", "green"], ["black", "blue", "red", "green"]])
def test_the_order_of_label_names(tmp_path, order):
    names = ["green", "red", "blue"]
    (tmp_path / "b").mkdir()
    for path in (
        write_parquet(tmp_path / "a.parquet"),
        write_parquet(tmp_path / "b.parquet", [names.index(label) for label in LABELS], names=names),
    ):
        data = load(path, label_names=order)
        assert data.names == tuple(order)
        assert data.labels.tolist() == [order.index(label) for label in LABELS]


def test_integer_labels(tmp_path):
    data = load(write_folder(tmp_path / "images", [2, 10, 1, 10, 2, 1]), label_names=["1", "2", "10"])
    assert data.labels.tolist() == [1, 2, 0, 2, 1, 0]


def test_integer_labels_are_sorted_as_numbers(tmp_path):
    assert load(write_folder(tmp_path / "images", [2, 10, 1, 10, 2, 1])).names == ("1", "2", "10")


def test_columns_of_other_names(tmp_path):
    data = load(write_folder(tmp_path / "images", key="colour"), label_column="colour")
    assert labels_of(data) == LABELS


def test_max_rows(tmp_path):
    path = write_parquet(tmp_path / "some.parquet")
    assert labels_of(load(path, max_rows=4)) == LABELS[:4]
    assert labels_of(load(path, max_rows=100)) == LABELS


def test_images_of_any_shape_and_mode(tmp_path):
    wide = Image.new("RGB", (30, 10), (255, 0, 0))  # the middle third is green: what a centre crop keeps
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    pictures = [
        wide,
        tall,
        Image.new("L", (8, 8), 128),
        Image.new("RGBA", (20, 20), (0, 0, 255, 255)),
        picture("red", (3, 3)),
        picture("blue", (1, 50)),
    ]
    data = load(write_folder(tmp_path / "images", pictures=pictures))
    assert data.images.shape == (6, 3, 8, 8)
    assert colours_of(data)[:2] == ["green", "green"]
    assert data.images[:2, 0].max() < 0.1
    torch.testing.assert_close(data.images[2], torch.full((3, 8, 8), 128 / 255))
    assert colours_of(data)[3:] == ["blue", "red", "blue"]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_whichever_way_they_are_stored(tmp_path, kind, orientation):
    """The same as `datasets` decodes, which turns them too: and so what it decoded is not turned twice."""
    corner = Image.new("L", (16, 16), 0)
    corner.paste(255, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[274] = orientation
    path = write_parquet(tmp_path / "a.parquet", ["red"], [encoded(corner, kind, exif=exif)])
    images = load(path, 16).images
    table = datasets.Dataset.from_parquet(str(path))
    theirs = np.asarray(table[0]["image"].convert("RGB"))
    assert np.array_equal((images[0] * 255).round().byte().permute(1, 2, 0).numpy(), theirs)
    right, below = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    assert images[0, 0, 12 if below else 3, 12 if right else 3] > 0.9 and images[0, 0].mean() < 0.3
    table.map(lambda row: row).to_parquet(tmp_path / "b.parquet")
    assert torch.equal(load(tmp_path / "b.parquet", 16).images, images)


def test_grey_images_of_16_bits(tmp_path):
    levels = np.linspace(0, 65535, 64).round().reshape(8, 8).astype(np.uint16)
    raw = b"P5 8 8 65535\n" + levels.astype(">u2").tobytes()
    big_endian = Image.fromarray(levels.astype(">u2"))
    cells = [encoded(Image.fromarray(levels)), encoded(big_endian, "TIFF"), {"bytes": raw, "path": None}]
    data = load(write_parquet(tmp_path / "some.parquet", LABELS[:3], cells))
    for image in data.images:
        torch.testing.assert_close(image, torch.linspace(0, 1, 64).reshape(1, 8, 8).expand(3, -1, -1), rtol=0, atol=0.6 / 255)


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_grey_images_without_a_white_are_refused(tmp_path, dtype, mode):
    cell = encoded(Image.fromarray(np.ones((8, 8), dtype)), "TIFF")
    with pytest.raises(
        ValueError, match=rf"row 0 .* its grey values \(TIFF, mode {mode}\) have no known white; save it with 8 or 16 bits\."
    ):
        load(write_parquet(tmp_path / "some.parquet", ["red"], [cell]))


# -- numbers, several columns, rows without a label --

COLUMNS = {
    "colour": (["red", "green", None, "green", "red", "blue"], datasets.Value("string")),
    "mood": ([0, 1, -1, 1, 0, 1], datasets.ClassLabel(names=["calm", "wild"])),
    "weight": ([0.5, -1.25, 3.0, None, float("nan"), 2.0], datasets.Value("float32")),
    "count": ([3, 1, 4, 1, 5, 9], datasets.Value("int64")),
}
NAN = float("nan")


def write_columns(path, **columns):
    features = datasets.Features(image=datasets.Image(), **{name: feature for name, (_, feature) in columns.items()})
    values = {name: values for name, (values, _) in columns.items()}
    table = datasets.Dataset.from_dict({"image": [picture(label) for label in LABELS], **values}, features=features)
    table.to_parquet(path)
    return path


def assert_labels(labels, wanted):
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels, torch.tensor(wanted), equal_nan=True)


def test_a_continuous_column(tmp_path):
    path = write_columns(tmp_path / "some.parquet", **COLUMNS)
    data = load(path, label_column="weight", kind="continuous", allow_missing=True)
    assert_labels(data.labels, [0.5, -1.25, 3.0, NAN, NAN, 2.0])
    assert data.names == () and colours_of(data) == LABELS
    data = load(path, label_column="count", kind="continuous")
    assert_labels(data.labels, [3.0, 1.0, 4.0, 1.0, 5.0, 9.0])


def test_numbers_in_a_folder(tmp_path):
    folder = write_folder(tmp_path / "images", [0.5, 1, None, 2.5, -3, 0])
    assert_labels(load(folder, kind="continuous", allow_missing=True).labels, [0.5, 1.0, NAN, 2.5, -3.0, 0.0])


def test_classes_with_rows_without_one(tmp_path):
    path = write_columns(tmp_path / "some.parquet", **COLUMNS)
    data = load(path, label_column="mood", allow_missing=True)
    assert_labels(data.labels, [0.0, 1.0, NAN, 1.0, 0.0, 1.0])
    assert data.names == ("calm", "wild")
    data = load(path, label_column="colour", allow_missing=True)
    assert_labels(data.labels, [2.0, 1.0, NAN, 1.0, 2.0, 0.0])
    assert data.names == ("blue", "green", "red")


def test_several_columns(tmp_path):
    path = write_columns(tmp_path / "some.parquet", **COLUMNS)
    data = load(
        path,
        label_column=["colour", "weight", "mood"],
        label_names=[["red", "green", "blue"], None, None],
        kind=["categorical", "continuous", "categorical"],
        allow_missing=True,
    )
    colour, weight, mood = [0.0, 1.0, NAN, 1.0, 0.0, 2.0], [0.5, -1.25, 3.0, NAN, NAN, 2.0], [0.0, 1.0, NAN, 1.0, 0.0, 1.0]
    assert_labels(data.labels, [list(row) for row in zip(colour, weight, mood, strict=True)])
    assert data.names == (("red", "green", "blue"), (), ("calm", "wild"))


def test_one_column_in_a_list(tmp_path):
    data = load(write_columns(tmp_path / "some.parquet", **COLUMNS), label_column=["count"])
    assert_labels(data.labels, [[1.0], [0.0], [2.0], [0.0], [3.0], [4.0]])
    assert data.names == (("1", "3", "4", "5", "9"),)


def test_labels_stay_with_their_images(tmp_path):
    cells = [{"bytes": png_bytes(label), "path": None} for label in LABELS]
    cells[1]["bytes"] = b""
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("float32"))
    table = datasets.Dataset.from_dict({"image": cells, "label": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}, features=features)
    table.to_parquet(tmp_path / "some.parquet")
    with pytest.warns(UserWarning, match="row 1 "):
        data = load_labelled_images(str(tmp_path / "some.parquet"), 8, kind="continuous", skip_unreadable=True)
    assert_labels(data.labels, [0.0, 2.0, 3.0, 4.0, 5.0])
    assert colours_of(data) == [label for i, label in enumerate(LABELS) if i != 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_column": "weight", "kind": "continuous"}, "Row 3 .* None, which is not a finite number, in column 'weight'"),
        ({"label_column": "colour", "kind": "continuous"}, "Row 0 .* 'red', which is not a finite number, in column 'colour'"),
        ({"label_column": ["count", "mood"]}, "Row 2 .* -1, which is not one of .*'calm', 'wild'.*in column 'mood'"),
        ({"label_column": ["count", "size"]}, "no column 'size'.*--label_column"),
        (
            {"label_column": ["count", "mood"], "kind": ["continuous"]},
            "2 label columns need as many label_names and kinds; got 2 and 1",
        ),
        ({"label_column": ["count"], "label_names": [["1"], ["2"]]}, "1 label columns need as many .* got 2 and 1"),
        ({"label_column": []}, "0 label columns"),
        ({"label_column": "count", "kind": "ordinal"}, "kind must be one of .* got 'ordinal'"),
    ],
)
def test_labels_that_cannot_be_had(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(write_columns(tmp_path / "some.parquet", **COLUMNS), **options)


def test_an_infinite_number(tmp_path):
    column = ([0.5, 1.0, float("inf"), 2.0, 3.0, 4.0], datasets.Value("float32"))
    path = write_columns(tmp_path / "some.parquet", weight=column)
    with pytest.raises(ValueError, match="Row 2 .* inf, which is not a finite number"):
        load(path, label_column="weight", kind="continuous", allow_missing=True)


# -- many large images --


def test_a_transform_sees_few_images_at_a_time(tmp_path):
    levels = [(i * 37) % 256 for i in range(150)]
    cells = [Image.new("RGB", (16, 16), (level,) * 3) for level in levels]
    path = write_parquet(tmp_path / "some.parquet", labels=["red"] * 150, cells=cells)
    seen = []

    def halve(images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32) and images.max() <= 1
        seen.append(len(images))
        return torch.nn.functional.avg_pool2d(images, 4)

    data = load(path, 32, transform=halve)
    assert max(seen) <= 32 and sum(seen) == 150
    assert data.images.shape == (150, 3, 8, 8)
    assert torch.equal(data.images, torch.nn.functional.avg_pool2d(load(path, 32).images, 4))
    torch.testing.assert_close(data.images[:, 0, 0, 0] * 255, torch.tensor(levels).float())


# -- what cannot --


def test_missing_columns(tmp_path):
    path = write_parquet(tmp_path / "some.parquet")
    with pytest.raises(ValueError, match=r"no column 'picture'.*\['image', 'label'\].*--image_column"):
        load(path, image_column="picture")
    with pytest.raises(ValueError, match=r"no column 'colour'.*\['image', 'label'\].*--label_column"):
        load(path, label_column="colour")


def test_an_image_column_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 \(red\) cannot be read"):  # text is taken for paths
        load(write_parquet(tmp_path / "some.parquet"), image_column="label")


def test_a_class_that_the_label_space_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"Row 2 .*'blue'.*\['red', 'green'\]"):
        load(write_parquet(tmp_path / "some.parquet"), label_names=["red", "green"])


@pytest.mark.parametrize("hole", [-1, None])
def test_a_row_without_a_label(tmp_path, hole):
    names = list(COLOURS)
    labels = [names.index(label) for label in LABELS]
    labels[3] = hole
    with pytest.raises(ValueError, match="Row 3"):
        load(write_parquet(tmp_path / "some.parquet", labels, names=names))


def test_a_row_without_a_label_in_a_column_of_text(tmp_path):
    with pytest.raises(ValueError, match="Row 3"):
        load(write_parquet(tmp_path / "some.parquet", [*LABELS[:3], None, *LABELS[4:]]))


def png_bytes(label):
    buffer = io.BytesIO()
    # noise, so that the file is long enough to be cut in its data
    pixels = np.random.default_rng(0).integers(0, 100, (8, 8, 3), dtype=np.uint8)
    pixels[..., list(COLOURS).index(label)] = 255
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def cut(data):
    return data[: len(data) // 2]


def no_bytes(data):
    return b""


def noise(data):
    return b"this is no picture"


def wrong_checksum(data):
    middle = data.index(b"IDAT") + 30
    return data[:middle] + bytes(b ^ 255 for b in data[middle : middle + 8]) + data[middle + 8 :]


def broken_header(data):
    return data[:16] + b"\xff\xff" + data[18:]


def enormous(data):
    """A good header, of a picture with 3.6 thousand million pixels, which PIL refuses to open."""
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def no_numbers(data):
    return b"P3 8 8 255 one two three"  # a PPM file, of which PIL says ValueError


SPOIL = [cut, no_bytes, noise, wrong_checksum, broken_header, enormous, no_numbers]


@pytest.mark.parametrize("spoil", SPOIL)
def test_an_unreadable_image_in_a_folder(tmp_path, spoil):
    folder = write_folder(tmp_path / "images")
    (folder / "3.png").write_bytes(spoil(png_bytes("green")))
    with pytest.raises(ValueError, match=r"row 3 \(.*3\.png\) cannot be read.*--skip_unreadable"):
        load(folder)
    with pytest.warns(UserWarning, match=r"1 images were skipped.*3\.png"):
        data = load_labelled_images(str(folder), 8, skip_unreadable=True)
    assert labels_of(data) == colours_of(data) == LABELS[:3] + LABELS[4:]


@pytest.mark.parametrize("spoil", SPOIL)
def test_an_unreadable_image_in_a_parquet_file(tmp_path, spoil):
    cells = [{"bytes": png_bytes(label), "path": None} for label in LABELS]
    cells[1]["bytes"] = spoil(cells[1]["bytes"])
    path = write_parquet(tmp_path / "some.parquet", cells=cells)
    with pytest.raises(ValueError, match="row 1 cannot be read"):
        load(path)
    with pytest.warns(UserWarning, match="row 1 "):
        data = load_labelled_images(str(path), 8, skip_unreadable=True)
    assert labels_of(data) == colours_of(data) == [label for i, label in enumerate(LABELS) if i != 1]


def test_a_row_without_an_image(tmp_path):
    path = write_parquet(tmp_path / "some.parquet", cells=[picture("red"), None, *(picture(label) for label in LABELS[2:])])
    with pytest.raises(ValueError, match="row 1 cannot be read"):
        load(path)


def test_whole_images_are_not_skipped(tmp_path):
    data = load(write_folder(tmp_path / "images"), skip_unreadable=True)  # nor warned about
    assert labels_of(data) == LABELS


def test_no_readable_image_at_all(tmp_path):
    path = write_parquet(tmp_path / "some.parquet", cells=[{"bytes": b"", "path": None}] * 6)
    with pytest.warns(UserWarning, match="6 images"), pytest.raises(ValueError, match="no readable image"):
        load_labelled_images(str(path), 8, skip_unreadable=True)


def test_names_that_are_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name in ("no/such-dataset", "no-such-dataset", str(tmp_path / "nowhere"), str(tmp_path / "empty")):
        with pytest.raises(ValueError, match=f"{name}.*could not be opened"):
            load(name)
    with pytest.raises(ValueError, match="broken.parquet.*could not be opened"):
        load(tmp_path / "broken.parquet")
