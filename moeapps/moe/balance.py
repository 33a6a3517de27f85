# SPDX-License-Identifier: Apache-2.0
"""Balance without a loss: move a selection bias against the load, once per optimizer step.

The bias is added to the scores for the *selection* only; it never enters a weight and never gets a gradient. Counts are
gathered over the micro-batches of a step and over ranks, used once, and reset. A plain loop uses `BiasBalancer`; the
callback ``BiasBalancing`` of ``moeapps.training`` does the same under Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from moeapps.moe.layer import MoELayer
from moeapps.moe.ranks import sum_over_ranks
from moeapps.moe.record import Record
from moeapps.moe.routers.choose import TopK
from moeapps.moe.routing import Routing


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    r"""Give the bias after one step: b_e + δ_e − mean(δ) with δ_e = rate·sign(mean(c) − c_e).

    An overloaded expert's bias goes down, an underloaded one's up, each by the same amount whatever the distance, so
    one odd batch cannot throw the bias far. Subtracting the mean keeps Σb where it was: only differences select.

    Args:
        bias_E: float32 [E], not changed.
        counts_E: Assignments per expert [E] since the last step, over all micro-batches and ranks.
        rate: Step size u in units of the score, above 0; 1e-3 is usual with sigmoid scores. Softmax scores differ by
            about 1/E, so scale the rate by 1/E there (our inference).

    Returns:
        float [E]; without any count (a step that routed nothing) the bias as it was.

    Raises:
        ValueError: If the shapes differ or the rate is not above 0.

    Source: Wang et al. (2024), auxiliary-loss-free load balancing (as generally known); the mean subtraction follows
        pytorch/torchtitan, components/optimizer.

    Example:
        >>> update_bias(torch.zeros(2), torch.tensor([9, 1]), 0.1)
        tensor([-0.1000,  0.1000])
    """
    if bias_E.shape != counts_E.shape:
        raise ValueError(
            f"bias {tuple(bias_E.shape)} and counts {tuple(counts_E.shape)} differ: both are one number per expert"
        )
    if not rate > 0.0:
        raise ValueError(f"rate={rate}: the step of the bias must be above 0; remove the balancing to switch it off")
    # float64: an integer mean is not representable in int64, and float32 counts above 2**24 would compare wrongly.
    counts_E = counts_E.double()
    delta_E = rate * torch.sign(counts_E.mean() - counts_E)
    return bias_E + (delta_E - delta_E.mean()).to(bias_E.dtype)


class CountAccumulator:
    """Assignments per expert and layer since the last reset.

    ``add`` after each micro-batch, ``totals`` before the optimizer step (that is the one moment at which ranks talk: E
    numbers per layer), ``reset`` after it. Counts stay on the device of the routing. Only sparse routings are counted:
    dense and slot routings cannot be out of balance.

    Example:
        >>> accumulator = CountAccumulator()
        >>> accumulator.add([]), accumulator.totals()
        (None, {})
    """

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, records: Iterable[Record]) -> None:
        """Add the counts of these records, layer by layer; several calls of one layer add up.

        Args:
            records: What a recorder gathered; masked rows are sentinels and do not count.
        """
        for record in records:
            if isinstance(record.routing, Routing):
                counts_E = record.routing.counts()
                earlier_E = self._counts.get(record.name)
                self._counts[record.name] = counts_E if earlier_E is None else earlier_E + counts_E

    def totals(self) -> dict[str, Tensor]:
        """Give int64 [E] per layer name, summed over ranks.

        All ranks must hold the same layers: run every layer on every rank (an empty batch still counts as a run).
        """
        return {name: sum_over_ranks(self._counts[name]) for name in sorted(self._counts)}

    def reset(self) -> None:
        """Forget all counts; call after each optimizer step."""
        self._counts.clear()


class BiasBalancer:
    """The biases of a network's layers: ``add`` the records of each micro-batch, ``step`` after the optimizer's step.

    Args:
        module: the network, the same that the recorder was given, so that names agree.
        rate: step of the bias in units of the score, above 0.
        layers: shell-style pattern on the names of the layers.

    Raises:
        ValueError: a rate that is not above 0, no layer with a bias, or a layer with several.

    Source: as `update_bias`.

    Example:
        >>> from moeapps.moe import MoERecorder
        >>> from moeapps.moe.presets import deepseek_v3
        >>> layer = deepseek_v3(num_experts=4, top_k=2, num_groups=1, keep_groups=1)(14)
        >>> balancer = BiasBalancer(layer)
        >>> with MoERecorder(layer) as recorder:
        ...     _ = layer(torch.randn(9, 14))
        >>> balancer.add(recorder.records), balancer.step()
        (None, None)
    """

    def __init__(self, module: nn.Module, rate: float = 1e-3, layers: str = "*") -> None:
        if not rate > 0:
            raise ValueError(f"rate={rate} does not balance; use a number above 0 or leave balancing out")
        self.rate = rate
        self.choosers: dict[str, TopK] = {}  # not the biases: ``module.to`` puts others in their place
        for name, layer in module.named_modules():
            # A recorder calls the network itself by its class where it is the layer.
            where = name or type(layer).__name__
            if isinstance(layer, MoELayer) and fnmatchcase(where, layers):
                found = [c for c in layer.router.modules() if isinstance(c, TopK) and c.bias is not None]
                if len(found) > 1:  # a record counts what all of them chose, and one bias would move by it
                    raise ValueError(
                        f"the router of layer {where!r} has {len(found)} choosers with a bias, but balancing can move "
                        "only one per layer; set balance_bias: true in one of them, or leave the layer out by 'layers'"
                    )
                if found:
                    self.choosers[where] = found[0]
        if not self.choosers:
            raise ValueError(
                f"balancing finds no layer like {layers!r} with a bias; set balance_bias: true in its router"
            )
        self._counts = CountAccumulator()

    def add(self, records: Iterable[Record]) -> None:
        """Count what the layers chose in one micro-batch."""
        self._counts.add(record for record in records if record.name in self.choosers)

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by what was counted since the last step, over all ranks."""
        for name, counts_E in self._counts.totals().items():
            bias_E = self.choosers[name].bias
            assert bias_E is not None
            # Experts that are not chosen but given (fixed groups) come after the chosen ones and have no bias.
            bias_E.copy_(update_bias(bias_E, counts_E[: len(bias_E)], self.rate))
        self._counts.reset()
