# SPDX-License-Identifier: Apache-2.0
"""Layers of rivals whose experts, not only their routers, differ from ProMoE's."""

from __future__ import annotations

from moeapps.moe import GLUExperts, LayerFactory, MoELayer, Sum
from tasks.image_diffusion.rivals import routers


def dsmoe(
    *, num_experts: int = 16, top_k: int = 2, width: float = 2 / 3, shared_width: float = 4 / 3, scale: float = 2.0
) -> LayerFactory:
    """DSMoE: many narrow gated experts, sigmoid gates renormalised over the chosen, one shared gated expert.

    The default widths have the active FLOPs of a dense FFN of width 4. Its rotary positions are not built.

    Args:
        num_experts: routed experts E.
        top_k: experts per token.
        width: hidden width of a routed expert over the model's.
        shared_width: the same of the shared expert, a multiple of ``width``: it is built of so many routed-size ones.
        scale: factor on the gates (released code: 2.0 to 2.5).

    Raises:
        ValueError: if the shared width is not a multiple of the routed one.

    Source: yhlleo/EfficientMoE (docs/papers/promoe.md, equation 15).
    """
    parts = round(shared_width / width)
    if parts < 0 or abs(parts * width - shared_width) > 1e-6:
        raise ValueError(f"shared_width={shared_width} is not a multiple of width={width}")
    make_router = routers.dsmoe(num_experts=num_experts, top_k=top_k, scale=scale)

    def build(dim: int) -> MoELayer:
        # A gated expert of width 2F is the sum of two of width F, so shared experts of equal width make one wide one.
        bank = GLUExperts(num_experts + parts, dim, round(width * dim), activation="silu")
        return MoELayer(make_router(dim), bank, num_shared=parts, combiner=Sum(shared="apart"))

    return build
