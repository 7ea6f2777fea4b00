"""AdamW and the optimizers of tables, their schedule, the average of weights, the check for non-finite gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hstu.config import Config, OptimConfig
from hstu.distributed import World, in_parts, own_part
from hstu.feature_tables import local_name
from hstu.table_optim import ReplicatedTables, Rule, TableOptimizer

Block = tuple[str, tuple[int, ...]]
"""Name of a parameter and, of a part of a sharded one, its offsets."""
SWAP_ROWS = 2**16
"""Of a parameter, exchanged with its average at a time."""


def make_optimizers(model: nn.Module, config: Config, world: World) -> list[torch.optim.Optimizer]:
    """AdamW, and what moves the embedding tables where that is not AdamW. Sharded tables get their rows here.

    Raises UserError where the tables do not fit into the memory of the ranks.
    """
    if config.embedding.optimizer == "adamw":
        rate = config.embedding.lr or config.optim.table_lr
        return [make_optimizer(model, dataclasses.replace(config.optim, table_lr=rate))]
    optimizers: list[torch.optim.Optimizer] = []
    rule, rate = table_rule(config), table_rate(config)
    whole = {p: None for module in model.tables() for p in module.parameters()}  # type: ignore[operator]
    if config.embedding.kind == "sharded":
        from hstu.sharded.tables import shard

        fused = shard(model, config, world)
        optimizers += [] if fused is None else [fused]
        sharded = set(model.sharded_names)  # type: ignore[arg-type]
        named = {local_name(n): p for n, p in model.named_parameters() if p in whole and n not in sharded}
        if named:
            optimizers.append(ReplicatedTables(named, rule, rate, rate / config.optim.lr))
    else:
        optimizers.append(TableOptimizer(whole, rule, rate, rate / config.optim.lr))
    return [make_optimizer(model, config.optim, apart=True), *optimizers]


def table_rate(config: Config) -> float:
    """Learning rate of the tables after the warm-up."""
    return config.embedding.lr or config.optim.table_lr or config.optim.lr


def table_rule(config: Config) -> Rule:
    """How rows move, where not by AdamW."""
    optim = config.optim
    decay = optim.weight_decay if optim.table_weight_decay is None else optim.table_weight_decay
    return Rule(config.embedding.optimizer, optim.eps, (optim.betas[0], optim.betas[1]), decay)


def make_optimizer(model: nn.Module, config: OptimConfig, apart: bool = False) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay on those of rank 2 and more, as usual. Fused where torch offers it.

    Embedding tables (what the model's ``tables()`` holds) have a decay and a rate of their own where the config gives
    them; each group's ``lr_factor`` is its rate as a multiple of ``config.lr``. apart: they are left out.
    """
    tables = {id(p) for module in getattr(model, "tables", list)() for p in module.parameters()}
    rest = [p for p in model.parameters() if id(p) not in tables]
    embeddings = [p for p in model.parameters() if id(p) in tables]
    decay = config.weight_decay
    table_decay = decay if config.table_weight_decay is None else config.table_weight_decay
    factor = 1.0 if config.table_lr is None else config.table_lr / config.lr
    if apart:
        embeddings = []
    elif table_decay == decay and factor == 1.0:
        rest, embeddings = list(model.parameters()), []
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay, "lr_factor": 1.0},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": embeddings, "weight_decay": table_decay, "lr_factor": factor},
    ]
    groups = [g | {"params": part} for g in groups for part in _alike(g["params"])]  # type: ignore[arg-type, operator]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _alike(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that are whole on every rank and those that lie in parts, which no fused step takes together."""
    return [[p for p in parameters if not in_parts(p)], [p for p in parameters if in_parts(p)]]


