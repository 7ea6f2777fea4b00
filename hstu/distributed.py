"""The ranks of a run: who this process is among them, and what they tell each other.

A run on one process has a :class:`World` of size 1, whose methods work without ``torch.distributed``. What is trained
is the same for every number of ranks: each takes its share of the users of a step, and counts are summed.

Legend: R ranks, n rows of a rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hstu.errors import UserError
from hstu.pulse import Pulse

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run.

    Attributes:
        rank: 0..size-1. size: R, 1 without a process group.
        device: where this rank computes.
        local_rank: its number on its machine.
        patient: the group of all ranks whose calls wait for as long as every rank lives; None: the default group.
        pulse: what tells a hanging rank; None: nothing.
        again: why the ranks had to be started again; empty: they had not.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_rank: int = 0
    patient: dist.ProcessGroup | None = None
    pulse: Pulse | None = None
    again: str = ""

    @classmethod
    def current(cls, device: torch.device | None = None) -> World:
        """Of the process group that is there, else of one process."""
        device = device or torch.device("cpu")
        if not dist.is_available() or not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device, int(os.environ.get("LOCAL_RANK", dist.get_rank())))

    def at(self, step: int, phase: str, patient: bool = False) -> None:
        """Says where this rank is in the run. All ranks come through the same places.

        patient: what they wait for in it may take a rank its time; see :class:`hstu.pulse.Place`.
        """
        if self.pulse is not None:
            self.pulse.at(step, phase, patient)

    def enter(self, exchange: str, patient: bool = False) -> None:
        """Says that this rank begins an exchange, before it does: how ranks are told that wait in different ones."""
        if self.pulse is not None:
            self.pulse.enter(exchange, patient)

    def load(self) -> None:
        """Says that the thread which makes batches begins an exchange, to which the others of all ranks come too."""
        if self.pulse is not None:
            self.pulse.load()

    @property
    def is_first(self) -> bool:
        """This rank prints, logs and writes the files of the run."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks of a tensor of one shape, without gradient; the argument stays as it is."""
        total = tensor.detach()
        if self.size > 1:
            self.enter("sum")
            total = total.clone()
            dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks in their order, [sum of n, ...], without gradient. tensor: [n, ...]; n may differ."""
        tensor = tensor.detach()
        if self.size == 1:
            return tensor
        counts = self.counts(len(tensor), tensor.device)
        longest = max(counts)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        self.enter("gather")
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def counts(self, number: int, device: torch.device) -> list[int]:
        """The number of every rank, in their order. device: where they meet, which is waited for once."""
        if self.size == 1:
            return [number]
        own = torch.full((1,), number, device=device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        self.enter("counts")
        dist.all_gather(everyone, own)
        return torch.cat(everyone).tolist()

    def gather_arrays(self, array: np.ndarray) -> np.ndarray:
        """As :meth:`gather`, of numpy arrays of numbers."""
        if self.size == 1:
            return array
        return self.gather(torch.from_numpy(np.ascontiguousarray(array))).numpy()

    def gather_objects(self, value: Any) -> list[Any]:
        """The small plain value of every rank, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self.enter("gather_objects")
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            self.enter("barrier", patient=True)
            dist.barrier(group=self.patient)

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, on every rank; the others wait, however long it takes.

        The result must be picklable. A UserError is raised on all ranks.
        """
        if self.size == 1:
            return function()
        self.enter("on_first", patient=True)
        outcome: list[Any] = [None]
        if self.is_first:
            try:
                outcome = [(function(), None)]
            except UserError as error:
                outcome = [(None, str(error))]
        dist.broadcast_object_list(outcome, src=0, group=self.patient)
        result, failure = outcome[0]
        if failure is not None:
            raise UserError(failure)
        return result  # type: ignore[no-any-return]

    def agree(self, values: dict[str, Any]) -> None:
        """Raises UserError, on every rank, where the small plain ``values`` are not the same on all of them."""
        everyone = self.gather_objects(values)
        for rank, other in enumerate(everyone):
            for name, value in everyone[0].items():
                if other.get(name) != value:
                    raise UserError(
                        f"{name} differs between ranks: rank 0 has {value!r}, rank {rank} has {other.get(name)!r}; "
                        "start all ranks alike"
                    )


class StepLoss(nn.Module):
    """A model with its loss as the forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__()
        self.model, self.world = model, world

    def forward(self, batch: Any, seed: int, plan: Any) -> Tensor:
        return self.model.loss(batch, seed, plan, self.world)  # type: ignore[operator, no-any-return]


class Engine:
    """The loss of a model whose gradients are averaged over ranks.

    A rank's loss counts its share of the sums that the loss divides by, so that the losses of all ranks add up to that
    of one rank; what is averaged is therefore R times each.

    Args:
        layers: those that lie in parts on the ranks, from :func:`spread_layers`.
    """

    def __init__(self, model: nn.Module, world: World, layers: Sequence[Any] = ()) -> None:
        self.module: nn.Module = StepLoss(model, world)
        self.layers = layers
        if world.size == 1:
            return
        ddp = nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in signature(ddp.__init__).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        for parameter in model.parameters():
            if parameter.numel() == 0:  # of features that the config has none of; no gradient ever comes for it
                parameter.requires_grad_(False)
        if world.device.type == "cuda":
            options["device_ids"] = [world.device]
        elsewhere = [*getattr(model, "sharded_names", []), *(n for n, p in model.named_parameters() if in_parts(p))]
        ddp._set_params_and_buffers_to_ignore_for_model(self.module, [f"model.{name}" for name in elsewhere])
        self.module = ddp(self.module, gradient_as_bucket_view=True, **options)

    def loss(self, batch: Any, seed: int, plan: Any) -> Tensor:
        """This rank's part of the loss, a scalar."""
        return self.module(batch, seed, plan)  # type: ignore[no-any-return]

    @contextmanager
    def local(self) -> Iterator[None]:
        """Inside, gradients are added up on each rank; those of the next backward outside are averaged with them."""
        if not isinstance(self.module, nn.parallel.DistributedDataParallel):
            yield
            return
        with self.module.no_sync():
            for layer in self.layers:
                layer.set_requires_gradient_sync(False)
            yield
            for layer in self.layers:
                layer.set_requires_gradient_sync(True)


def spread_layers(model: nn.Module, world: World) -> list[Any]:
    """Lays the parameters of the encoder's layers in parts on the ranks (FSDP2), and gives the layers.

    Each is gathered while it computes; every forward of the layers is then one of all ranks. Parameters are replaced:
    optimizers are made after it.
    """
    if world.size == 1:
        return []
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    layers: Any = model.encoder.layers  # type: ignore[union-attr]
    return [fully_shard(layer, mesh=mesh, reshard_after_forward=True) for layer in layers]


def same_gpu() -> Callable[[], None]:
    """What a new thread calls first for the GPU that is current here to be so there, where the first of the machine is:
    kernels of Triton and events of others' code go to the current one."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def in_parts(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts on the ranks (FSDP2)."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank, sharing its memory: its part, or all of it."""
    return tensor.to_local() if in_parts(tensor) else tensor  # type: ignore[attr-defined, no-any-return]
