"""The calibrated classifier: it learns, its temperature is the best one, and its log-probability can be differentiated."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_ctrl import Categorical, Classifier, Continuous, LabelSpace
from diffusers_ctrl.adapters import resolve_folder
from diffusers_ctrl.calibration import STD_FLOOR, fit_temperature
from diffusers_ctrl.classifiers import _split, calibrate, epochs_for, fit_classifier
from digits_data import drawn_digits


NAN = float("nan")
ONE = LabelSpace(shade=Categorical(("dark", "grey", "light")))
NUMBER = Continuous(0.0, 10.0, "tenths")
ONE_NUMBER = LabelSpace(light=NUMBER)
MIXED = LabelSpace(side=Categorical(("left", "right")), light=NUMBER)
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
    assert all(found.accuracy > 0.95 for found in report.attributes.values())
    assert (report.num_train, report.num_validation) == (240, 60)
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())


def test_fewer_labels_get_as_many_optimizer_steps():
    assert epochs_for(600) == epochs_for(1600) == {"max_epochs": 80, "patience": 20}
    assert epochs_for(100) == {"max_epochs": 480, "patience": 120}


def test_it_is_calibrated_where_labels_are_noisy():
    """A share of 0.3 of the labels is drawn anew: the best that can be known is 0.8 for the true class."""
    classifier = tiny()
    images, labels = pictures(600, noise=0.3)
    report = fit(classifier, images, labels[:, :1])
    held_out, truth = pictures(600, seed=1)
    with torch.no_grad():
        chosen = classifier.log_prob(held_out, truth[:, :1]).exp()
    assert chosen.mean() == pytest.approx(0.8, abs=0.08)
    shade = report.attributes["shade"]
    assert shade.nll_after <= shade.nll_before + 1e-9
    assert shade.nll_after < math.log(3)
    assert f"shade: accuracy {shade.accuracy:.3f}" in report.lines() and "nats" in report.lines()


def test_early_stopping_keeps_the_best():
    """Labels that are noise: training soon makes it worse. It stops, and what is kept is what it was at its best."""
    images = torch.rand(60, 3, 8, 8, generator=generator())
    labels = torch.randint(3, (60, 1), generator=generator(7)).float()
    stopped = fit(tiny(), images, labels, max_epochs=60, patience=3, learning_rate=3e-2)
    assert stopped.epochs < 60
    went_on = fit(tiny(), images, labels, max_epochs=40, patience=40, learning_rate=3e-2)
    assert went_on.epochs == 40
    assert went_on.attributes["shade"].nll_before < 1.3  # before the temperature mends it


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
    assert all(math.isfinite(value) for found in report.attributes.values() for value in (found.nll_after, found.ece_after))
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
    temperature = report.attributes["shade"].temperature
    assert 0.2 < temperature < 5
    held_out, truth = pictures(600, seed=1, noise=0.3)
    with torch.no_grad():
        (logits,) = classifier(held_out)
        assert logits.shape == (3, 600, 3)
        assert (logits[0] - logits[1]).abs().max() > 1e-2
        alone = [F.cross_entropy(z / temperature, truth[:, 0].long()).item() for z in logits]
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


# -- numbers --


def shades(n, seed=0, noise=0.3):
    """(n, 3, 8, 8) pictures as light as a number from 2 to 8 says, and labels (n, 2): side, and that number with noise."""
    g = generator(seed)
    images, labels = pictures(n, seed)
    light = 2 + 6 * torch.rand(n, generator=g)
    images = images * 0.1 + 0.1 * light[:, None, None, None] * 0.9
    labels[:, 0] = light + noise * torch.randn(n, generator=g)
    return images.clamp(0, 1), labels[:, [1, 0]]


def test_it_learns_a_number_and_how_sure_it_may_be():
    """The label is the picture's with an error of 0.3: no law has a lower NLL than that error's own."""
    classifier = tiny(ONE_NUMBER, members=2)
    images, labels = shades(300)
    report = fit(classifier, images, labels[:, 1:], max_epochs=30)
    found = report.attributes["light"]
    assert found.correlation > 0.97 and found.r2 > 0.95 and 0.25 < found.rmse < 0.45
    assert found.nll_after <= found.nll_before + 1e-9
    assert found.coverage_50_after == pytest.approx(0.5, abs=0.08) and found.coverage_90_after == pytest.approx(0.9, abs=0.05)
    assert "R²" in report.lines() and f"{found.nll_after:.3f} nats" in report.lines()
    fresh, truth = shades(1000, seed=1)
    with torch.no_grad():
        nll = -classifier.log_prob(fresh, truth[:, 1:]).mean().item()
    assert 0.5 * math.log(2 * math.pi * math.e * 0.3**2) - 0.05 < nll < found.nll_after + 0.15


def test_the_density_integrates_to_one_in_its_own_unit():
    classifier = tiny(ONE_NUMBER, members=3, temperatures=(0.7,)).double().eval()
    with torch.no_grad():
        for member, shift in zip(classifier.networks, (-0.5, 0.0, 0.6), strict=True):
            member.heads[0].bias.copy_(torch.tensor([shift, -4.0]))  # members that disagree: three bumps
    grid = torch.linspace(-20, 30, 1001, dtype=torch.float64)
    image = pictures(1)[0].double()
    with torch.no_grad():
        (outputs,) = classifier(image)
        density = classifier.log_prob(image.expand(len(grid), -1, -1, -1), grid[:, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    mean, log_variance = outputs[:, 0].unbind(1)
    std = (0.7 * (log_variance.exp() + STD_FLOOR**2)).sqrt()
    laws = torch.distributions.Normal(5 + 5 * mean, 5 * std)
    expected = laws.log_prob(torch.tensor(6.5)).exp().mean().log()
    torch.testing.assert_close(classifier.log_prob(image, torch.tensor([[6.5]]))[0], expected)


def test_another_unit_shifts_every_log_density_by_one_constant():
    """As if a length were given in millimetres instead of centimetres: what is learned cannot depend on it."""
    centi, milli = tiny(ONE_NUMBER), tiny(LabelSpace(light=Continuous(0.0, 100.0)))
    milli.load_state_dict(centi.state_dict())
    images, labels = shades(20)
    with torch.no_grad():
        difference = centi.log_prob(images, labels[:, 1:]) - milli.log_prob(images, 10 * labels[:, 1:])
    torch.testing.assert_close(difference, torch.full((20,), math.log(10)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sure", [10.0, 1e4, 1e8])
def test_the_density_is_bounded_however_sure_the_regression_is(sure):
    classifier = tiny(ONE_NUMBER).eval().requires_grad_(False)
    classifier.networks[0].heads[0].bias.copy_(torch.tensor([0.0, -sure]))
    images = pictures(8)[0].requires_grad_()
    labels = torch.linspace(0, 10, 8)[:, None]
    value = classifier.log_prob(images, labels)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert value.max() <= -math.log(STD_FLOOR * 5 * math.sqrt(2 * math.pi)) + 1e-5
    classifier.networks[0].heads[0].bias.copy_(torch.tensor([0.0, sure]))
    assert classifier.log_prob(images, labels).isfinite().all()


def test_the_gradient_of_a_log_density_is_that_of_finite_differences():
    classifier = tiny(MIXED, members=2).double().eval().requires_grad_(False)
    images, labels = shades(3)
    labels[0, 0], labels[1, 1] = NAN, NAN
    assert torch.autograd.gradcheck(lambda x: classifier.log_prob(x, labels), (images.double().requires_grad_(),), fast_mode=True)


def test_numbers_and_classes_add_and_may_be_missing():
    classifier = tiny(MIXED, members=2).eval()
    images, labels = shades(10)
    with torch.no_grad():
        whole = classifier.log_prob(images, labels)
        side, light = labels.clone(), labels.clone()
        side[:, 1], light[:, 0] = NAN, NAN
        torch.testing.assert_close(classifier.log_prob(images, side) + classifier.log_prob(images, light), whole)
        assert torch.equal(classifier.log_prob(images, torch.full((10, 2), NAN)), torch.zeros(10))
    with pytest.raises(ValueError, match="'light' is a number"):
        classifier.log_probs(images)


@pytest.mark.parametrize("members", [1, 2])
def test_two_datasets_without_a_common_image(members):
    """One knows the side, the other, a fifth of its size, the number: concatenated, with NaN for what is not known."""
    (first, sides), (second, lights) = shades(200), shades(50, seed=5)
    sides[:, 1], lights[:, 0] = NAN, NAN
    classifier = tiny(MIXED, members=members)
    report = fit(classifier, torch.cat([first, second]), torch.cat([sides, lights]), max_epochs=30)
    assert report.attributes["side"].num_labels == (40 if members == 1 else 200)
    assert report.attributes["light"].num_labels == (10 if members == 1 else 50)
    fresh, truth = shades(200, seed=9)
    side = torch.tensor([[0.0, NAN], [1.0, NAN]])
    with torch.no_grad():
        scores = torch.stack([classifier.log_prob(fresh, row.expand(200, -1)) for row in side], dim=1)
        (_, numbers) = classifier(fresh)
    assert (scores.argmax(1) == truth[:, 0]).float().mean() > 0.95
    assert torch.corrcoef(torch.stack([numbers[..., 0].mean(0), truth[:, 1]]))[0, 1] > 0.9


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_fold_has_its_share_of_every_dataset(count):
    labels = torch.full((120, 2), NAN)
    labels[:80, 0], labels[70:113, 1] = 1.0, 2.0  # 70 with the first alone, 10 with both, 33 with the second; 7 with none
    order, parts = _split(labels, count, 0.2, generator())
    assert sorted(order.tolist()) == list(range(113))
    together = torch.cat(parts).tolist()
    assert len(set(together)) == len(together)
    for low, high in ((0, 70), (70, 80), (80, 113)):
        sizes = [sum(low <= row < high for row in part.tolist()) for part in parts]
        if count == 1:
            assert sizes == [round(0.2 * (high - low))]
        else:
            assert sum(sizes) == high - low and max(sizes) - min(sizes) <= 1


def test_too_few_labels_of_an_attribute_to_hold_some_out():
    images, labels = shades(60)
    labels[3:, 1] = NAN
    with pytest.raises(ValueError, match="attribute 'light'.*each of the members"):
        fit(tiny(MIXED, members=4), images, labels)


def test_a_number_needs_labels_that_differ():
    images, labels = shades(60)
    labels[:, 1] = 3.0
    with pytest.raises(ValueError, match=r"'light' needs training images with different labels, got \[3\.0\]"):
        fit(tiny(MIXED), images, labels)


@pytest.mark.parametrize("fit_or_calibrate", [fit, calibrate])
@pytest.mark.parametrize(
    "column, value, message",
    [
        (0, 2.0, "2 of attribute 'side'.*index from 0 to 1"),
        (0, -1.0, "-1 of attribute 'side'"),
        (0, 0.5, "0.5 of attribute 'side'"),
        (1, 10.5, "10.5 of attribute 'light'.*from 0.0 to 10.0"),
        (1, -0.5, "-0.5 of attribute 'light'"),
        (1, math.inf, "inf of attribute 'light'"),
    ],
)
def test_labels_that_the_space_does_not_have(fit_or_calibrate, column, value, message):
    images, labels = shades(20)
    labels[3, column] = value
    with pytest.raises(ValueError, match=message):
        fit_or_calibrate(tiny(MIXED), images, labels)


@pytest.mark.parametrize("shape", [(20,), (20, 1), (19, 2)])
def test_labels_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"labels must be \(20, 2\)"):
        fit(tiny(MIXED), shades(20)[0], torch.zeros(shape))


def test_calibrate_of_a_number_and_of_one_that_is_never_given():
    images, labels = shades(200)
    classifier = tiny(MIXED).eval().requires_grad_(False)
    report = calibrate(classifier, images, labels)
    found = report.attributes["light"]
    assert classifier.config.temperatures == (report.attributes["side"].temperature, found.temperature)
    with torch.no_grad():
        only = labels.clone()
        only[:, 0] = NAN
        assert -classifier.log_prob(images, only).mean().item() == pytest.approx(found.nll_after, abs=1e-5)
    with pytest.raises(ValueError, match="No held-out image has a label of attribute 'side'"):
        calibrate(classifier, images, only)


# -- where a pixel is --


def test_coordinates_are_each_pixel_s_place(tmp_path):
    classifier = tiny(image_size=5, coordinates=True).eval().requires_grad_(False)
    stem = classifier.networks[0].stem
    assert stem.in_channels == 5
    seen = []
    stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = pictures(2)[0]
    found = classifier.log_probs(images)
    assert torch.equal(seen[0][:, :3], classifier.prepare(images))
    places = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    assert torch.equal(seen[0][1, 3], places.expand(5, 5)) and torch.equal(seen[0][1, 4], places[:, None].expand(5, 5))
    classifier.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert again.config.coordinates is True and torch.equal(again.log_probs(images)[0], found[0])
    stem.weight[:, 3:] = 0.0
    plain = tiny(image_size=5).eval()
    state = classifier.networks[0].state_dict()
    plain.networks[0].load_state_dict({**state, "stem.weight": state["stem.weight"][:, :3]})
    torch.testing.assert_close(classifier.log_probs(images)[0], plain.log_probs(images)[0])


def test_the_shipped_classifier_is_as_it_was():
    """Fitted before there were numbers and coordinates; its config has neither. The figures are those it gave then."""
    classifier = Classifier.from_pretrained(resolve_folder("digits-stroke") / "classifier")
    assert classifier.config.coordinates is False and classifier.networks[0].stem.in_channels == 3
    images = drawn_digits()[0][:6]
    with torch.no_grad():
        found = classifier.log_prob(images, torch.tensor([[0.0], [1.0], [2.0], [NAN], [0.0], [1.0]]))
    expected = [-10.032625, -0.252843, -2.218485e-4, 0.0, -9.179115e-6, -3.593578]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-6)


# -- calibration in the classifier --


def test_calibrate_sets_one_temperature_an_attribute():
    images, labels = pictures(200)
    classifier = tiny(TWO).eval().requires_grad_(False)
    report = calibrate(classifier, images, labels)
    temperatures = classifier.config.temperatures
    assert len(temperatures) == 2 and temperatures[0] != temperatures[1]
    for column, (name, (logits,), temperature) in enumerate(zip(TWO.attributes, classifier(images), temperatures, strict=True)):
        label = labels[:, column].long()
        assert F.cross_entropy(logits / temperature, label) <= F.cross_entropy(logits, label) + 1e-6
        assert temperature == pytest.approx(fit_temperature(TWO.attributes[name], logits[None], label), rel=1e-6)
        assert report.attributes[name].temperature == temperature
        assert report.attributes[name].nll_after <= report.attributes[name].nll_before


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
