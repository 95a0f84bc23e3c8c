"""torch.compile of the denoiser, as accelerate was told to (`accelerate launch --dynamo_backend inductor`)."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, is_torch_version


def compiles(accelerator: Accelerator) -> bool:
    """Whether accelerate was told to compile."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def compile_in_place(denoiser: torch.nn.Module, accelerator: Accelerator) -> None:
    """Compiles the denoiser itself, whole or by its repeated blocks: names of weights, LoRA and the label's hook stay what they are.

    Raises:
        ValueError: for a torch before 2.5, whose graphs keep weights as they were; for regional compilation of a denoiser that names no blocks.
    """
    plugin = accelerator.state.dynamo_plugin
    if is_torch_version("<", "2.5"):
        raise ValueError(f"--dynamo_backend needs torch 2.5 or later: this is {torch.__version__}.")
    if not plugin.use_regional_compilation:
        return denoiser.compile(**plugin.to_kwargs())
    if not getattr(denoiser, "_repeated_blocks", None):
        raise ValueError(f"{type(denoiser).__name__} names no repeated blocks: leave out --dynamo_use_regional_compilation.")
    denoiser.compile_repeated_blocks(**plugin.to_kwargs())
