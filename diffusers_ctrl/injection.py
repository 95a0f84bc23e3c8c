"""Where the label enters a denoiser: LoRA on its layers, and one hook that adds the label embedding to its time embedding.

Both go in and come out of any diffusers denoiser (U-Net or transformer) without touching its class or its state-dict keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn


SITE_NAMES = ("time_embedding", "timestep_embedder", "time_embedder")
HOOK_NAME = "ctrl_label"
STRENGTH_HOOK_NAME = "ctrl_strength"
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def find_injection_site(denoiser: nn.Module, injection_site: str | None = None) -> tuple[str, nn.Module]:
    """Path and module of the denoiser's time embedding, whose output (B, D) the label is added to.

    Args:
        injection_site: a module path inside the denoiser, for models whose time embedding has another name.

    Raises:
        ValueError: if there is no such module; the message lists candidates.
    """
    modules = dict(denoiser.named_modules())
    if injection_site is not None:
        if injection_site not in modules or not injection_site:
            raise ValueError(f"{type(denoiser).__name__} has no module {injection_site!r}. {_candidates(modules)}")
        return injection_site, modules[injection_site]
    found = [name for name in modules if name.rsplit(".", 1)[-1] in SITE_NAMES]
    if not found:
        raise ValueError(
            f"No time embedding named {', '.join(SITE_NAMES)} was found in {type(denoiser).__name__}: pass "
            f"injection_site='path.of.module'. {_candidates(modules)}"
        )
    name = min(found, key=lambda n: (n.count("."), len(n)))
    return name, modules[name]


def _candidates(modules: dict[str, nn.Module]) -> str:
    names = [name for name in modules if "time" in name.rsplit(".", 1)[-1] or "emb" in name.rsplit(".", 1)[-1]][:12]
    return f"Candidates: {', '.join(names)}." if names else "No module here has 'time' or 'emb' in its name."


def site_width(site: nn.Module) -> int:
    """Width D of the site's output: that of its last linear layer."""
    linears = [module for module in site.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"The injection site {type(site).__name__} has no linear layer, so its width is unknown.")
    return linears[-1].out_features


class LabelHook(ModelHook):
    """Adds `embedding` (n, D) to the site's output. Rows beyond n are a guidance batch: they come first and get zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: torch.Tensor | None = None

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        if self.embedding is None:
            return output
        embedding, rows = self.embedding.to(output), output.shape[0]
        if rows == 2 * len(embedding):
            embedding = torch.cat([torch.zeros_like(embedding), embedding])
        elif rows != len(embedding):
            raise ValueError(f"Got {len(embedding)} labels for a denoiser batch of {rows}: one a sample is needed.")
        return output + embedding


def add_label_hook(denoiser: nn.Module, injection_site: str | None = None) -> LabelHook:
    """Registers the hook on the denoiser's time embedding; with no embedding set it changes nothing."""
    _, site = find_injection_site(denoiser, injection_site)
    registry = HookRegistry.check_if_exists_or_initialize(site)
    if registry.get_hook(HOOK_NAME) is not None:
        raise ValueError("This denoiser already carries a label adapter: unload it first.")
    hook = LabelHook()
    registry.register_hook(hook, HOOK_NAME)
    return hook


def remove_label_hook(denoiser: nn.Module, injection_site: str | None = None) -> None:
    _, site = find_injection_site(denoiser, injection_site)
    HookRegistry.check_if_exists_or_initialize(site).remove_hook(HOOK_NAME, recurse=False)


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
        inject_adapter_in_model(config, denoiser, adapter_name=adapter_name)
    except ValueError as error:
        remove_lora(denoiser, adapter_name)
        raise ValueError(f"LoRA cannot be put on {type(denoiser).__name__} with targets {targets}: {error}") from error


def lora_layers(denoiser: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Module path -> LoRA layer, for the layers that carry this adapter."""
    return {
        name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


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
                f"The LoRA does not fit {type(denoiser).__name__}: {name} has weights {list(down.shape)} and {list(up.shape)}."
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
    """Takes the adapter out again; layers left without any adapter become the plain layers they were."""
    for name, layer in lora_layers(denoiser, adapter_name).items():
        layer.delete_adapter(adapter_name)
        if not layer.lora_A:
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
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


class StrengthHook(ModelHook):
    """On the denoiser itself: runs base + strength · (tuned − base), and the base alone on steps that have no noise.

    With no embedding set the denoiser is the base, bit for bit. The second forward is paid for only where strength ∉ {0, 1}, or
    where `keeps_base` asks for the base's output beside the tuned one (`base_output`).
    """

    def __init__(self, label_hook: LabelHook, layers: Sequence[BaseTunerLayer]) -> None:
        super().__init__()
        self.label_hook, self.layers = label_hook, list(layers)
        self.embedding: torch.Tensor | None = None
        self.strength = 1.0
        self.base_timesteps: frozenset[int] = frozenset()
        self.keeps_base = False
        self.base_output: torch.Tensor | None = None

    def new_forward(self, module: nn.Module, *args, **kwargs):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        strength = self.strength
        if self.embedding is None:
            strength = 0.0
        elif self.base_timesteps and int(torch.as_tensor(timestep).flatten()[0]) in self.base_timesteps:
            strength = 0.0
        if strength == 1.0 and not self.keeps_base:
            return self._tuned(*args, **kwargs)
        base = self._base(*args, **kwargs)
        if self.keeps_base:
            self.base_output = base if isinstance(base, torch.Tensor) else base[0]
        if strength == 0.0:
            return base
        tuned = self._tuned(*args, **kwargs)
        if strength == 1.0:
            return tuned
        if isinstance(tuned, torch.Tensor):
            return torch.lerp(base, tuned, strength)
        mixed = torch.lerp(base[0], tuned[0], strength)
        if isinstance(tuned, tuple):
            return (mixed, *tuned[1:])
        return type(tuned)(sample=mixed)

    def _base(self, *args, **kwargs):
        with lora_disabled(self.layers):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _tuned(self, *args, **kwargs):
        self.label_hook.embedding = self.embedding
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self.label_hook.embedding = None


def add_strength_hook(denoiser: nn.Module, label_hook: LabelHook, adapter_name: str = "default") -> StrengthHook:
    """Registers the hook that switches and mixes base and tuned model."""
    hook = StrengthHook(label_hook, lora_layers(denoiser, adapter_name).values())
    HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(hook, STRENGTH_HOOK_NAME)
    return hook


def remove_strength_hook(denoiser: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(STRENGTH_HOOK_NAME, recurse=False)
