"""What benchmarks/step_time.py measures: the shapes of the published models, the operations of an update, bfloat16."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import devices  # noqa: E402
import step_time  # noqa: E402
from random_sd import SIZES, random_unet, random_vae  # noqa: E402

import report_tables  # noqa: E402


# diffusers' own counts of the published checkpoints; SDXL's less the two layers of what it is told of pooled text and picture sizes
SDXL_TOLD = (2816 * 1280 + 1280) + (1280 * 1280 + 1280)
PUBLISHED = {"sd15": 859_520_964, "sdxl": 2_567_463_684 - SDXL_TOLD}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where there is a GPU the trainer would take it; and what `worker` sets for a process of its own is set back."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    with torch.device("meta"):
        unet, vae = random_unet(SIZES[name]), random_vae(SIZES[name])
        x = torch.empty(1, 4, SIZES[name].side, SIZES[name].side)
        text = torch.empty(1, SIZES[name].text_length, SIZES[name].text_width)
        assert unet(x, 1, encoder_hidden_states=text).sample.shape == x.shape
        assert vae.decode(x[..., :8, :8]).sample.shape == (1, 3, 64, 64)
    assert sum(p.numel() for p in unet.parameters()) == PUBLISHED[name]
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


@pytest.mark.parametrize("size", [(2, 8, 256, 77, 4), (1, 2, 16, 16, 8)])
def test_attention_is_counted(size):
    """Two products of (queries x keys x width) forward; with the two computed again, five of that size backward, as torch counts it on a GPU."""
    batch, heads, queries, keys, width = size
    q = torch.randn(batch, heads, queries, width, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, width, requires_grad=True) for _ in range(2))
    one = 2 * batch * heads * queries * keys * width
    with devices.counter_of_flops() as forward:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with devices.counter_of_flops() as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * one and backward.get_total_flops() == 5 * one


@pytest.mark.parametrize(("name", "dtype"), [("tiny", "float32"), ("narrow sdxl", "bfloat16")])
@pytest.mark.usefixtures("fresh_accelerate")
def test_an_update_is_measured(name, dtype, monkeypatch):
    """Sampling's operations are those of its calls, and an update of ours has those and more."""
    narrow = {
        "widths": (32, 32, 64),
        "heads": (2, 2, 4),
        "groups": 16,
        "text_width": 32,
        "depths": (1, 2, 3),
        "vae_widths": (16, 32),
        "vae_groups": 8,
    }
    monkeypatch.setitem(SIZES, "narrow sdxl", replace(SIZES["sdxl"], side=8, **narrow))
    steps, size = 4, SIZES[name]
    sampling, default = (step_time.worker(row, name, steps, 1, "cpu", dtype) for row in ("sampling", "adjoint_matching (default)"))
    assert sampling["rows"] == 8 * steps and sampling["optimizer_steps"] == 0
    assert default["rows"] > sampling["rows"] and default["optimizer_steps"] == 1
    with torch.no_grad(), devices.counter_of_flops() as counter:
        x, text = torch.randn(8, 4, size.side, size.side), torch.randn(8, size.text_length, size.text_width)
        random_unet(size)(x, 1, encoder_hidden_states=text)
    # LoRA: merged once, or two small products beside each of these narrow projections
    least, most = steps * counter.get_total_flops() / 1e12, 1.02 if dtype == "float32" else 1.5
    assert least < sampling["tflop"] < most * least
    assert default["tflop"] > 1.2 * sampling["tflop"]
    assert sampling["seconds"] > 0 and default["seconds"] > 0


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_operations_counted_are_of_the_update_that_was_timed():
    """The official algorithm truncates at random: of 4 steps it differentiates another number in each update."""
    update, unet, _, generator = step_time.update_of("official", "tiny", 4, "unused")
    unet.conv_in.count = lambda given: None

    def operations():
        with devices.counter_of_flops() as counter:
            update()
        return counter.get_total_flops()

    states, found = [], []
    for _ in range(2):
        states.append(generator.get_state())
        found.append(operations())
    generator.set_state(states[0])
    assert len(set(found)) > 1 and operations() == found[0]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("row", ["direct_backprop, all steps", "control head, direct_backprop, all steps"])
