# SPDX-License-Identifier: Apache-2.0
"""Make mixtures out of trained dense networks: copy an FFN, cut it into granules, fuse specialists into one mixture.

Works on weights alone, so that a mixture can be made from checkpoints without building the networks they belong to.
Each function states an identity that tests hold.

Shape legend: E experts, D input width, F hidden width, O output width, H = F, or 2F when gated (gate | up), m slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.feed_forward import FeedForward
from moeapps.moe.joined import JoinedExperts
from moeapps.moe.layer import MoELayer

__all__ = ["Shared", "fuse", "one_process_state", "split", "upcycle"]

Stacked = GLUExperts | MLPExperts
State = Mapping[str, Tensor]
_STACKS = ("w_in", "b_in", "w_out", "b_out")
Shared = Literal["random", "first_slice"]


def upcycle(ffn: Experts, num_experts: int) -> Experts:
    r"""Copy one dense expert into a bank of equal ones.

    Whatever weights that sum to 1 a router gives them, :math:`\sum_e w_e E_e(x)` is the dense output.

    Args:
        ffn: a bank of one expert.
        num_experts: how many copies.

    Raises:
        ValueError: a bank of several experts, or fewer than one copy.

    Source: Sparse Upcycling (Komatsuzaki et al. 2022), the common form.

    Example:
        >>> upcycle(GLUExperts(1, dim=8, hidden_dim=16), 4).num_experts
        4
    """
    if ffn.num_experts != 1:
        raise ValueError(f"the bank has {ffn.num_experts} experts, but one dense expert is copied; select([e]) one.")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}, but at least one copy must be made.")
    return ffn.select([0] * num_experts)


def split(bank: Stacked, slices: int) -> Stacked:
    r"""Cut every expert into ``slices`` granules along its hidden width; expert e becomes granules em to em + m - 1.

    The UNWEIGHTED sum of the granules is the expert, :math:`\sum_{i<m} G_{em+i}(x) = E_e(x)`: each has some hidden
    units with all of their weights, and an m-th of the output's bias.

    Args:
        bank: perceptrons or gated linear units.
        slices: m, a divisor of the hidden width.

    Raises:
        ValueError: a bank of another kind, or a width that m does not divide.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equation 15).

    Example:
        >>> granules = split(GLUExperts(2, dim=8, hidden_dim=16), 4)
        >>> granules.num_experts, granules.hidden_dim
        (8, 4)
    """
    if not isinstance(bank, GLUExperts | MLPExperts):
        raise ValueError(f"{type(bank).__name__} has no hidden width to cut; give MLPExperts or GLUExperts.")
    made = granules(bank.feed_forward(), slices)
    bias, hidden = bank.b_in is not None, made.w_out.shape[1]
    with torch.device("meta"):  # the weights are replaced: neither memory nor random numbers
        cut = type(bank)(
            made.num_experts, bank.in_dim, hidden, out_dim=bank.out_dim, activation=bank.activation, bias=bias
        )
    for name, stack in _stacks(made).items():
        setattr(cut, name, nn.Parameter(stack.detach().clone()))
    return cut


def fuse(
    specialists: Sequence[State], net: nn.Module, *, shared: Shared = "random", rescale: bool = True
) -> dict[str, Tensor]:
    r"""Make the state of a mixture out of dense networks of one shape.

    The FFN of each specialist is cut into as many slices as there are routed experts per specialist: specialist s
    becomes experts sm to sm + m - 1. All that lies outside the MoE layers (embeddings, attention, norms, heads) is the
    mean over the specialists; routers stay as they are in ``net``. Fusing equal specialists under equal gates over all
    experts, without null experts, gives back the specialist if ``rescale`` is on.

    Args:
        specialists: states of networks that are ``net`` but for their MoE layers, each of which holds one expert.
        net: the mixture, which gives names, sizes and the initial routers; it is not changed.
        shared: what the shared experts of a layer start from: ``random`` leaves those of ``net``, ``first_slice`` takes
            the first hidden units of the specialists in turn.
        rescale: multiply the output layers of the routed experts by m, since weights that sum to 1 would give an m-th
            of a specialist's output.

    Returns:
        A state for ``net.load_state_dict``.

    Raises:
        ValueError: no specialist; specialists that do not fit each other or the mixture; experts of other kinds.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equation 16); the rescaling is ours.

    Example:
        >>> from moeapps.moe.presets import dense, point_moe
        >>> state = fuse([dense()(8).state_dict() for _ in range(2)], point_moe(num_experts=4)(8))
        >>> state["experts.w_in"].shape
        torch.Size([4, 8, 16])
    """
    if not specialists:
        raise ValueError("there is no specialist to fuse; give the state of at least one.")
    if shared not in ("random", "first_slice"):
        raise ValueError(f"shared={shared!r}, but it must be 'random' or 'first_slice'.")
    own = net.state_dict()
    layers = {f"{name}." if name else "": m for name, m in net.named_modules() if isinstance(m, MoELayer)}
    if not layers:
        raise ValueError(f"{type(net).__name__} has no MoE layer to put the specialists into; give the mixture.")
    made = {key: value.clone() for key, value in own.items() if key.startswith(tuple(layers))}
    for prefix, layer in layers.items():
        made |= _fused_bank(prefix, layer, specialists, shared=shared, rescale=rescale)
    outside = [key for key in own if not key.startswith(tuple(layers))]
    _check_outside(outside, own, tuple(layers), specialists)
    made |= {key: _mean([state[key] for state in specialists]) for key in outside}
    return {key: made[key] for key in own}


def granules(ffn: FeedForward, slices: int) -> FeedForward:
    """Cut stacked weights along the hidden width, see :func:`split`."""
    num, hidden, _ = ffn.w_out.shape
    if slices < 1 or hidden % slices:
        raise ValueError(f"slices={slices} does not divide the hidden width {hidden}; choose a divisor.")
    width, parts = hidden // slices, 2 if ffn.gated else 1

    def cut(stack: Tensor) -> Tensor:
        """(E, ..., H) -> (Em, ..., H / m), gate and up halves each cut by themselves."""
        pieces = stack.reshape(*stack.shape[:-1], parts, slices, width).movedim(-2, 1)
        return pieces.reshape(num * slices, *stack.shape[1:-1], parts * width)

    return replace(
        ffn,
        w_in=cut(ffn.w_in),
        b_in=None if ffn.b_in is None else cut(ffn.b_in),
        w_out=ffn.w_out.reshape(num * slices, width, -1),
        b_out=None if ffn.b_out is None else (ffn.b_out / slices).repeat_interleave(slices, 0),
    )


def first_units(ffn: FeedForward, width: int) -> FeedForward:
    """Keep the first hidden units of every expert, and their share of the output's bias."""
    hidden = ffn.w_out.shape[1]
    if not 1 <= width <= hidden:
        raise ValueError(
            f"shared experts of width {width} cannot start from {hidden} hidden units; make them narrower."
        )

    def cut(stack: Tensor) -> Tensor:
        return torch.cat([half[..., :width] for half in stack.chunk(2 if ffn.gated else 1, dim=-1)], dim=-1)

    return replace(
        ffn,
        w_in=cut(ffn.w_in),
        b_in=None if ffn.b_in is None else cut(ffn.b_in),
        w_out=ffn.w_out[:, :width],
        b_out=None if ffn.b_out is None else ffn.b_out * (width / hidden),
    )


