"""One label of an adapter for people without this package: an ordinary pipeline, or an ordinary LoRA file.

The label embedding is a constant added to the output of the time embedding, so for one label it folds into the bias of the linear layer
that this output comes from; LoRA of scale 1 folds into the weights, W + B A. A LoRA file has no place for a bias, but it can hold the
constant as a LoRA of rank 1, B = the embedding and A·h(t) = 1 for the layer's input h(t) at every timestep: h has many more dimensions
than a sampler has steps.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import nn

from .adapters import Adapter, adapter_base, check_base, find_adapter, load_adapter, local_folder
from .bases import call_arguments, call_parameters, denoiser_of
from .injection import find_injection_sites
from .labels import Label
from .replay import Call, replay, stand_in
from .sampling import trained_scheduler
from .schedulers import MemorylessFlowMatchScheduler


NAMINGS = ("kohya", "diffusers")
OTHER_TIMES = 400  # timesteps between the sampler's own at which a label in a LoRA file is to be nearly constant


def check_exportable(adapter: Adapter) -> None:
    """Raises ValueError for an adapter of which a plain pipeline or LoRA file has no place for a label."""
    if adapter.label_encoder.control_head is not None:
        raise ValueError(
            "This adapter has a control head, and its labels cannot be put into a plain pipeline or a LoRA file, which have no place for one: use "
            "it in a CTRLPipeline, or train one with control_head: 0."
        )


def check_has_lora(adapter: Adapter) -> None:
    """Raises ValueError for an adapter that has none to write."""
    if not adapter.lora:
        raise ValueError("This adapter has no LoRA to write: all of it is in a control head, which needs a CTRLPipeline.")


def _label_shift(
    pipe: DiffusionPipeline, adapter: Adapter, label: Label, gamma: float | None, label_scale: float
) -> tuple[torch.Tensor, dict[str, nn.Linear]]:
    """The label's embedding (D,), times `label_scale`, and the linear layers, by path, to whose outputs it is to be added."""
    check_exportable(adapter)
    name, denoiser = denoiser_of(pipe)
    check_base(adapter.config, type(pipe).__name__, name, denoiser)
    if gamma is not None and adapter.config.gamma_range is None and gamma != adapter.config.gamma:
        raise ValueError(f"This adapter was trained for gamma = {adapter.config.gamma} only, got gamma = {gamma}.")
    labels = adapter.label_encoder.label_space.encode(label)
    shift = label_scale * adapter.label_encoder(labels, adapter.config.gamma if gamma is None else gamma)[0]
    path, sites = find_injection_sites(denoiser, adapter.config.injection_site)
    last = {id(_last_linear(path, site)) for site in sites}
    layers = {name: module for name, module in denoiser.named_modules() if id(module) in last}
    width = next(iter(layers.values())).out_features
    if width != len(shift):
        raise ValueError(f"The label embedding is {len(shift)} wide, and {path} ends in a layer of {width}.")
    return shift, layers


@torch.no_grad()
def bake_label(
    pipe: DiffusionPipeline, adapter: Adapter, label: Label, gamma: float | None = None, label_scale: float = 1.0
) -> None:
    """Turns a plain pipeline of the adapter's base, in place, into one that draws this label and nothing else.

    Its denoiser is then the tuned one for this label at every step, to rounding. Two things differ from `pipe(label=...)`:

    - under classifier-free guidance the unconditional half sees the label too, where the adapter was trained with it seeing none: guidance
      then strengthens the prompt alone and no longer the label. There is no exact way in a plain pipeline, which runs one denoiser for
      both halves. To first order the label then moves the guided output by 1 in place of guidance_scale, so a `label_scale` between 1
      and guidance_scale comes nearer: docs/sharing.md has figures, and the card of an adapter trained under guidance its own;
    - a step without noise (mostly the last) is taken with the tuned model, where `pipe(label=...)` takes it with the base.

    Args:
        label: a name, an index, or a dict {attribute: value}.
        gamma: as in the pipeline's call, for adapters trained with a range.
        label_scale: the label's embedding is multiplied by this.

    Raises:
        ValueError: for an unknown label, another base, or a time embedding that does not end in a linear layer; the pipeline is then as
            it was.
    """
    shift, layers = _label_shift(pipe, adapter, label, gamma, label_scale)
    denoiser, merged = denoiser_of(pipe)[1], {}
    for key in (key for key in adapter.lora if key.endswith(".lora_A.weight")):
        layer = key.removesuffix(".lora_A.weight")
        down, up = adapter.lora[key].double(), adapter.lora.get(f"{layer}.lora_B.weight")
        try:
            weight = denoiser.get_submodule(layer).weight
            merged[layer] = weight.double().cpu() + (up.double().flatten(1) @ down.flatten(1)).view(weight.shape)
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"The LoRA does not fit {type(denoiser).__name__} at {layer!r}.") from error
    for layer, value in merged.items():
        denoiser.get_submodule(layer).weight.copy_(value)
    for last in layers.values():
        constant = shift.to(last.weight)
        last.bias = nn.Parameter(constant if last.bias is None else last.bias + constant, requires_grad=False)