def test_the_operations_of_a_trajectory_that_is_computed_again_are_counted(row):
    """Its gradients are taken in the leaves themselves, step by step; all steps cost the same."""
    found = []
    for steps in (3, 4):
        update, *_ = step_time.update_of(row, "tiny", steps, "unused")
        with devices.counter_of_flops() as counter:
            update()
        found.append(counter.get_total_flops())
    assert found[1] > 1.1 * found[0] > 0


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_official_algorithm_draws_its_noise_from_a_generator_of_its_own(monkeypatch):
    """On a GPU from one there; what is truncated is then all that the other one, on the CPU, decides."""
    loss, given, steps = step_time.official_loss, {}, 4

    def watched(*args, **named):
        given.update(args=args, **named)
        return loss(*args, **named)

    monkeypatch.setattr(step_time, "official_loss", watched)
    update, unet, _, generator = step_time.update_of("official", "tiny", steps, "unused")
    unet.conv_in.count = lambda rows: None
    update()
    assert given["noise"] is given["generator"] is generator  # on the CPU one is enough
    truncates, expected, noise = (torch.Generator().manual_seed(seed) for seed in (7, 7, 8))
    before = noise.get_state()
    loss(*given["args"], kl_weight=1.0, generator=truncates, noise=noise)
    for _ in range(steps):
        torch.randint(steps + 1, (1,), generator=expected)
    assert torch.equal(truncates.get_state(), expected.get_state()) and not torch.equal(noise.get_state(), before)


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step_time.main(["--device", "cuda"])
    assert "finds no GPU here" in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """As on a card that is too small for it: the others are run and kept, and the end says which one failed, and why."""
    run, output = step_time.subprocess.run, tmp_path / "found.json"

    def failing(command, **options):
        if "official" not in command:
            return run(command, **options)
        return step_time.subprocess.CompletedProcess(command, 1, "", "out of memory")

    monkeypatch.setattr(step_time.subprocess, "run", failing)
    only = ["--only", "official", "sampling", "--steps", "2", "--rounds", "2", "--repeats", "1", "--threads", "1"]
    with pytest.raises(SystemExit, match=r"official, 2 steps: out of memory\nFailed: official, 2 steps\."):
        step_time.main([*only, "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["name"] == "sampling" and len(row["rounds"]) == 2
    assert row["mib"] > 1  # of a process of its own: this one's memory is full of what other tests left


def test_the_table_of_a_gpu():
    """TFLOP/s of the median update over those of the matrix product; the card's name under the table; a compiled row has no operations."""
    one = {
        "first_seconds": 9.0,
        "seconds": 2.0,
        "cpu_seconds": 1.0,
        "mib": 100.0,
        "rows": 10.0,
        "optimizer_steps": 1.0,
        "tflop": 500.0,
    }
    bare = {key: value for key, value in one.items() if key != "tflop"} | {"seconds": 1.0}
    rows = step_time.summary({(20, "official"): [one], (20, "adjoint_matching (default), compiled"): [bare]}, 1000.0)
    assert rows[0]["tflops"] == 250 and rows[0]["over_matmul"] == 0.25 and rows[1]["time_over_official"] == 0.5
    record = {"size": "sd15", "device": "Some Card", "dtype": "bfloat16", "threads": 2, "repeats": 3, "matmul_tflops": 1000.0}
    table = report_tables._step_time({**record, "commit": "abcdef012", "rows": rows})
    assert "500.00 | 250.0 | 0.25 | 1 |" in table and "| – | – | – | 1 |" in table
    assert "Size sd15, Some Card, bfloat16" in table and "1000.0 TFLOP/s" in table
