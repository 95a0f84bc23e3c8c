"""Load: datasets that are streamed, the same with a thousand rows and a million; and long trainings, which must not grow."""

import gc
import os
import time
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from test_trainer import make_trainer

import streamed_data
import train_ctrl
from diffusers_ctrl import Categorical, Classifier, LabelSpace
from diffusers_ctrl.classifiers import fit_classifier
from streamed_data import stream_labelled_images


NAMES = ("dark", "light")
SPACE = LabelSpace(tone=Categorical(NAMES))


def write_pictures(folder, count: int, shards: int = 4, labels=None):
    """Parquet shards of `count` random 8x8 pictures, BMP, labelled by their mean; returns the folder."""
    folder.mkdir(parents=True)
    header = b"BM" + (54 + 192).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    header += (8).to_bytes(4, "little") * 2 + b"\x01\x00\x18\x00" + bytes(24)
    generator = np.random.default_rng(0)
    for shard, rows in enumerate(np.array_split(np.arange(count), shards)):
        pixels = generator.integers(0, 200, (len(rows), 1), dtype=np.uint8) + generator.integers(
            0, 56, (len(rows), 192), dtype=np.uint8
        )
        light = (pixels.mean(axis=1) > 127).astype(int)
        files = [header + row.tobytes() for row in pixels]
        own = [NAMES[i] for i in light] if labels is None else [labels] * len(rows)
        table = pa.table({"image": [{"bytes": file, "path": None} for file in files], "label": own})
        pq.write_table(table, folder / f"rows-{shard:03d}.parquet", row_group_size=2000)
    return folder


