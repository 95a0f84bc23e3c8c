"""benchmarks/peers.py and report.py: the price of a step, how a weight is chosen, one JSON a method, and pages that are what their results say."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.distributions import Normal, kl_divergence
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gap_spread
from baselines import dps, mpgd
from baselines.base import open_base
from exact_reference import JUDGED, VALIDATION, Reference, distance, histogram, noise_seed, to_cells

import peer_methods
import peer_rows
import peers
import report_format
import report_peers
from diffusers_ctrl.adapters import load_adapter, resolve_folder, save_adapter
from diffusers_ctrl.rollouts import both_transitions, rollout, tuned_transition
from digits_data import PROMPTS
from problems import tiny_environment, tiny_policy


SPEC = importlib.util.spec_from_file_location("benchmarks_report", Path(peers.__file__).with_name("report.py"))
report = importlib.util.module_from_spec(SPEC)  # training/ has a report.py too
SPEC.loader.exec_module(report)


@pytest.fixture(scope="module")
def base():
    return open_base(DiffusionPipeline.from_pretrained(resolve_folder("digits-base")), list(PROMPTS), 4)


def test_the_price_of_a_step_is_its_kl_to_the_bases(base):
    generator, prompts = torch.Generator().manual_seed(0), torch.arange(3)
    x = base.start(3, generator)
    with torch.no_grad():
        own = base.step(x, base.clean(x, 1, prompts), 1)
    mean = own.mean + 0.1 * torch.randn(x.shape, generator=generator)
    expected = kl_divergence(Normal(mean, own.std), Normal(own.mean, own.std)).flatten(1).sum(dim=1)
    before = base.calls.copy()
    with base.pricing(3):
        base.price(mean, x, 1, prompts)
        torch.testing.assert_close(base.kl, expected, rtol=1e-4, atol=1e-4)
        base.price(own.mean, x, 1, prompts)
        torch.testing.assert_close(base.kl, expected, rtol=1e-4, atol=1e-4)
    assert base.kl is None and base.calls == before


def test_only_laws_that_the_base_covers_have_a_finite_price(base):
    """DPS moves noisy steps only; MPGD also the last one, which has no noise."""
    classifier = load_adapter(resolve_folder("digits-stroke")).classifier.eval().requires_grad_(False)
    for module, weight, finite in ((dps, 0.5, True), (mpgd, 0.02, False)):
        with base.pricing(2):
            module.sample(
                base, classifier.log_prob, torch.tensor([2.0]), torch.arange(2), torch.Generator().manual_seed(0), weight=weight
            )
            assert (base.kl > 0).all() and base.kl.isfinite().all() == finite


def test_cells_of_two_attributes():
    edges = (torch.tensor([0.0]), torch.tensor([0.0, 1.0]))
    cells = to_cells(torch.tensor([0, 2]), [torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 2.0])], edges)
    assert cells.tolist() == [1, 2 * 6 + 1 * 3 + 2]
    p = histogram(cells, torch.tensor([1.0, 3.0], dtype=torch.float64), 60)
    assert p[1] == 0.25 and distance(p, p) == 0 and distance(p, p.roll(1)) == 1


def test_few_pictures_behind_many_draws():
    """Equal weights, and one picture that has all."""
    weights = torch.zeros(12, 1, dtype=torch.float64)
    weights[0] = 50.0
    law = Reference(torch.zeros(12, 1, 1, 1), 2, torch.zeros(12), torch.zeros(12, 1), weights, (), (), 0.0)
    torch.testing.assert_close(law.effective_sizes(0), torch.tensor([1.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(law.effective_sizes(0, gamma=0.0), torch.tensor([6.0, 6.0], dtype=torch.float64))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    only = ["--smoke", "--settings", "stroke", "--seeds", "0", "--runs", str(folder / "runs"), "--results", str(folder / "results")]
    peers.main([*only, "--only", "base", "CTRL"])
    return folder, only


def test_one_json_a_method_and_none_twice(smoke):
    folder, only = smoke
    paths = sorted((folder / "results" / "stroke-seed0").glob("*.json"))
    assert [path.name for path in paths] == ["CTRL.json", "base.json"]
    times = [path.stat().st_mtime_ns for path in paths]
    peers.main([*only, "--only", "base", "CTRL"])
    assert [path.stat().st_mtime_ns for path in paths] == times
    for path in paths:
        record = json.loads(path.read_text())
        (row,) = record["rows"]
        assert record["method"] == path.stem and record["labels"] == 3
        assert row["tuned_for"] == {"base": ["accuracy", "distance"], "CTRL": ["accuracy", "distance", "plain"]}[path.stem]
        assert row["worst_label"] == min(row["by_label"]) and len(row["by_label"]) == 3
        assert row["accuracy"] == pytest.approx(sum(row["by_label"]) / 3) and row["forward_calls"] == 4
        assert row["kl"] >= 0 and row["gap"] > -3 * row["gap_se"]
    assert json.loads(paths[1].read_text())["rows"][0]["kl"] == 0


def test_no_adapter_is_trained_for_methods_that_need_none(tmp_path):
    """The classifier alone is fitted, once."""
    only = ["--smoke", "--settings", "slant", "--seeds", "0", "--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    peers.main([*only, "--only", "base"])
    kept = tmp_path / "slant-0" / "classifier" / "calibration.json"
    written = kept.stat().st_mtime_ns
    peers.main([*only, "--only", "exact draws"])
    assert kept.stat().st_mtime_ns == written and not (tmp_path / "slant-0" / peers.CONFIG_NAME).exists()
    assert len(list((tmp_path / "results" / "slant-seed0").glob("*.json"))) == 2
    (row,) = json.loads((tmp_path / "results" / "slant-seed0" / "exact-draws.json").read_text())["rows"]
    assert row["tv_floor"] > 0 and row["mmd2_floor_sd"] > 0 and 1 <= row["smallest_ess"] <= 30  # of 300 base samples, ten prompts


class Made:
    smoke, labels, reference, classifier = False, torch.tensor([[0.0], [1.0], [2.0]]), None, None


@pytest.fixture
def found(monkeypatch):
    """{weight: distance, right of 30 images of each label}, made up, and of which weights validation images were drawn."""
    table, drawn = {1.0: (0.2, (24, 24, 24)), 2.0: (0.3, (27, 27, 27)), 3.0: (0.4, (21, 21, 21))}, []

    def draw_all(s, draw, per_label, use):
        assert use == VALIDATION
        drawn.append(draw)
        return [torch.tensor([[draw, label]]).expand(30, 2) for label in range(3)]

    def of_each(images, rows, classifier):
        """The scores of the labels: its own is the best in as many images as the table says, in the others the next one."""
        weight, label = images[0].tolist()
        right = torch.arange(30) < table[weight][1][int(label)]
        return torch.eye(3)[torch.where(right, int(label), (int(label) + 1) % 3)]

    monkeypatch.setattr(peer_rows, "draw_all", draw_all)
    monkeypatch.setattr(peer_rows, "distance_to_law", lambda reference, images: table[images[0][0, 0].item()][0])
    monkeypatch.setattr(peer_rows, "of_each", of_each)
    monkeypatch.setattr(peer_rows, "judged_row", lambda s, name, weight, draw, outputs: {"judged": draw})
    return table, drawn


def test_the_weight_is_tuned_for_each_aim_by_its_own_figure(found):
    """The nearest, the most accurate, and the value of 1."""
    table, _ = found
    weights, bar = (1.0, 2.0, 3.0), tqdm(disable=True)
    best, tried, _ = peer_rows.tuned(Made(), peer_methods.Method(weights, lambda s, fitted, weight: weight), 4, bar)
    assert [one["weight"] for one in tried] == list(weights) and [one["classifier_accuracy"] for one in tried] == [0.8, 0.9, 0.7]
    assert [one["tv"] for one in tried] == [0.2, 0.3, 0.4]
    assert best == {"distance": tried[0], "accuracy": tried[1]}
    table[2.0], plain = (0.1, (28, 24, 21)), peer_methods.Method(weights, lambda s, fitted, weight: weight, plain=True)
    best, tried, _ = peer_rows.tuned(Made(), plain, 4, bar)
    assert best == {"plain": tried[0], "distance": tried[1], "accuracy": tried[1]}
    table[3.0] = (
        0.5,
        (27, 23, 23),
    )  # as accurate as a smaller one, which stays: a mean of the labels' means would be larger by rounding
    best, tried, _ = peer_rows.tuned(Made(), plain, 4, bar)
    assert best["accuracy"] is tried[1]


@pytest.mark.parametrize("fitted", [False, True])
def test_more_weights_are_tried_beside_those_of_a_result(fitted, found, monkeypatch):
    """What was drawn stays, row by row and with its commit; of a method that is fitted first nothing does."""
    table, drawn = found
    method = peer_methods.Method(
        (1.0, 2.0), lambda s, fitted, weight: weight, fit=(lambda s: "made") if fitted else None, plain=True
    )
    monkeypatch.setitem(peer_methods.METHODS, "m", method)
    run = lambda earlier: peer_rows.rows_of(Made(), "m", 8, 4, tqdm(disable=True), earlier)  # noqa: E731
    old = [{"commit": "before", **row} for row in run(None)]
    assert [(row["weight"], row["tuned_for"], row["judged"]) for row in old] == [
        (1.0, ["distance", "plain"], 1.0),
        (2.0, ["accuracy"], 2.0),
    ]
    drawn.clear()
    table[3.0] = (0.4, (30, 30, 30))
    monkeypatch.setitem(peer_methods.METHODS, "m", replace(method, weights=(1.0, 2.0, 3.0)))
    assert not peers.has_tried(old, "m")
    rows = run(old)
    assert peers.has_tried(rows, "m") and [one["weight"] for one in rows[0]["tried"]] == [1.0, 2.0, 3.0]
    assert [(row["weight"], row["tuned_for"], row["judged"]) for row in rows] == [
        (1.0, ["distance", "plain"], 1.0),
        (3.0, ["accuracy"], 3.0),
    ]
    assert [row.get("commit") for row in rows] == [None if fitted else "before", None]
    assert drawn == ([1.0, 2.0, 3.0] if fitted else [3.0])


@pytest.mark.parametrize("open_ended", [False, True])
def test_weights_go_on_while_the_last_is_the_best(open_ended, found):
    """By the ratio of the last two, so that no method's best is one that only its list has made the last."""
    table, _ = found
    distances = {1.0: 0.2, 2.0: 0.3, 4.0: 0.5, 8.0: 0.6, 16.0: 0.7, 32.0: 0.1}
    table |= {weight: (tv, (min(20 + i, 23),) * 3) for i, (weight, tv) in enumerate(distances.items())}
    method = peer_methods.Method((1.0, 2.0), lambda s, fitted, weight: weight, open_ended=open_ended)
    best, tried, _ = peer_rows.tuned(Made(), method, 4, tqdm(disable=True))
    assert [one["weight"] for one in tried] == ([1.0, 2.0, 4.0, 8.0, 16.0] if open_ended else [1.0, 2.0])
    assert best["accuracy"]["weight"] == (8.0 if open_ended else 2.0) and best["distance"]["weight"] == 1.0
    for figures, after in (
        ((0.3, 0.9), 18),
        ((0.1, 0.5), 18),
        ((0.2, 0.8), None),
        ((0.2, 1.0), None),
    ):  # the last: it has no better
        last = dict(zip(("tv", "classifier_accuracy"), figures, strict=True))
        tried = [{"weight": 8, "tv": 0.2, "classifier_accuracy": 0.8}, {"weight": 12, **last}]
        assert replace(method, weights=(8, 12)).next_weight(tried) == (after if open_ended else None)


