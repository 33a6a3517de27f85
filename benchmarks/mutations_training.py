# SPDX-License-Identifier: Apache-2.0
"""The ways in which `benchmarks.mutate` breaks `moeapps.training`: what a run does around a network.

Written as those of `benchmarks.mutations`; the rest of tests/training follows the tests named here.
"""

from __future__ import annotations

from benchmarks.mutations import Mutation

CODE = "moeapps/training/"
TESTS = "tests/training/"


def mutation_of_training(file: str, name: str, search: str, replace: str, tests: str, why: str) -> Mutation:
    """Give a mutation of a file of moeapps/training, or named from moeapps/ on; tests without a folder are its own."""
    found = tuple(test if "/" in test else TESTS + test for test in tests.split())
    path = file if file.startswith("moeapps/") else CODE + file
    return Mutation(name, path, search, replace, found, why)


_training = mutation_of_training


_AFTER_BATCH = "_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:\n"

TASK = (
    _training(
        "task.py",
        "training forgets the weight of an auxiliary loss",
        "loss = loss + aux.weight * value",
        "loss = loss + value",
        "test_aux_losses.py",
        "a balance loss of 0.01 acts as one of 1",
    ),
    _training(
        "task.py",
        "auxiliary losses are only logged",
        "loss = loss + aux.weight * value",
        "loss = loss + aux.weight * value.detach()",
        "test_aux_losses.py",
        "the log shows a loss that nothing is trained on",
    ),
    _training(
        "task.py",
        "training steps without the auxiliary losses",
        "        return total\n",
        "        return out.loss\n",
        "test_aux_losses.py",
        "the log shows a loss that nothing is trained on",
    ),
    _training(
        "evaluated.py",
        "padding batches leave their records",
        "            self.last_records, self.last_answer = [], None\n            return\n",
        "            return\n",
        "test_records.py",
        "in runs of several processes the routing report counts rows twice",
    ),
    _training(
        "evaluated.py",
        "padding batches are scored",
        "if self.data.is_padding(stage, dataloader_idx, batch_idx):",
        "if False:",
        "test_records.py",
        "in runs of several processes some rows count twice",
    ),
    _training(
        "task.py",
        "training keeps the records of a step",
        '''            SIGTERMException: SIGTERM came in it, and there are several processes.
        """
        self.last_records = []
''',
        '''            SIGTERMException: SIGTERM came in it, and there are several processes.
        """
''',
        "test_records.py",
        "two graphs are in memory at once",
    ),
    *(
        _training(
            "evaluated.py",
            f"the {hook} keeps the records of a batch",
            f"def on_{hook}{_AFTER_BATCH}        self.last_records = []\n",
            f"def on_{hook}{_AFTER_BATCH}",
            "test_records.py",
            "what was routed lies in memory until the next evaluation",
        )
        for hook in ("validation", "test")
    ),
    _training(
        "task.py",
        "losses are told of every micro-batch",
        "        if self.trainer.global_step != self._last_step:\n",
        "        if True:\n",
        "test_aux_losses.py",
        "the balance of a global batch is that of a micro-batch",
    ),
    _training(
        "task.py",
        "a resumed run takes its first micro-batch for a step",
        "        self._last_step = self.trainer.global_step\n        if self.trained",
        "        self._last_step = 0\n        if self.trained",
        "test_aux_losses.py",
        "the first step of a resumed run balances half of its batch",
    ),
    _training(
        "evaluated.py",
        "the sanity check counts in the first validation",
        'self.scores["val"].reset()',
        "pass",
        "test_task.py",
        "the first scores hold some items twice, scored before training",
    ),
    _training(
        "evaluated.py",
        "a second test adds to the first",
        'self.scores["test"].reset()',
        "pass",
        "test_task.py",
        "a test after a test reports a mixture of two models",
    ),
    _training(
        "evaluated.py",
        "scores go to the first domain",
        "self.last_domain = self.data.eval_domains(stage)[dataloader_idx]",
        "self.last_domain = self.data.eval_domains(stage)[0]",
        "test_task.py test_callbacks.py",
        "domains are mixed up",
    ),
    _training(
        "task.py",
        "the schedule moves once per epoch",
        '"interval": "step"',
        '"interval": "epoch"',
        "test_task.py",
        "a run never leaves the warm-up",
    ),
    _training(
        "task.py",
        "the schedule does not know the length of the run",
        "max(1, int(steps))",
        "1000",
        "test_task.py",
        "the rate never comes down",
    ),
    _training(
        "task.py",
        "sparse gradients are not clipped",
        'clip_gradients(held, float(gradient_clip_val), gradient_clip_algorithm or "norm")',
        "pass",
        "test_task.py",
        "one odd batch destroys the tables",
    ),
    _training(
        "task.py",
        "dense gradients are not clipped",
        "super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)",
        "pass",
        "test_task.py",
        "one odd batch destroys the network",
    ),
    _training(
        "task.py",
        "the loss in the log holds the auxiliary losses",
        'self.log_train("loss", out.loss, out.batch_size, prog_bar=True)',
        'self.log_train("loss", total, out.batch_size, prog_bar=True)',
        "test_aux_losses.py",
        "runs with and without a balance loss cannot be compared",
    ),
)

