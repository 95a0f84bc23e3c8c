"""What a label may be: named attributes, each a choice of names or a number in an interval.

A user writes `"bold"`, `2`, `{"stroke": "bold"}` or a list of these, one a prompt; the model reads a float tensor (B, A) with one
column an attribute and NaN where an attribute is not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


Label = str | int | float | Mapping[str, Any] | None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Categorical:
    """One of several names. `names` are unique, non-empty strings; the label is the index into them.

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
        if _is_number(value) and float(value).is_integer() and 0 <= value < len(self.names):
            return float(value)
        raise ValueError(
            f"Unknown label {value!r} for attribute {attribute!r}: use one of {list(self.names)} or an index from 0 to "
            f"{len(self.names) - 1}."
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

    def values(self) -> list[dict[str, str]]:
        """Every single named label of the categorical attributes, in order: [{"stroke": "thin"}, …]."""
        return [
            {name: value}
            for name, attribute in self.attributes.items()
            if isinstance(attribute, Categorical)
            for value in attribute.names
        ]

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