FLAT = {"tv": 0.2, "classifier_accuracy": 0.5}  # wherever it is measured


def test_results_of_other_noise_or_without_a_plain_row_are_run_again(tmp_path):
    assert all(1 in method.weights for method in peer_methods.METHODS.values() if method.plain)
    weights, noise = peer_methods.METHODS["DPS"].weights, noise_seed(1, JUDGED)
    for name, aims, weight, drawn, kept, done in (
        ("new", ["plain", "distance"], 1, noise, True, True),
        ("old", ["distance"], 1, noise, True, False),
        ("other", ["plain"], 2, noise, True, False),
        ("of seed 0", ["plain"], 1, noise_seed(0, JUDGED), False, False),
    ):
        row = {"tuned_for": aims, "tried": [{"weight": one * weight, **FLAT} for one in weights]}
        counts, of = {"outputs": 60, "validation": 20, "base_samples": 300}, dict.fromkeys(peers.OF_A_RUN, "then")
        about = {"seed": 1, "noise_seed": drawn, **counts, **of}
        (tmp_path / name).write_text(json.dumps({**about, "rows": [row]}))
        rows = peers.earlier_rows(tmp_path / name, 1, counts)
        assert rows == ([{**row, **of}] if kept else []) and peers.has_tried(rows, "DPS") == done
        assert all(not peers.earlier_rows(tmp_path / name, 1, {**counts, key: 400}) for key in counts)
    assert peers.earlier_rows(tmp_path / "none", 1, counts) == [] and not peers.has_tried([], "DPS")
    for name, done in (("best of n", True), ("MPGD", False)):  # one whose largest is its price, and one that goes on
        weights = peer_methods.METHODS[name].weights
        row = {"tuned_for": ["accuracy"], "tried": [{"weight": one, **FLAT} for one in weights]}
        assert peers.has_tried([row], name)
        more = {**row, "tried": [*row["tried"], {"weight": float(f"{2 * weights[-1]:.2g}"), **FLAT}]}
        assert not peers.has_tried([more], name)  # more than is tried: after a tie that was none then
        row["tried"][-1]["tv"] = 0.1
        assert peers.has_tried([row], name) == done and peers.has_tried([more], name) != done