def _stacks(ffn: FeedForward) -> dict[str, Tensor]:
    stacks = {"w_in": ffn.w_in, "b_in": ffn.b_in, "w_out": ffn.w_out, "b_out": ffn.b_out}
    return {name: stack for name, stack in stacks.items() if stack is not None}


def _with(ffn: FeedForward, stacks: Mapping[str, Tensor]) -> FeedForward:
    """The same kind of network with other weights."""
    return replace(ffn, w_in=stacks["w_in"], b_in=stacks.get("b_in"), w_out=stacks["w_out"], b_out=stacks.get("b_out"))


def _fused_bank(
    prefix: str, layer: MoELayer, specialists: Sequence[State], *, shared: Shared, rescale: bool
) -> dict[str, Tensor]:
    """The weights of one layer's bank, under their names in the network."""
    banks = _banks(prefix, layer)
    where, routed = next(iter(banks.items()))
    slices, rest = divmod(layer.num_experts, len(specialists))
    if rest or not slices:
        raise ValueError(
            f"{where}: {layer.num_experts} routed experts cannot be shared out among {len(specialists)} specialists; "
            "use a multiple of their number."
        )
    dense = [_dense(state, prefix, routed, slices) for state in specialists]
    cut = _joined([granules(ffn, slices) for ffn in dense])
    if rescale:
        cut = replace(cut, w_out=cut.w_out * slices, b_out=None if cut.b_out is None else cut.b_out * slices)
    made = {}
    spare = routed.num_experts - layer.num_experts  # shared experts of the same width, last in the one bank
    for name, stack in _stacks(cut).items():
        old = getattr(routed, name).detach()
        tail = _shared_stack(name, dense, spare, routed.hidden_dim, old[layer.num_experts :], shared)
        made[f"{where}{name}"] = torch.cat([stack.to(old), tail])
    for place, bank in list(banks.items())[1:]:
        for name in _stacks(bank.feed_forward()):
            old = getattr(bank, name).detach()
            made[f"{place}{name}"] = _shared_stack(name, dense, bank.num_experts, bank.hidden_dim, old, shared)
    return made


def _shared_stack(
    name: str, dense: Sequence[FeedForward], count: int, width: int, old: Tensor, shared: Shared
) -> Tensor:
    """One stack of the shared experts: as it is, or of the first units of the specialists in turn."""
    if shared == "random" or not count:
        return old.clone()
    first = _joined([first_units(dense[i % len(dense)], width) for i in range(count)])
    return _stacks(first)[name].to(old)


