"""Where the label enters a denoiser: LoRA on its layers, one hook that adds the label embedding to its time embedding, and a control head.

Both go in and come out of any diffusers denoiser (U-Net or transformer) without touching its class or its state-dict keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from .heads import LABEL_WIDTH, ControlHead


SITE_NAMES = ("time_embedding", "timestep_embedder", "time_embedder")
HOOK_NAME = "ctrl_label"
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def find_injection_sites(denoiser: nn.Module, injection_site: str | None = None) -> tuple[str, list[nn.Module]]:
    """Path and modules of the denoiser's time embedding, to whose output (B, D) the label is added.

    Most denoisers embed the time once. Where every block does it anew (DiT), the path has `*` in place of the blocks' numbers, and
    the label is added in all of them.

    Args:
        injection_site: a module path inside the denoiser, for models whose time embedding has another name; `*` for any number.

    Raises:
        ValueError: if there is no such module; the message lists candidates.
    """
    modules = dict(denoiser.named_modules())
    if injection_site is not None:
        found = [name for name in modules if name and _matches(name, injection_site)]
        if not found:
            raise ValueError(f"{type(denoiser).__name__} has no module {injection_site!r}. {_candidates(modules)}")
        return injection_site, [modules[name] for name in found]
    found = [name for name in modules if name.rsplit(".", 1)[-1] in SITE_NAMES]
    if not found:
        raise ValueError(
            f"No time embedding named {', '.join(SITE_NAMES)} was found in {type(denoiser).__name__}: pass "
            f"injection_site='path.of.module'. {_candidates(modules)}"
        )
    name = min(found, key=lambda n: (n.count("."), len(n)))
    pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
    alike = [n for n in found if _matches(n, pattern)]
    return (name if len(alike) == 1 else pattern), [modules[n] for n in alike]


def find_injection_site(denoiser: nn.Module, injection_site: str | None = None) -> tuple[str, nn.Module]:
    """`find_injection_sites`, with the first of the modules only: they are all alike."""
    path, modules = find_injection_sites(denoiser, injection_site)
    return path, modules[0]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(
        part == want or (want == "*" and part.isdigit()) for part, want in zip(parts, wanted, strict=True)
    )


def _candidates(modules: dict[str, nn.Module]) -> str:
    last = {name: name.rsplit(".", 1)[-1] for name in modules}
    names = [name for name in modules if "time" in last[name]] + [name for name in modules if "emb" in last[name]]
    if not names:
        return "No module here has 'time' or 'emb' in its name."
    return f"Candidates: {', '.join(list(dict.fromkeys(names))[:12])}."


def site_width(site: nn.Module) -> int:
    """Width D of the site's output: that of its last linear layer."""
    linears = [module for module in site.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"The injection site {type(site).__name__} has no linear layer, so its width is unknown.")
    return linears[-1].out_features


class LabelInput:
    """What one adapter adds in the denoiser's current call.

    embedding: (n, D), one row a sample, or None for nothing; with a head longer, the end being the head's. guided: a batch of len(guided)·n rows
    is a guidance batch; its parts get the label (True) or none (False). head: the adapter's control head. time: the denoiser's own time
    embedding in this call, (B or 1, D), without the label.
    """

    def __init__(self, head: ControlHead | None = None) -> None:
        self.head = head
        self.embedding: torch.Tensor | None = None
        self.guided: tuple[bool, ...] = (False, True)
        self.time: torch.Tensor | None = None

    @property
    def is_alone(self) -> bool:
        """Whether the denoiser itself is told nothing: all is the control head's."""
        return self.head is not None and self.head.alone

    def rows(self, output: torch.Tensor) -> torch.Tensor:
        """The embedding for an output (B, *), in its dtype and on its device."""
        embedding = self.embedding.to(output)
        if len(output) == len(embedding):
            return embedding
        if len(output) != len(self.guided) * len(embedding):
            raise ValueError(f"Got {len(embedding)} labels for a denoiser batch of {len(output)}: one a sample is needed.")
        return torch.cat([embedding if given else torch.zeros_like(embedding) for given in self.guided])

    def corrected(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The denoiser's output at these states, (B, *), with what the control head adds."""
        if self.head is None or self.embedding is None:
            return output
        self.head.to(output.device)
        return self.head(sample, output, self.time.expand(len(output), -1), self.rows(output)[:, -LABEL_WIDTH:])


def state_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The first tensor of a denoiser's arguments: the states, (B, *)."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


class LabelHook(ModelHook):
    """Adds the label's embedding to the output (B, D) of one time embedding."""

    def __init__(self, label: LabelInput) -> None:
        super().__init__()
        self.label = label

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        if self.label.head is not None:
            self.label.time = output.detach()
        if self.label.embedding is None:
            return output
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f"The injection site {type(module).__name__} gives {shape}; a tensor (batch, width) is needed.")
        return output if self.label.is_alone else output + self.label.rows(output)[:, : output.shape[1]]