def test_each_seed_and_use_has_noise_of_its_own(base):
    """Methods of one seed share it, which makes them comparable; seeds do not, which is what makes three of them surer than one."""
    drawn = []
    for seed, use in product((0, 1), (VALIDATION, JUDGED)):
        setting = SimpleNamespace(seed=seed, base=base, labels=torch.zeros(2, 1))
        one, other = (peer_rows.draw_all(setting, lambda y, prompts, g: base.draw(prompts, g), 3, use) for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        drawn += [torch.cat(one)]
    pictures = torch.cat(drawn).flatten(1)
    assert torch.pdist(pictures).min() > 0.1 and len(pictures) == 4 * 6


# -- report --


def test_a_distance_has_the_error_of_exact_draws():
    rows = [{"tv": 0.2, "accuracy": 0.9, "accuracy_se": 0.02}, {"tv": 0.22, "accuracy": 0.9, "accuracy_se": 0.02}]
    found = [{"method": "exact draws", "rows": [{"tv_floor_sd": 0.016, "mmd2_floor_sd": 1e-3}]}, {"method": "m", "rows": rows}]
    assert report_peers.with_errors(rows, "tv", 3, found) == "0.210 ± 0.011"  # 0.016 / √2
    assert report_peers.with_errors(rows, "accuracy", 3, found) == "0.900 ± 0.014"  # 0.02 / √2
    assert report_peers.with_errors(rows, "gap", 2, found) == report_peers.with_errors([], "tv", 3, found) == "–"


def test_the_pages_are_what_their_results_say():
    report.main(["--check"])


def test_sections_are_rendered_between_their_marks(monkeypatch):
    monkeypatch.setitem(report.SECTIONS, "step-time", lambda: "made anew")
    page = "a\n<!-- step-time -->\nold\n<!-- /step-time -->\nb\n<!-- not-ours -->\nkept\n<!-- /not-ours -->\n"
    once = report.rendered(page)
    assert once == page.replace("old", "made anew") == report.rendered(once)


def test_seeds_are_put_together():
    def one(seed, rows):
        return {"method": "m", "seed": seed, "rows": rows}

    near, sharp = {"tuned_for": ["distance"], "weight": 1}, {"tuned_for": ["accuracy"], "weight": 4}
    both = {"tuned_for": ["distance", "accuracy"], "weight": 2}
    plain = {"tuned_for": ["plain", "distance"], "weight": 1}
    assert report_peers.method_rows([one(0, [near, sharp]), one(1, [both])], "m") == [
        ("distance", [near, both]),
        ("accuracy", [sharp, both]),
    ]
    assert report_peers.method_rows([one(0, [both])], "m") == [("", [both])]
    assert report_peers.method_rows([one(0, [plain, sharp])], "m") == [("plain, distance", [plain]), ("accuracy", [sharp])]
    # a row that only some seeds have is none of the table's
    assert report_peers.method_rows([one(0, [plain, sharp]), one(1, [both])], "m") == [
        ("distance", [plain, both]),
        ("accuracy", [sharp, both]),
    ]
    assert report_format.spread([1.0, 3.0], 1) == "2.0 ± 1.0" and report_format.spread([1.0], 1, [0.25]) == "1.0 ± 0.2"
    assert report_format.spread([1.0, 1.0], 2, [0.3, 0.4]) == "1.00 ± 0.25" and report_format.spread([1.0], 1) == "1.0"
    assert report_format.spread([1.0, 3.0], 1, [0.1, None]) == "2.0 ± 1.0"
    assert report_format.mean_and_error([1.0, 3.0], [0.1, 0.1]) == (2.0, 1.0) and report_format.mean_and_error([1.0]) == (1.0, None)
    assert report_format.span([1, 2.5]) == "1–2.5" and report_format.span([2]) == "2"


def test_what_a_larger_value_could_make_better():
    """The last value tried is marked, unless all that it is for is perfect."""
    tried = [{"weight": 1, "classifier_accuracy": 0.5}, {"weight": 2, "classifier_accuracy": 1.0}]
    for aims, weight, accuracy, marked in (
        (["accuracy"], 2, 0.9, True),
        (["accuracy"], 2, 1.0, False),
        (["accuracy", "distance"], 2, 1.0, True),
        (["plain"], 2, 0.9, False),
        (["accuracy"], 1, 0.9, False),
    ):
        tried[-1]["classifier_accuracy"] = accuracy
        assert report_peers.at_the_edge({"tuned_for": aims, "weight": weight, "tried": tried}) == marked
    assert not report_peers.at_the_edge({"tuned_for": ["accuracy"], "weight": 1, "tried": tried[:1]})


@pytest.mark.parametrize("rank", [0, 2])
def test_strength_beyond_the_range(rank):
    """At one state the control is multiplied, and its KL by the square; a head alone needs the base's call only."""
    policy, environment = tiny_policy(perturb=0.3, control_head=16, lora_rank=rank), tiny_environment()
    batch = environment.draw(5, torch.Generator().manual_seed(0))
    stronger, calls = peer_methods.Strengthened(policy, 1.5), []
    with torch.no_grad():
        tuned, base = both_transitions(policy, environment.sampler, batch, 1, batch.noise)
        hook = policy.denoiser.register_forward_hook(lambda *_: calls.append(1))
        more, same = both_transitions(stronger, environment.sampler, batch, 1, batch.noise)
        hook.remove()
        alone = tuned_transition(stronger, environment.sampler, batch, 1, batch.noise)
        found = rollout(stronger, environment.sampler, batch, torch.Generator().manual_seed(1))
    torch.testing.assert_close(same.mean, base.mean, rtol=0, atol=0)
    torch.testing.assert_close(more.mean - base.mean, 1.5 * (tuned.mean - base.mean))
    torch.testing.assert_close(alone.mean, more.mean)
    torch.testing.assert_close(more.kl(base), 2.25 * tuned.kl(base))
    assert len(calls) == (1 if rank == 0 else 2) and (found.kl > 0).all()


def test_a_spread_and_what_was_claimed():
    found = gap_spread.spread_of([1.0, 2.0, 3.0], [0.3, 0.4, 0.0])
    assert found["spread"] == 1.0 and found["mean"] == 2.0 and found["mean_se"] == pytest.approx(3**-0.5)
    assert found["claimed"] == pytest.approx((0.25 / 3) ** 0.5) and found["ratio"] == pytest.approx(12**0.5)


def test_an_adapter_of_other_settings_is_not_taken(smoke, tmp_path):
    """A toy one among those of the table, whose steps and seed are others."""
    folder, _ = smoke
    shutil.copytree(folder / "runs" / "stroke-0", tmp_path / "stroke-1")
    with pytest.raises(SystemExit, match="stroke-1 was trained with another num_inference_steps, seed: delete it"):
        peers.trained("stroke", 1, "recipe", tmp_path, smoke=False)


def test_all_adapters_of_a_setting_are_trained_with_its_classifier(smoke, tmp_path):
    """As it was written, seconds and all: a fit of its own might differ by more than is allowed, after all the training."""
    folder, _ = smoke
    shutil.copytree(folder / "runs" / "stroke-0" / "classifier", tmp_path / "stroke-0" / "classifier")
    found = peers.trained("stroke", 0, "head", tmp_path, smoke=True)
    written = [(tmp_path / name / "classifier" / "calibration.json").read_bytes() for name in ("stroke-0", "stroke-0-head")]
    assert written[0] == written[1]
    assert found.adapter.config.metrics["seconds_classifier"] == json.loads(written[0])["seconds"]
    (tmp_path / "stroke-0").rename(tmp_path / "gone")
    peers.copy_classifier(tmp_path / "stroke-0-head", tmp_path / "stroke-0")  # as `open_setting` does where a variant is alone
    assert (tmp_path / "stroke-0" / "classifier" / "calibration.json").read_bytes() == written[0]


def test_adapters_of_other_classifiers_are_not_compared(smoke, tmp_path):
    """Every method is given one classifier: a variant that was trained with another is found, whether its method is asked for or not."""
    folder, _ = smoke
    shutil.copytree(folder / "runs" / "stroke-0", tmp_path / "stroke-0")
    other = load_adapter(tmp_path / "stroke-0")
    for parameter in other.classifier.parameters():
        parameter.data *= 1.5
    save_adapter(tmp_path / "stroke-0-longer", other)
    with pytest.raises(SystemExit, match="stroke-0-longer has another classifier than .*stroke-0: delete one"):
        peers.open_setting("stroke", 0, tmp_path, 300, smoke=True)


def test_results_of_another_classifier_are_found(tmp_path):
    record = {"base_samples": 300, "log_partition": -1.25, "rows": [{"log_partition": -1.2497}, {}]}
    (tmp_path / "DPS.json").write_text(json.dumps(record))
    peers.check_partition(tmp_path, -1.2504, 300)
    peers.check_partition(tmp_path, -1.3, 400)
    with pytest.raises(
        SystemExit, match="DPS.json is of another classifier: its log Z is -1.2500, and that of the one at hand -1.3000"
    ):
        peers.check_partition(tmp_path, -1.3, 300)
