"""benchmarks/baselines on the embedded digits: they sample the same base, they reduce to it, and guidance does what it should."""

import statistics
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from baselines import best_of_n, cfg_finetune, classifier_guidance, dps, mpgd, tfg
from baselines.base import Labelled, encode, open_base
from baselines.guided import guided
from exact_reference import DECILES, DIGITS, distance_to_law, make_reference, mmd2_to, of_exact_draws, small, to_exact

from diffusers_ctrl.adapters import load_adapter, resolve_folder
from digits_data import PROMPTS, digit_oracle, drawn_digits, measure_stroke, stroke_oracle


STEPS = 8
ROWS = torch.arange(10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def adapter():
    found = load_adapter(resolve_folder("digits-stroke"))
    found.classifier.eval().requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def base():
    return open_base(DiffusionPipeline.from_pretrained(resolve_folder("digits-base")), list(PROMPTS), STEPS)


@pytest.fixture(scope="module")
def data(base):
    images, digits = drawn_digits()
    return Labelled(encode(base, images[:200]), stroke_oracle(images[:200])[:, None].float(), torch.as_tensor(digits[:200]))


def test_the_base_is_the_pipelines_own_sampler(base):
    expected = base.pipe(
        list(PROMPTS), num_inference_steps=STEPS, guidance_scale=1.0, eta=1.0, generator=generator(), output_type="pt"
    ).images
    torch.testing.assert_close(base.draw(ROWS, generator()), expected, rtol=0, atol=2e-3)


def test_guidance_of_weight_zero_is_the_base(base, adapter):
    plain = guided(base, adapter.classifier.log_prob, torch.tensor([2.0]), ROWS, generator())
    torch.testing.assert_close(plain, base.draw(ROWS, generator()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "options", "backward"),
    [(dps, {"weight": 1.0}, 8), (mpgd, {"weight": 0.3}, 0), (tfg, {"weight": 0.5}, 15), (best_of_n, {"weight": 16}, 0)],
)
@pytest.mark.parametrize("label", [0.0, 2.0])
def test_guidance_raises_the_likelihood(base, adapter, module, options, backward, label):
    label = torch.tensor([label])

    def likelihood(images):
        with torch.no_grad():
            return adapter.classifier.log_prob(images, label.expand(len(images), -1)).mean().item()

    before = likelihood(base.draw(ROWS, generator()))
    base.calls.clear()
    images = module.sample(base, adapter.classifier.log_prob, label, ROWS, generator(), **options)
    assert base.calls["backward"] == backward * len(ROWS)
    assert images.shape == (10, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert likelihood(images) > before / 2 > before
    assert (digit_oracle(images) == ROWS).double().mean() >= 0.9


def test_tds_walks_on_the_bases_timesteps(base, adapter):
    pytest.importorskip("azula")
    from baselines import tds

    schedule = tds.GridSchedule(base)
    times = torch.linspace(1, 0, STEPS + 1)
    assert [schedule.index(t) for t in times] == list(range(STEPS + 1))
    alphas = torch.stack([schedule(t)[0] for t in times[:-1]])
    expected = base.sampler.scheduler.alphas_cumprod[base.sampler.timesteps].sqrt()
    torch.testing.assert_close(alphas, expected)
    images = tds.sample(base, adapter.classifier.log_prob, torch.tensor([2.0]), ROWS[:2], generator(), weight=0.25)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()


def test_the_noisy_classifier_learns_and_guides(base, adapter, data):
    fitted = classifier_guidance.fit(base, data, updates=300)
    clean = fitted(data.latents, torch.full((len(data.latents),), -3.0))[0].argmax(dim=1)
    assert (clean == data.labels[:, 0]).double().mean() > 0.8
    means = []
    for label in (0.0, 2.0):
        images = classifier_guidance.sample(
            base, adapter.classifier.log_prob, torch.tensor([label]), ROWS, generator(), classifier=fitted, weight=3.0
        )
        means.append(measure_stroke(images).mean())
    assert means[0] < means[1]


def test_cfg_fine_tuning_starts_at_the_base_and_moves(base, adapter, data):
    space = adapter.label_encoder.label_space
    label = torch.tensor([2.0])
    for updates in (0, 2):
        policy = cfg_finetune.fit(base, space, data, updates=updates)
        found = cfg_finetune.sample(base, None, label, ROWS, generator(), policy=policy, weight=3.0)
        same = torch.allclose(found, base.draw(ROWS, generator()), rtol=0, atol=1e-3)
        assert same == (updates == 0)


def test_distances_to_the_exact_law(base, adapter, tmp_path):
    """Draws of the exact law are as far from it as their floor says; those of the base are further; a cache is read again."""
    labels = torch.tensor([[0.0], [1.0], [2.0]])
    arguments = (base, adapter.classifier.log_prob, labels, 1.0, ["stroke"], 600, tmp_path / "pool.pt")
    reference = make_reference(*arguments)
    again = make_reference(*arguments)
    assert torch.equal(reference.cells, again.cells) and torch.equal(reference.log_weights, again.log_weights)
    of_classifier = make_reference(arguments[0], adapter.classifier, *arguments[2:])  # which looks at each picture once
    torch.testing.assert_close(of_classifier.log_weights, reference.log_weights)
    law = reference.law(2)
    assert law.shape == (DIGITS * DECILES,) and abs(law.sum().item() - 1) < 1e-9
    pool = torch.load(tmp_path / "pool.pt", weights_only=True).float()
    rows = [reference.in_turn(label, 300, generator(label)) for label in range(3)]
    assert all(torch.equal(own % 10, torch.arange(300) % 10) for own in rows)
    floor = of_exact_draws(reference, 300, generator(2))
    found = {}
    for name, images in (("exact", [pool[own] for own in rows]), ("plain", [pool[:300]] * 3)):
        mmd2 = [to_exact(reference, label, generator(3))(small(own)) for label, own in enumerate(images)]
        found[name] = {"tv": distance_to_law(reference, images), "mmd2": statistics.mean(mmd2)}
    exact, plain = found["exact"], found["plain"]
    for name in ("tv", "mmd2"):  # one set of draws is where the others are
        assert abs(exact[name] - floor[f"{name}_floor"]) < 4 * floor[f"{name}_floor_sd"]
    assert exact["tv"] < 1.5 * floor["tv_floor"] < plain["tv"]
    assert exact["mmd2"] < plain["mmd2"] / 3
    with pytest.raises(SystemExit, match="holds 600 samples, not 700"):
        make_reference(*arguments[:5], 700, arguments[-1])


def test_mmd_of_gaussians():
    """Zero in expectation for equal laws; larger the further apart they are."""
    x, y = torch.randn(400, 4, generator=generator(0)), torch.randn(400, 4, generator=generator(1))
    assert abs(mmd2_to(y)(x)) < 5e-3
    assert 0.02 < mmd2_to(y + 0.5)(x) < mmd2_to(y + 1)(x)