def add_label_hook(
    denoiser: nn.Module, injection_site: str | None = None, adapter_name: str = "default", head: ControlHead | None = None
) -> LabelInput:
    """Registers a hook on each of the denoiser's time embeddings; with no embedding set they change nothing.

    head: the adapter's control head, for `LabelInput.corrected`, which whoever calls the denoiser applies.
    """
    _, sites = find_injection_sites(denoiser, injection_site)
    label, name = LabelInput(head), f"{HOOK_NAME}.{adapter_name}"
    registries = [HookRegistry.check_if_exists_or_initialize(site) for site in sites]
    if any(registry.get_hook(name) is not None for registry in registries):
        raise ValueError(f"This denoiser already carries a label adapter named {adapter_name!r}: unload it first.")
    for registry in registries:
        registry.register_hook(LabelHook(label), name)
    return label


def remove_label_hook(denoiser: nn.Module, injection_site: str | None = None, adapter_name: str = "default") -> None:
    for site in find_injection_sites(denoiser, injection_site)[1]:
        HookRegistry.check_if_exists_or_initialize(site).remove_hook(f"{HOOK_NAME}.{adapter_name}", recurse=False)


def add_lora(
    denoiser: nn.Module,
    rank: int,
    targets: Sequence[str] | str = DEFAULT_TARGETS,
    adapter_name: str = "default",
    rank_pattern: dict[str, int] | None = None,
) -> None:
    """Puts LoRA (alpha = rank, so scale 1; B = 0, so no change yet) on the denoiser's `targets`, and freezes all else.

    Args:
        targets: suffixes of module names, or one regular expression that must match the whole module name.

    Raises:
        ValueError: if no layer matches.
    """
    targets = targets if isinstance(targets, str) else list(targets)
    alpha_pattern = dict(rank_pattern or {})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        init_lora_weights=True,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=alpha_pattern,
    )
    if lora_layers(denoiser, adapter_name):
        raise ValueError(f"This {type(denoiser).__name__} already carries a LoRA named {adapter_name!r}: take it out first.")
    denoiser.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # another adapter is in: that is allowed
            inject_adapter_in_model(config, denoiser, adapter_name=adapter_name)
    except ValueError as error:
        remove_lora(denoiser, adapter_name)
        raise ValueError(f"LoRA cannot be put on {type(denoiser).__name__} with targets {targets}: {error}") from error


