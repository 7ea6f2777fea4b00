"""Heads of the ranking model: multi-task networks over ``user state * item``, their losses and predictions.

Legend: T predicted events, D model width, C outputs of a task, X experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hstu.config_ranking import HeadConfig, TaskConfig
from hstu.distributed import World
from hstu.errors import UserError
from hstu.model.shares import over_ranks
from hstu.seeding import derive
from kernels._dropout import seeded_dropout

LEAST_RATE = 1e-4
"""Rates of the training labels are kept this far from 0 and 1 in the initial biases."""


def num_outputs(task: TaskConfig) -> int:
    """C: 1, or one for each level (ordinal: a score, compared with cut points)."""
    return len(task.levels) if task.kind == "multiclass" else 1


class RankingHeads(nn.Module):
    """One network a task, over a shared trunk or a mixture of experts.

    Without experts: one trunk for all tasks. With experts each task mixes the shared ones and its own by a softmax
    gate over the input (Ma et al. 2018, MMoE; with task experts: Tang et al. 2020, the last level of PLE).

    Args:
        dim: D.
        tasks: name -> config.
        config: widths, experts, dropout.
        priors: task -> what the training labels are like: rate [1] (binary), share of each level [C] (multiclass,
            ordinal), or mean and standard deviation [2] of the transformed label (regression). They set the initial
            biases, and for regression the scale, which is kept in the state.
        calibrate: binary predictions have the buffer ``calibration`` [tasks] added to their logits; the loss has not.

    Raises UserError for a task name that torch cannot take.
    """

    def __init__(
        self, dim: int, tasks: dict[str, TaskConfig], config: HeadConfig, priors: dict[str, list[float]] | None = None,
        calibrate: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tasks, self.config, self.calibrate = tasks, config, calibrate
        shared, own = config.shared_experts, config.task_experts
        self.shared = nn.ModuleList(_mlp(dim, config.hidden) for _ in range(shared or (0 if own else 1)))
        self.own, self.gates, self.outputs = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, task in tasks.items():
            if hasattr(self.outputs, name):
                raise UserError(f"ranking.tasks.{name}: torch takes that name for itself; choose another")
            if shared or own:
                self.own[name] = nn.ModuleList(_mlp(dim, config.hidden) for _ in range(own))
                self.gates[name] = nn.Linear(dim, shared + own)
            last = nn.Linear(config.hidden[-1], num_outputs(task))
            nn.init.normal_(last.weight, std=0.01)
            self.outputs[name] = last
            if task.kind == "ordinal":
                steps = torch.zeros(len(task.levels) - 1)
                self.register_parameter(f"cuts_{name}", nn.Parameter(steps))
            if task.kind == "regression":
                self.register_buffer(f"scale_{name}", torch.tensor([0.0, 1.0]))
        if calibrate:
            self.register_buffer("calibration", torch.zeros(len(tasks)))
        self._set_priors(priors or {})

    def _set_priors(self, priors: dict[str, list[float]]) -> None:
        with torch.no_grad():
            for name, values in priors.items():
                task, prior = self.tasks[name], torch.tensor(values)
                bias = self.get_parameter(f"outputs.{name}.bias")
                if task.kind == "binary":
                    bias.copy_(torch.logit(prior, eps=LEAST_RATE))
                elif task.kind == "multiclass":
                    bias.copy_(prior.clamp(min=LEAST_RATE).log())
                elif task.kind == "ordinal":
                    bias.zero_()
                    above = torch.logit(1.0 - prior.cumsum(0)[:-1], eps=LEAST_RATE)  # falls with the level
                    cuts = self.get_parameter(f"cuts_{name}")
                    cuts[0] = -above[0]
                    gaps = (above[:-1] - above[1:]).clamp(min=1e-3)
                    cuts[1:] = torch.log(torch.expm1(gaps))  # inverse of softplus
                else:
                    bias.zero_()
                    self.get_buffer(f"scale_{name}").copy_(prior)

    def forward(self, x: Tensor, seed: int | None = None, rows: Tensor | None = None) -> dict[str, Tensor]:
        """x: [T, D]; seed: of the dropout, None in evaluation. Returns task -> outputs [T, C] before the link.

        rows: [T] int64. Places among the predicted events of all ranks, by which dropout is drawn; None: 0..T-1.
        """
        shared = [self._run(mlp, x, seed, rows, i) for i, mlp in enumerate(self.shared)]
        if len(self.gates) == 0:
            return {name: self.outputs[name](shared[0]) for name in self.tasks}
        found = {}
        for number, name in enumerate(self.tasks):
            mlps: Any = self.own[name]
            own = [self._run(mlp, x, seed, rows, (number + 1) * 64 + i) for i, mlp in enumerate(mlps)]
            experts = torch.stack([*shared, *own], dim=1)  # [T, X, hidden]
            gate = torch.softmax(self.gates[name](x), dim=1)  # [T, X]
            found[name] = self.outputs[name](torch.einsum("tx,txh->th", gate, experts))
        return found

    def _run(self, mlp: Any, x: Tensor, seed: int | None, rows: Tensor | None, place: int) -> Tensor:
        for index, linear in enumerate(mlp):
            x = nn.functional.silu(linear(x))
            place_seed = None if seed is None else derive(seed, place, index)
            x = seeded_dropout(x, self.config.dropout, place_seed, rows)
        return x

    def loss(
        self, outputs: dict[str, Tensor], labels: dict[str, Tensor], world: World | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum over tasks of the mean loss over labelled events of all ranks, and each task's mean; with
        several ranks this rank's part of them, see ``hstu/model/shares.py``.

        labels: task -> [T], NaN where missing; a task without any label in the batch gives 0 and no gradient.
        """
        known = torch.stack([(~torch.isnan(labels[name])).sum() for name in self.tasks])
        counts = over_ranks(known, world).clamp(min=1)
        each = {
            name: self._task_loss(name, outputs[name].float(), labels[name], count)
            for name, count in zip(self.tasks, counts, strict=True)
        }
        zero = next(iter(each.values())).new_zeros(())
        total = sum((self.tasks[name].weight * value for name, value in each.items()), zero)
        return total, each

    def _task_loss(self, name: str, output: Tensor, label: Tensor, count: Tensor) -> Tensor:
        """Sum over labelled events, over ``count`` of them on all ranks."""
        task = self.tasks[name]
        known = ~torch.isnan(label)
        label = torch.where(known, label, 0.0)
        if task.kind == "binary":
            loss = nn.functional.binary_cross_entropy_with_logits(output[:, 0], label, reduction="none")
        elif task.kind == "regression":
            loss = (output[:, 0] - self._standardise(name, label)).square()
        else:
            log_p = self._log_levels(name, output)  # [T, C]
            loss = -log_p.gather(1, label.long()[:, None])[:, 0]
        return torch.where(known, loss, 0.0).sum() / count

    def _log_levels(self, name: str, output: Tensor) -> Tensor:
        """Log-probability of each level, [T, C].

        ordinal: P(level > k) = sigmoid(score - cut_k), cut points ascending (McCullagh 1980).
        """
        if self.tasks[name].kind == "multiclass":
            return nn.functional.log_softmax(output, dim=1)
        steps = self.get_parameter(f"cuts_{name}").float()
        cuts = torch.cat([steps[:1], steps[:1] + nn.functional.softplus(steps[1:]).cumsum(0)])  # [C-1]
        z = output - cuts  # logit of P(level > k)
        above, below = nn.functional.logsigmoid(z), nn.functional.logsigmoid(-z)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b-a)): no cancellation where both are near 0 or 1
        gaps = cuts.diff().clamp(min=torch.finfo(torch.float32).tiny)
        middle = above[:, :-1] + below[:, 1:] + torch.log(-torch.expm1(-gaps))
        return torch.cat([below[:, :1], middle, above[:, -1:]], dim=1)

    def _standardise(self, name: str, label: Tensor) -> Tensor:
        mean, std = self.get_buffer(f"scale_{name}")
        value = torch.log1p(label) if self.tasks[name].transform == "log1p" else label
        return (value - mean) / std

    def predict(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions in the labels' terms: probability [T] (binary), probability of each level [T, C] (multiclass,
        ordinal), value in the raw unit [T] (regression)."""
        found = {}
        for number, (name, task) in enumerate(self.tasks.items()):
            output = outputs[name].float()
            if task.kind == "binary":
                shift = self.get_buffer("calibration")[number] if self.calibrate else 0.0
                found[name] = torch.sigmoid(output[:, 0] + shift)
            elif task.kind == "regression":
                mean, std = self.get_buffer(f"scale_{name}")
                value = output[:, 0] * std + mean
                found[name] = torch.expm1(value) if task.transform == "log1p" else value
            else:
                found[name] = self._log_levels(name, output).exp()
        return found


def _mlp(dim: int, hidden: list[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in zip([dim, *hidden], hidden, strict=False))
