# SPDX-License-Identifier: Apache-2.0
"""Attention of keys over sequences: units that read pairs of a behaviour and a key, and the weights of a sum over them.

Shape legend: B sequences, H places of a sequence, N keys of a sequence, d width, F hidden width, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from moeapps.moe.routers.score import applied

Part = Literal["own", "product", "difference", "key"]
Pooling = Literal["sum", "sqrtn", "mean"]
AttentionNorm = Literal["none", "softmax"]
WidthActivation = Callable[[int], nn.Module]


class PairUnit(nn.Sequential):
    r"""A perceptron on the parts of a pair, for each behaviour h and key q: ``own`` h, ``product`` h * q, ``key`` q ...

    Called on the joined parts it is the equation. `pairs` gives the same without joining them: of the first layer
    :math:`W_1 h + W_2 (h \odot q) + W_3 (h - q) + W_4 q = (W_1 + W_3 + W_2 diag(q)) h + (W_4 - W_3) q`, one product
    of each sequence with the small matrices of its keys.

    Args:
        dim: d, width of behaviours and keys.
        out_dim: o.
        hidden: widths of the hidden layers, at least one.
        parts: what is joined, in this order.
        activation: width -> activation of a hidden layer; None means ReLU. One with a true ``reads_mask`` is also given
            which values count, for statistics over a batch.

    Raises:
        ValueError: no hidden layer, an unknown part or none.

    Source: G. Zhou et al., "Deep Interest Network", KDD 2018 (docs/papers/aw_moe.md, equation 2).

    Example:
        >>> PairUnit(8, 1, hidden=(16,)).pairs(torch.randn(3, 5, 8), torch.randn(3, 2, 8)).shape
        torch.Size([3, 5, 2, 1])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        hidden: Sequence[int],
        parts: Sequence[Part] = ("own", "product", "key"),
        activation: WidthActivation | None = None,
    ) -> None:
        if not hidden or not parts or set(parts) - set(get_args(Part)) or len(set(parts)) < len(parts):
            raise ValueError(
                f"hidden={tuple(hidden)}, parts={tuple(parts)}: give at least one hidden width, and each of the parts "
                f"{', '.join(get_args(Part))} at most once"
            )
        layers: list[nn.Module] = [nn.Linear(len(parts) * dim, hidden[0])]
        for width, after in zip(hidden, [*hidden[1:], out_dim], strict=True):
            layers += [nn.ReLU() if activation is None else activation(width), nn.Linear(width, after)]
        super().__init__(*layers)
        self.dim, self.parts = dim, tuple(parts)

    def pairs(self, history_BHd: Tensor, key_BNd: Tensor, mask: Tensor | None = None) -> Tensor:
        """Outputs [B, H, N, o] for all pairs of a behaviour and a key.

        Args:
            history_BHd: behaviours.
            key_BNd: keys, N for each sequence.
            mask: bool, broadcastable to [B, H, N]: which pairs count in statistics over a batch; None means all.
        """
        x: Tensor = self._first(history_BHd, key_BNd)
        for layer in list(self)[1:]:
            if getattr(layer, "reads_mask", False):
                x = layer(x, None if mask is None else mask.expand(x.shape[:-1]))
            else:
                x = applied(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return x

    def _first(self, history_BHd: Tensor, key_BNd: Tensor) -> Tensor:
        """The first layer, [B, H, N, F]."""
        first = cast(nn.Linear, self[0])
        dtype = torch.promote_types(first.weight.dtype, key_BNd.dtype)
        weights = first.weight.to(dtype).split(self.dim, dim=1)
        w: dict[Part, Tensor] = dict(zip(self.parts, weights, strict=True))  # each [F, d]
        zero = torch.zeros_like(weights[0])
        apart = w.get("difference", zero)
        own_dF = (w.get("own", zero) + apart).t()
        bias_BNF = key_BNd @ (w.get("key", zero) - apart).t() + first.bias.to(dtype)
        if "product" not in w:
            own_BH1F: Tensor = (history_BHd @ own_dF).unsqueeze(2)
            return own_BH1F + bias_BNF.unsqueeze(1)
        matrix_BdNF = torch.addcmul(
            own_dF.unsqueeze(1), key_BNd.transpose(1, 2).unsqueeze(-1), w["product"].t().unsqueeze(1)
        )
        joined = torch.baddbmm(bias_BNF.flatten(1).unsqueeze(1), history_BHd, matrix_BdNF.flatten(2))
        return joined.view(*joined.shape[:2], *bias_BNF.shape[1:])


class ConstantUnit(nn.Module):
    """What stands in for a unit that was taken out: the same outputs for all pairs, 1 or learned.

    Args:
        out_dim: o.
        learned: numbers that are trained, from N(0, 1); else 1.

    Example:
        >>> ConstantUnit(1).pairs(torch.zeros(3, 5, 8), torch.zeros(3, 2, 8)).unique()
        tensor([1.])
    """

    value: Tensor

    def __init__(self, out_dim: int, *, learned: bool = False) -> None:
        super().__init__()
        if learned:
            self.value = nn.Parameter(torch.randn(out_dim))
        else:
            self.register_buffer("value", torch.ones(out_dim), persistent=False)

    def pairs(self, history_BHd: Tensor, key_BNd: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, H, N, o]."""
        return self.value.to(history_BHd.dtype).expand(*history_BHd.shape[:2], key_BNd.shape[1], -1)


def attention_weights(
    score_BHN: Tensor, mask_BH: Tensor, *, norm: AttentionNorm = "none", pooling: Pooling = "sum"
) -> Tensor:
    """Weights [B, H, N] of a sum over sequences, exactly 0 at padding.

    Args:
        score_BHN: what a unit gave for each pair.
        mask_BH: bool, which places are real.
        norm: ``none`` keeps the scores, ``softmax`` makes them sum to 1 over a sequence that is not empty.
        pooling: ``sum``, or the sum divided by the root of the number of real places (``sqrtn``) or by it (``mean``).
    """
    real_BH1 = mask_BH.unsqueeze(-1)
    if norm == "softmax":
        # Scores of an empty sequence stay finite, so that no gradient of it is nan.
        hidden_BH1 = ~real_BH1 & mask_BH.any(1, keepdim=True).unsqueeze(-1)
        score_BHN = score_BHN.masked_fill(hidden_BH1, float("-inf")).softmax(1)
    weight_BHN = score_BHN.where(real_BH1, 0)
    if pooling == "sum":
        return weight_BHN
    number_B11 = mask_BH.sum(1).clamp(min=1).to(score_BHN.dtype)[:, None, None]
    return weight_BHN / (number_B11.sqrt() if pooling == "sqrtn" else number_B11)


def check_attention(norm: str, pooling: str) -> None:
    """Refuse options that `attention_weights` does not know.

    Raises:
        ValueError: an unknown one.
    """
    if norm not in get_args(AttentionNorm) or pooling not in get_args(Pooling):
        raise ValueError(
            f"norm={norm!r}, pooling={pooling!r}: norm is one of {', '.join(get_args(AttentionNorm))}, pooling one of "
            f"{', '.join(get_args(Pooling))}"
        )
