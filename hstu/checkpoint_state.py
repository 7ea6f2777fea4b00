"""What of a run is in its checkpoints, and how a run takes it over again, on as many ranks as it now has.

Names of tensors: ``model.<name>`` as in the model's state_dict; ``optimizer.<parameter>.<field>`` and
``average.<parameter>`` by the names of parameters; ``rng.<device>.<rank>``, torch's generators.

Everything random in training is a function of the seed and the step, so that a run goes on alike with another number of
ranks. torch's own generators, which only foreign code draws from, are those of rank r mod R for rank r, with R the
number of ranks that saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hstu.checkpoint import Saved, State
from hstu.distributed import World
from hstu.errors import UserError
from hstu.optim import WeightAverage


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the model alone, which are its own, not copies."""
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def run_state(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    average: WeightAverage | None,
    progress: dict[str, Any],
    world: World,
) -> State:
    """All that a run needs to go on as if it had not been interrupted. The tensors are the run's own, not copies."""
    tensors = model_state(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for name, fields in _optimizer_state(optimizer, names).items():
            tensors |= {f"optimizer.{name}.{field}": value for field, value in fields.items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.tensors().items()}
    tensors |= {f"rng.{device}.{world.rank}": value for device, value in _generators(world.device).items()}
    return State(tensors, {"progress": progress, "average_updates": 0 if average is None else average.num_updates})


def _optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, dict[str, Tensor]]:
    """By name of the parameter and field. names: of the parameters by their identity.

    An optimizer whose parameters are no modules' own, as those of sharded tables, has a method ``states`` for this.
    """
    if hasattr(optimizer, "states"):
        return optimizer.states()  # type: ignore[no-any-return]
    return {names[id(parameter)]: dict(fields) for parameter, fields in optimizer.state.items()}


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_model(saved: Saved, model: nn.Module, world: World | None = None) -> None:
    """Gives the model the weights saved.

    Raises UserError where the checkpoint is of another model.
    """
    saved.read(model_targets(saved, model), world)


def model_targets(saved: Saved, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the model to be read; modules whose state grows (they have ``fit``) make room for it first.

    Raises UserError where the checkpoint is of another model.
    """
    for path, module in model.named_modules():
        if hasattr(module, "fit"):
            start = f"model.{path}."
            module.fit({n.removeprefix(start): s for n, (s, _) in saved.sizes.items() if n.startswith(start)})
    targets = model_state(model)
    foreign = [name for name in saved.sizes if name.startswith("model.") and name not in targets]
    if foreign:
        raise UserError(f"checkpoint {saved.path} has {foreign[0]}, which this model has not: it is of another model")
    return targets


def restore_run(
    saved: Saved,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    average: WeightAverage | None,
    world: World,
) -> dict[str, Any]:
    """Gives all that :func:`run_state` saved to a run that has not begun; returns the progress.

    Raises UserError where the checkpoint is of another model or optimizer.
    """
    targets = model_targets(saved, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fresh = []
    for optimizer in optimizers:
        for name, fields in _optimizer_state(optimizer, names).items():
            targets |= {f"optimizer.{name}.{field}": value for field, value in fields.items()}
        if not hasattr(optimizer, "states") and not optimizer.state:
            state, keys = _state_to_fill(saved, optimizer, names)
            fresh.append((optimizer, state))
            targets |= keys
    if average is not None:
        for number, (name, value) in enumerate(average.tensors().items()):
            key = f"average.{name}"
            targets[key if key in saved.sizes else f"average.#{number}"] = value
    generators = _generators(world.device)
    for device, value in generators.items():
        key = f"rng.{device}.{world.rank % saved.ranks}"
        if key in saved.sizes:
            targets[key] = value
    saved.read(targets, world)
    for optimizer, state in fresh:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if average is not None:
        average.num_updates = saved.values["average_updates"]
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], world.device)
    return dict(saved.values["progress"])


def _state_to_fill(
    saved: Saved, optimizer: torch.optim.Optimizer, names: dict[int, str]
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """For an optimizer that has made no step: state by number of the parameter and field, and by name in ``saved``.

    What has the shape of its parameter is sharded as that is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owners = {f"optimizer.{names[id(parameter)]}": number for number, parameter in enumerate(parameters)}
    owners |= {f"optimizer.#{number}": number for number in range(len(parameters))}  # of the first format
    state: dict[int, dict[str, Tensor]] = {}
    keys: dict[str, Tensor] = {}
    for key, (shape, dtype) in saved.sizes.items():
        owner, _, field = key.rpartition(".")
        if owner in owners:
            parameter = parameters[owners[owner]].detach()
            target = torch.empty(shape, dtype=dtype)
            if shape == parameter.shape:
                target = torch.zeros_like(parameter, dtype=dtype)
            keys[key] = state.setdefault(owners[owner], {})[field] = target
    return state, keys
