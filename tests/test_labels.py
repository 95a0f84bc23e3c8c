"""Labels: what a user may write, the tensor it becomes, and the errors for everything else."""

import json
import math

import pytest
import torch

from diffusers_ctrl.labels import Categorical, Continuous, LabelSpace, label_grid


NAN = float("nan")


def one():
    return LabelSpace(stroke=Categorical(("thin", "regular", "bold")))


def two():
    return LabelSpace(stroke=Categorical(("thin", "regular", "bold")), slant=Continuous(-0.5, 0.5, "rad"))


def assert_rows(encoded, rows):
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, torch.tensor(rows, dtype=torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("label", "row"),
    [
        ("bold", [2.0]),
        (0, [0.0]),
        (2, [2.0]),
        (1.0, [1.0]),
        ({"stroke": "thin"}, [0.0]),
        ({"stroke": 1}, [1.0]),
        ({"stroke": None}, [NAN]),
        ({}, [NAN]),
        (None, [NAN]),
    ],
)
def test_one_attribute(label, row):
    assert_rows(one().encode(label), [row])


@pytest.mark.parametrize(
    ("label", "row"),
    [
        ({"stroke": "bold", "slant": 0.25}, [2.0, 0.25]),
        ({"slant": -0.5, "stroke": 0}, [0.0, -0.5]),
        ({"slant": 0.5}, [NAN, 0.5]),
        ({"slant": 0}, [NAN, 0.0]),
        ({"stroke": "regular", "slant": None}, [1.0, NAN]),
        (None, [NAN, NAN]),
    ],
)
def test_two_attributes_in_the_order_of_the_space(label, row):
    assert_rows(two().encode(label), [row])


def test_one_label_serves_all_prompts():
    assert_rows(one().encode("bold", num_prompts=3), [[2.0]] * 3)
    assert_rows(two().encode(None, num_prompts=2), [[NAN, NAN]] * 2)


def test_a_list_is_one_label_a_prompt():
    assert_rows(one().encode(["bold", 0, None, {"stroke": "regular"}], num_prompts=4), [[2.0], [0.0], [NAN], [1.0]])
    assert_rows(two().encode(({"slant": 0.5}, {"stroke": 2}), num_prompts=2), [[NAN, 0.5], [2.0, NAN]])


def test_a_tensor_of_indices_is_one_label_a_prompt():
    assert_rows(one().encode(torch.tensor([2, 0]), num_prompts=2), [[2.0], [0.0]])


@pytest.mark.parametrize(
    ("names", "value", "index"),
    [
        (("1", "2", "3"), 1, 0.0),  # a column of whole numbers gives such names
        (("1", "2", "3"), 3.0, 2.0),
        (("1", "2", "3"), "2", 1.0),
        (("10", "2"), 2, 1.0),
        (("0.5", "1.0"), 0.5, 0.0),
        (("0.5", "1.0"), 1, 1.0),  # so does one of floats
        (("0", "1", "2"), 1, 1.0),
        (("911", "beetle", "2cv"), 911, 0.0),
        (("911", "beetle", "2cv"), 2, 2.0),
        (("nan", "inf"), 1, 1.0),
    ],
)
def test_a_number_is_the_class_of_that_name(names, value, index):
    assert_rows(LabelSpace(rank=Categorical(names)).encode({"rank": value}), [[index]])


@pytest.mark.parametrize("value", [0, 4, 1.5, "one", True])
def test_where_all_names_are_numbers_none_is_an_index(value):
    with pytest.raises(ValueError, match=r"label .* for attribute 'rank': use one of \['1', '2', '3'\]\.$"):
        LabelSpace(rank=Categorical(("1", "2", "3"))).encode(value)


@pytest.mark.parametrize(
    "label",
    ["italic", "", "Bold", -1, 3, 1.5, NAN, math.inf, True, False, b"bold", {"stroke": "italic"}],
)
def test_a_wrong_categorical_label_names_the_attribute_and_the_choices(label):
    with pytest.raises(ValueError, match=r"(?s)stroke.*thin.*regular.*bold.*0 to 2"):
        one().encode(label)


