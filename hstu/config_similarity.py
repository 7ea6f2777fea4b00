"""Config of a learned similarity between a query and an item."""

from __future__ import annotations

from dataclasses import dataclass

from hstu.errors import check as _check
from hstu.errors import one_of as _one_of

SIMILARITIES = ("dot", "mixture_of_logits")


@dataclass
class MixtureConfig:
    """Mixture of logits (Zhai et al. 2023, Ding & Zhai 2024); of use with ``model.similarity=mixture_of_logits``."""

    query_components: int = 8
    """Component vectors of a query (P); one of them is the user's own where there are ``user_embeddings``."""
    item_components: int = 4
    """Component vectors of an item (K); a query and an item have P * K logits."""
    dim: int = 64
    """Width of each component."""
    hidden_dim: int = 512
    """Width of the gated linear unit that makes the query's components."""
    activation: str = "silu"
    """Of that unit: silu or gelu."""
    gate_dim: int = 128
    """Hidden width of the three networks that give the logits their weights."""
    user_embeddings: int = 0
    """Rows of a table of user vectors, each shared by users (row in the store modulo this number); 0: none. A user who
    is not in the store has a vector of zeros."""
    user_dropout: float = 0.5
    """On the user vectors."""
    user_norm_weight: float = 0.1
    """Added to the loss: this times the mean squared norm of the batch's user vectors."""
    item_dropout: float = 0.1
    """On the item embeddings that make the item's components."""
    gate_dropout: float = 0.0
    """On the logits that enter their own gating network."""
    softmax_dropout: float = 0.2
    """On the weights of the logits; what is left is scaled to sum to 1."""
    temperature: float = 0.05
    """Divides the logits, before they are weighted; ``loss.temperature`` is then 1."""
    balance_weight: float = 0.001
    """Added to the loss: this times minus the mutual information between positions and logits that carry the weight,
    which keeps all of them in use."""
    chunk_mib: int = 256
    """What the loss keeps of one block of positions, about; each block is scored again in the backward pass, which
    needs as much once more."""

    def __post_init__(self) -> None:
        for name in ("query_components", "item_components", "dim", "hidden_dim", "gate_dim", "chunk_mib"):
            _check(getattr(self, name) >= 1, f"model.mixture.{name}", getattr(self, name), ">= 1")
        for name in ("user_embeddings", "user_norm_weight", "balance_weight"):
            _check(getattr(self, name) >= 0, f"model.mixture.{name}", getattr(self, name), ">= 0")
        for name in ("user_dropout", "item_dropout", "gate_dropout", "softmax_dropout"):
            _check(0.0 <= getattr(self, name) < 1.0, f"model.mixture.{name}", getattr(self, name), "in [0, 1)")
        _check(self.temperature > 0, "model.mixture.temperature", self.temperature, "> 0")
        _one_of("model.mixture.activation", self.activation, ("silu", "gelu"))
        least = 2 if self.user_embeddings else 1
        _check(self.query_components >= least, "model.mixture.query_components", self.query_components,
               f">= {least}: the user's vector is one of them")  # fmt: skip
