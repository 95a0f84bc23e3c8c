"""The adapters in a denoiser, and the hook that mixes them with the base: base + Σ_i strength_i · (tuned_i − base).

All of it lives on the denoiser: pipelines that share a denoiser (`from_pipe`) share its adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .calls import CallWatch
from .heads import ControlHead
from .injection import (
    LabelInput,
    add_label_hook,
    load_lora_state_dict,
    lora_chosen,
    lora_layers,
    merged_weights,
    remove_label_hook,
    remove_lora,
    state_of,
    weights_replaced,
)
from .replay import first, with_first


STRENGTH_HOOK_NAME = "ctrl_strength"


@dataclass(frozen=True)
class Control:
    """One adapter in the denoiser. label: of its hooks at `injection_site`. adapter: what else was loaded with it."""

    name: str
    injection_site: str
    label: LabelInput
    adapter: Any


@dataclass(frozen=True)
class Active:
    """One adapter in one call. embedding: (n, D), one row a sample. strength: one number, or (n,) where the samples differ."""

    control: Control
    embedding: torch.Tensor
    strength: float | torch.Tensor


class StrengthHook(ModelHook):
    """On the denoiser itself: runs base + Σ strength · (tuned − base), and the base alone on steps that have no noise.

    With nothing active the denoiser is the base, bit for bit. One forward of the base and one an active adapter; the base's is
    spared where a single adapter has strength 1, unless `keeps_base` asks for the base's output beside (`base_output`). An adapter whose control
    head is alone needs the base's only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.controls: dict[str, Control] = {}
        self.layers: list[nn.Module] = []
        self.active: tuple[Active, ...] = ()
        self.watch: CallWatch | None = None
        self.keeps_base = False
        self.base_output: torch.Tensor | None = None
        self._merged: dict[str, dict[nn.Module, torch.Tensor] | None] = {}

    def begin(self, active: tuple[Active, ...], watch: CallWatch) -> None:
        """A pipeline's call begins: these adapters are on until `end`, and their weights do not change."""
        self.active, self.watch = active, watch

    def end(self) -> None:
        self.active, self.watch, self._merged = (), None, {}

    def new_forward(self, module: nn.Module, *args, **kwargs):
        if not self.active:
            return self._base(*args, **kwargs)
        sample = state_of(args, kwargs)
        given = self.watch.begin_call(len(sample))
        active = () if self.watch.is_deterministic() else self.active
        found = self._mixed(active, given, *args, **kwargs)
        if self.keeps_base:
            self._check_recorded(given, sample)
        output = first(found)
        seen = self.watch.end_call(output)
        return found if seen is output else with_first(found, seen)

    def _mixed(self, active: tuple[Active, ...], given: tuple[bool, ...], *args, **kwargs):
        if len(active) == 1 and _is(active[0].strength, 1.0) and not self.keeps_base:
            return self._tuned(active[0], given, *args, **kwargs)
        base = self._base(*args, **kwargs)
        if self.keeps_base:
            self.base_output = first(base)
        active = tuple(one for one in active if not _is(one.strength, 0.0))
        if not active:
            return base
        # those first: another adapter's call would leave them another time embedding
        first_ones = sorted(active, key=lambda one: not one.control.label.is_alone)
        found = {one.control.name: self._beside(base, one, given, *args, **kwargs) for one in first_ones}
        tuned = [found[one.control.name] for one in active]
        if len(active) == 1 and not isinstance(active[0].strength, torch.Tensor):
            if active[0].strength == 1.0:
                return tuned[0]
            return with_first(tuned[0], torch.lerp(first(base), first(tuned[0]), active[0].strength))
        start = total = first(base)
        for one, output in zip(active, tuned, strict=True):
            strength = one.strength
            if isinstance(strength, torch.Tensor):  # one a sample, and the same in each part of a guided batch
                strength = strength.to(start).repeat(len(given)).view(-1, *[1] * (start.ndim - 1))
            total = total + strength * (first(output) - start)
        return with_first(base, total)

    def _base(self, *args, **kwargs):
        with lora_chosen(self.layers, self.controls, None):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _beside(self, base, one: Active, given: tuple[bool, ...], *args, **kwargs):
        """`_tuned`, where the base's answer to the same call is at hand."""
        label = one.control.label
        if not label.is_alone:
            return self._tuned(one, given, *args, **kwargs)
        if any(given):
            label.embedding, label.guided = one.embedding, given
        try:
            return with_first(base, label.corrected(state_of(args, kwargs), first(base)))
        finally:
            label.embedding = label.time = None

    def _tuned(self, one: Active, given: tuple[bool, ...], *args, **kwargs):
        label, name = one.control.label, one.control.name
        weights = self._weights(name, state_of(args, kwargs).device)
        if any(given):
            label.embedding, label.guided = one.embedding, given
        try:
            # merged, a tuned call costs what the base's does; a small model would spend a quarter more on LoRA's products
            with weights_replaced(weights or {}), lora_chosen(self.layers, self.controls, None if weights else name):
                found = self.fn_ref.original_forward(*args, **kwargs)
            output = first(found)
            corrected = label.corrected(state_of(args, kwargs), output)
            return found if corrected is output else with_first(found, corrected)
        finally:
            label.embedding = label.time = None

    @torch.compiler.disable  # what a compiled denoiser is called with, not a part of it: else another call would compile it anew
    def _weights(self, name: str, device: torch.device) -> dict[nn.Module, torch.Tensor] | None:
        """`merged_weights` of an adapter, computed once a pipeline's call; None where gradients are wanted of LoRA's own."""
        if torch.is_grad_enabled():
            return None
        if name not in self._merged:
            self._merged[name] = merged_weights(self.layers, self.controls, name, device)
        return self._merged[name]

    def _check_recorded(self, given: tuple[bool, ...], sample: torch.Tensor) -> None:
        """particles.PathRecorder undoes one kind of guidance; for another its weights would be wrong."""
        what = None
        if len(self.watch.calls) > 1:
            what = "guidance by two calls of the denoiser a step"
        elif given == (True, False):
            what = "a guidance batch with the condition first"
        elif self.base_output.shape[1:] != sample.shape[1:]:
            what = "a denoiser that also predicts variances"
        if what is not None and not self.watch.guidance_is_unknown:
            raise ValueError(f"num_particles cannot yet be combined with {what}.")