@pytest.mark.parametrize("value", [0.51, -0.51, NAN, math.inf, True, "0.1", [0.1]])
def test_a_wrong_continuous_label_names_the_attribute_and_the_interval(value):
    with pytest.raises(ValueError, match=r"(?s)slant.*-0\.5 to 0\.5 rad"):
        two().encode({"slant": value})


def test_an_unknown_attribute_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match=r"(?s)colour.*stroke.*slant"):
        two().encode({"colour": "red"})


@pytest.mark.parametrize("label", ["bold", 2, ["bold"]])
def test_a_bare_label_with_two_attributes_asks_for_a_dict(label):
    with pytest.raises(ValueError, match=r"(?s)dict.*stroke.*slant"):
        two().encode(label)


@pytest.mark.parametrize("labels", [[], ["bold"], ["bold"] * 3])
def test_the_number_of_labels_must_be_the_number_of_prompts(labels):
    with pytest.raises(ValueError, match=f"{len(labels)} labels for 2 prompts"):
        one().encode(labels, num_prompts=2)


@pytest.mark.parametrize("names", [(), ("only",), ("a", "a"), ("a", ""), ("a", 1), "thin"])
def test_a_categorical_needs_two_different_names(names):
    with pytest.raises(ValueError, match="names"):
        Categorical(names)


@pytest.mark.parametrize(
    "thresholds", [(), (0.2,), (0.2, 0.3, 0.4), (0.3, 0.2), (0.2, 0.2), (0.2, NAN), (0.2, math.inf), (True, 2.0), "ab", ("a", "b")]
)
def test_thresholds_are_increasing_numbers_between_the_classes(thresholds):
    with pytest.raises(ValueError, match="thresholds"):
        Categorical(("thin", "regular", "bold"), thresholds)


def test_thresholds_and_unit_are_kept_and_older_dicts_have_none():
    space = LabelSpace(stroke=Categorical(["thin", "regular", "bold"], [1, 2.5], "mean ink"))
    assert space.attributes["stroke"].thresholds == (1.0, 2.5)
    data = json.loads(json.dumps(space.to_dict()))
    assert data["stroke"].items() >= {"thresholds": [1.0, 2.5], "unit": "mean ink"}.items()
    assert LabelSpace.from_dict(data) == space != one()
    assert not {"thresholds", "unit"} & set(one().to_dict()["stroke"])
    assert LabelSpace.from_dict({"stroke": {"type": "categorical", "names": ["thin", "regular", "bold"]}}) == one()
    assert_rows(space.encode("bold"), [[2.0]])


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, 0.0), (-math.inf, 0.0), (0.0, NAN)])
def test_a_continuous_needs_a_finite_interval(low, high):
    with pytest.raises(ValueError, match="low < high"):
        Continuous(low, high)


def test_a_space_needs_attributes_of_a_known_type():
    with pytest.raises(ValueError, match="at least one attribute"):
        LabelSpace()
    with pytest.raises(ValueError, match="'stroke'.*tuple"):
        LabelSpace(stroke=("thin", "bold"))


def test_dict_round_trip_keeps_everything_and_the_order():
    space = two()
    data = space.to_dict()
    again = LabelSpace.from_dict(data)
    assert again == space
    assert list(again.attributes) == ["stroke", "slant"]
    assert again.to_dict() == data
    assert data["stroke"].items() >= {"type": "categorical", "names": ["thin", "regular", "bold"]}.items()
    assert data["slant"].items() >= {"type": "continuous", "low": -0.5, "high": 0.5, "unit": "rad"}.items()
    assert json.loads(json.dumps(data)) == data


def test_json_with_sorted_keys_keeps_the_order():
    # diffusers writes config.json so: a column would otherwise change its meaning
    data = json.loads(json.dumps(two().to_dict(), sort_keys=True))
    assert list(LabelSpace.from_dict(data).attributes) == ["stroke", "slant"]