def lora_layers(denoiser: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Module path -> LoRA layer, for the layers that carry this adapter."""
    return {
        name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def other_lora(module: nn.Module, names: Collection[str]) -> bool:
    """Whether it has layers of peft's that carry anything but the adapters `names`, or nothing any more."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    return any(not isinstance(layer, LoraLayer) or not layer.lora_A or set(layer.lora_A) - set(names) for layer in layers)


def lora_state_dict(denoiser: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """LoRA weights, keys as `down_blocks.0….to_q.lora_A.weight`, detached, on the CPU."""
    state = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def load_lora_state_dict(denoiser: nn.Module, state: dict[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Puts LoRA onto exactly the layers that `state` names, with the ranks it has, and loads the weights.

    Raises:
        ValueError: if a layer does not exist or a shape does not fit; the denoiser is then left without the adapter.
    """
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in state.items() if key.endswith(".lora_A.weight")}
    modules = dict(denoiser.named_modules())
    for name in ranks:
        if name not in modules:
            raise ValueError(f"The LoRA has weights for {name!r}, which {type(denoiser).__name__} does not have.")
        if f"{name}.lora_B.weight" not in state:
            raise ValueError(f"The LoRA has no {name}.lora_B.weight beside its lora_A.")
        # before the layers are built: a stranger's shapes must not decide how much is allocated
        down, up, weight = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], getattr(modules[name], "weight", None)
        if weight is None or down.shape[1:2] != weight.shape[1:2] or up.shape[:2] != (weight.shape[0], len(down)):
            raise ValueError(
                f"The LoRA does not fit {type(denoiser).__name__}: {name}, a {type(modules[name]).__name__}, has weights "
                f"{list(down.shape)} and {list(up.shape)}."
            )
    if not ranks or len(state) != 2 * len(ranks):
        raise ValueError("The LoRA's keys are not pairs of NAME.lora_A.weight and NAME.lora_B.weight.")
    # ^…$ would be read as a suffix list's entry; the patterns here are whole module names
    pattern = "|".join(name.replace(".", r"\.") for name in ranks)
    rank_pattern = {f"^{name.replace('.', chr(92) + '.')}$": rank for name, rank in ranks.items()}
    add_lora(denoiser, next(iter(ranks.values())), f"({pattern})", adapter_name, rank_pattern)
    try:
        result = set_peft_model_state_dict(denoiser, state, adapter_name=adapter_name)
    except RuntimeError as error:
        remove_lora(denoiser, adapter_name)
        raise ValueError(f"The LoRA does not fit {type(denoiser).__name__}: {str(error).splitlines()[-1].strip()}") from error
    if result.unexpected_keys:
        remove_lora(denoiser, adapter_name)
        raise ValueError(f"The LoRA has keys that {type(denoiser).__name__} has no place for: {result.unexpected_keys[:3]}.")


def remove_lora(denoiser: nn.Module, adapter_name: str = "default") -> None:
    """Takes the adapter out again; layers left without any adapter become the plain layers they were.

    Other adapters keep what they had: peft would activate one in place of the one that leaves, and make it trainable.
    """
    trained = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    for name, layer in lora_layers(denoiser, adapter_name).items():
        active = [other for other in layer.active_adapters if other != adapter_name]
        layer._active_adapter = active
        layer.delete_adapter(adapter_name)
        layer._active_adapter = active
        if not layer.lora_A:
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
    for parameter in denoiser.parameters():
        parameter.requires_grad_(trained[parameter])
    if not any(isinstance(module, BaseTunerLayer) for module in denoiser.modules()):
        denoiser.__dict__.pop("peft_config", None)
    elif adapter_name in getattr(denoiser, "peft_config", {}):
        del denoiser.peft_config[adapter_name]


@contextmanager
def lora_disabled(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Runs the block with these LoRA layers bypassed: the base, bit for bit.

    peft's `enable_adapters` also flips `requires_grad`, which would cut the layers out of a graph that is being built; only the
    bypass flag is wanted here.
    """
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


@contextmanager
def lora_chosen(layers: Sequence[BaseTunerLayer], names: Collection[str], chosen: str | None) -> Iterator[None]:
    """Runs the block with `chosen`, or none, of the adapters `names` on; adapters of other names stay as they are.

    By flags alone, like `lora_disabled`. A layer on which nothing is on is bypassed: the base, bit for bit. Adapters that were fused
    (`fuse_lora`) are in W, and stay there.
    """
    for layer in layers:
        if layer._disable_adapters and layer.merged:  # `disable_lora` takes fused LoRA out again: peft does so in its next forward
            layer.unmerge()
    before = [(layer._active_adapter, layer._disable_adapters, layer.merged_adapters) for layer in layers]
    for layer in layers:
        others = _others(layer, names)
        on = [*others, chosen] if chosen in layer.lora_A else others
        # told of what is fused, peft would leave `chosen` out, or, with nothing on, take it out of W
        layer._active_adapter, layer._disable_adapters, layer.merged_adapters = on, not on, []
    try:
        yield
    finally:
        for layer, (active, disabled, merged) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters, layer.merged_adapters = active, disabled, merged


def _others(layer: LoraLayer, names: Collection[str]) -> list[str]:
    """The adapters besides `names` that peft would apply to W here: none where one is fused, W is all then."""
    if layer._disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name not in names and name in layer.lora_A]


# of the copy that `merged_weights` makes; beyond that a model is large, and two small products beside each large one are cheap
MERGED_BYTES = 2**28


@torch.no_grad()
def merged_weights(
    layers: Sequence[LoraLayer], names: Collection[str], chosen: str, device: torch.device
) -> dict[nn.Module, torch.Tensor] | None:
    """W + BA of the layers on which `lora_chosen` would leave this adapter alone, by the module that holds W.

    None where that is not a plain copy in float32: half precision would round BA away, weights elsewhere than on `device` are moved layer
    by layer by an offloading hook, and other adapters may be switched while the copy is in use.
    """
    found: dict[nn.Module, torch.Tensor] = {}
    for layer in layers:
        if _others(layer, names) or (layer._disable_adapters and layer.merged):  # the latter is about to leave W: see `lora_chosen`
            return None
        if chosen in layer.lora_A:
            module = layer.get_base_layer()
            # not quantized, nor dealt out to other processes
            plain = type(module.weight.data) is torch.Tensor and module.weight.dtype == torch.float32
            if not plain or module.weight.device != device:
                return None
            found[module] = module.weight
    if not found or sum(weight.nbytes for weight in found.values()) > MERGED_BYTES:
        return None
    deltas = {layer.get_base_layer(): layer.get_delta_weight(chosen) for layer in layers if chosen in layer.lora_A}
    return {module: weight.detach() + deltas[module] for module, weight in found.items()}


@contextmanager
def weights_replaced(weights: dict[nn.Module, torch.Tensor]) -> Iterator[None]:
    """Runs the block with other weights in these modules; the parameters themselves are not touched."""
    before = {module: module._parameters["weight"] for module in weights}
    for module, weight in weights.items():
        module._parameters["weight"] = weight
    try:
        yield
    finally:
        for module, weight in before.items():
            module._parameters["weight"] = weight
