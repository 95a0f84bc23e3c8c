"""The denoiser as a policy: called, it is the tuned model; `.reference()` is the pre-trained one, from the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .conditions import Condition
from .heads import coarse_grid
from .injection import (
    DEFAULT_TARGETS,
    add_label_hook,
    add_lora,
    find_injection_site,
    lora_disabled,
    lora_layers,
    site_width,
    state_of,
)
from .label_encoder import LabelEncoder
from .labels import LabelSpace
from .replay import first


# what a denoiser answered in one call, and its time embedding (1 or rows, D)
Answer = tuple[torch.Tensor, torch.Tensor]


class Policy(nn.Module):
    """Owns a denoiser with LoRA on it and the label encoder, so that whatever wraps a module (DDP, accelerate) sees both.

    The law that is tuned is the sampler's own, classifier-free guidance included: both `__call__` and `reference` return the
    *guided* output. The unconditional half of a guided batch gets the null label, with the LoRA on, as the pipeline does it.

    Args:
        denoiser: any module with the call `denoiser(sample, timestep, ...)` returning a tensor, or an object with `.sample`.
        label_encoder: built from `label_space` if not given.
        label_space: needed when no label encoder is given.
        lora_rank, lora_targets: where LoRA goes; `lora_rank=None` if the denoiser already carries it, 0 for none, with a control head alone.
        injection_site: module path of the time embedding, where it has an unusual name.
        guidance_scale: classifier-free guidance; 1 means none (and half the cost).
        checkpointing: recompute each denoiser call during backward instead of keeping its activations, where a gradient flows. A whole
            call is recomputed. The denoiser's own `enable_gradient_checkpointing()` works too, beside this or alone: its blocks are
            then recomputed with the label and the LoRA as they were.
        control_head: width of a control head (heads.py), 0 for none; where the label encoder is not given. It needs shape: (C, H, W) of a state.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        label_encoder: LabelEncoder | None = None,
        *,
        label_space: LabelSpace | None = None,
        lora_rank: int | None = 16,
        lora_targets: tuple[str, ...] | list[str] | str = DEFAULT_TARGETS,
        injection_site: str | None = None,
        gamma_range: tuple[float, float] | None = None,
        guidance_scale: float = 1.0,
        checkpointing: bool = False,
        control_head: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.injection_site, site = find_injection_site(denoiser, injection_site)
        if control_head and shape is None:
            raise ValueError("A policy with a control_head needs shape: (C, H, W) of a state.")
        if lora_rank == 0 and not control_head and label_encoder is None:
            raise ValueError("lora_rank = 0 leaves a control head alone, and there is none: give its width, control_head=512.")
        if label_encoder is None:
            if label_space is None:
                raise ValueError("Policy needs a label_encoder, or a label_space to build one from.")
            head = {"grid": list(coarse_grid(shape)), "width": control_head} if control_head else None
            if head is not None and lora_rank == 0:
                head["alone"] = True
            label_encoder = LabelEncoder(label_space.to_dict(), site_width(site), gamma_range, head)
        self.shares_base = label_encoder.is_alone
        if self.shares_base and (lora_rank or lora_layers(denoiser)):
            raise ValueError(
                "This label encoder's control head is alone, and LoRA is not for it: lora_rank=0, on a denoiser without any."
            )
        if lora_rank == 0 and not self.shares_base:
            raise ValueError("lora_rank = 0 is for a label encoder whose control head is alone, and this one's is not.")
        if lora_rank:
            add_lora(denoiser, lora_rank, lora_targets)
        elif lora_rank == 0:
            denoiser.requires_grad_(False)
        self.denoiser = denoiser
        self.label_encoder = label_encoder
        self.guidance_scale = guidance_scale
        self.checkpointing = checkpointing
        self._hook = add_label_hook(denoiser, injection_site, head=label_encoder.control_head)
        self._lora_layers = lora_layers(denoiser)
        self._lora = list(self._lora_layers.values())
        self._merged: dict[str, torch.Tensor] | None = None
        self._noted: list[Answer] | None = None
        self._known: Iterator[Answer] | None = None

    @property
    def label_space(self) -> LabelSpace:
        return self.label_encoder.label_space

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        labels: torch.Tensor,
        gamma: torch.Tensor | float | None = None,
        prompt_embeds: torch.Tensor | Condition | None = None,
        null_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The tuned model's guided output at (x_k, t_k): (B, C, *).

        Args:
            sample: x_k, (B, C, *). timestep: t_k, one for the batch. labels: (B, A), NaN where not given. gamma: (B,) or float.
            prompt_embeds: (B, L, D), given to the denoiser as `encoder_hidden_states`; or all that the pipeline gives it, as
                `record_conditions` found it; or None for an unconditional denoiser. null_embeds: (B, L, D), for guidance with the first.

        Raises:
            ValueError: for a number of labels that is not the batch's, guidance without null_embeds, or conditions that were
                recorded with another guidance_scale than the policy's.
        """
        if len(labels) != len(sample):
            raise ValueError(f"Got {len(labels)} labels for {len(sample)} samples: one a sample is needed.")
        embedding = self.label_encoder(labels, gamma)
        return self._call(self._tuned, sample, timestep, prompt_embeds, null_embeds, embedding)

    def reference(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        prompt_embeds: torch.Tensor | Condition | None = None,
        null_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The pre-trained model's guided output, bit for bit; gradients flow to `sample` only."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and sample.requires_grad):  # nothing else in it has a gradient
            return self._call(self._base, sample, timestep, prompt_embeds, null_embeds)

    def both(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        labels: torch.Tensor,
        gamma: torch.Tensor | float | None = None,
        prompt_embeds: torch.Tensor | Condition | None = None,
        null_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` and `reference`: by one call of the denoiser where the control head is alone, but for calls that are recomputed."""
        if not self.shares_base or (self.checkpointing and torch.is_grad_enabled()):
            tuned = self(sample, timestep, labels, gamma, prompt_embeds, null_embeds)
            return tuned, self.reference(sample, timestep, prompt_embeds, null_embeds)
        with self.noted() as answers:
            tuned = self(sample, timestep, labels, gamma, prompt_embeds, null_embeds)
        with self.known(answers):
            return tuned, self.reference(sample, timestep, prompt_embeds, null_embeds)

    @contextmanager
    def uncheckpointed(self) -> Iterator[None]:
        """Within the block no whole call is recomputed: for gradients that are taken call by call, which would gain nothing by it."""
        before, self.checkpointing = self.checkpointing, False
        try:
            yield
        finally:
            self.checkpointing = before

    def _call(self, function, *args) -> torch.Tensor:
        if torch.is_grad_enabled():
            for module in self._checkpointed_modules():
                module._gradient_checkpointing_func = self._checkpointed_block
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)

    def _checkpointed_modules(self) -> list[nn.Module]:
        return [module for module in self.denoiser.modules() if getattr(module, "gradient_checkpointing", False)]

    def _checkpointed_block(self, block, *args) -> torch.Tensor:
        """torch's checkpoint of one block, recomputed with the label and the LoRA's bypass of its forward.

        Without that a block of the reference would be differentiated with the LoRA on, and one that embeds the time itself (DiT's)
        without its label.
        """
        embedding, bypassed = self._hook.embedding, [layer for layer in self._lora if layer._disable_adapters]

        @contextmanager
        def as_it_was() -> Iterator[None]:
            before, self._hook.embedding = self._hook.embedding, embedding
            try:
                with lora_disabled(bypassed):
                    yield
            finally:
                self._hook.embedding = before

        def again(*given):
            if torch.compiler.is_compiling():  # the graph itself is recomputed, and it is of this label and bypass
                return block(*given)
            with as_it_was():
                return block(*given)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

    def _tuned(self, sample, timestep, prompt_embeds, null_embeds, embedding) -> torch.Tensor:
        if self._merged is None:
            return self._guided(sample, timestep, prompt_embeds, null_embeds, embedding)
        with lora_disabled(self._lora):
            return self._guided(sample, timestep, prompt_embeds, null_embeds, embedding, self._merged)

    def _base(self, sample, timestep, prompt_embeds, null_embeds) -> torch.Tensor:
        with lora_disabled(self._lora):
            return self._guided(sample, timestep, prompt_embeds, null_embeds)

    @contextmanager
    def merged(self, enabled: bool = True) -> Iterator[None]:
        """Within the block the tuned model runs with W + BA computed once, in place of W and two more layers beside each.

        The same function of the same parameters, gradients included, at two thirds of the cost on small models; worth it wherever
        the base's weights are float32 and the parameters do not change within the block (one update, or sampling). Does nothing
        where the denoiser checkpoints its blocks, which are recomputed after the merged weights are gone.
        """
        layers = self._lora_layers if enabled and not self._checkpointed_modules() else {}
        if layers:
            self._merged = {
                f"{name}.base_layer.weight": layer.get_base_layer().weight + layer.get_delta_weight(layer.active_adapters[0])
                for name, layer in layers.items()
            }
        try:
            yield
        finally:
            self._merged = None

    def _guided(self, sample, timestep, prompt_embeds, null_embeds, embedding=None, weights=None) -> torch.Tensor:
        def call(args: tuple[Any, ...], kwargs: dict[str, Any], added: torch.Tensor | None) -> torch.Tensor:
            return self._denoise(args, kwargs, added, weights)

        if isinstance(prompt_embeds, Condition):
            asked = prompt_embeds.plan.guidance_scale
            if self.guidance_scale != asked:
                raise ValueError(
                    f"The policy's guidance_scale is {self.guidance_scale}, but its conditions were recorded with {asked}: the law "
                    "that is tuned must be the sampler's own."
                )
            return prompt_embeds.output(call, sample, timestep, embedding)
        if self.guidance_scale == 1.0 or prompt_embeds is None:
            kwargs = {} if prompt_embeds is None else {"encoder_hidden_states": prompt_embeds}
            return call((sample, timestep), kwargs, embedding)
        if null_embeds is None:
            raise ValueError(f"guidance_scale={self.guidance_scale} needs null_embeds beside prompt_embeds.")
        if embedding is not None:
            embedding = torch.cat([torch.zeros_like(embedding), embedding])
        both = call(
            (torch.cat([sample, sample]), timestep), {"encoder_hidden_states": torch.cat([null_embeds, prompt_embeds])}, embedding
        )
        unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _denoise(self, args, kwargs, embedding, weights) -> torch.Tensor:
        """One call of the denoiser, with a row of `embedding` (rows, D) for each row of its batch."""
        hook = self._hook
        hook.embedding = embedding
        try:
            if self._known is not None:
                output, hook.time = next(self._known)
            elif weights is None:
                output = first(self.denoiser(*args, **kwargs))
            else:
                # a weight tied to a merged one keeps W, as beside LoRA it does; and nothing looks through all modules for such
                output = first(functional_call(self.denoiser, weights, args, kwargs, tie_weights=False))
            if self._noted is not None:
                self._noted.append((output, hook.time))
            return hook.corrected(state_of(args, kwargs), output)
        finally:
            hook.embedding = hook.time = None

    @contextmanager
    def noted(self) -> Iterator[list[Answer]]:
        """Within the block the list gets what the denoiser itself answers, call by call, with its graph where it has one."""
        self._noted = []
        try:
            yield self._noted
        finally:
            self._noted = None

    @contextmanager
    def known(self, answers: list[Answer]) -> Iterator[None]:
        """Within the block the denoiser is not called: these are its answers. For learning the control head alone, which sees nothing else of it."""
        self._known = iter(answers)
        try:
            yield
        finally:
            self._known = None

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """{"lora": [...], "label_encoder": [...], "control_head": [...]}, those that there are: the groups that training moves."""
        encoder = self.label_encoder
        groups = {} if self.shares_base else {"lora": [p for p in self.denoiser.parameters() if p.requires_grad]}
        groups["label_encoder"] = list(encoder.tables)
        return groups if encoder.control_head is None else groups | {"control_head": list(encoder.control_head.parameters())}

    def lora_up(self) -> list[torch.Tensor]:
        """LoRA's B of each layer: all zero where it changes nothing."""
        return [layer.lora_B[name].weight for layer in self._lora for name in layer.active_adapters if name in layer.lora_B]

    def roots(self) -> list[torch.Tensor]:
        """Where the graph of a tuned call ends: the trainable parameters; within `merged` the merged weights in place of the LoRA's."""
        parameters = [parameter for group in self.trainable_parameters().values() for parameter in group]
        if self._merged is None:
            return parameters
        merged = {id(parameter) for layer in self._lora for parameter in layer.parameters()}
        return [*self._merged.values(), *(parameter for parameter in parameters if id(parameter) not in merged)]
