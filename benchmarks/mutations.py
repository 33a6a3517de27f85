# SPDX-License-Identifier: Apache-2.0
"""The ways in which `benchmarks.mutate` breaks the core: one plausible mistake each, as a search and a replacement.

The searched text must be in its file exactly once. ``tests`` are those most likely to notice; the rest of tests/moe
follow.
"""

from __future__ import annotations

from dataclasses import dataclass

CORE = "moeapps/moe/"
TESTS = "tests/moe/"


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Args:
        name: What goes wrong, in a few words.
        path: File, relative to the repository.
        search: Text that is there exactly once.
        replace: What it becomes.
        tests: Test files to run first.
        why: What a user would suffer if no test noticed.
    """

    name: str
    path: str
    search: str
    replace: str
    tests: tuple[str, ...]
    why: str


def _core(file: str, name: str, search: str, replace: str, tests: str, why: str) -> Mutation:
    return Mutation(name, CORE + file, search, replace, tuple(TESTS + test for test in tests.split()), why)


ROUTERS = (
    _core(
        "routers/choose.py",
        "top-k forgets to renormalise",
        "weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)",
        "pass",
        "test_choosers_by_row.py",
        "weights of the chosen no longer sum to 1: every layer shrinks",
    ),
    _core(
        "routers/choose.py",
        "top-k forgets to renormalise sigmoids and lost null mass",
        "            weight_NK = normalised(weight_NK, self._counted(index_NK, taken_NK))\n",
        "            pass\n",
        "test_choosers_by_row.py",
        "weights of sigmoids, or beside null experts, no longer sum to 1",
    ),
    _core(
        "routers/choose.py",
        "bias enters the weight",
        'source = probs_NX if self.weighing in ("softmax", "sigmoid") else logits_NX\n        weight_NK',
        "source = self.rank(logits_NX, probs_NX)\n        weight_NK",
        "test_choosers_by_row.py",
        "balancing changes the function of the network, not only the choice",
    ),
    _core(
        "routers/choose_top_p.py",
        "top-p leaves out the expert that crosses p",
        "return nn.functional.pad(sorted_NK.detach().cumsum(-1)[:, :-1], (1, 0))",
        "return sorted_NK.detach().cumsum(-1)",
        "test_choosers_by_row.py",
        "the chosen set does not reach p, and may be empty",
    ),
    _core(
        "routers/choose_top_p.py",
        "recomputation chooses by the moved threshold",
        "threshold = self.used if self.training and is_recomputed() else self.threshold",
        "threshold = self.threshold",
        "test_budget.py",
        "gradients under checkpointing belong to other experts than the output",
    ),
    _core(
        "routers/choose_top_p.py",
        "the budget counts masked rows",
        "real_NK = (index_NK < num_experts) & rows_N.unsqueeze(-1)",
        "real_NK = index_NK < num_experts",
        "test_budget.py",
        "padding decides how many experts real rows get",
    ),
    _core(
        "routers/chooser.py",
        "padding of a row is computed",
        "counts = torch.ones_like(is_null) if picked.taken_NK is None else picked.taken_NK",
        "counts = torch.ones_like(is_null)",
        "test_choosers_by_row.py",
        "top-p takes as many experts as it could ever take",
    ),
    _core(
        "routers/chooser.py",
        "null experts keep their weight",
        "expert_NK.where(real, num_experts), weight_NK.where(real, 0)",
        "expert_NK.where(real, num_experts), weight_NK",
        "test_choosers_by_row.py",
        "sentinels carry weights that importance and metrics add up",
    ),
    _core(
        "routers/chooser.py",
        "router ignores the token mask",
        "counts = counts if token_mask is None else counts & token_mask.unsqueeze(-1)",
        "counts = counts if token_mask is None else counts & True",
        "test_choosers.py test_choosers_by_row.py",
        "padding is routed, computed and counted",
    ),
    _core(
        "routers/chooser.py",
        "ties go to the highest index",
        "found.append(score.argmax(-1, keepdim=True) if",
        "found.append(score.shape[-1] - 1 - score.flip(-1).argmax(-1, keepdim=True) if",
        "test_choosers_by_row.py",
        "the order of equal scores is no longer defined",
    ),
    _core(
        "routers/capacity.py",
        "capacity keeps one assignment too many",
        "_rank(routing, self._priority(routing)) < limit",
        "_rank(routing, self._priority(routing)) <= limit",
        "test_routers.py",
        "an expert holds more rows than its buffer",
    ),
    _core(
        "routers/capacity.py",
        "capacity serves rows before choices",
        "order_M.view(routing.num_rows, -1).T.reshape(-1)",
        "order_M",
        "test_routers.py",
        "second choices of early rows push out first choices of late ones",
    ),
    _core(
        "routers/combinators.py",
        "fixed rows are routed all the same",
        "expert_M = fixed_N[row_M].where(here_M, expert_M)",
        "expert_M = expert_M.clone()",
        "test_router_combinators.py",
        "unconditional rows do no work, or that of a routed expert",
    ),
)

DISPATCH = (
    _core(
        "routing.py",
        "the sentinel is counted as the last expert",
        "torch.ones_like(self.expert_M))[: self.num_experts]",
        "torch.ones_like(self.expert_M))[1:]",
        "test_routing.py",
        "loads, losses and balance are about the wrong experts",
    ),
    _core(
        "plan.py",
        "the sort forgets the sentinels",
        "stable=True).indices[:num_real]",
        "stable=True).indices[total - num_real :]",
        "test_backends.py",
        "real assignments are dropped and those without work computed",
    ),
    _core(
        "plan.py",
        "the sort is not stable",
        "order_M = torch.sort(routing.expert_M.to(key_dtype(num_experts)), stable=True).indices[:num_real]",
        "order_M = total - 1 - torch.sort(routing.expert_M.to(key_dtype(num_experts)).flip(0), stable=True).indices\n"
        "        order_M = order_M[:num_real]",
        "test_backends_work.py",
        "results depend on the sort's implementation to the last bit",
    ),
    _core(
        "feed_forward.py",
        "two experts swap their second layers",
        "w_in, w_out = self.w_in.unbind(0), self.w_out.unbind(0)",
        "w_in, w_out = self.w_in.unbind(0), self.w_out.roll(1, 0).unbind(0)",
        "test_backends.py",
        "each row gets half of another expert",
    ),
    _core(
        "feed_forward.py",
        "the gated unit activates the wrong half",
        "return self.activation.function(gate) * up",
        "return self.activation.function(up) * gate",
        "test_backends.py",
        "checkpoints of other implementations compute something else",
    ),
    _core(
        "backends/loop.py",
        "outputs are not weighed",
        "return combine(y_MO if at_input else weigh(y_MO, plan.weight_M), plan)",
        "return combine(y_MO, plan)",
        "test_backends.py",
        "the router has no say and no gradient",
    ),
    _core(
        "fast/segments.py",
        "the router gets no gradient from segments",
        "self.dweight_M = torch.empty_like(weight_M) if need_weight else None",
        "self.dweight_M = torch.zeros_like(weight_M)[:0] if need_weight and weight_M is None else None",
        "test_backends.py",
        "the router never learns from the task on a CPU",
    ),
    _core(
        "fast/segments.py",
        "the gate's gradient has the bias with the wrong sign",
        "dot_R.add_(torch.mv(g_RO",
        "dot_R.sub_(torch.mv(g_RO",
        "test_backends.py",
        "the router learns something slightly wrong",
    ),
    _core(
        "derivatives.py",
        "gradients of gradients follow the paths between the inputs",
        "apart = [None if t is None else t.view_as(t) for t in inputs]",
        "apart = list(inputs)",
        "test_derivatives.py",
        "gradient penalties and meta-learning descend on something else",
    ),
    _core(
        "derivatives.py",
        "gradients cannot be differentiated again",
        "found: Gradients = _ByHand.apply(by_hand, function, tuple(needs), grad, *inputs)",
        "with torch.no_grad():\n        found = by_hand()",
        "test_derivatives.py",
        "the inner step of meta-learning counts as a constant",
    ),
    _core(
        "plan.py",
        "a plan made without gradients is used where they are wanted",
        "not (kept_M.is_inference() or weight_M.requires_grad)",
        "not kept_M.is_inference()",
        "test_derivatives.py",
        "a routing looked at before training steps never teaches its router",
    ),
    _core(
        "backends/grouped_mm.py",
        "undefined rows of a grouped product reach the weights",
        "        x_MD = weigh(x_MD, weight_M)\n    x_MD = x_MD.where(real_M1, 0)",
        "        x_MD = weigh(x_MD.where(real_M1, 0), weight_M)\n    x_MD = x_MD + 0",
        "test_static.py",
        "gradients of sentinels are nan now and then, on CUDA alone",
    ),
    _core(
        "fast/static.py",
        "the compiled router learns from the wrong assignments",
        "torch.zeros_like(call.weight_M).index_copy_(0, static.plan.order_M, dsorted_M)",
        "torch.zeros_like(call.weight_M).index_copy_(0, torch.arange(len(dsorted_M)), dsorted_M)",
        "test_static.py test_compile.py",
        "a compiled layer trains to something else than a plain one",
    ),
    _core(
        "combine.py",
        "shared experts are dropped",
        "ids_NS = torch.arange(routing.num_experts, num_all, device=device).expand(num_rows, -1)",
        "ids_NS = torch.full((num_rows, num_shared), num_all, device=device)",
        "test_layer.py",
        "the always-on part of the layer is missing",
    ),
    _core(
        "combine.py",
        "dense gates share the weights of one gate",
        'return torch.einsum("...ne,neo->...no", weight.to(y_NEo.dtype), y_NEo)',
        'return torch.einsum("...ne,neo->...no", weight.to(y_NEo.dtype).flip(0), y_NEo)',
        "test_layer_inputs.py test_layer.py",
        "tasks read each other's gates",
    ),
    _core(
        "record.py",
        "the recorder records the recomputation too",
        "if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:",
        "if False:",
        "test_record.py",
        "activation checkpointing doubles losses and counts",
    ),
    _core(
        "record.py",
        "the recorder detaches",
        "self.records.append(Record(self._name_of(layer), routing, layer, token_mask, group))",
        "probs = None if routing.probs_NE is None else routing.probs_NE.detach()\n"
        "        routing = __import__('dataclasses').replace(routing, probs_NE=probs)\n"
        "        self.records.append(Record(self._name_of(layer), routing, layer, token_mask, group))",
        "test_record.py",
        "auxiliary losses are logged and train nothing",
    ),
    _core(
        "record.py",
        "gradients switched off in the recorder go unnoticed",
        "if self._grad and not torch.is_grad_enabled():",
        "if False:",
        "test_record.py",
        "auxiliary losses are constants under reentrant checkpointing",
    ),
)

LOSSES = (
    _core(
        "objectives.py",
        "balance is not divided by k",
        "fraction_E = counts_E / counts_E.sum().clamp_min(1.0)",
        "fraction_E = counts_E / probs_NE.shape[0]",
        "test_losses.py",
        "the loss grows with k: no coefficient carries over",
    ),
    _core(
        "objectives.py",
        "balance trains on the detached probabilities",
        "return len(fraction_E) * (fraction_E.detach() * probs_NE.mean(0)).sum()",
        "return len(fraction_E) * (fraction_E * probs_NE.detach().mean(0)).sum() + 0.0 * probs_NE.sum()",
        "test_losses.py",
        "the loss is logged and does nothing",
    ),
    _core(
        "objectives.py",
        "losses ignore the token mask",
        "values = values[..., record.token_mask, :]",
        "values = values[..., torch.ones_like(record.token_mask), :]",
        "test_losses.py",
        "padding is balanced too",
    ),
    _core(
        "objectives.py",
        "entropy has the wrong sign",
        "return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)",
        "return (probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)",
        "test_losses.py",
        "the loss that should decide the router blurs it",
    ),
    _core(
        "objectives.py",
        "the smooth load compares an expert with itself",
        "others_NE = torch.where(inside_NE, top_NK[:, k, None], top_NK[:, k - 1, None])",
        "others_NE = top_NK[:, k - 1, None]",
        "test_losses.py",
        "the smooth load counts nothing of what is routed",
    ),
    _core(
        "losses.py",
        "global balance never forgets",
        "        self._seen.clear()",
        "        pass",
        "test_losses_modules.py",
        "the load of the first epoch weighs on the last",
    ),
    _core(
        "balance.py",
        "bias balancing pushes the wrong way",
        "torch.sign(counts_E.mean() - counts_E)",
        "torch.sign(counts_E - counts_E.mean())",
        "test_balance.py",
        "one expert takes everything",
    ),
    _core(
        "balance.py",
        "bias drifts",
        "return bias_E + (delta_E - delta_E.mean()).to(bias_E.dtype)",
        "return bias_E + delta_E.to(bias_E.dtype)",
        "test_balance.py",
        "biases wander off together until they lose precision",
    ),
    _core(
        "metrics.py",
        "information is divided by the entropy of the experts",
        "information, entropy = _information(joint_SE), _entropy(joint_SE.sum(1))",
        "information, entropy = _information(joint_SE), _entropy(joint_SE.sum(0))",
        "test_metrics.py",
        "specialisation of few experts looks complete",
    ),
)

CORE_MUTATIONS = ROUTERS + DISPATCH + LOSSES
