"""What a label may be: named attributes, each a choice of names or a number in an interval.

A user writes `"bold"`, `2`, `{"stroke": "bold"}` or a list of these, one a prompt; the model reads a float tensor (B, A) with one
column an attribute and NaN where an attribute is not given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


Label = str | int | float | Mapping[str, Any] | None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str) -> float | None:
    """The finite number that a name is, or None."""
    try:
        return number if math.isfinite(number := float(name)) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Categorical:
    """One of several names. `names` are unique, non-empty strings; the label is the index into them.

    Names may be numbers, "1" or "0.5": such a number is then that class, whatever its index, and where all are numbers none is an index.

    Where the classes are ranges of a number, `thresholds` are the len(names) - 1 increasing values between them, in `unit`: for the
    reader of a card, since nothing is computed from them.
    """

    names: tuple[str, ...]
    thresholds: tuple[float, ...] | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise ValueError(f"A categorical attribute needs a list of names, got the string {self.names!r}.")
        names = tuple(self.names)
        object.__setattr__(self, "names", names)
        if len(names) < 2 or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f"A categorical attribute needs two or more different, non-empty names; got {list(names)}.")
        if self.thresholds is not None:
            if not isinstance(self.thresholds, (tuple, list)) or not all(_is_number(t) for t in self.thresholds):
                raise ValueError(f"The thresholds of a categorical attribute must be finite numbers, got {self.thresholds!r}.")
            thresholds = tuple(float(t) for t in self.thresholds)
            object.__setattr__(self, "thresholds", thresholds)
            if len(thresholds) != len(names) - 1 or any(a >= b for a, b in zip(thresholds, thresholds[1:], strict=False)):
                raise ValueError(f"{len(names)} classes need {len(names) - 1} increasing thresholds, got {list(thresholds)}.")

    def encode(self, value: Any, attribute: str) -> float:
        """Name or index -> index. Raises ValueError naming the attribute and what is allowed."""
        if isinstance(value, str) and value in self.names:
            return float(self.names.index(value))
        numbers = [_number(name) for name in self.names]
        if _is_number(value) and value in numbers:
            return float(numbers.index(value))
        indexed = None in numbers
        if indexed and _is_number(value) and float(value).is_integer() and 0 <= value < len(self.names):
            return float(value)
        raise ValueError(
            f"Unknown label {value!r} for attribute {attribute!r}: use one of {list(self.names)}"
            f"{f' or an index from 0 to {len(self.names) - 1}' if indexed else ''}."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; thresholds and unit only where there are any."""
        data: dict[str, Any] = {"type": "categorical", "names": list(self.names)}
        if self.thresholds is not None:
            data["thresholds"] = list(self.thresholds)
        return {**data, "unit": self.unit} if self.unit else data


@dataclass(frozen=True)
class Continuous:
    """A number in [low, high], in `unit`."""

    low: float
    high: float
    unit: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"A continuous attribute needs finite low < high; got low={self.low}, high={self.high}.")

    def encode(self, value: Any, attribute: str) -> float:
        """Number -> the same number as float. Raises ValueError outside [low, high]."""
        if _is_number(value) and self.low <= value <= self.high:
            return float(value)
        raise ValueError(
            f"Label {value!r} for attribute {attribute!r} is not allowed: use a number from {self.low} to {self.high}"
            f"{' ' + self.unit if self.unit else ''}."
        )

    def to_dict(self) -> dict[str, Any]:
        return {"type": "continuous", "low": self.low, "high": self.high, "unit": self.unit}


Attribute = Categorical | Continuous