OPTIMISATION = (
    _training(
        "optim.py",
        "the last matching group wins",
        "members[hits[0] + 1 if hits else 0]",
        "members[hits[-1] + 1 if hits else 0]",
        "test_optim.py",
        "parameters learn at a rate other than the documented one",
    ),
    _training(
        "optim.py",
        "the factor of a group is forgotten",
        "lr = (config.lr if group.lr is None else group.lr) * group.lr_mult",
        "lr = config.lr if group.lr is None else group.lr",
        "test_optim.py",
        "blocks learn as fast as the head",
    ),
    _training(
        "optim.py",
        "the decay of a group is forgotten",
        "decay = config.weight_decay if group.weight_decay is None else group.weight_decay",
        "decay = config.weight_decay",
        "test_optim.py",
        "norms and biases decay",
    ),
    _training(
        "optim.py",
        "frozen parameters are trained",
        "if parameter.requires_grad:\n",
        "if True:\n",
        "test_optim.py",
        "decay moves what was frozen",
    ),
    _training(
        "optim.py",
        "the numbers of AdamW are torch's own",
        '"betas": config.betas, "eps": config.eps, ',
        "",
        "test_optim.py",
        "betas and eps of a configuration do nothing",
    ),
    _training(
        "optim.py",
        "a fused step keeps the loss scale to itself",
        "optimizer._step_supports_amp_scaling = False",
        "pass",
        "test_optim.py",
        "nothing that clips trains under mixed precision",
    ),
    _training(
        "optim.py",
        "warm-up begins at nothing",
        "return (step + 1) / warm",
        "return step / warm",
        "test_optim.py",
        "the first step of every run is lost",
    ),
    _training(
        "optim.py",
        "the cosine ends at nothing",
        "return self.final + (1 - self.final) * 0.5",
        "return 0.5",
        "test_optim.py",
        "the last steps of a run do nothing",
    ),
    _training(
        "optim.py",
        "the cycle ends before the run",
        "total_steps=total_steps + 1",
        "total_steps=total_steps",
        "test_optim.py",
        "every run fails at its last step",
    ),
    _training(
        "sparse.py",
        "the parts keep their own state after loading",
        "            part.state = self.state\n",
        "",
        "test_sparse.py",
        "a resumed run starts with empty moments",
    ),
    _training(
        "sparse.py",
        "tables are not stepped",
        "        for part in self.parts:\n            part.step()",
        "        for part in self.parts[:1]:\n            part.step()",
        "test_sparse.py",
        "embeddings stay as they were drawn",
    ),
    _training(
        "sparse.py",
        "a row touched twice is clipped twice",
        "parameter.grad = parameter.grad.coalesce()",
        "parameter.grad = parameter.grad._coalesced_(True)",
        "test_sparse.py",
        "the norm of a table's gradient is wrong",
    ),
    _training(
        "sparse.py",
        "the dense part is never fused beside tables",
        "parts.append(AdamW(dense, **adamw_numbers(config)))",
        "parts.append(AdamW(dense, **{**adamw_numbers(config), 'fused': None}))",
        "test_sparse.py",
        "a setting does nothing, silently",
    ),
)
