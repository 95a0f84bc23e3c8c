"""The learning experiments of benchmarks/ at toy size: what they compare with, what they change, and that they go on where they stopped."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablations
import experiment
import sample_efficiency
import time_to_gap
from digits_runs import (
    Labels,
    Price,
    base_samples,
    cached_classifier,
    config_of,
    corrupt,
    fit_to_seconds,
    make_trainer,
    train,
)
from exact_reference import of_exact_draws
from official import official_objective

from diffusers_ctrl.objectives import OBJECTIVES
from digits_data import digit_oracle, stroke_oracle
from jackknife import jackknife


SMOKE = {name: experiment.read(experiment.EXPERIMENTS / f"{name}.yaml", smoke=True) for name in ("ablations", "sample_efficiency")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Classifiers and base samples of all tests here."""
    return tmp_path_factory.mktemp("cache")


def trainer_of(folder: Path, **settings):
    spec = SMOKE["ablations"]
    classifier, _ = cached_classifier(spec["base"], Labels("stroke", spec["num_labels"], 0), folder, spec["epochs"])
    return make_trainer(spec["base"], classifier, config_of(spec["common"], settings, 0, folder / "run"))


def test_values_go_on_while_the_last_is_the_best_of_all(folder):
    """A draw that comes nearer to the truth with its weight, up to 16 of it, and one with other updates that never does."""
    spec, count = SMOKE["sample_efficiency"], 300
    reference = sample_efficiency.truth(spec["base"], 4, "stroke", count, folder / "pool.pt")
    classifier, _ = cached_classifier(spec["base"], Labels("stroke", 50, 0), folder, spec["epochs"])
    asked = []

    def draw(value: tuple[int, float], per_label: int, seed: int) -> list[torch.Tensor]:
        asked.append(value)
        generator, (updates, weight) = torch.Generator().manual_seed(seed), value
        rows = [reference.in_turn(label, per_label, generator) for label in range(3)]
        exact = round(per_label * min(1.0, weight / 16)) if updates == 800 else 0
        return [reference.images[torch.cat([own[:exact], torch.arange(per_label - exact)])].float() for own in rows]

    series = [[(800, 1), (800, 2)], [(200, 1), (200, 2)]]
    fitted = sample_efficiency.Fitted(draw, series, {})
    best, tried = sample_efficiency.chosen(fitted, reference, classifier, 60, 0)
    # 32 is the same as 16, so no better; with 200 updates nothing is better than with others
    assert asked == [one["value"] for one in tried] == [*series[0], *series[1], (800, 4), (800, 8), (800, 16), (800, 32)]
    assert "distance" in best[800, 16] and "plain" in best[800, 1]
    flat = sample_efficiency.Fitted(lambda value, *rest: draw((800, value), *rest), [[16, 32]], {})
    assert [one["value"] for one in sample_efficiency.chosen(flat, reference, classifier, 60, 0)[1]] == [16, 32]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_the_corrupted_share_is_what_it_says(share):
    true = torch.arange(600) % 3
    found = corrupt(true, share, 3, seed=0)
    assert (found != true).sum() == round(share * 600)
    assert ((found >= 0) & (found < 3)).all()
    if share == 1.0:  # each wrong class as likely: 300 ± 12 of 600
        assert abs(int(((found - true) % 3 == 1).sum()) - 300) < 60


def test_fewer_labels_are_a_part_of_more_and_unseen_is_the_rest():
    few, many = Labels("stroke", 50, 3), Labels("stroke", 400, 3, corrupted=0.2)
    assert torch.equal(few.rows, many.rows[:50])
    assert set(many.rows.tolist()) | set(many.unseen.tolist()) == set(range(1797)) and len(many.unseen) == 1397
    assert (many.given() != Labels("stroke", 400, 3).given()).sum() == 80


def test_the_truth_is_of_the_class_that_the_oracle_reads(folder):
    spec = SMOKE["sample_efficiency"]
    count, pool = 300, folder / "pool.pt"
    reference = sample_efficiency.truth(spec["base"], 4, "stroke", count, pool)
    images, prompts = torch.load(pool, weights_only=True).float(), torch.arange(count) % 10
    classes, digits = stroke_oracle(images), digit_oracle(images)
    for label in range(3):
        weights = reference.log_weights[:, label].exp()
        for prompt in range(10):
            own = prompts == prompt
            assert weights[own].sum().item() == pytest.approx(0.1)
            if (classes[own] == label).any():
                assert weights[own & (classes != label)].sum() < 1e-12
                alike = weights[own & (classes == label)]
                assert alike.allclose(alike.mean())
    # exact draws of it are judged right: always the label, and as close as as many draws are
    generator = torch.Generator().manual_seed(0)
    whole = [row for row in range(3) if all((classes[prompts == p] == row).any() for p in range(10))]
    assert whole
    for label in whole:
        rows = reference.in_turn(label, 100, generator)
        assert (classes[rows] == label).all()
        found = sample_efficiency.distances_with_errors(reference, [images[reference.in_turn(0, 100, generator)]], 0)
        floor = of_exact_draws(dataclasses.replace(reference, log_weights=reference.log_weights[:, :1]), 100, generator)
        assert abs(found["tv"] - floor["tv_floor"]) < 0.15 and 0 < found["tv_se"] < 0.1
    assert (digits == prompts).double().mean() > 0.9
    # copies of the labelled images are told from exact draws, which are as near to them as exact draws are
    label, known = whole[0], images[reference.in_turn(whole[0], 20, generator)]
    draws = images[reference.in_turn(label, 200, generator)]
    only = dataclasses.replace(reference, log_weights=reference.log_weights[:, [label]])
    assert sample_efficiency.nearest(only, [known[torch.arange(100) % 20]], known, 0) < 0.05
    assert 0.8 < sample_efficiency.nearest(only, [draws], known, 0) < 1.25


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean(kept: torch.Tensor) -> float:
        return values[kept].mean().item()

    assert jackknife(mean, 2000, groups=10) == pytest.approx(2000**-0.5, rel=0.6)  # a chi distribution of nine degrees, 24 % wide
    # one row at a time it is the textbook's, exactly
    assert jackknife(mean, 300, groups=300) == pytest.approx(values[:300].std().item() / 300**0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("gaps", "level", "expected"),
    [
        ([5.0, 3.0, 2.0, 1.0], 4.0, 20.0),
        ([5.0, 1.9, 2.1, 1.5, 1.2], 2.0, 40.0),  # below it once is not yet below it
        ([5.0, 3.0, 1.9], 2.0, None),  # the last point has none after it
        ([1.0, 1.0], 0.5, None),
    ],
)
def test_a_threshold_is_reached_when_the_next_point_confirms_it(gaps, level, expected):
    curve = [{"seconds": 10.0 * (i + 1), "gap": gap} for i, gap in enumerate(gaps)]
    assert time_to_gap.time_to(curve, level) == expected


