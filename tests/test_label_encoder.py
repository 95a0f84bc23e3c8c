"""LabelEncoder: zero at the start, zero for "no label" for ever, a quadratic in log gamma, the same after save and load."""

import itertools
import math

import pytest
import torch

from diffusers_ctrl.label_encoder import LabelEncoder
from diffusers_ctrl.labels import Categorical, Continuous, LabelSpace


NAN = float("nan")
WIDTH = 6
GAMMA_RANGE = (0.5, 8.0)


def space():
    return LabelSpace(slant=Continuous(-2.0, 6.0), stroke=Categorical(("thin", "regular", "bold")))


def encoder(label_space=None, gamma_range=None, seed=0, dtype=torch.float64):
    """An encoder as after training: every weight random."""
    result = LabelEncoder((label_space or space()).to_dict(), WIDTH, gamma_range).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in result.parameters():
        parameter.data.normal_(generator=generator)
    return result


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma_range", [None, GAMMA_RANGE])
def test_a_fresh_encoder_is_exactly_zero(gamma_range):
    fresh = LabelEncoder(space().to_dict(), WIDTH, gamma_range)
    labels = torch.tensor([[-2.0, 0.0], [6.0, 2.0], [NAN, NAN]])
    assert_equal(fresh(labels, 2.0), torch.zeros(3, WIDTH))
    assert all(not parameter.any() for parameter in fresh.parameters())


@pytest.mark.parametrize("gamma_range", [None, GAMMA_RANGE])
def test_no_label_stays_exactly_zero_under_adamw_with_weight_decay(gamma_range):
    trained = LabelEncoder(space().to_dict(), WIDTH, gamma_range)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, weight_decay=0.1)
    labels = torch.tensor([[NAN, NAN], [1.0, 2.0], [NAN, 0.0], [5.0, NAN], [NAN, NAN]])
    for _ in range(20):
        optimizer.zero_grad()
        (trained(labels, 2.0) - 1).square().sum().backward()  # pulls the rows without a label as well
        optimizer.step()
    embedded = trained(labels, torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]))
    assert_equal(embedded[[0, 4]], torch.zeros(2, WIDTH))
    assert (embedded[1:4].abs() > 0.1).all()


def test_the_first_gradient_is_not_zero_and_finite():
    fresh = LabelEncoder(space().to_dict(), WIDTH, GAMMA_RANGE)
    # slant 2 is the middle of its interval and gamma 2 the middle of its range: every power is 0 ** n there
    fresh(torch.tensor([[2.0, 0.0], [NAN, 2.0]]), 2.0).sum().backward()
    for parameter in fresh.parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any()
    assert not fresh.tables[1].grad[1].any()  # "regular" is in no label


def test_the_gradient_of_a_row_without_a_label_is_zero():
    trained = encoder(gamma_range=GAMMA_RANGE)
    trained(torch.full((3, 2), NAN), 2.0).sum().backward()
    assert all(not parameter.grad.any() for parameter in trained.parameters())


def test_row_i_depends_on_label_i_and_gamma_i_only():
    trained = encoder(gamma_range=GAMMA_RANGE)
    labels = torch.tensor([[1.0, 0.0], [2.0, 1.0], [NAN, 2.0]])
    gamma = torch.tensor([1.0, 2.0, 4.0])
    before = trained(labels, gamma)
    for row in range(3):
        assert_close(trained(labels[row : row + 1], gamma[row : row + 1])[0], before[row])
        others = [i for i in range(3) if i != row]
        other_label, other_gamma = labels.clone(), gamma.clone()
        other_label[row, 1] = (other_label[row, 1] + 1) % 3
        other_gamma[row] = 3.0
        for after in (trained(other_label, gamma), trained(labels, other_gamma)):
            assert_equal(after[others], before[others])
            assert not torch.allclose(after[row], before[row])


def test_a_categorical_label_is_its_row_of_the_table():
    trained = encoder(LabelSpace(stroke=Categorical(("thin", "regular", "bold"))))
    labels = torch.tensor([[2.0], [0.0], [NAN], [1.0]])
    table = trained.tables[0]
    assert_equal(trained(labels), torch.stack([table[2], table[0], torch.zeros_like(table[0]), table[1]]))


def test_a_continuous_label_is_a_cubic_of_its_place_in_the_interval():
    trained = encoder(LabelSpace(slant=Continuous(-2.0, 6.0)))
    table = trained.tables[0]
    embedded = trained(torch.tensor([[-2.0], [2.0], [6.0], [4.0]]))
    assert_close(embedded[0], table[0] - table[1] + table[2] - table[3])
    assert_close(embedded[1], table[0])
    assert_close(embedded[2], table.sum(0))
    assert_close(embedded[3], table[0] + table[1] / 2 + table[2] / 4 + table[3] / 8)


def test_attributes_add_and_one_may_be_missing():
    trained = encoder()
    both, slant, stroke = trained(torch.tensor([[1.5, 2.0], [1.5, NAN], [NAN, 2.0]]))
    assert_close(both, slant + stroke)
    assert slant.any() and stroke.any()


