"""Labels -> an embedding that is added to the denoiser's time embedding, and one for the control head. Exactly zero at the start, and always
for "no label"."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .heads import LABEL_WIDTH, ControlHead, check_head
from .labels import Categorical, LabelSpace


def place_in_range(gamma: torch.Tensor, gamma_range: tuple[float, float]) -> torch.Tensor:
    """log gamma, scaled so that the range is [-1, 1]."""
    low, high = (torch.tensor(float(g)).log().item() for g in gamma_range)
    return (gamma.log() - low) / (high - low) * 2 - 1


class LabelEncoder(ModelMixin, ConfigMixin):
    """One learned table (or, for a continuous attribute, one linear map of polynomial features) an attribute, summed.

    Every embedding starts at zero, so a fresh encoder changes nothing; an attribute that is not given (NaN) is multiplied out,
    so "no label" stays exactly zero whatever training and weight decay do. If the adapter is trained for a range of gamma,
    each label's embedding is a quadratic in normalised log gamma.

    Args:
        label_space: `LabelSpace.to_dict()` (kept in config.json).
        embedding_dim: width of the time embedding it is added to.
        gamma_range: (low, high) of the gamma it is trained for, or None if gamma is fixed.
        head: {"grid": [C, h, w], "width"} of a control head (heads.py), or None for none. The embedding is then LABEL_WIDTH longer: that end
            of it is the head's. With "alone": true it is nothing else: nothing is added to the time embedding.
    """

    CONTINUOUS_DEGREE = 3

    @register_to_config
    def __init__(
        self,
        label_space: dict[str, Any],
        embedding_dim: int,
        gamma_range: tuple[float, float] | None = None,
        head: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.label_space = LabelSpace.from_dict(label_space)
        if gamma_range is not None and not 0 < gamma_range[0] < gamma_range[1]:
            raise ValueError(f"gamma_range must be 0 < low < high, got {tuple(gamma_range)}.")
        self.gamma_terms = 1 if gamma_range is None else 3
        if head is not None:
            check_head(head)
        alone = head is not None and "alone" in head
        self.width = (0 if alone else embedding_dim) + (0 if head is None else LABEL_WIDTH)
        self.tables = nn.ParameterList()
        for attribute in self.label_space.attributes.values():
            rows = len(attribute.names) if isinstance(attribute, Categorical) else self.CONTINUOUS_DEGREE + 1
            self.tables.append(nn.Parameter(torch.zeros(rows, self.gamma_terms * self.width)))
        self.control_head = None if head is None else ControlHead(tuple(head["grid"]), head["width"], embedding_dim, alone)

    @property
    def is_alone(self) -> bool:
        """Whether all that it says goes to a control head: the denoiser is told nothing, and there is no LoRA."""
        return self.control_head is not None and self.control_head.alone

    def forward(self, labels: torch.Tensor, gamma: torch.Tensor | float | None = None) -> torch.Tensor:
        """(B, A) labels, NaN where not given, and (B,) gamma -> (B, embedding_dim), LABEL_WIDTH longer with a head, or that alone."""
        dtype, device = self.tables[0].dtype, self.tables[0].device
        labels = labels.to(device)
        total = torch.zeros(len(labels), self.gamma_terms * self.width, dtype=dtype, device=device)
        for column, (attribute, table) in enumerate(zip(self.label_space.attributes.values(), self.tables, strict=True)):
            given = ~labels[:, column].isnan()
            if isinstance(attribute, Categorical):
                given = given & (labels[:, column] != -1)  # integer labels cannot be NaN: -1 is their "not given"
            value = torch.where(given, labels[:, column], 0.0 if isinstance(attribute, Categorical) else attribute.low)
            if isinstance(attribute, Categorical):
                embedded = table[value.long()]
            else:
                unit = (2 * (value.to(dtype) - attribute.low) / (attribute.high - attribute.low) - 1).unsqueeze(1)
                embedded = unit ** torch.arange(self.CONTINUOUS_DEGREE + 1, dtype=dtype, device=device) @ table
            total = total + embedded * given.unsqueeze(1).to(dtype)
        if self.gamma_terms == 1:
            return total
        powers = self._log_gamma(gamma, len(labels)) ** torch.arange(3, dtype=dtype, device=device)
        return torch.einsum("bj,bjd->bd", powers, total.unflatten(1, (3, self.width)))

    def _log_gamma(self, gamma: torch.Tensor | float | None, batch_size: int) -> torch.Tensor:
        """(B, 1), see `place_in_range`; gamma = 1 where it is not given."""
        gamma = torch.as_tensor(1.0 if gamma is None else gamma, dtype=self.tables[0].dtype, device=self.tables[0].device)
        return place_in_range(gamma, self.config.gamma_range).expand(batch_size).unsqueeze(1)