def test_the_official_algorithm_learns_without_guidance(folder, monkeypatch):
    """On the digits, whose base has no guidance: the probability of the label goes up, and the reference stays the base."""
    monkeypatch.setitem(OBJECTIVES, "official", official_objective(1.0, 64.0, seed=0))
    trainer = trainer_of(
        folder, objective="official", merge_lora=False, coarse_share=0, num_inference_steps=8, max_updates=10, batch_size=16
    )
    history = trainer.train()
    assert history[0]["kl"] == pytest.approx(0.0, abs=1e-6) and history[-1]["kl"] > 1e-4
    rewards = [row["reward"] for row in history]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_the_seconds_are_the_updates_alone_and_looking_is_not_counted(folder):
    trainer = trainer_of(folder, coarse_share=0.5)
    price, config = fit_to_seconds(trainer, 0.4, 0.5), trainer.config
    assert trainer.update == 0 and not trainer.optimizer.state
    assert 0 < price.coarse < price.fine
    assert config.coarse_updates == int(0.2 / price.coarse)
    assert price.of(config.max_updates, config.coarse_updates) <= max(0.4, 0.2 + price.fine)
    assert Price(1.0, 10.0).of(2, 3) == 2 and Price(1.0, 10.0).of(5, 3) == 23
    seen = []

    def look(update: int) -> None:
        seen.append(update)
        started = experiment.clock()
        while experiment.clock() - started < 0.3:
            pass

    spent = train(trainer, look)
    assert seen == list(range(1, trainer.update + 1)) and trainer.update == config.max_updates >= 1
    assert 0 < spent < 3


def test_base_samples_are_drawn_once_and_scored_anew(folder):
    trainer = trainer_of(folder)
    first = base_samples(trainer, 60, folder)
    trainer.environment.sampler.scheduler.set_timesteps(4)
    again = base_samples(trainer, 60, folder)
    assert len(first.images) == 60 and torch.equal(first.images, again.images)
    expected = trainer.environment.score(first.images, trainer.environment.labels[first.label_rows])
    assert torch.allclose(first.log_likelihood, expected.double(), atol=1e-5)


def test_a_run_that_fails_does_not_stop_the_others_and_what_is_done_is_kept(tmp_path, monkeypatch, folder):
    arguments = ["--smoke", "--results", str(tmp_path), "--only", "default", "corrupted-40"]
    real = ablations.cached_classifier

    def failing(base, labels, *rest):
        if labels.corrupted:
            raise ValueError("no such labels")
        return real(base, labels, *rest)

    monkeypatch.setattr(ablations, "cached_classifier", failing)
    with pytest.raises(SystemExit, match="1 of 2 runs failed: corrupted-40, seed 0"):
        ablations.main(arguments)
    done = tmp_path / "default-seed0.json"
    record = json.loads(done.read_text())
    assert (
        record["updates"] >= 1
        and record["commit"]
        and {"gap", "gap_se", "accuracy", "kl", "exact_accuracy"} <= record["metrics"].keys()
    )
    assert done.stat().st_size < 8000 and not (tmp_path / "corrupted-40-seed0.json").exists()
    before = done.stat().st_mtime_ns
    monkeypatch.setattr(ablations, "cached_classifier", real)
    ablations.main(arguments)
    assert done.stat().st_mtime_ns == before and (tmp_path / "corrupted-40-seed0.json").exists()
    with pytest.raises(SystemExit, match="No variant nonsense"):
        ablations.main([*arguments[:3], "--only", "nonsense"])


@pytest.mark.slow  # bench-smoke, in CI too, runs the same and looks at nothing
def test_a_curve_and_a_comparison_of_both_methods(tmp_path):
    time_to_gap.main(["--smoke", "--results", str(tmp_path / "time"), "--only", "direct_backprop"])
    record = json.loads((tmp_path / "time" / "direct_backprop-seed0.json").read_text())
    assert record["curve"][-1]["seconds"] == record["curve"][-2]["seconds"] == record["seconds"]
    assert record["thresholds"].keys() == {"4", "3", "2", "1.5", "1", "0.5", "0.2"}
    sample_efficiency.main(["--smoke", "--results", str(tmp_path / "n")])
    for method in ("ctrl", "head", "cfg", "exact"):
        record = json.loads((tmp_path / "n" / f"{method}-n50-seed0.json").read_text())
        assert {aim for row in record["rows"] for aim in row["tuned_for"]} == {"plain", "distance", "accuracy"}
        assert {"accuracy_se", "tv_se", "mmd2_se", "prompt_accuracy", "nearest"} <= record["rows"][0].keys()
        assert record["tv_floor"] > 0
