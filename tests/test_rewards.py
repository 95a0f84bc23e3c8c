"""Rewards of several attributes: each one's own, on the rows that have it, and nothing where it is not given."""

import math

import pytest
import torch
from test_trainer import make_trainer

from diffusers_ctrl import Categorical, Classifier, Continuous, LabelSpace
from diffusers_ctrl.evaluation import draw_samples
from diffusers_ctrl.rewards import attribute_rewards, classifier_reward
from problems import GaussianLikelihood


NAN = float("nan")
SPACE = LabelSpace(shade=Categorical(("dark", "grey", "light")), ink=Continuous(0.0, 1.0))
LABELS = torch.tensor([[0.0, 0.25], [2.0, NAN], [NAN, 0.75], [NAN, NAN]])


def ink_score(images, labels):
    """A measurement, no classifier: a normal law of the mean ink."""
    return -0.5 * ((1 - images.mean(dim=(1, 2, 3)) - labels[:, 0]) / 0.1) ** 2


def shade_classifier():
    torch.manual_seed(0)
    space = LabelSpace(shade=SPACE.attributes["shade"])
    return Classifier(space.to_dict(), image_size=8, widths=(8, 8)).double()


def pictures(n=4):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mixed():
    return attribute_rewards({"ink": ink_score, "shade": classifier_reward(shade_classifier())}, SPACE)


def test_a_classifier_and_a_measurement_add_where_they_are_given():
    images, classifier = pictures(), shade_classifier()
    found = mixed()(images, LABELS)
    shade = classifier.log_prob(images[:2], LABELS[:2, :1])
    ink = ink_score(images[[0, 2]], LABELS[[0, 2], 1:])
    torch.testing.assert_close(found, torch.stack([shade[0] + ink[0], shade[1], ink[1], torch.zeros_like(ink[0])]))
    assert found[3] == 0


def test_an_attribute_that_is_not_given_has_no_gradient():
    images = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(mixed()(images, LABELS).sum(), images)
    assert gradient[:3].flatten(1).any(dim=1).all() and not gradient[3].any()
    alone = attribute_rewards({"ink": ink_score}, LabelSpace(ink=SPACE.attributes["ink"]))
    (of_ink,) = torch.autograd.grad(alone(images, LABELS[:, 1:]).sum(), images)
    assert torch.equal(gradient[2], of_ink[2]) and not of_ink[1].any()


def test_the_gradient_is_that_of_finite_differences():
    images = pictures().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixed()(x, LABELS), (images,), fast_mode=True)


def test_no_label_at_all_is_exactly_nothing():
    images = torch.full((2, 3, 8, 8), NAN).requires_grad_()  # a picture that went wrong cannot matter to who does not ask for it
    found = mixed()(images, torch.full((2, 2), NAN))
    assert torch.equal(found, torch.zeros(2))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert not gradient.any()


def test_a_reward_is_called_with_its_own_column_of_its_own_rows():
    seen = {}

    def spy(name):
        def reward(images, labels):
            seen[name] = (images, labels)
            return labels[:, 0].double()

        return reward

    images = pictures()
    found = attribute_rewards({name: spy(name) for name in SPACE.attributes}, SPACE)(images, LABELS)
    assert torch.equal(found, torch.tensor([0.25, 2.0, 0.75, 0.0], dtype=torch.float64))
    assert torch.equal(seen["shade"][0], images[:2]) and seen["shade"][1].tolist() == [[0.0], [2.0]]
    assert torch.equal(seen["ink"][0], images[[0, 2]]) and seen["ink"][1].tolist() == [[0.25], [0.75]]


def test_one_reward_without_a_gradient_leaves_the_sum_without():
    """Else half of a gradient would be taken for all of it."""
    images = pictures().requires_grad_()
    counted = attribute_rewards(
        {"shade": classifier_reward(shade_classifier()), "ink": lambda x, y: ink_score(x.detach(), y)}, SPACE
    )
    assert not counted(images, LABELS).requires_grad
    assert counted(images[1:2], LABELS[1:2]).requires_grad  # here only the classifier is asked


@pytest.mark.parametrize("names", [["shade"], ["shade", "ink", "size"], ["shade", "size"]])
def test_each_attribute_needs_its_reward(names):
    with pytest.raises(ValueError, match=r"one reward.*'ink', 'shade'"):
        attribute_rewards(dict.fromkeys(names, ink_score), SPACE)


@pytest.mark.parametrize(
    "score, message",
    [
        (lambda x, y: ink_score(x, y).sum(), r"'ink' must return \(2,\), got \(\)"),
        (lambda x, y: ink_score(x, y)[:, None], r"'ink' must return \(2,\), got \(2, 1\)"),
    ],
)
def test_a_reward_that_returns_something_else(score, message):
    both = attribute_rewards({"shade": classifier_reward(shade_classifier()), "ink": score}, SPACE)
    with pytest.raises(ValueError, match=message):
        both(pictures(), LABELS)


def test_a_nan_stays_in_the_sum_and_a_warning_names_the_attribute():
    score = lambda x, y: torch.where(y[:, 0] > 0.5, math.nan, ink_score(x, y))  # noqa: E731
    both = attribute_rewards({"shade": classifier_reward(shade_classifier()), "ink": score}, SPACE)
    with pytest.warns(UserWarning, match="reward of attribute 'ink' is NaN"):
        assert both(pictures(), LABELS).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("objective", ["direct_backprop", "policy_gradient"])
def test_training_skips_an_update_whose_scorer_gives_a_nan_and_evaluation_refuses_it(tmp_path, objective, caplog):
    calls, good = [], GaussianLikelihood((-0.4, 1.0), 0.6)

    def scorer(x, labels):
        calls.append(x)
        return good(x, labels) * (math.nan if len(calls) == 2 else 1.0)

    space = LabelSpace(y=Categorical(("low", "high")))
    trainer = make_trainer(tmp_path, attribute_rewards({"y": scorer}, space), objective=objective, max_updates=3, max_bad_updates=2)
    with pytest.warns(UserWarning, match="reward of attribute 'y' is NaN"):
        history = trainer.train()
    assert [row["update"] for row in history] == [1, 3]
    assert "Update 2 was skipped, 1 in a row (2 stop the training): in micro-batch 1 of 1, the log-likelihood is NaN" in caplog.text
    del calls[1:]
    with (
        pytest.warns(UserWarning, match="reward of attribute 'y' is NaN"),
        pytest.raises(ValueError, match="The log-likelihood is NaN for 8 of 8 images: the reward must give a number for each"),
    ):
        draw_samples(trainer.policy, trainer.environment, 4, torch.Generator().manual_seed(0), progress=False)


def test_labels_of_another_space():
    with pytest.raises(ValueError, match=r"labels must be \(4, 2\), got \(4, 1\)"):
        mixed()(pictures(), LABELS[:, :1])
