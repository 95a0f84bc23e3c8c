"""The calibrated classifier: it learns, its temperature is the best one, and its log-probability can be differentiated."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_ctrl import Categorical, Classifier, Continuous, LabelSpace
from diffusers_ctrl.classifiers import calibrate, expected_calibration_error, fit_classifier, fit_temperature


NAN = float("nan")
ONE = LabelSpace(shade=Categorical(("dark", "grey", "light")))
TWO = LabelSpace(shade=Categorical(("dark", "grey", "light")), side=Categorical(("left", "right")))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, seed=0, noise=0.0):
    """(n, 3, 8, 8) pictures with a spot, and labels (n, 2): how light the picture is, and the half that the spot is in."""
    g = generator(seed)
    shade, side = torch.randint(3, (n,), generator=g), torch.randint(2, (n,), generator=g)
    images = (0.2 + 0.3 * shade.float())[:, None, None, None].expand(n, 3, 8, 8).clone()
    for row in range(n):
        images[row, :, 3:5, 1 + 4 * side[row] : 3 + 4 * side[row]] = 0.0
    images = (images + 0.05 * torch.randn(images.shape, generator=g)).clamp(0, 1)
    flip = torch.rand(n, generator=g) < noise
    shade = torch.where(flip, torch.randint(3, (n,), generator=g), shade)
    return images, torch.stack([shade, side], dim=1).float()


def tiny(space=ONE, **kwargs):
    torch.manual_seed(0)
    return Classifier(space.to_dict(), **{"image_size": 8, "widths": (8, 8), **kwargs})


def fit(classifier, images, labels, **kwargs):
    return fit_classifier(classifier, images, labels, progress=False, **{"max_epochs": 20, "learning_rate": 1e-2, **kwargs})


# -- fit --


def test_it_learns():
    classifier = tiny(TWO)
    report = fit(classifier, *pictures(300), max_epochs=30)
    images, labels = pictures(300, seed=1)
    with torch.no_grad():
        for column, log_probs in enumerate(classifier.log_probs(images)):
            assert (log_probs.argmax(1) == labels[:, column]).float().mean() > 0.95
    assert report.accuracy > 0.95
    assert (report.num_train, report.num_validation) == (240, 60)
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())


def test_it_is_calibrated_where_labels_are_noisy():
    """A share of 0.3 of the labels is drawn anew: the best that can be known is 0.8 for the true class."""
    classifier = tiny()
    images, labels = pictures(600, noise=0.3)
    report = fit(classifier, images, labels[:, :1])
    held_out, truth = pictures(600, seed=1)
    with torch.no_grad():
        chosen = classifier.log_prob(held_out, truth[:, :1]).exp()
    assert chosen.mean() == pytest.approx(0.8, abs=0.08)
    assert report.nll_after <= report.nll_before + 1e-9
    assert report.nll_after < math.log(3)
    assert f"{report.accuracy:.3f}" in report.lines() and "nats" in report.lines()


def test_early_stopping_keeps_the_best():
    """Labels that are noise: training soon makes it worse. It stops, and what is kept is what it was at its best."""
    images = torch.rand(60, 3, 8, 8, generator=generator())
    labels = torch.randint(3, (60, 1), generator=generator(7)).float()
    stopped = fit(tiny(), images, labels, max_epochs=60, patience=3, learning_rate=3e-2)
    assert stopped.epochs < 60
    went_on = fit(tiny(), images, labels, max_epochs=40, patience=40, learning_rate=3e-2)
    assert went_on.epochs == 40
    assert went_on.nll_before < 1.3  # before the temperature mends it


def test_the_seed_is_all():
    reports = []
    for _ in range(2):
        images, labels = pictures(60)
        reports.append(fit(tiny(), images, labels[:, :1], max_epochs=2, seed=3))
    assert reports[0] == reports[1]


def test_labels_that_are_not_given_are_left_out():
    images, labels = pictures(200)
    labels[::2, 0], labels[1::2, 1] = NAN, NAN  # each picture has one attribute, as from two datasets
    classifier = tiny(TWO)
    report = fit(classifier, images, labels)
    assert all(math.isfinite(value) for value in (report.nll_before, report.nll_after, report.ece_after))
    held_out, truth = pictures(100, seed=1)
    with torch.no_grad():
        for column, log_probs in enumerate(classifier.log_probs(held_out)):
            assert (log_probs.argmax(1) == truth[:, column]).float().mean() > 0.9


def test_members_are_cross_fitted():
    """Every label is held out from one member, the members differ, and their mean is better than they are on new data."""
    classifier = tiny(members=3)
    images, labels = pictures(150, noise=0.3)
    report = fit(classifier, images, labels[:, :1])
    assert (report.num_train, report.num_validation) == (100, 150)
    assert 0.2 < report.temperature < 5
    held_out, truth = pictures(600, seed=1, noise=0.3)
    with torch.no_grad():
        (logits,) = classifier(held_out)
        assert logits.shape == (3, 600, 3)
        assert (logits[0] - logits[1]).abs().max() > 1e-2
        alone = [F.cross_entropy(z / report.temperature, truth[:, 0].long()).item() for z in logits]
        together = -classifier.log_prob(held_out, truth[:, :1]).mean().item()
        torch.testing.assert_close(classifier.log_probs(held_out)[0].exp().sum(1), torch.ones(600))
    assert together < sum(alone) / 3


def test_members_must_be_one_or_more():
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        tiny(members=0)


def test_a_class_without_images():
    images, labels = pictures(60)
    labels[:, 0].clamp_(max=1)
    with pytest.raises(ValueError, match="'light' of attribute 'shade'"):
        fit(tiny(), images, labels[:, :1])


def test_continuous_attributes_are_refused():
    with pytest.raises(ValueError, match="'slant' is Continuous"):
        tiny(LabelSpace(slant=Continuous(0.0, 1.0)))


# -- temperature and calibration error --


def logits_and_labels(scale, n=2000, classes=3):
    """Labels drawn from softmax(z), and logits scale·z: the best temperature is `scale`."""
    z = 2 * torch.randn(n, classes, generator=generator(), dtype=torch.float64)
    labels = torch.multinomial(z.softmax(1), 1, generator=generator(1)).squeeze(1)
    return scale * z, labels


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_temperature_minimises_the_nll(scale):
    logits, labels = logits_and_labels(scale)
    found = fit_temperature(logits, labels)

    def nll(t):
        return F.cross_entropy(logits / t, labels).item()

    scan = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    best = min(scan.tolist(), key=nll)
    assert found == pytest.approx(best, rel=0.01)
    assert nll(found) <= nll(best) + 1e-9
    assert nll(found) <= nll(1.0) + 1e-12
    assert found == pytest.approx(scale, rel=0.1)


def test_the_temperature_of_predictions_that_are_all_right_or_all_wrong():
    """No temperature is the best one: the answer must still be a positive number."""
    logits = torch.tensor([[4.0, 0.0], [0.0, 5.0]]).repeat(10, 1)
    right = torch.tensor([0, 1]).repeat(10)
    for labels in (right, 1 - right):
        for scale in (0.1, 1.0, 10.0, 100.0):
            temperature = fit_temperature(scale * logits, labels)
            assert math.isfinite(temperature) and temperature > 0
            assert temperature <= 1 if labels is right else temperature > 1


def test_calibration_error_of_calibrated_predictions():
    confidence = torch.linspace(0.5, 1.0, 20000, dtype=torch.float64)
    labels = (torch.rand(20000, generator=generator(), dtype=torch.float64) > confidence).long()
    log_probs = torch.stack([confidence, 1 - confidence], dim=1).clamp_min(1e-12).log()
    assert expected_calibration_error(log_probs, labels) < 0.02


@pytest.mark.parametrize("confidence, accuracy", [(0.99, 0.6), (0.6, 0.9), (1.0, 0.5)])
def test_calibration_error_of_predictions_that_are_not(confidence, accuracy):
    log_probs = torch.tensor([[confidence, 1 - confidence]]).repeat(1000, 1).log()
    labels = (torch.arange(1000) >= 1000 * accuracy).long()
    assert expected_calibration_error(log_probs, labels) == pytest.approx(abs(confidence - accuracy), abs=1e-6)


def test_calibration_error_weights_bins_by_size():
    log_probs = torch.tensor([[0.95, 0.05]] * 300 + [[0.55, 0.45]] * 100).log()
    labels = torch.cat([torch.zeros(300), torch.ones(100)]).long()
    assert expected_calibration_error(log_probs, labels) == pytest.approx(0.75 * 0.05 + 0.25 * 0.55, abs=1e-6)


def test_calibrate_sets_one_temperature_an_attribute():
    images, labels = pictures(200)
    classifier = tiny(TWO).eval().requires_grad_(False)
    report = calibrate(classifier, images, labels)
    temperatures = classifier.config.temperatures
    assert len(temperatures) == 2 and temperatures[0] != temperatures[1]
    for column, ((logits,), temperature) in enumerate(zip(classifier(images), temperatures, strict=True)):
        label = labels[:, column].long()
        assert F.cross_entropy(logits / temperature, label) <= F.cross_entropy(logits, label) + 1e-6
        assert temperature == pytest.approx(fit_temperature(logits, label), rel=1e-6)
    assert report.nll_after <= report.nll_before
    assert report.temperature == pytest.approx(sum(temperatures) / 2)


# -- log p --


def test_log_prob_is_the_sum_of_the_attributes_log_softmax():
    classifier = tiny(TWO, temperatures=(2.0, 0.5)).eval()
    images, labels = pictures(10)
    with torch.no_grad():
        (shade,), (side,) = classifier(images)
        expected = (shade / 2.0).log_softmax(1)[range(10), labels[:, 0].long()]
        expected = expected + (side / 0.5).log_softmax(1)[range(10), labels[:, 1].long()]
        torch.testing.assert_close(classifier.log_prob(images, labels), expected)
        every = torch.tensor([[a, b] for a in range(3) for b in range(2)]).float()
        total = torch.stack([classifier.log_prob(images, row.expand(10, -1)) for row in every]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(10), rtol=0, atol=1e-6)


def test_labels_that_are_not_given_count_nothing():
    classifier = tiny(TWO).eval()
    images, labels = pictures(10)
    with torch.no_grad():
        whole = classifier.log_prob(images, labels)
        parts = torch.stack([labels.clone(), labels.clone()])
        parts[0, :, 1], parts[1, :, 0] = NAN, NAN
        torch.testing.assert_close(classifier.log_prob(images, parts[0]) + classifier.log_prob(images, parts[1]), whole)
        assert torch.equal(classifier.log_prob(images, torch.full((10, 2), NAN)), torch.zeros(10))
        mixed = labels.clone()
        mixed[:5] = NAN
        found = classifier.log_prob(images, mixed)
    assert torch.equal(found[:5], torch.zeros(5))
    torch.testing.assert_close(found[5:], whole[5:])


@pytest.mark.parametrize("size", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("label", [0.0, 2.0, NAN])
def test_the_gradient_is_finite_for_extreme_logits(size, label):
    classifier = tiny().eval().requires_grad_(False)
    classifier.networks[0].heads[0].bias.copy_(torch.tensor([-size, 0.0, size]))
    images = pictures(4)[0].requires_grad_()
    value = classifier.log_prob(images, torch.full((4, 1), label))
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert value.isfinite().all() and gradient.isfinite().all()
    if label == 0.0:
        assert gradient.abs().max() > 0  # the class that p gives nothing to still pulls
        assert value.max() < -size
    if math.isnan(label):
        assert not gradient.any()


def test_the_gradient_is_that_of_finite_differences():
    classifier = tiny().double().eval().requires_grad_(False)
    images, labels = pictures(2)
    images, labels = images.double().requires_grad_(), labels[:, :1]
    direction = torch.randn(images.shape, generator=generator(), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(classifier.log_prob(images, labels).sum(), images)
    with torch.no_grad():
        ahead, behind = (classifier.log_prob(images + s * 1e-5 * direction, labels).sum() for s in (1, -1))
    assert ((gradient * direction).sum() - (ahead - behind) / 2e-5).abs() < 1e-7


def test_images_of_another_size_are_resized():
    classifier = tiny(image_size=8).eval()
    images = pictures(4)[0]
    large = F.interpolate(images, size=(24, 24), mode="nearest")
    with torch.no_grad():
        ours = classifier.log_probs(large)[0]
        expected = classifier.log_probs(F.interpolate(large, size=(8, 8), mode="bilinear", antialias=True))[0]
        assert torch.equal(ours, expected)
        assert classifier.log_probs(images[..., :6])[0].shape == (4, 3)
        flat = torch.full((1, 3, 8, 8), 0.4)
        torch.testing.assert_close(
            classifier.log_probs(flat.expand(1, 3, 8, 8)), classifier.log_probs(torch.full((1, 3, 31, 17), 0.4))
        )


# -- files --


@pytest.mark.parametrize("members", [1, 2])
def test_save_and_load(tmp_path, members):
    classifier = tiny(TWO, members=members)
    fit(classifier, *pictures(60), max_epochs=1)
    classifier.save_pretrained(tmp_path / "classifier")
    again = Classifier.from_pretrained(tmp_path / "classifier")
    assert again.label_space == TWO
    assert list(again.config.temperatures) == list(classifier.config.temperatures)
    assert 1.0 not in again.config.temperatures
    images, labels = pictures(10)
    with torch.no_grad():
        assert torch.equal(again.log_prob(images, labels), classifier.log_prob(images, labels))
    assert not again.training