class LabelSpace:
    """Named attributes in a fixed order: `LabelSpace(stroke=Categorical(("thin", "regular", "bold")))`."""

    def __init__(self, attributes: Mapping[str, Attribute] | None = None, **named: Attribute) -> None:
        self.attributes: dict[str, Attribute] = {**(attributes or {}), **named}
        if not self.attributes:
            raise ValueError("A label space needs at least one attribute.")
        for name, attribute in self.attributes.items():
            if not isinstance(attribute, (Categorical, Continuous)):
                raise ValueError(f"Attribute {name!r} must be Categorical or Continuous, got {type(attribute).__name__}.")

    def __len__(self) -> int:
        return len(self.attributes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelSpace) and list(self.attributes.items()) == list(other.attributes.items())

    def __repr__(self) -> str:
        return f"LabelSpace({', '.join(f'{name}={attribute!r}' for name, attribute in self.attributes.items())})"

    def encode_one(self, label: Label) -> list[float]:
        """One label -> one float an attribute, NaN where it is not given."""
        row = dict.fromkeys(self.attributes, float("nan"))
        if label is None:
            return list(row.values())
        if not isinstance(label, Mapping):
            if len(self) > 1:
                raise ValueError(
                    f"Label {label!r} does not say which attribute it belongs to: with several attributes write a dict with "
                    f"keys from {list(self.attributes)}."
                )
            label = {next(iter(self.attributes)): label}
        for name, value in label.items():
            if name not in self.attributes:
                raise ValueError(f"Unknown attribute {name!r}: this label space has {list(self.attributes)}.")
            if value is not None:
                row[name] = self.attributes[name].encode(value, name)
        return list(row.values())

    def encode(self, label: Label | Sequence[Label], num_prompts: int = 1) -> torch.Tensor:
        """Labels for `num_prompts` prompts -> float32 tensor (num_prompts, A); one label serves all prompts.

        Raises:
            ValueError: for an unknown name, index or attribute, or when a list's length is not the number of prompts.
        """
        if isinstance(label, torch.Tensor):
            label = label.tolist()
        if isinstance(label, (list, tuple)):
            if len(label) != num_prompts:
                raise ValueError(
                    f"Got {len(label)} labels for {num_prompts} prompt{'s' if num_prompts != 1 else ''}: give one label for all, "
                    "or a list with one a prompt."
                )
            rows = [self.encode_one(item) for item in label]
        else:
            rows = [self.encode_one(label)] * num_prompts
        return torch.tensor(rows, dtype=torch.float32)

    def example(self) -> str | float | dict[str, str | float]:
        """A label that a call could be given: "bold", or {"stroke": "bold", "slant": 0.5}."""
        found: dict[str, str | float] = {
            name: a.names[-1] if isinstance(a, Categorical) else float(f"{(a.low + 3 * a.high) / 4:.3g}")
            for name, a in self.attributes.items()
        }
        return found if len(found) > 1 else next(iter(found.values()))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Each attribute carries its column, because writers of JSON may sort the keys (diffusers' does)."""
        return {name: {**attribute.to_dict(), "column": i} for i, (name, attribute) in enumerate(self.attributes.items())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LabelSpace:
        """Inverse of `to_dict`. Raises ValueError for anything else."""
        if not isinstance(data, Mapping):
            raise ValueError(f"A label space is a mapping of attributes, got {type(data).__name__}.")
        attributes: dict[str, Attribute] = {}
        columns = {name: spec.get("column", i) if isinstance(spec, Mapping) else i for i, (name, spec) in enumerate(data.items())}
        if not all(isinstance(column, int) for column in columns.values()) or len(set(columns.values())) != len(columns):
            raise ValueError(f"The label space's columns must be different integers, got {columns}.")
        for name in sorted(columns, key=columns.__getitem__):
            spec = data[name]
            kind = spec.get("type") if isinstance(spec, Mapping) else None
            try:
                if kind == "categorical":
                    attributes[name] = Categorical(spec["names"], spec.get("thresholds"), str(spec.get("unit", "")))
                elif kind == "continuous":
                    attributes[name] = Continuous(float(spec["low"]), float(spec["high"]), str(spec.get("unit", "")))
                else:
                    raise ValueError(f"type must be 'categorical' or 'continuous', got {kind!r}")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"Attribute {name!r} of the label space cannot be read: {error}.") from error
        return cls(attributes)


@dataclass(frozen=True)
class LabelGrid:
    """Finitely many labels that stand for a label space, to train on and to judge by.

    labels: (M, A), NaN where an attribute is left free. spread: (M, A), half the width of the interval that a continuous attribute's
    label stands for; 0 elsewhere. names: M strings, such as "bold", "bold, left" or "slant 0.4, bold".
    """

    labels: torch.Tensor
    spread: torch.Tensor
    names: tuple[str, ...]


MAX_GRID = 4096


def label_grid(space: LabelSpace, bins: int = 5, subsets: bool = True) -> LabelGrid:
    """Every combination of the attributes' values; a continuous one is cut into `bins` equal intervals, its labels their centres.

    Args:
        subsets: also every combination of some of the attributes, the others free; those with fewer attributes come first.

    Raises:
        ValueError: if that makes more than 4,096 labels.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    choices: list[list[tuple[float, float, str] | None]] = []
    shared = [name for attribute in space.attributes.values() if isinstance(attribute, Categorical) for name in attribute.names]
    for name, attribute in space.attributes.items():
        if isinstance(attribute, Categorical):
            titles = [value if shared.count(value) == 1 else f"{name} {value}" for value in attribute.names]
            values: list[tuple[float, float, str] | None] = [(float(i), 0.0, title) for i, title in enumerate(titles)]
        else:
            half = (attribute.high - attribute.low) / (2 * bins)
            centres = [(attribute.low * (2 * (bins - i) - 1) + attribute.high * (2 * i + 1)) / (2 * bins) for i in range(bins)]
            values = [(centre, half, f"{name} {centre:.3g}") for centre in centres]
        choices.append([*values, None] if subsets else values)
    count = math.prod(map(len, choices)) - subsets
    if count > MAX_GRID:
        raise ValueError(f"This label space has {count} combinations, more than {MAX_GRID}: use fewer bins, or no subsets.")
    rows = [row for row in itertools.product(*choices) if any(value is not None for value in row)]
    rows.sort(key=lambda row: sum(value is not None for value in row))
    return LabelGrid(
        torch.tensor([[math.nan if value is None else value[0] for value in row] for row in rows]),
        torch.tensor([[0.0 if value is None else value[1] for value in row] for row in rows]),
        tuple(", ".join(value[2] for value in row if value is not None) for row in rows),
    )