def _banks(prefix: str, layer: MoELayer) -> dict[str, Stacked]:
    """The stacks of a layer's bank under their names, routed experts in the first."""
    experts = layer.experts
    found = (
        {f"{prefix}experts.banks.{i}.": bank for i, bank in enumerate(experts.banks)}
        if isinstance(experts, JoinedExperts)
        else {f"{prefix}experts.": experts}
    )
    stacks = {name: bank for name, bank in found.items() if isinstance(bank, GLUExperts | MLPExperts)}
    if len(stacks) < len(found):
        kinds = ", ".join(sorted({type(bank).__name__ for bank in found.values()}))
        raise ValueError(f"{prefix}experts: experts of {kinds} have no hidden width; fuse MLPExperts or GLUExperts.")
    if next(iter(stacks.values())).num_experts < layer.num_experts:
        raise ValueError(f"{prefix}experts: routed experts lie in several banks; put them all into the first.")
    return stacks


def _dense(state: State, prefix: str, like: Stacked, slices: int) -> FeedForward:
    """The one expert of a specialist's layer, checked against the mixture's."""
    names = _stacks(like.feed_forward())
    place = f"{prefix}experts."
    missing = [f"{place}{name}" for name in names if f"{place}{name}" not in state]
    if missing:
        near = sorted(key for key in state if key.startswith(prefix))[:6]
        raise ValueError(
            f"a specialist has no {', '.join(missing)} (below {prefix!r} it has {', '.join(near) or 'nothing'}); "
            "its layers must hold one expert of the mixture's kind, as those of presets.dense do."
        )
    parts = 2 if like.gated else 1
    wide = slices * like.hidden_dim
    wanted = {
        **{"w_in": (1, like.in_dim, parts * wide), "b_in": (1, parts * wide)},
        **{"w_out": (1, wide, like.out_dim), "b_out": (1, like.out_dim)},
    }
    for name in names:
        if tuple(state[f"{place}{name}"].shape) != wanted[name]:
            raise ValueError(
                f"{place}{name} of a specialist is {tuple(state[f'{place}{name}'].shape)}, but {slices} slices of the "
                f"mixture's width {like.hidden_dim} make {wanted[name]}: give the specialists a hidden width of {wide}."
            )
    return _with(like.feed_forward(), {name: state[f"{place}{name}"].detach() for name in names})


def _joined(parts: Sequence[FeedForward]) -> FeedForward:
    stacks = [_stacks(part) for part in parts]
    return _with(parts[0], {name: torch.cat([stack[name] for stack in stacks]) for name in stacks[0]})


def _check_outside(outside: Sequence[str], own: State, inside: tuple[str, ...], specialists: Sequence[State]) -> None:
    """Refuse specialists that are not the mixture outside its MoE layers."""
    for number, state in enumerate(specialists):
        missing = [key for key in outside if key not in state]
        spare = [key for key in state if not key.startswith(inside) and key not in own]
        if missing or spare:
            raise ValueError(
                f"specialist {number} is another network: it lacks {_few(missing)} and has {_few(spare)} beside; build "
                "specialists and mixture with the same options but for the MoE layers."
            )
        for key in outside:
            if state[key].shape != own[key].shape:
                raise ValueError(
                    f"{key} is {tuple(state[key].shape)} in specialist {number} and {tuple(own[key].shape)} in the "
                    "mixture; build both with the same widths and data."
                )


def _few(names: Sequence[str]) -> str:
    return (", ".join(names[:4]) + (" ..." if len(names) > 4 else "")) or "nothing"


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Mean of weights; counters and flags cannot be averaged, the first specialist's stay."""
    return torch.stack(list(values)).mean(0) if values[0].is_floating_point() else values[0].clone()


def one_process_state(state: Mapping[str, Any], split: Iterable[str]) -> dict[str, Any]:
    """Name the weights of a spread network as the network has them in one process, where nothing is spread.

    :class:`~moeapps.moe.parallel.ExpertParallel` cuts a stacked bank that also holds shared experts in two; here these
    become its last rows again.

    Args:
        state: names and whole tensors, as read from a checkpoint.
        split: names of the banks that were cut, see :func:`~moeapps.moe.parallel.split_banks`.

    Example:
        >>> state = {"moe.experts.banks.0.b_out": torch.zeros(3, 1), "moe.experts.banks.1.b_out": torch.ones(1, 1)}
        >>> one_process_state(state, ["moe.experts"])
        {'moe.experts.b_out': tensor([[0.],
                [0.],
                [0.],
                [1.]])}
    """
    found = dict(state)
    for bank in split:
        routed = f"{bank}.banks.0." if bank else "banks.0."
        for key in [key for key in found if key.startswith(routed)]:
            name = key.removeprefix(routed)
            parts = [found.pop(key), found.pop(f"{routed[:-2]}1.{name}")]
            found[f"{bank}.{name}" if bank else name] = torch.cat(parts) if name in _STACKS else parts[0]
    return found
