"""Optimizers of embedding tables: the rows with a gradient move, the others keep their values and their state.

The rules are those of fbgemm's fused kernels (fbgemm_gpu/codegen/genscript/optimizers.py), so that a local table learns
as a sharded one does. A row whose whole gradient is exactly zero counts as untouched; fbgemm's Adams move it by what
momentum it has (docs/architecture.md, "Sharded tables").

Legend: n rows of a table, D their width, t touched rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
MOMENTUM, SECOND = "momentum1", "exp_avg_sq"
"""Names of the state, as torchrec's fused optimizers call it."""


@dataclass(frozen=True)
class Rule:
    """How one step moves rows.

    name: of ``hstu.config_embedding.TABLE_OPTIMIZERS``. betas, weight_decay (decoupled): of the two Adams only.
    """

    name: str
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def state(self, weight: Tensor) -> State:
        """Zeros to start with for a table [n, D]; float32 whatever the table is stored in."""
        whole = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "sgd": {},
            "adagrad": {MOMENTUM: tuple(weight.shape)},
            "rowwise_adagrad": {MOMENTUM: (weight.shape[0],)},
            "adam": {MOMENTUM: tuple(weight.shape), SECOND: tuple(weight.shape)},
            "rowwise_adam": {MOMENTUM: tuple(weight.shape), SECOND: (weight.shape[0],)},
        }
        return {name: torch.zeros(shape, **whole) for name, shape in shapes[self.name].items()}  # type: ignore[call-overload]

    @torch.no_grad()
    def update(self, weight: Tensor, rows: Tensor, grad: Tensor, state: State, lr: float, step: int) -> None:
        """Moves rows [t] int64, each once, of weight [n, D] by their gradients grad [t, D]; step: 1, 2, ..."""
        change = _CHANGES[self.name](self, weight, rows, grad.to(_wide(weight)), state, step)
        weight.index_copy_(0, rows, (weight[rows].to(change.dtype) - lr * change).to(weight.dtype))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _sgd(rule: Rule, weight: Tensor, rows: Tensor, grad: Tensor, state: State, step: int) -> Tensor:
    return grad


def _adagrad(rule: Rule, weight: Tensor, rows: Tensor, grad: Tensor, state: State, step: int) -> Tensor:
    total = state[MOMENTUM][rows] + grad.square()
    state[MOMENTUM].index_copy_(0, rows, total)
    return grad / (total.sqrt() + rule.eps)


def _rowwise_adagrad(rule: Rule, weight: Tensor, rows: Tensor, grad: Tensor, state: State, step: int) -> Tensor:
    total = state[MOMENTUM][rows] + grad.square().mean(dim=1)
    state[MOMENTUM].index_copy_(0, rows, total)
    return grad / (total.sqrt() + rule.eps)[:, None]


def _adam(rule: Rule, weight: Tensor, rows: Tensor, grad: Tensor, state: State, step: int) -> Tensor:
    return _adam_change(rule, weight, rows, grad, grad.square(), state, step)


def _rowwise_adam(rule: Rule, weight: Tensor, rows: Tensor, grad: Tensor, state: State, step: int) -> Tensor:
    return _adam_change(rule, weight, rows, grad, grad.square().mean(dim=1), state, step)


def _adam_change(
    rule: Rule, weight: Tensor, rows: Tensor, grad: Tensor, square: Tensor, state: State, step: int
) -> Tensor:
    """square: [t, D] or [t]. The correction of the bias counts all steps, not those of the row."""
    first = state[MOMENTUM][rows].mul_(rule.betas[0]).add_(grad, alpha=1.0 - rule.betas[0])
    second = state[SECOND][rows].mul_(rule.betas[1]).add_(square, alpha=1.0 - rule.betas[1])
    state[MOMENTUM].index_copy_(0, rows, first)
    state[SECOND].index_copy_(0, rows, second)
    divisor = (second / (1.0 - rule.betas[1] ** step)).sqrt() + rule.eps
    change = first / (1.0 - rule.betas[0] ** step) / (divisor if divisor.ndim == 2 else divisor[:, None])
    if rule.weight_decay:
        change = change + rule.weight_decay * weight[rows].to(change.dtype)
    return change


_CHANGES: dict[str, Callable[[Rule, Tensor, Tensor, Tensor, State, int], Tensor]] = {
    "sgd": _sgd, "adagrad": _adagrad, "rowwise_adagrad": _rowwise_adagrad, "adam": _adam,
    "rowwise_adam": _rowwise_adam,
}  # fmt: skip


def touched(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [t] int64 with a gradient, and their gradients [t, D], of a dense or a sparse gradient [n, D]."""
    if grad.is_sparse:
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
        keep = (values != 0).any(dim=1).nonzero()[:, 0]
        return rows[keep], values[keep]
    rows = (grad != 0).any(dim=1).nonzero()[:, 0]
    return rows, grad[rows]


class TableOptimizer(torch.optim.Optimizer):
    """Moves local tables by ``rule``; ``param_groups`` carry ``lr`` and ``lr_factor`` as those of AdamW do."""

    def __init__(self, tables: Iterable[Tensor], rule: Rule, lr: float, lr_factor: float = 1.0) -> None:
        super().__init__(list(tables), {"lr": lr, "lr_factor": lr_factor})
        self.rule = rule
        for table in self._tables():
            self.state[table] = {"step": torch.zeros((), dtype=torch.int64), **rule.state(table)}

    def _tables(self) -> list[Tensor]:
        return [table for group in self.param_groups for table in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; every table counts it, with or without a gradient."""
        assert closure is None
        for group in self.param_groups:
            for table in group["params"]:
                state = self.state[table]
                state["step"] += 1
                if table.grad is not None:
                    rows, grad = touched(table.grad)
                    self.rule.update(table, rows, grad, state, group["lr"], int(state["step"]))


class ReplicatedTables(TableOptimizer):
    """Of tables that stay whole on every rank beside sharded ones; ``states`` has the names of local tables.

    tables: those names, as in a state_dict of the model, and the tables.
    """

    def __init__(self, tables: Mapping[str, Tensor], rule: Rule, lr: float, lr_factor: float = 1.0) -> None:
        super().__init__(tables.values(), rule, lr, lr_factor)
        self.named = tables

    def states(self) -> dict[str, State]:
        """State by name and field, sharing its memory."""
        return {name: dict(self.state[table]) for name, table in self.named.items()}
