# SPDX-License-Identifier: Apache-2.0
"""Laws of the recorder: references only, once per call, nothing when off, the same under checkpointing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeapps.moe import (
    Dense,
    DenseRouting,
    Jitter,
    LinearScore,
    MLPExperts,
    MoELayer,
    MoERecorder,
    Record,
    Router,
    Routing,
    SlotRouting,
    SwitchBalance,
    TopK,
)

D, E = 6, 4


def moe() -> MoELayer:
    return MoELayer(Router(LinearScore(D, E), TopK(2), noise=Jitter(0.05)), MLPExperts(E, D, 8))


class Net(nn.Module):
    """Two blocks, each optionally run under activation checkpointing."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        self.first, self.second = moe(), moe()
        self.drop = nn.Dropout(0.2)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if self.mode == "plain":
                x = x + self.drop(layer(x))
            else:
                block = lambda x, layer=layer: x + self.drop(layer(x))  # noqa: E731
                x = checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return x


def twin(mode: str) -> Net:
    torch.manual_seed(0)
    return Net(mode)


@contextlib.contextmanager
def counting_saved() -> Iterator[list[int]]:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def test_one_record_per_call_in_order_with_names() -> None:
    net, x = Net(), torch.randn(5, D)
    with MoERecorder(net) as recorder:
        net(x)
        net(x)
    assert [r.name for r in recorder.records] == ["first", "second"] * 2
    assert recorder.records[1].layer is net.second
    recorder.clear()
    assert recorder.records == []


def test_names_without_a_module_and_for_strangers() -> None:
    a, b, x = moe(), moe(), torch.randn(5, D)
    with MoERecorder() as recorder:
        a(x), b(x), a(x)
    assert [r.name for r in recorder.records] == ["MoELayer", "MoELayer_1", "MoELayer"]
    with MoERecorder(nn.ModuleDict({"mine": a})) as recorder:
        a(x), b(x)
    assert [r.name for r in recorder.records] == ["mine", "MoELayer"]


def test_a_record_refers_to_what_the_layer_had() -> None:
    layer, x = moe(), torch.randn(3, D, requires_grad=True)
    mask, group = torch.tensor([True, False, True]), torch.tensor([0, 1, 1])
    with MoERecorder(layer) as recorder:
        routing = layer.route(x, group=group)
        masked = layer.route(x, token_mask=mask, group=group)
    record = recorder.records[0]
    assert record.routing is routing
    assert isinstance(record.routing, Routing)
    assert record.routing.features_ND.data_ptr() == x.data_ptr()
    assert record.routing.features_ND.requires_grad
    record = recorder.records[1]
    assert record.routing is masked
    assert torch.equal(record.routing.features_ND[mask], x[mask])  # what was read: nothing of a masked row
    assert not torch.equal(record.routing.features_ND[~mask], x[~mask])
    assert torch.equal(record.token_mask, mask)
    assert torch.equal(record.group, group)


def test_applying_a_routing_again_is_not_routing_again() -> None:
    layer, x = moe(), torch.randn(3, D)
    with MoERecorder() as recorder:
        routing = layer.route(x)
        for _ in range(4):
            x = layer(x, routing=routing)
    assert len(recorder.records) == 1


def test_recording_saves_no_tensor_and_changes_no_number() -> None:
    net, x = Net().eval(), torch.randn(5, D)
    with counting_saved() as off:
        y = net(x)
    with counting_saved() as on, MoERecorder(net) as recorder:
        z = net(x)
    assert torch.equal(y, z)
    assert off == on
    assert len(recorder.records) == 2


def test_nothing_is_recorded_when_off_even_after_an_error() -> None:
    net, x = Net(), torch.randn(5, D)
    with contextlib.suppress(KeyError), MoERecorder(net) as recorder:
        raise KeyError
    net(x)
    assert recorder.records == []


def test_the_innermost_recorder_receives_and_one_may_be_opened_twice() -> None:
    layer, x = moe(), torch.randn(5, D)
    with MoERecorder() as outer:
        layer(x)
        with MoERecorder() as inner:
            layer(x)
        with outer:
            layer(x)
        layer(x)
    assert (len(outer.records), len(inner.records)) == (3, 1)


def test_a_recorder_belongs_to_its_thread() -> None:
    layer, x = moe(), torch.randn(5, D)
    with MoERecorder() as recorder:
        thread = threading.Thread(target=lambda: layer(x))
        thread.start()
        thread.join()
    assert recorder.records == []


@pytest.mark.parametrize("inside", [True, False], ids=["backward_inside", "backward_after"])
def test_checkpointing_changes_neither_counts_nor_gradients(inside: bool) -> None:
    results = []
    for mode in ("plain", "checkpointed"):
        net = twin(mode)
        torch.manual_seed(1)
        x = torch.randn(40, D, requires_grad=True)
        with MoERecorder(net) as recorder:
            y = net(x)
            loss = y.square().mean() + SwitchBalance(weight=0.1)(recorder.records)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert [r.name for r in recorder.records] == ["first", "second"]
        counts = [r.routing.counts() for r in recorder.records]
        results.append([*counts, loss.detach(), x.grad, *(p.grad for p in net.parameters())])
    assert any(g.any() for g in results[0][-2:])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_a_balance_loss_on_records_reaches_the_router_under_checkpointing() -> None:
    net = twin("checkpointed")
    with MoERecorder(net) as recorder:
        net(torch.randn(40, D))
    SwitchBalance(weight=1.0)(recorder.records).backward()
    assert net.second.router.score.weight.grad.any()