class WeightAverage:
    """Exponential moving average of a model's parameters, to be evaluated and kept in place of the last ones.

    After t updates the decay is ``min(decay, (1 + t) / (10 + t))``, so that the initial weights are soon forgotten.
    Each rank averages its own parts of sharded tables. The average of narrow weights is float32.

    Source: Polyak and Juditsky 1992; the ramp as in TensorFlow's ExponentialMovingAverage.

    Args:
        optimizers: those of the model; one of sharded tables knows this rank's parts of them.

    Attributes:
        now: this rank's weights; by the name of the parameter and, of sharded tables, the offsets of the part.
        values: the average of each.
    """

    def __init__(self, model: nn.Module, decay: float, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        self.decay, self.num_updates = decay, 0
        self.tables: list[Any] = [optimizer for optimizer in optimizers if hasattr(optimizer, "parts")]
        sharded = set(getattr(model, "sharded_names", ()))
        self.now: dict[Block, Tensor] = {
            (local_name(name), ()): p.detach() for name, p in model.named_parameters() if name not in sharded
        }
        for tables in self.tables:
            self.now |= tables.parts()
        self.values = {block: now.to(_wide(now), copy=True) for block, now in self.now.items()}

    def update(self) -> None:
        """Takes in the parameters as they are now. It passes over all of them, touched rows or not."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        pairs = [(own_part(self.values[block]), own_part(now)) for block, now in self.now.items()]
        alike = [(value, now) for value, now in pairs if value.dtype == now.dtype]
        torch._foreach_lerp_([value for value, _ in alike], [now for _, now in alike], 1.0 - decay)
        for value, now in pairs:
            if value.dtype != now.dtype:
                value.mul_(decay).add_(now, alpha=1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged parameters."""
        narrow = {block: now.clone() for block, now in self.now.items() if now.dtype != self.values[block].dtype}
        self._swap({block: self.values[block] for block in narrow})
        try:
            yield
        finally:
            self._swap(narrow)

    def _swap(self, narrow: Mapping[Block, Tensor]) -> None:
        """Weights for averages and back. Those of narrow weights would lose digits there: they become ``narrow``."""
        for block, now in self.now.items():
            if block in narrow:
                now.copy_(narrow[block])
                continue
            parts = (torch.atleast_1d(own_part(tensor)).split(SWAP_ROWS) for tensor in (now, self.values[block]))
            for ours, theirs in zip(*parts, strict=True):
                kept = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the names of parameters, as checkpoints have them: not copies."""
        whole = {name: value for (name, offsets), value in self.values.items() if not offsets}
        for tables in self.tables:
            whole |= tables.sharded(self.values)
        return whole


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of the optimizer step ``step`` (0-based) of ``total_steps``: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = config.min_lr_fraction
    return config.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of every group: ``rate`` times its ``lr_factor``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)  # a checkpoint of an earlier release has none


def gradient_norm(model: nn.Module) -> Tensor:
    """Global L2 norm of all gradients, a scalar float32; non-finite exactly where some gradient is (or overflows)."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(())
    parts = [own_part(g) for g in grads if in_parts(g)]
    norms = torch._foreach_norm([g for g in grads if not in_parts(g)])
    if parts:
        squares = torch.stack(torch._foreach_norm(parts)).square().sum()
        torch.distributed.all_reduce(squares)
        norms = (*norms, squares.sqrt())
    return torch.linalg.vector_norm(torch.stack(norms))


def row_gradients(optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[str, Tensor]] | None:
    """Gradients of this rank's rows of sharded tables, as of their optimizer; None without such tables.

    They belong to no parameter, and no two ranks have the same ones.
    """
    found = [optimizer.gradients() for optimizer in optimizers if hasattr(optimizer, "gradients")]
    return [pair for pairs in found for pair in pairs] if found else None


def sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """A scalar float64 on the device; non-finite where some gradient is (or overflows in float32)."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(list(gradients))).double().square().sum()


def clip_gradients(model: nn.Module, norm: Tensor, limit: float, rows: Sequence[Tensor] = ()) -> None:
    """Scales all gradients, and those of ``rows``, by ``min(1, limit / norm)``."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*(own_part(p.grad) for p in model.parameters() if p.grad is not None), *rows], factor)
