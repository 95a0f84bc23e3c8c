"""What several processes have to agree on. With one process every function here gives back what it was given, and nothing is sent.

Every process must call these functions in the same order: they wait for each other. Rows of a tensor (samples, trajectories) are dealt
out in order, `share(total)` to each process, so that what is gathered is in the order that one process would have made.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env


T = TypeVar("T")

# the others wait while the main process fits a classifier or measures samples; the usual ten minutes would end the run
PATIENCE = timedelta(hours=24)
_NO_FORWARD = torch.nn.Module.forward  # that of a container, which nobody calls
CHUNK = 2**24  # numbers that a process sends at once when rows are gathered


def use_cpu() -> bool:
    """Whether several processes run on CPU: asked for, or launched where there is no accelerator (accelerate would start each alone)."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = getattr(torch, "accelerator", torch.cuda)  # the first from torch 2.6 on
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not accelerator.is_available())


def make_accelerator(**settings: Any) -> Accelerator:
    """An `Accelerator` of these settings that finds its processes on CPU too, and in which processes wait for each other long enough."""
    asked, launched = settings.get("mixed_precision"), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked is not None and launched not in ("no", asked):
        warnings.warn(
            f"mixed_precision is {asked}, whatever the launcher says ({launched}): give --mixed_precision {launched} for that.",
            stacklevel=3,
        )
    atexit.register(_leave_gloo)
    return Accelerator(cpu=use_cpu(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **settings)


def make_state() -> PartialState:
    """What an `Accelerator` knows of its device and of the other processes, for work that is no training."""
    atexit.register(_leave_gloo)
    return PartialState(cpu=use_cpu(), timeout=PATIENCE)


def leave() -> None:
    """Ends the group of processes, where there is one: the last thing in a command that all of them came through. It may wait for the others."""
    if dist.is_available() and dist.is_initialized():
        PartialState().destroy_process_group()


def _leave_gloo() -> None:
    """At exit, also after an error: threads of gloo that are there still can abort a process that is done (pytorch issue 190489).

    Other backends have no such threads, and leaving them after an error might wait for processes that are gone.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        leave()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Which of them this is; 0 is the main process."""
    return dist.get_rank() if count() > 1 else 0


def share(total: int) -> range:
    """The rows of `total` that are this process's: in order, and as many as any other's or one fewer."""
    each, more = divmod(total, count())
    start = index() * each + min(index(), more)
    return range(start, start + each + (index() < more))


def rounds(total: int, size: int = 1) -> list[range]:
    """This process's share in parts of at most `size`; every process has as many parts, so that some may be empty."""
    own = share(total)
    return [range(own.start + part.start, own.start + part.stop) for part in _cut(len(own), total, size)]


def _cut(own: int, total: int, size: int) -> list[range]:
    """The rounds of a share of `own` rows, from 0."""
    parts = -(-total // (count() * size))
    return [range(own * part // parts, own * (part + 1) // parts) for part in range(parts)]


def cut_alike(total: int, size: int, at_a_time: int | None) -> int | None:
    """How many rows at a time each process takes of its `rounds`, so that all take equally many calls for one: `at_a_time`, or the next that does.

    Rounds of different processes may differ by a row, and calls of a base that is dealt out are everybody's. Fewer rows rather than more.
    """
    if at_a_time is None or count() == 1:
        return at_a_time
    each, more = divmod(total, count())
    pairs = list(zip(_cut(each, total, size), _cut(each + (more > 0), total, size), strict=True))
    tries = [*range(at_a_time, 0, -1), *range(at_a_time + 1, size + 1)]
    return next(rows for rows in tries if all(-(-len(a) // rows) == -(-len(b) // rows) for a, b in pairs))


def agree(flag: bool) -> bool:
    """True on all processes where it is True on any."""
    return sum_over([float(flag)])[0] > 0


def sum_over(values: Iterable[float]) -> list[float]:
    """Sums over the processes, in double precision."""
    values = list(values)
    if count() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=PartialState().device)
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds up the gradients of all processes, in one call. A parameter without a gradient counts as zero, and has none where nobody has."""
    parameters = list(parameters)
    if count() == 1 or not parameters:
        return
    sizes = [parameter.numel() for parameter in parameters]
    present = parameters[0].new_tensor([float(parameter.grad is not None) for parameter in parameters])
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    buffer = torch.cat([*parts, present])
    dist.all_reduce(buffer)
    *sums, present = buffer.split([*sizes, len(parameters)])
    for parameter, found, number in zip(parameters, sums, present.tolist(), strict=True):
        parameter.grad = found.view_as(parameter) if number else None


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Gives all processes the main process's values, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather_rows(tensor: torch.Tensor, *, to_main: bool = False) -> torch.Tensor | None:
    """The rows (n, *) of all processes in their order, (N, *), on the tensor's device. Processes may have different n, also 0.

    With `to_main` the others get None, and the memory of so many rows is the main process's only.
    """
    if count() == 1:
        return tensor
    shapes = gather_objects((tuple(tensor.shape), tensor.dtype))
    shape, dtype = next((found for found in shapes if found[0][0]), shapes[0])  # a process without rows may not know the rest
    lengths = [length for (length, *_), _ in shapes]
    device = PartialState().device
    step = max(1, CHUNK // max(1, torch.Size(shape[1:]).numel()))
    wanted = not to_main or index() == 0
    parts: list[list[torch.Tensor]] = [[] for _ in lengths]
    for start in range(0, max(lengths), step):
        size = min(step, max(lengths) - start)
        sent = torch.zeros(size, *shape[1:], dtype=dtype, device=device)
        own = tensor[start : start + size]
        if len(own):
            sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in lengths] if wanted else None
        if to_main:
            dist.gather(sent, received, 0)
        else:
            dist.all_gather(received, sent)
        for part, found, length in zip(parts, received or [], lengths, strict=False):
            part.append(found[: max(0, min(size, length - start))].to(tensor.device))
    if not wanted:
        return None
    return torch.cat(sum(parts, [])) if max(lengths) else tensor


def gather_objects(value: T) -> list[T]:
    """The small objects of all processes, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """An error of these kinds on one process is raised at the end of the block on all, instead of leaving the others to wait.

    Nothing inside the block may wait for other processes.
    """
    error: Exception | None = None
    try:
        yield
    except kinds as found:
        error = found
    if count() > 1 and agree(error is not None):
        messages = gather_objects(None if error is None else str(error))
        if error is None:
            other, message = next((i, message) for i, message in enumerate(messages) if message is not None)
            raise kinds[0](f"on process {other}, {message}")
    if error is not None:
        raise error


def shard(module: torch.nn.Module, kept: Iterable[torch.nn.Parameter]) -> None:
    """Deals the frozen weights of a module out to the processes, but for those that are `kept` whole (FSDP2, arXiv 2304.11277).

    A block's weights are gathered when it is called and let go after it, forward and backward: all processes must call the module
    equally often. Blocks are the members of the outermost module lists, as the blocks of a U-Net or of a transformer are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # here: all else does with a torch before 2.7

    mesh, kept = init_device_mesh(PartialState().device.type, (count(),)), set(kept)
    waiting = [module]
    while waiting:
        for child in waiting.pop().children():
            if isinstance(child, torch.nn.ModuleList) and all(type(block).forward is not _NO_FORWARD for block in child):
                for block in child:
                    fully_shard(block, mesh=mesh, ignored_params=kept & set(block.parameters()))
            else:
                waiting.append(child)
    fully_shard(module, mesh=mesh, ignored_params=kept)


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives on the main process, for all. Where it raises, all raise: the main process the error itself."""
    if count() == 1:
        return function()
    found: list[Any] = [None, None]
    error: Exception | None = None
    if index() == 0:
        try:
            found = [function(), None]
        except Exception as raised:  # the others must hear of any error before it ends this process
            error, found = raised, [None, f"{type(raised).__name__}: {raised}"]
    dist.broadcast_object_list(found, 0)
    if error is not None:
        raise error
    if found[1] is not None:
        raise RuntimeError(f"The main process failed with {found[1]}")
    return found[0]
