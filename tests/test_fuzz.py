"""Adapters from a stranger: 11,000 spoilt files. Each loads or is refused by a ValueError that names the file, within bounds of time and
memory, and a pipeline that is told to load it is afterwards what it was.

Random but seeded: `python -m pytest tests/test_fuzz.py --fuzz-seed 7` tries others.
"""

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ctrl import CTRLPipeline
from diffusers_ctrl.adapters import load_adapter
from diffusers_ctrl.cards import card_text
from diffusers_ctrl.untrusted import MAX_JSON_DEPTH, read_json, read_tensors


LORA = "pytorch_lora_weights.safetensors"
ENCODER = "label_encoder/diffusion_pytorch_model.safetensors"
CLASSIFIER = "classifier/diffusion_pytorch_model.safetensors"
CASES = {
    "ctrl_config.json": 4500,
    "label_encoder/config.json": 1500,
    "classifier/config.json": 1500,
    LORA: 1500,
    ENCODER: 1000,
    CLASSIFIER: 1000,
}
SECONDS_A_CASE = 10  # of processor time: the machine may be busy with other things
MEMORY = 200 * 2**20

NASTY = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**31 - 1, 2**32, 2**63, -(2**63), 2**64, 10**30, 10**400, 10**9, 10**12, 100_000, 1_000_000),
    *(
        "",
        "x",
        "x" * 20_000,
        "../../etc/passwd",
        "/etc/passwd",
        "\x00",
        "\u202e\x1b[31mred",
        "\ud800",
        "a\nb",
        "nan",
        "1",
        "unet",
        "os.system",
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        [None],
        [0],
        [1, 2],
        [2, 1],
        [1.0, float("inf")],
        ["a", "b"],
        ["a", "a"],
        [[1], [2]],
        {"": None},
        {"a": {"b": []}},
    ),
    list(range(3000)),
    ["x" * 100] * 300,
    {"type": "categorical", "names": 5},
    {"type": "categorical", "names": {"a": 1, "b": 2}},
    {"type": "categorical", "names": [[], {}]},
    {"type": "continuous", "low": 10**400, "high": "z"},
    {"type": "continuous", "low": 0, "high": 1, "column": 0},
    {"__class__": "os.system", "__reduce__": ["id"]},
]