def test_spaces_differ_by_order_by_names_and_by_bounds():
    space = two()
    assert space != LabelSpace(slant=space.attributes["slant"], stroke=space.attributes["stroke"])
    assert one() != LabelSpace(stroke=Categorical(("thin", "bold", "regular")))
    assert LabelSpace(slant=Continuous(-0.5, 0.5)) != LabelSpace(slant=Continuous(-0.5, 0.6))


def test_the_grid_has_every_combination_of_every_subset_the_smaller_first():
    space = LabelSpace(stroke=Categorical(("thin", "bold")), slant=Continuous(-1.0, 2.0), size=Categorical(("small", "bold")))
    grid = label_grid(space, bins=3)
    assert len(grid.names) == len(set(grid.names)) == 3 * 4 * 3 - 1 == len(grid.labels) == len(grid.spread)
    # a value that two attributes share is named with its attribute
    assert grid.names[:7] == ("thin", "stroke bold", "slant -0.5", "slant 0.5", "slant 1.5", "small", "size bold")
    assert grid.names[-1] == "stroke bold, slant 1.5, size bold"
    assert_rows(grid.labels[:3], [[0.0, NAN, NAN], [1.0, NAN, NAN], [NAN, -0.5, NAN]])
    assert_rows(grid.labels[-1:], [[1.0, 1.5, 1.0]])
    assert torch.equal(grid.spread[:, 1] > 0, ~grid.labels[:, 1].isnan()) and grid.spread[:, [0, 2]].max() == 0
    assert grid.spread[-1, 1] == 0.5  # half of a third of the interval
    given = (~grid.labels.isnan()).sum(1)
    assert torch.equal(given, given.sort().values)
    assert len(label_grid(space, bins=3, subsets=False).labels) == 2 * 3 * 2
    assert label_grid(LabelSpace(stroke=Categorical(("thin", "bold")))).labels.tolist() == [[0.0], [1.0]]


def test_a_grid_that_is_too_large_or_empty_is_refused():
    space = LabelSpace({f"a{i}": Categorical(("x", "y")) for i in range(12)})
    with pytest.raises(ValueError, match="531440 combinations, more than 4096: use fewer bins, or no subsets"):
        label_grid(space)
    assert len(label_grid(space, subsets=False).labels) == 4096
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        label_grid(space, bins=0)


def test_an_example_is_a_label_that_can_be_given():
    for space in (
        two(),
        LabelSpace(stroke=Categorical(("thin", "bold"))),
        LabelSpace(slant=Continuous(-1.0, 2.0)),
    ):
        row = space.encode(space.example())
        assert not row.isnan().any()
    assert LabelSpace(stroke=Categorical(("thin", "bold"))).example() == "bold"
    assert LabelSpace(slant=Continuous(-1.0, 2.0)).example() == 1.25


@pytest.mark.parametrize(
    "spec",
    [
        None,
        "categorical",
        {},
        {"type": "ordinal"},
        {"names": ["a", "b"]},
        {"type": "categorical"},
        {"type": "categorical", "names": 3},
        {"type": "categorical", "names": "abc"},
        {"type": "categorical", "names": ["a"]},
        {"type": "categorical", "names": ["a", "a"]},
        {"type": "categorical", "names": [["a"], ["b"]]},
        {"type": "categorical", "names": ["a", "b"], "thresholds": 3},
        {"type": "categorical", "names": ["a", "b"], "thresholds": "3"},
        {"type": "categorical", "names": ["a", "b"], "thresholds": [0.1, 0.2]},
        {"type": "continuous", "low": 0.0},
        {"type": "continuous", "low": "zero", "high": 1.0},
        {"type": "continuous", "low": None, "high": 1.0},
        {"type": "continuous", "low": 1.0, "high": 0.0},
        {"type": "continuous", "low": 0.0, "high": math.inf},
    ],
)
def test_a_malformed_attribute_is_a_value_error_with_its_name(spec):
    with pytest.raises(ValueError, match="stroke"):
        LabelSpace.from_dict({"stroke": spec})


@pytest.mark.parametrize("data", [None, [], "stroke", 3, {}])
def test_a_malformed_space_is_a_value_error(data):
    with pytest.raises(ValueError, match="label space"):
        LabelSpace.from_dict(data)