@pytest.mark.parametrize("gamma_range", [None, GAMMA_RANGE])
def test_any_subset_may_be_given_and_what_is_not_has_no_part_in_it(gamma_range):
    """Every one of the 8 subsets of three attributes: the sum of those given, no gradient for the tables of the others."""
    three = LabelSpace(slant=Continuous(-2.0, 6.0), stroke=Categorical(("thin", "bold")), size=Continuous(0.0, 1.0))
    trained = encoder(three, gamma_range)
    full = torch.tensor([1.5, 1.0, 0.25])
    alone = [trained(torch.full((1, 3), NAN).index_fill(1, torch.tensor(i), full[i].item()), 2.0)[0] for i in range(3)]
    for subset in itertools.product([False, True], repeat=3):
        trained.zero_grad()
        embedded = trained(torch.where(torch.tensor(subset), full, NAN)[None], 2.0)
        assert_close(embedded[0], sum((alone[i] for i in range(3) if subset[i]), torch.zeros(WIDTH, dtype=torch.float64)))
        assert embedded.any().item() == any(subset)
        embedded.sum().backward()
        assert [bool(table.grad.any()) for table in trained.tables] == list(subset)


def test_the_embedding_is_a_quadratic_in_log_gamma():
    trained = encoder(gamma_range=GAMMA_RANGE)
    labels = torch.tensor([[1.5, 2.0]])
    low, middle, high, beyond = (trained(labels, gamma) for gamma in (0.5, 2.0, 8.0, 32.0))
    third_difference = beyond - 3 * high + 3 * middle - low
    torch.testing.assert_close(third_difference, torch.zeros_like(third_difference), rtol=0, atol=1e-10)
    assert (high - 2 * middle + low).abs().max() > 0.1
    assert (high - low).abs().max() > 0.1


def test_gamma_is_one_number_one_a_row_or_one_if_not_given():
    trained = encoder(gamma_range=GAMMA_RANGE)
    labels = torch.tensor([[1.5, 2.0], [0.0, 0.0], [NAN, NAN]])
    assert_equal(trained(labels, 4.0), trained(labels, torch.full((3,), 4.0)))
    assert_equal(trained(labels, 4.0), trained(labels, torch.tensor(4.0)))
    assert_equal(trained(labels), trained(labels, 1.0))
    assert not torch.allclose(trained(labels, 4.0)[0], trained(labels, 2.0)[0])


def test_without_a_gamma_range_gamma_changes_nothing():
    trained = encoder()
    labels = torch.tensor([[1.5, 2.0]])
    assert_equal(trained(labels, 4.0), trained(labels))


@pytest.mark.parametrize("gamma_range", [(0.0, 1.0), (-1.0, 1.0), (2.0, 2.0), (2.0, 1.0)])
def test_a_gamma_range_must_be_positive_and_increasing(gamma_range):
    with pytest.raises(ValueError, match="gamma_range"):
        LabelEncoder(space().to_dict(), WIDTH, gamma_range)


@pytest.mark.parametrize("gamma_range", [None, GAMMA_RANGE])
def test_save_and_load_give_the_identical_encoder(tmp_path, gamma_range):
    trained = encoder(gamma_range=gamma_range, dtype=torch.float32)
    trained.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = LabelEncoder.from_pretrained(tmp_path)
    assert loaded.label_space == trained.label_space
    labels = torch.tensor([[-2.0, 0.0], [1.25, 2.0], [NAN, 1.0], [NAN, NAN]])
    assert_equal(loaded(labels, 3.0), trained(labels, 3.0))


def test_save_and_load_keep_the_order_of_the_attributes(tmp_path):
    unsorted = LabelSpace(stroke=Categorical(("thin", "bold")), paper=Categorical(("white", "grey")))
    trained = encoder(unsorted, dtype=torch.float32)
    trained.save_pretrained(tmp_path)
    loaded = LabelEncoder.from_pretrained(tmp_path)
    labels = torch.tensor([[0.0, 1.0], [1.0, NAN], [NAN, 0.0]])
    assert list(loaded.label_space.attributes) == ["stroke", "paper"]
    assert_equal(loaded(labels), trained(labels))


def test_log_gamma_is_scaled_to_the_range():
    trained = encoder(LabelSpace(stroke=Categorical(("thin", "bold"))), gamma_range=GAMMA_RANGE)
    constant, linear, quadratic = trained.tables[0][1].unflatten(0, (3, WIDTH))
    embedded = trained(torch.ones(4, 1), torch.tensor([0.5, 2.0, 8.0, math.sqrt(0.5 * 2.0)]))
    # the range's ends are known in single precision
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(embedded[0], constant - linear + quadratic, **close)
    torch.testing.assert_close(embedded[1], constant, **close)
    torch.testing.assert_close(embedded[2], constant + linear + quadratic, **close)
    torch.testing.assert_close(embedded[3], constant - linear / 2 + quadratic / 4, **close)