def places(value, path=()):
    """Paths of all values inside a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:20]):
            yield from places(item, (*path, index))


def spoil_value(rng, data):
    """Replaces, removes, adds, renames or wraps one value somewhere."""
    data = copy.deepcopy(data)
    path = rng.choice([path for path in places(data) if path])
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, action = path[-1], rng.random()
    if action < 0.6:
        parent[key] = copy.deepcopy(rng.choice(NASTY))
    elif action < 0.7:
        del parent[key]
    elif action < 0.8 and isinstance(parent, dict):
        parent[rng.choice(["extra", "_private", "", "__class__", "members", "widths", "embedding_dim", "image_size"])] = rng.choice(
            NASTY
        )
    elif action < 0.85 and type(parent[key]) in (int, float) and abs(parent[key]) < 1e300:
        parent[key] = rng.choice([-parent[key], parent[key] * 10**6, parent[key] + 1, str(parent[key]), parent[key] + 0.5])
    elif action < 0.9:
        depth = rng.choice([2, MAX_JSON_DEPTH + 1, 80])
        for _ in range(depth):
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
    elif isinstance(parent, dict):
        parent[f"{key}{rng.choice('xX_. ')}"] = parent.pop(key)
    return data


def spoil_bytes(rng, data):
    """Cuts, lengthens, flips, doubles or overwrites bytes."""
    data, at = bytearray(data), rng.randrange(len(data))
    action = rng.randrange(7)
    if action == 0:
        return bytes(data[:at])
    if action == 1:
        return bytes(data) + rng.randbytes(rng.choice([1, 8, 5000]))
    if action == 2:
        data[at] ^= 1 << rng.randrange(8)
    elif action == 3:
        data[at : at + rng.choice([1, 4, 8])] = rng.randbytes(rng.choice([0, 1, 4, 8]))
    elif action == 4:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100]))
    elif action == 5:
        data[at:at] = data[at : at + rng.choice([1, 10, 100])]
    else:
        data[at:at] = rng.choice(
            [b"[", b"{", b'"', b"\\", b"1e999", b"9" * 5000, b"[" * 100_000, b"\xff\xfe", b"NaN", b"-Infinity"]
        )
    return bytes(data)


def spoil_json(rng, data):
    if rng.random() < 0.25:
        return spoil_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        value = spoil_value(rng, value) or value
    return json.dumps(value).encode("utf-8", "surrogatepass")


def spoil_tensors(rng, data):
    """The header's length, its JSON, one tensor's type, shape or place, or bytes anywhere."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    action = rng.random()
    if action < 0.2:
        return spoil_bytes(rng, data)
    if action < 0.3:
        return (
            struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data), 100_000_000]))
            + data[8:]
        )
    if action < 0.45:
        body = bytearray(body)
        for _ in range(rng.choice([1, 10])):
            at = rng.randrange(len(body) - 4)
            body[at : at + 4] = rng.choice([b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", struct.pack("<f", 1e30), rng.randbytes(4)])
    elif action < 0.55:
        header = spoil_value(rng, header) or header
    else:
        key = rng.choice([key for key in header if key != "__metadata__"])
        entry, what = header[key], rng.randrange(7)
        if what == 0:
            entry["dtype"] = rng.choice(
                ["F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "Q9", "", None, 5, ["F32"]]
            )
        elif what == 1:
            wrong = [[10**12, 0], [0], [2**62, 2], [-1, -1], [], [1.5], ["3"], None, "3", [True], [10**9, 10**9], [1] * 50, [2**63]]
            entry["shape"] = rng.choice([*wrong, entry["shape"][::-1], [*entry["shape"], 1]])
        elif what == 2:
            entry["data_offsets"] = rng.choice(
                [
                    [0, 2**63],
                    [-1, 3],
                    [5],
                    [],
                    None,
                    [3, 1],
                    [0, 0],
                    [0.0, 4.0],
                    "ab",
                    [len(body), len(body) + 4],
                    entry["data_offsets"][::-1],
                ]
            )
        elif what == 3:  # a whole other side at the same number of bytes: rank 1,000,000 of nothing
            n = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["shape"] = rng.choice([[n // 4, 1], [1, n // 4], [n // 4], [1, 1, n // 4], [n // 8, 2]])
        elif what == 4:
            header[rng.choice(["", "x", key + "x", key.replace("lora_A", "lora_B"), "unet." * 50, "../" + key, "\x1b[2J"])] = (
                header.pop(key)
            )
        elif what == 5:
            header["__metadata__"] = rng.choice(NASTY)
        else:
            entry["data_offsets"] = header[rng.choice([k for k in header if k != "__metadata__"])]["data_offsets"]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(body)


def fingerprint(pipe):
    digest = hashlib.sha256()
    for name, module in pipe.unet.named_modules():
        digest.update(f"{name} {type(module).__name__} {[h for h in getattr(module, '_forward_hooks', {})]}".encode())
    for name, tensor in [*pipe.unet.named_parameters(), *pipe.unet.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tensor.requires_grad}".encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest(), pipe.label_space


@contextmanager
def bounds():
    """No more than MEMORY beyond what the process has: an attempt fails at once, and its message says so. Yields how to time a case."""

    def late(*_):
        raise TimeoutError(f"a case took more than {SECONDS_A_CASE} s of processor time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if os.path.exists("/proc/self/statm"):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    before = signal.signal(signal.SIGPROF, late)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_PROF, SECONDS_A_CASE)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def pipe(sd_folder):
    pipe = CTRLPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_spoilt_files(name, share, sd_adapter, pipe, tmp_path, fuzz_seed):
    cases = round(share * CASES[name])
    folder = shutil.copytree(sd_adapter, tmp_path / "adapter")
    good = (folder / name).read_bytes()
    spoil = spoil_json if name.endswith(".json") else spoil_tensors
    rng, outcomes, escaped = random.Random(f"{name} {fuzz_seed}"), Counter(), []
    before = fingerprint(pipe)
    with bounds() as start:
        for case in range(cases):
            bad = spoil(rng, good)
            (folder / name).write_bytes(bad)
            start()
            in_pipeline = False
            try:
                adapter = load_adapter(folder)
                outcomes["loaded"] += 1
                if name == "ctrl_config.json":
                    card_text(adapter.config)  # whoever pushes it again writes a card of it
                in_pipeline = outcomes["loaded"] % 12 == 1
                if in_pipeline:
                    pipe.load_ctrl_adapter(adapter)
                    outcomes["in the pipeline"] += 1
                    pipe.unload_ctrl_adapter()
            except ValueError as error:
                outcomes["refused"] += 1
                # what only the pipeline can see has no file, but the name of what does not fit
                named = in_pipeline or str(folder) in str(error)
                if not named or len(str(error)) > 3000 or "allocate" in str(error):
                    escaped.append((case, bad[:300], str(error)[:300]))
            except BaseException as error:  # whatever else it is, is what is looked for
                escaped.append((case, bad[:300], repr(error)[:300]))
            if in_pipeline:
                assert fingerprint(pipe) == before, (case, bad[:300])
    print(name, dict(outcomes))
    assert not escaped, escaped[:3]
    assert outcomes["refused"] > cases // 5 and sum(outcomes[k] for k in ("refused", "loaded")) >= cases
    (folder / name).write_bytes(good)
    load_adapter(folder)


# -- the worst of them one by one --


def write_tensors(path, header, body=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(shape, first=0, last=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": entry([10**12, 0])}, b"", "impossible shape"),
        ({"a": entry([2**62, 4], 0, 0)}, b"", "impossible shape"),
        ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24), "overlap"),
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16), "overlap"),
        ({"a": entry([4], 8, 24)}, bytes(24), "gaps"),
        ({"a": entry([4], 0, 16)}, bytes(20), "need 16 bytes, and it has 20"),
        ({"a": entry([4], 0, 16)}, bytes(12), "truncated"),
        ({"a": entry([4], 0, 8)}, bytes(8), "has 8 bytes for the shape"),
        ({"a": entry([8], 0, 8, "F8_E4M3")}, bytes(8), "floating point: its type is 'F8_E4M3'"),
        ({"a": entry([2], 0, 16, "F64")}, struct.pack("<2d", 1e300, 1.0), "not finite"),
        ({"a": entry([2], 0, 8)}, struct.pack("<2f", float("nan"), 1.0), "not finite"),
        ({"a": entry([2], 0, 8) | {"more": 1}}, bytes(8), "malformed"),
        ([1], b"", "no JSON object"),
    ],
)
def test_headers(tmp_path, header, body, message):
    path = write_tensors(tmp_path / "x.safetensors", header, body)
    with pytest.raises(ValueError, match=message) as error:
        read_tensors(path)
    assert str(path) in str(error.value)


def test_good_tensors_are_read_in_every_known_type(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensors = {"a": torch.randn(3, 4).to(dtype), "b": torch.randn(5).to(dtype), "c": torch.tensor(2.0).to(dtype)}
        save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
        read = read_tensors(tmp_path / "x.safetensors")
        assert all(torch.equal(read[key], value.float()) for key, value in tensors.items()) and set(read) == set(tensors)


def edit(folder, name, **changes):
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(data | changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("label_encoder/config.json", {"embedding_dim": 10**12}),
        ("classifier/config.json", {"members": 10**9}),
        ("classifier/config.json", {"widths": [10**6, 10**6]}),
        ("classifier/config.json", {"widths": [8] * 10_000}),
        ("classifier/config.json", {"in_channels": 10**9}),
        ("classifier/config.json", {"image_size": 10**6}),
        ("classifier/config.json", {"temperatures": [0.0]}),
        ("classifier/config.json", {"temperatures": ["hot"]}),
        ("classifier/config.json", {"temperatures": [1.0, 1.0]}),
    ],
)
def test_configs_that_would_allocate_gigabytes_or_divide_by_zero(sd_adapter, tmp_path, name, changes):
    folder = shutil.copytree(sd_adapter, tmp_path / "adapter")
    edit(folder, name, **changes)
    with bounds() as start:
        start()
        with pytest.raises(ValueError, match=name.split("/")[0]) as error:
            load_adapter(folder)
    assert "allocate" not in str(error.value)


def test_a_lora_of_a_million_ranks_is_refused_before_it_is_built(sd_adapter, pipe, tmp_path):
    """4 MB in the file, but a million ranks of a layer 16 wide would be 64 MB, and of a real one gigabytes."""
    folder, rank = shutil.copytree(sd_adapter, tmp_path / "adapter"), 1_000_000
    lora = read_tensors(folder / LORA)
    layer = next(key for key in lora if key.endswith("lora_A.weight"))
    pair = {layer: torch.zeros(rank, 1), layer.replace("lora_A", "lora_B"): torch.zeros(1, rank)}
    save_file(lora | pair, folder / LORA)
    before = fingerprint(pipe)
    with bounds() as start:
        start()
        with pytest.raises(ValueError, match="does not fit"):
            pipe.load_ctrl_adapter(folder)
    assert fingerprint(pipe) == before


@pytest.mark.parametrize(
    "sampler",
    [
        {"options": {"height": 1_000_000}},
        {"options": {"output_type": "latent"}},
        {"options": {"eta": "1.0"}},
        {"options": {"eta": float("nan")}},
        {"num_inference_steps": 10**9},
        {"scheduler_config": {"num_train_timesteps": 10**12}},
        {"guidance_scale": float("inf")},
    ],
)
def test_a_stranger_does_not_choose_the_calls_arguments(sd_adapter, tmp_path, sampler):
    folder = shutil.copytree(sd_adapter, tmp_path / "adapter")
    edit(folder, "ctrl_config.json", sampler=json.loads((folder / "ctrl_config.json").read_text())["sampler"] | sampler)
    with pytest.raises(ValueError, match="ctrl_config.json: .*sampler"):
        load_adapter(folder)


@pytest.mark.parametrize("name", CASES)
def test_links_out_of_the_folder(sd_adapter, tmp_path, name):
    folder = shutil.copytree(sd_adapter, tmp_path / "adapter")
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the adapter's folder"):
        load_adapter(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=Path(name).name):
        load_adapter(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    with pytest.raises(ValueError, match=Path(name).name):
        load_adapter(folder)


def test_links_inside_the_folder_are_read(sd_adapter, tmp_path):
    folder = shutil.copytree(sd_adapter, tmp_path / "adapter")
    (folder / LORA).rename(folder / "real.safetensors")
    (folder / LORA).symlink_to("real.safetensors")
    load_adapter(folder)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    load_adapter(tmp_path / "link")


def test_json_bounds(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    for text in (
        '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"a": ' + "9" * 5_000 + "}",
        '{"a": ' + "[" * 60 + "]" * 60 + "}",
        "{" * 10,
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="x.json is not valid JSON"):
            read_json(path)
    path.write_text(json.dumps({"a": "b" * 100}))
    assert read_json(path) == {"a": "b" * 100}
    monkeypatch.setattr("diffusers_ctrl.untrusted.MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match="x.json has 109 bytes"):
        read_json(path)