@pytest.fixture(autouse=True)
def no_wait(request, monkeypatch):
    """datasets waits five seconds whenever a pass over several shards ends, for the threads of remote file systems."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory, datasets_cache):
    return write_pictures(tmp_path_factory.mktemp("stream") / "small", 1000)


def stream(folder, **settings):
    return stream_labelled_images(str(folder), 8, **{"label_names": (NAMES,), "head": 60, **settings})


def contents(images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_a_stream_gives_every_row_once_a_pass_in_an_order_of_its_seed(small):
    opened = stream(small)
    assert opened.head.images.shape == (60, 3, 8, 8) and opened.head.names == (NAMES,)
    one, again, other = (list(islice(opened.batches([], 100, seed), 20)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(one, again, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    passes = [contents(torch.cat([images for images, _ in batches])) for batches in (one[:10], one[10:], other[:10])]
    assert passes[0] == passes[1] == passes[2] and len(passes[0]) == 1000
    assert not torch.equal(one[0][0], one[10][0])  # the second pass has another order
    for images, labels in one:
        assert torch.equal(labels[:, 0], (images.mean(dim=(1, 2, 3)) * 255 > 127).float())


def test_held_out_images_never_come_not_even_as_copies(tmp_path, small):
    pictures = pq.read_table(small / "rows-000.parquet")
    (tmp_path / "twice").mkdir()
    for copy in range(2):
        pq.write_table(pictures, tmp_path / "twice" / f"{copy}.parquet")
    opened = stream(tmp_path / "twice")
    held = list(range(0, 60, 3))
    left = contents(torch.cat([images for images, _ in islice(opened.batches(held, 50, 1), 30)]))
    assert not left & contents(opened.head.images[held])
    assert left == contents(torch.cat([i for i, _ in islice(opened.batches([], 50, 0), 10)])) - contents(opened.head.images[held])


def test_a_stream_of_nothing_but_held_out_images(small):
    opened = stream(small, max_rows=30)
    assert len(opened.head.images) == 30
    with pytest.raises(ValueError, match="no image besides those that are held out"):
        next(opened.batches(range(30), 8, 1))


def test_what_a_stream_refuses(tmp_path, small):
    with pytest.raises(
        ValueError, match="classes of column 'label'.*cannot be known before its last row is read: give --label_names"
    ):
        stream(small, label_names=(None,))
    with pytest.raises(ValueError, match="no column 'colour'; it has"):
        stream(small, label_columns=("colour",))
    with pytest.raises(
        ValueError, match=r"Row \d+ of the stream \(seed 0, pass 0\).*label 'light', which is not one of \['dark'\]"
    ):
        stream(small, label_names=(("dark",),))
    with pytest.raises(ValueError, match="could not be opened"):
        stream(tmp_path / "nowhere")
    table = pq.read_table(small / "rows-000.parquet").to_pylist()
    table[3]["image"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match="image in row .* cannot be read.*--skip_unreadable"):
        stream(tmp_path / "broken.parquet", head=250)
    assert len(stream(tmp_path / "broken.parquet", head=250, skip_unreadable=True).head.images) == 249


def test_only_the_head_and_the_buffer_are_read_at_the_start(tmp_path, datasets_cache, monkeypatch):
    folder = write_pictures(tmp_path / "many", 20_000, shards=5)
    read, key = [], streamed_data._key
    monkeypatch.setattr(streamed_data, "_key", lambda cell: (read.append(1), key(cell))[1])
    opened = stream(folder)
    assert len(read) <= 61
    next(opened.batches([], 64, 1))
    assert len(read) <= 61 + 65


def test_cross_fitting_and_calibration_of_a_stream(small):
    """Each member learns from all but its own part of the head, and is calibrated on it; it ends as good as in memory."""
    opened, held = stream(small, head=200), []

    def more(rows, batch_size, seed):
        held.append(rows)
        return opened.batches(rows.tolist(), batch_size, seed)

    torch.manual_seed(0)
    settings = {"image_size": 8, "widths": (8, 8), "members": 2}
    classifier = Classifier(SPACE.to_dict(), **settings)
    options = {"max_epochs": 4, "progress": False}
    report = fit_classifier(classifier, opened.head.images, opened.head.labels, more=more, epoch_batches=12, **options)
    assert sorted(torch.cat(held).tolist()) == list(range(200)) and report.num_validation == 200
    assert report.num_train == report.epochs * 12 * 64
    torch.manual_seed(0)
    whole = stream(small, head=1000).head
    in_memory = fit_classifier(Classifier(SPACE.to_dict(), **settings), whole.images, whole.labels, **options)
    found, expected = (r.attributes["tone"].accuracy for r in (report, in_memory))
    assert found > 0.9 and found > expected - 0.05


def test_labels_outside_their_interval_are_found_while_streaming(small):
    opened = stream(small, head=200)

    def more(rows, batch_size, seed):
        for images, labels in opened.batches(rows.tolist(), batch_size, seed):
            yield images, labels + 5

    with pytest.raises(ValueError, match="of attribute 'tone' is not allowed"):
        fit_classifier(
            Classifier(SPACE.to_dict(), image_size=8, widths=(4,)),
            opened.head.images,
            opened.head.labels,
            more=more,
            progress=False,
        )


def test_the_command_streams_datasets_of_several_attributes(sd_folder, tmp_path, small):
    """Two datasets, each with one of two attributes; the head of one is smaller than asked for."""
    other = write_pictures(tmp_path / "other", 40, shards=1)
    settings = {
        "base": str(sd_folder),
        "attribute": ["tone", "light"],
        "dataset": [str(small), str(other)],
        "label_names": ["dark|light", "dark|light"],
        "streaming": True,
        "stream_head": 60,
        "epoch_labels": 128,
        "num_labels": None,
        "classifier_size": 8,
        "classifier_widths": [4, 4],
        "classifier_members": 2,
        "classifier_epochs": 2,
        "num_inference_steps": 4,
        "lora_rank": 2,
        "batch_size": 4,
        "max_updates": 1,
        "eval_samples": 2,
        "base_samples": 8,
        "sample_every": 0,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    try:
        metrics = train_ctrl.main(["--config", str(tmp_path / "settings.yaml")])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert metrics["num_labels"] == metrics["classifier_num_train"] == metrics["classifier_epochs"] * 128
    assert metrics["classifier_num_validation"] == 100
    assert np.isfinite([metrics["gap"], metrics["kl"]]).all()


# -- growth --


def resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(folder, first: int, last: int) -> tuple[float, int]:
    """Relative growth of resident memory, and of the number of open files, from update `first` to update `last` of one training."""
    found = {}

    def look(update, policy):
        if update in (first, last):
            found[update] = resident(), len(os.listdir("/proc/self/fd"))

    trainer = make_trainer(
        folder, num_inference_steps=4, max_updates=last, sample_every=first, checkpoint_every=50, report_to="tensorboard"
    )
    trainer.save_images = look
    trainer.train()
    (memory, files), (later, files_later) = found[first], found[last]
    return later / memory - 1, files_later - files


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_two_hundred_updates_without_growth(tmp_path):
    grown, files = growth(tmp_path, 100, 200)
    assert grown < 0.02 and files == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("objective", ["direct_backprop", "adjoint_matching", "policy_gradient"])
def test_a_thousand_updates_without_growth(tmp_path, objective):
    grown, files = growth(tmp_path, 200, 1000)
    print(f"{objective}: resident memory grew by {100 * grown:.2f} % from update 200 to update 1,000, open files by {files}")
    assert grown < 0.02 and files == 0


@pytest.mark.slow
def test_a_million_rows_start_in_ten_seconds_and_teach_as_fast_as_a_thousand(tmp_path, datasets_cache):
    """In processor time, which what else runs on the machine does not change."""
    rates = []
    for count, shards in ((1000, 1), (1_000_000, 100)):
        folder = write_pictures(tmp_path / str(count), count, shards)
        started, wall = time.process_time(), time.perf_counter()
        opened = stream(folder, head=1000)
        batches = opened.batches([], 64, 1)
        next(batches)
        start, wall = time.process_time() - started, time.perf_counter() - wall
        classifier = Classifier(SPACE.to_dict(), image_size=8, widths=(8, 8))
        torch.manual_seed(0)
        started = time.process_time()
        report = fit_classifier(
            classifier,
            opened.head.images,
            opened.head.labels,
            more=lambda rows, size, seed, opened=opened: opened.batches(rows.tolist(), size, seed),
            max_epochs=4,
            epoch_batches=40,
            progress=False,
        )
        rates.append(report.num_train / (time.process_time() - started))
        accuracy = report.attributes["tone"].accuracy
        print(f"{count} rows: start {start:.2f} s ({wall:.2f} by the wall), {rates[-1]:.0f} rows a second, accuracy {accuracy:.3f}")
        assert start < 10
    assert rates[1] > 0.8 * rates[0]