def _is(strength: float | torch.Tensor, value: float) -> bool:
    return not isinstance(strength, torch.Tensor) and strength == value


def control_hook(denoiser: nn.Module) -> StrengthHook | None:
    """The denoiser's hook; None while it has no adapter."""
    return HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(STRENGTH_HOOK_NAME)


def add_control(
    denoiser: nn.Module,
    name: str,
    injection_site: str,
    lora: dict[str, torch.Tensor],
    adapter: Any = None,
    head: ControlHead | None = None,
) -> Control:
    """Puts an adapter's LoRA, label hooks and control head into the denoiser, not trainable, at rest.

    Raises:
        ValueError: if they do not fit; the denoiser is then as it was.
    """
    alone = head is not None and head.alone
    if alone and lora:
        raise ValueError("This adapter has LoRA, and its control head is alone: one of the two is another's.")
    if alone and lora_layers(denoiser, name):
        raise ValueError(
            f"This {type(denoiser).__name__} already carries a LoRA named {name!r}: give the adapter another adapter_name, or take the LoRA out first."
        )
    # whether a weight requires a gradient changes the bits of torch's products: the base keeps what it had
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    # and peft switches the adapters that are there off for the new one: a user's own LoRA stays on
    active = {module: module._active_adapter for module in denoiser.modules() if isinstance(module, BaseTunerLayer)}
    try:
        if not alone:
            load_lora_state_dict(denoiser, lora, name)
        try:
            label = add_label_hook(denoiser, injection_site, name, head)
        except ValueError:
            remove_lora(denoiser, name)
            raise
        denoiser.requires_grad_(False)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        # its own layers are at rest too: `fuse_lora` of a user's LoRA would put it into the base's weights
        for module in denoiser.modules():
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = active.get(module, [])
    hook = control_hook(denoiser)
    if hook is None:
        hook = StrengthHook()
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(hook, STRENGTH_HOOK_NAME)
    hook.controls[name] = Control(name, injection_site, label, adapter)
    hook.layers = _layers(denoiser, hook.controls)
    return hook.controls[name]


def remove_control(denoiser: nn.Module, name: str) -> None:
    """Takes an adapter out, and no LoRA that is not its own; without any, the denoiser is the base again, bit for bit."""
    hook = control_hook(denoiser)
    control = hook.controls.pop(name)
    remove_label_hook(denoiser, control.injection_site, name)
    if not control.label.is_alone:
        remove_lora(denoiser, name)
    hook.layers = _layers(denoiser, hook.controls)
    if not hook.controls:
        HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(STRENGTH_HOOK_NAME, recurse=False)


def check_lora(denoiser: nn.Module) -> None:
    """Finds the adapters' LoRA again before it is used or saved: diffusers has methods of its own for all LoRA in a denoiser.

    Raises:
        ValueError: where they have taken an adapter's out, or fused it into the base's weights.
    """
    hook = control_hook(denoiser)
    hook.layers = _layers(denoiser, hook.controls)
    for name, control in hook.controls.items():
        own = [layer for layer in hook.layers if name in layer.lora_A]
        if not own and not control.label.is_alone:
            raise ValueError(
                f"The LoRA of the label adapter {name!r} was taken out of this {type(denoiser).__name__}, by unload_lora_weights of a pipeline that shares "
                f"it, unload_lora or delete_adapters: call unload_ctrl_adapter({name!r}), and load_ctrl_adapter to put the adapter in again."
            )
        if any(name in layer.merged_adapters for layer in own):
            raise ValueError(
                f"The LoRA of the label adapter {name!r} was fused into the weights of this {type(denoiser).__name__}, which is no longer the base: "
                "call unfuse_lora(), and fuse_lora(adapter_names=[...]) without it."
            )


def _layers(denoiser: nn.Module, names: dict[str, Control]) -> list[nn.Module]:
    own = [name for name, control in names.items() if not control.label.is_alone]
    return list({id(layer): layer for name in own for layer in lora_layers(denoiser, name).values()}.values())