@torch.no_grad()
def label_lora(
    pipe: DiffusionPipeline,
    adapter: Adapter,
    label: Label,
    gamma: float | None = None,
    label_scale: float = 1.0,
    call: dict[str, Any] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The adapter's LoRA with one label in it, as LoRA too, for a plain pipeline of the adapter's base; the pipeline stays as it is.

    It does what `bake_label` does, and differs from `pipe(label=...)` in the same ways. At the timesteps of the adapter's own sampler the
    label is exact to rounding. In between, and with other samplers, it is multiplied by something near 1.

    Args:
        label, gamma, label_scale: as for `bake_label`.
        call: more of the pipeline's arguments, where its timesteps depend on them: {"height": 768, "width": 768} for Flux and SD3.

    Returns:
        the LoRA, keys `LAYER.lora_A.weight` (r, n) and `LAYER.lora_B.weight` (m, r) of scale 1; and how far the label's factor is from 1 at
        most, {"own_timesteps": …, "other_timesteps": …}.

    Raises:
        ValueError: as `bake_label`; where every block embeds the time anew (DiT), or the time embedding is too narrow for this sampler.
    """
    shift, layers = _label_shift(pipe, adapter, label, gamma, label_scale)
    if len(layers) > 1:
        raise ValueError(
            f"{type(denoiser_of(pipe)[1]).__name__} embeds the time in {len(layers)} places, into which no LoRA of a label is put: use "
            "export_label, which folds it into their biases."
        )
    ((name, layer),) = layers.items()
    own, other = _time_features(pipe, adapter, layer, call)
    row, errors = _unit_row(own, other)
    if errors["own_timesteps"] > 1e-3:
        raise ValueError(
            f"The time embedding, {own.shape[1]} wide, cannot hold a constant at {len(own)} timesteps (it is off by "
            f"{errors['own_timesteps']:.2g}): use export_label."
        )
    rank = len(next(value for key, value in adapter.lora.items() if key.endswith(".lora_A.weight")))
    # of the other layers' rank: some readers take one rank and one scale for all
    down, up = torch.zeros(rank, own.shape[1]), torch.zeros(len(shift), rank)
    down[0], up[:, 0] = row.float(), shift.float().cpu()
    keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    if keys[0] in adapter.lora:
        down, up = torch.cat([adapter.lora[keys[0]], down]), torch.cat([adapter.lora[keys[1]], up], dim=1)
    return {**adapter.lora, keys[0]: down, keys[1]: up}, errors


class _FoundError(Exception):
    """Ends a call of the denoiser from inside, when the time embedding's last layer got its input."""


def _time_features(
    pipe: DiffusionPipeline, adapter: Adapter, layer: nn.Linear, call: dict[str, Any] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's inputs (K, H) at the adapter's own timesteps, and (N, H) at others, as the pipeline itself calls its denoiser."""
    settings, denoiser, before = adapter.config.sampler, denoiser_of(pipe)[1], pipe.scheduler
    arguments = call_arguments(pipe, ["0"], settings["num_inference_steps"], extra=call)
    pipe.scheduler = trained_scheduler(before, settings)
    try:
        real = replay(pipe, arguments, max_steps=1)
        steps = replay(pipe, arguments, answer=stand_in(real.steps[0])).steps
    finally:
        pipe.scheduler = before
    position = [name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"].index("timestep")

    def given(call: Call) -> torch.Tensor:
        return torch.as_tensor(call.args[position] if len(call.args) > position else call.kwargs["timestep"])

    def features(times: Sequence[torch.Tensor]) -> torch.Tensor:
        first, rows = steps[0].calls[0], []

        def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows.append(args[0][0].double().cpu())
            raise _FoundError

        handle = layer.register_forward_pre_hook(keep)
        try:
            for time in times:
                args, kwargs = list(first.args), dict(first.kwargs)
                if len(args) > position:
                    args[position] = time
                else:
                    kwargs["timestep"] = time
                try:
                    denoiser(*args, **kwargs)
                except _FoundError:
                    continue
        finally:
            handle.remove()
        return torch.stack(rows)

    own = [given(step.calls[0]) for step in steps]
    largest = max(time.max().item() for time in own)
    between = [torch.full_like(own[0], t, dtype=torch.float32) for t in torch.linspace(0, largest, OTHER_TIMES).tolist()]
    return features(own), features(between)


def _unit_row(own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """a (H,) with own @ a = 1 exactly and other @ a = 1 by least squares, and the largest errors. own: (K, H), other: (N, H), float64."""
    ridge = 1e-9 * torch.linalg.matrix_norm(other, 2).square()
    inverse = torch.linalg.inv(other.T @ other + ridge * torch.eye(other.shape[1], dtype=other.dtype))
    row = inverse @ other.sum(0)
    row = row + inverse @ own.T @ torch.linalg.pinv(own @ inverse @ own.T, hermitian=True) @ (1 - own @ row)
    errors = {name: (x @ row - 1).abs().max().item() for name, x in (("own_timesteps", own), ("other_timesteps", other))}
    return row, errors


def write_lora(
    file: str | os.PathLike, lora: dict[str, torch.Tensor], denoiser: str, naming: str | None = None, **notes: Any
) -> Path:
    """Writes a LoRA as one safetensors file.

    Args:
        lora: as `Adapter.lora`, keys without the component's name.
        denoiser: "unet" or "transformer".
        naming: "kohya", `lora_unet_LAYER.lora_down.weight`, `.lora_up.weight` and `.alpha`, which user interfaces read for U-Nets; or
            "diffusers", `transformer.LAYER.lora_A.weight`, which diffusers reads, and user interfaces for transformers. By default the
            former for a unet, the latter for a transformer.
        notes: kept as texts in the file's metadata.

    Raises:
        ValueError: for an unknown naming, or kohya's for a transformer.
    """
    naming = naming or ("kohya" if denoiser == "unet" else "diffusers")
    if naming not in NAMINGS or (naming == "kohya" and denoiser != "unet"):
        raise ValueError(f"naming must be 'diffusers', or 'kohya' for a unet, got {naming!r} for a {denoiser}.")
    state = {f"{denoiser}.{key}": value.contiguous() for key, value in lora.items()}
    if naming == "kohya":
        # the original code's name of this layer, by which diffusers finds it too, and readers that know diffusers' names of blocks only
        ours, theirs = "lora_unet_time_embedding_linear_2.", "lora_unet_time_embed_2."
        state = {key.replace(ours, theirs): value for key, value in convert_state_dict_to_kohya(state).items()}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.saving")
    save_file(state, temporary, metadata={"format": "pt"} | {key: str(value) for key, value in notes.items()})
    os.replace(temporary, file)
    return file


def plain_scheduler(pipe: DiffusionPipeline, adapter: Adapter) -> Any:
    """The scheduler of a plain pipeline that draws the adapter's label: the adapter's own, or the pipeline's where that is of no known class.

    For MemorylessFlowMatchScheduler, which diffusers does not have, FlowMatchEulerDiscreteScheduler with the same settings: the flow
    without noise, which has the same law in the limit of many steps (arXiv 2409.08861). Warns where the adapter was trained with an eta
    that the pipeline's call cannot be given.
    """
    own = trained_scheduler(pipe.scheduler, adapter.config.sampler)
    if lost := [
        f"{name} = {value}" for name, value in adapter.config.sampler["options"].items() if name not in call_parameters(pipe)
    ]:
        warnings.warn(
            f"The adapter was trained with {', '.join(lost)}, which the call of a plain {type(pipe).__name__.removeprefix('CTRL')} does not take: what is "
            f"exported draws with the default of {type(own).__name__}.step, from another law.",
            stacklevel=3,
        )
    if isinstance(own, MemorylessFlowMatchScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(own.config, stochastic_sampling=False)
    return own


def _last_linear(path: str, site: nn.Module) -> nn.Linear:
    """The linear layer whose output is the site's. Only where nothing comes behind it can a constant be moved into its bias."""
    linears = [module for module in site.modules() if isinstance(module, nn.Linear)]
    if not linears or getattr(site, "post_act", None) is not None:
        raise ValueError(f"The output of {path} does not come straight from a linear layer: a label cannot be baked into its bias.")
    return linears[-1]


def export_label(
    adapter: str | os.PathLike,
    label: Label,
    folder: str | os.PathLike,
    *,
    gamma: float | None = None,
    label_scale: float = 1.0,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Path:
    """Writes an ordinary pipeline folder that draws one label: `DiffusionPipeline.from_pretrained(folder)` runs it. See `bake_label`.

    Its scheduler is the adapter's (see `plain_scheduler`); the number of steps, the guidance scale and eta are for the call: those of
    `adapter.config.sampler`.

    Args:
        adapter: a local folder, an embedded adapter's name, or a Hub id.
        kwargs: passed to the base's `from_pretrained` (`torch_dtype`, `token`, `cache_dir`, …).

    Raises:
        ValueError: as `bake_label`, or if the adapter or its base cannot be read.
    """
    pipe, read = _plain_base(adapter, subfolder, kwargs)
    pipe.scheduler = plain_scheduler(pipe, read)
    bake_label(pipe, read, label, gamma, label_scale)
    pipe.save_pretrained(folder)
    return Path(folder)


def export_lora(
    adapter: str | os.PathLike,
    file: str | os.PathLike,
    label: Label | None = None,
    *,
    gamma: float | None = None,
    label_scale: float = 1.0,
    naming: str | None = None,
    call: dict[str, Any] | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Path:
    """Writes an ordinary LoRA file with one label in it (see `label_lora`), or, without a label, the adapter's LoRA alone.

    Without a label the base is not needed; what the file then draws is no label in particular, since nothing tells the model which.

    Args:
        adapter, kwargs: as for `export_label`.
        naming: see `write_lora`. call: see `label_lora`.

    Raises:
        ValueError: as `label_lora` and `write_lora`, or if the adapter or its base cannot be read.
    """
    if label is None:
        read = _read(adapter, subfolder, kwargs)
        check_has_lora(read)
        return write_lora(file, read.lora, read.config.denoiser, naming)
    pipe, read = _plain_base(adapter, subfolder, kwargs)
    lora, errors = label_lora(pipe, read, label, gamma, label_scale, call)
    return write_lora(file, lora, read.config.denoiser, naming, label=label, label_scale=label_scale, **errors)


def _read(adapter: str | os.PathLike, subfolder: str | None, kwargs: dict[str, Any]) -> Adapter:
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "force_download") if key in kwargs}
    found = find_adapter(adapter, subfolder=subfolder, **hub)
    if found is None:
        raise ValueError(f"{str(adapter)!r} is no label adapter: it has no ctrl_config.json.")
    return load_adapter(found)


def _plain_base(adapter: str | os.PathLike, subfolder: str | None, kwargs: dict[str, Any]) -> tuple[DiffusionPipeline, Adapter]:
    read = _read(adapter, subfolder, kwargs)
    base, chosen = adapter_base(read.config, from_hub=local_folder(adapter) is None, given=kwargs)
    return DiffusionPipeline.from_pretrained(local_folder(base) or base, **kwargs | chosen), read