def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    net, x = Net("reentrant"), torch.randn(5, D, requires_grad=True)
    with MoERecorder(net), pytest.raises(RuntimeError, match="use_reentrant=False"):
        net(x)
    net(x).sum().backward()  # nobody records: nothing to refuse


def test_a_pass_without_gradients_is_recorded_by_a_recorder_of_its_own() -> None:
    net, x = Net(), torch.randn(5, D)
    with torch.no_grad(), MoERecorder(net) as recorder:
        net(x)
    assert len(recorder.records) == 2
    with MoERecorder(net) as outer:
        net(x)
        with torch.no_grad(), MoERecorder() as teacher:
            net(x)
    assert (len(outer.records), len(teacher.records)) == (2, 2)
    with torch.inference_mode(), MoERecorder(net) as recorder:
        net(x)
    assert len(recorder.records) == 2


def test_outputs_are_kept_when_asked_and_are_those_of_the_pass() -> None:
    net, x, seen = Net().eval(), torch.randn(5, D), []
    hook = net.first.register_forward_hook(lambda layer, args, y: seen.append(y))
    with MoERecorder(net, keep=("output",)) as recorder:
        net(x)
        routing = net.second.route(x)
    hook.remove()
    first, second, routed_only = recorder.records
    assert first.output is seen[0]
    assert second.output is not None
    assert routed_only.routing is routing
    assert routed_only.output is None
    assert first.expert_output is None  # nobody asked, and not all experts ran
    with MoERecorder(net) as recorder:
        net(x)
    assert [record.output for record in recorder.records] == [None, None]


def test_outputs_of_experts_are_kept_without_running_them_again() -> None:
    calls: list[int] = []

    class Counted(MLPExperts):
        def every(self, x: Tensor, *side: Tensor) -> Tensor:
            calls.append(len(x))
            return super().every(x, *side)

    layer, x = MoELayer(Router(LinearScore(D, E), Dense()), Counted(E, D, 8)), torch.randn(5, D)
    with MoERecorder(layer, keep=("experts",)) as recorder:
        y = layer(x)
    record = recorder.records[0]
    assert calls == [5]
    assert record.expert_output is not None
    assert record.output is None
    torch.testing.assert_close(torch.einsum("ne,neo->no", record.routing.assignment(), record.expert_output), y)


def test_work_is_spread_over_the_experts_of_a_row_and_the_chosen_one_weighs_most() -> None:
    routing = Routing(
        row_M=torch.tensor([0, 0, 1, 1, 2, 2]),
        expert_M=torch.tensor([0, 2, 1, E, E, E]),
        weight_M=torch.tensor([0.2, 0.8, 1.0, 0.0, 0.0, 0.0]),
        num_rows=3,
        num_experts=E,
    )
    record = Record("layer", routing, moe())
    assert record.work().tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert record.chosen().tolist() == [2, 1, -1]


def test_a_negative_weight_is_a_choice_and_the_largest_wins() -> None:
    sentinel = E
    routing = Routing(
        row_M=torch.tensor([0, 0, 1, 1, 2, 2]),
        expert_M=torch.tensor([1, 2, 0, sentinel, sentinel, sentinel]),
        weight_M=torch.tensor([-0.7, -0.2, -3.0, 0.0, 0.0, 0.0]),
        num_rows=3,
        num_experts=E,
    )
    assert Record("layer", routing, moe()).chosen().tolist() == [2, 0, -1]


def test_of_dense_gates_only_what_is_allowed_is_chosen() -> None:
    weight = torch.tensor([[-0.5, -0.1, 0.0], [-2.0, -1.0, -3.0], [-1.0, -2.0, -3.0]])
    allowed = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert Record("gate", DenseRouting(weight, 3, allowed=allowed), moe()).chosen().tolist() == [1, 0, -1]
    assert Record("gate", DenseRouting(weight, 3), moe()).chosen().tolist() == [2, 1, 0]
    gates = torch.stack([weight, weight - 4.0])  # the second gate may use the last expert alone
    seen = torch.stack([allowed, torch.tensor([False, False, True]).expand(3, 3)])
    assert Record("gate", DenseRouting(gates, 3, allowed=seen), moe()).chosen().tolist() == [2, 0, 2]


def test_a_masked_row_of_slots_has_no_expert() -> None:
    combine = torch.tensor([[[0.2, 0.1], [0.3, 0.4]], [[0.0, 0.0], [0.0, 0.0]]])
    assert Record("slots", SlotRouting(torch.rand(2, 2, 2), combine), moe()).chosen().tolist() == [1, -1]
