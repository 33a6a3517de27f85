# SPDX-License-Identifier: Apache-2.0
"""MixER: does a gate fitted to clusters of contexts find hidden families, does it pay, and against which rivals?

Claims C1 to C5 are the paper's, as far as they can be tested here (docs/papers/mixer.md), C6 and C7 ours. Two gates are
kept apart everywhere: the published one and ``robust``, ours. Both are trained our way (Adam for AdaBelief, single
steps before roll-outs, 300 rounds of 3 + 9 steps for 500 to 5000 of 12 + 12, no windows), so nothing here is "as
published" but gate, contributors and adaptation where a text says so. A step sees all environments or, as published, a
family's number of them (``five``); compared are variants that see as many. Errors are those of whole roll-outs from new
initial conditions, compared by ratio (log10); initial conditions, numbering and weights are drawn anew for every pair
of seeds.
"""

from __future__ import annotations

import math

from benchmarks.evidence.grid import Claim, Grid, Ladder, Variant

SETTING = "benchmarks/evidence/mixer.yaml"
MSE, RELATIVE, ARI, PURITY = "seen/mse", "seen/relative_mse", "partition/ari", "partition/purity"
GEOMETRIC = "geometric.seen/relative_mse"
"""Geometric mean over families of each family's mean relative error: no family rules it by the size of its errors."""
MEDIAN, GATE = "seen/relative_mse_median", "mixer_gate"
HALF = math.log10(2.0)
"""Half the error. Set before any run."""
TIE = math.log10(1.25)
"""A quarter more error: the loss that non-inferiority accepts. Set before any run."""
ARI_BAR, PURITY_BAR, RELATIVE_BAR, ARI_LEAD = 0.9, 0.95, 1e-2, 0.3
"""Bars for medians over seeds, and by how much fitted gates should lead gradient gates. Set before any run."""


def variant(*names: str, flags: tuple[str, ...] = (), pairs: int = 3, more: tuple[str, ...] = ()) -> Variant:
    """The base config with overlays of configs/baselines on top."""
    overlays = (SETTING, *more, *(f"configs/baselines/mixer_{name}.yaml" for name in names))
    return Variant(overlays, flags, pairs)


NET = "--model.init_args.net.init_args."
ONE, TEN = ("benchmarks/evidence/mixer_one.yaml",), ("benchmarks/evidence/mixer_ten.yaml",)
ZEROS = ("--model.init_args.adaptation=tasks.dynamics.nets.adaptation.FromZeros",)
FIVE = ("--model.init_args.alternation.contributors=5",)
"""Environments of a step as published: as many as a family has."""
THREE_EXPERTS = (f"{NET}num_experts=3", f"{NET}context_dim=12")
TEN_EXPERTS = (f"{NET}num_experts=10", f"{NET}context_dim=40")
STEPS = "--data.init_args.steps_per_epoch="
"""120 in the base config. A fit of the gate tries every expert on every environment, which costs more than a step does:
one meta-learner takes 199 (four families) or 185 (ten) for equal FLOPs of the training, fits included. The published
gate is also fitted where ours still warms up, and on ten families takes 118. Set before any of these runs."""
VARIANTS = {
    "robust": variant(pairs=8),
    "single": variant("single", pairs=8),
    "mixer_gate": variant("faithful_gate", pairs=8),
    "mixer": variant("faithful", pairs=8),
    "single_five": variant("single", flags=FIVE, pairs=8),
    "single_equal": variant("single", flags=(f"{STEPS}199",), pairs=8),
    "single_params": variant("single_params"),
    "frozen": variant("frozen"),
    "switch": variant("switch"),
    "soft": variant("soft"),
    "hard_em": variant("hard_em"),
    "oracle": variant("oracle"),
    "robust_cold": variant(flags=(f"{NET}gate.init_args.warmup=0",)),
    "robust_zeros": variant(flags=ZEROS),
    "robust_eight": variant(flags=(f"{NET}num_experts=8", f"{NET}context_dim=32")),
    "coda": variant("coda", pairs=2),
    "ncf": variant("ncf", pairs=2),
    "cavia": variant("cavia", pairs=2),
    "per_environment": variant("per_environment", pairs=2),
    "context_free": variant("context_free", pairs=2),
    "one_robust": variant(more=ONE, flags=THREE_EXPERTS),
    "one_mixer": variant("faithful", more=ONE, flags=THREE_EXPERTS),
    "one_single": variant("single", more=ONE),
    "one_single_five": variant("single", more=ONE, flags=FIVE),
    "ten_robust": variant(more=TEN, flags=TEN_EXPERTS),
    "ten_mixer": variant("faithful_gate", more=TEN, flags=(*TEN_EXPERTS, f"{STEPS}118")),
    "ten_single": variant("single", more=TEN),
    "ten_single_equal": variant("single", more=TEN, flags=(f"{STEPS}185",)),
}


def lower(id: str, text: str, system: str, baseline: str, **options: object) -> Claim:
    """One error is lower than another, by ratio."""
    given = {"metric": MSE, "direction": "lower", "scale": "log10", **options}
    return Claim(id, text, system=system, baseline=baseline, **given)  # type: ignore[arg-type]


def by_steps(id: str, text: str, system: str, baseline: str, **options: object) -> Claim:
    """One error is lower than another after as many steps; fits of a gate come on top, as the printed ratio says."""
    return lower(id, f"{text}, after as many steps.", system, baseline, match="none", **options)


def bar(id: str, text: str, system: str, metric: str, value: float, direction: str = "higher") -> Claim:
    """The median over seeds reaches a bar."""
    return Claim(id, text, metric, direction, system, rule="median", baseline_value=value)  # type: ignore[arg-type]


SHARED = (
    by_steps(
        "C1a",
        "Five environments a step: the published gate and contributors have a lower error than one meta-learner",
        "mixer",
        "single_five",
    ),
    lower(
        "C1b",
        "All environments a step: the published gate has a lower error than one meta-learner of as many parameters in "
        "all, which takes 9.3 times its FLOPs a step.",
        "mixer_gate",
        "single_params",
        match="params",
    ),
    by_steps(
        "C1c",
        "robust (ours) has a lower error than one meta-learner of the size of an expert",
        "robust",
        "single",
    ),
    by_steps(
        "C1d",
        "The median error of robust (ours) is at most half that of one meta-learner of the size of an expert",
        "robust",
        "single",
        rule="median",
        margin=HALF,
    ),
    lower(
        "C1e",
        "robust (ours) has a lower error than one meta-learner of as many parameters in all, which takes 9.3 times its "
        "FLOPs a step.",
        "robust",
        "single_params",
        match="params",
    ),
    by_steps(
        "C1f",
        "All environments a step: the published gate has a lower error than one meta-learner of the size of an expert",
        "mixer_gate",
        "single",
    ),
    lower(
        "C1g",
        "robust (ours) has a lower error than one meta-learner of the size of an expert after a training of equal "
        "FLOPs, fits of the gate included.",
        "robust",
        "single_equal",
    ),
    lower(
        "C1h",
        "All environments a step: the published gate has a lower error than one meta-learner of the size of an expert "
        "after a training of equal FLOPs, fits of the gate included.",
        "mixer_gate",
        "single_equal",
    ),
    lower(
        "C1i",
        "Family by family (geometric mean) robust (ours) has a lower relative error than one meta-learner after a "
        "training of equal FLOPs.",
        "robust",
        "single_equal",
        metric=GEOMETRIC,
    ),
)
GATES = (
    bar(
        "C2a",
        "The published gate and contributors, five environments a step: the median adjusted Rand index reaches 0.9.",
        "mixer",
        ARI,
        ARI_BAR,
    ),
    bar("C2b", "robust (ours): the median adjusted Rand index reaches 0.9.", "robust", ARI, ARI_BAR),
    bar("C2c", "robust (ours): the median purity reaches 0.95.", "robust", PURITY, PURITY_BAR),
    bar("C2d", "robust (ours): the median relative error is at most 0.01.", "robust", RELATIVE, RELATIVE_BAR, "lower"),
    *(
        Claim(id, f"{text}, after as many steps.", ARI, "higher", system, baseline, margin=margin, match="none")
        for id, system, baseline, margin, text in (
            ("C2e", GATE, "frozen", 0.0, "The published gate recovers families better than the frozen one"),
            ("C2f", GATE, "switch", 0.0, "The published gate recovers families better than the Switch gate"),
            (
                "C2g",
                "robust",
                "switch",
                ARI_LEAD,
                "robust (ours) recovers families better than the Switch gate, by 0.3",
            ),
        )
    ),
    Claim("C2h", "robust (ours) recovers families better than the published gate.", ARI, "higher", "robust", GATE),
    by_steps("C2i", "The published gate has a lower error than the frozen one", GATE, "frozen"),
    by_steps("C2j", "The published gate has a lower error than the Switch gate", GATE, "switch"),
    lower("C2k", "robust (ours) has a lower error than the published gate.", "robust", GATE),
    by_steps("C2l", "robust (ours) has a lower error than the Switch gate", "robust", "switch"),
    lower(
        "C2m",
        "robust (ours) has a lower error than a soft mixture of 12 times its FLOPs a step.",
        "robust",
        "soft",
        match="none",
    ),
    lower("C2n", "robust (ours) has a lower error than hard expectation-maximisation.", "robust", "hard_em"),
    by_steps("C2o", "robust (ours) has a lower error than the frozen gate", "robust", "frozen"),
    by_steps(
        "C2p",
        "robust (ours) loses at most a quarter to a gate that is told the families",
        "robust",
        "oracle",
        rule="non-inferiority",
        margin=TIE,
    ),
    Claim(
        "C2q",
        "Experts drawn at random before the first fit: robust (ours) recovers families better than without.",
        ARI,
        "higher",
        "robust",
        "robust_cold",
    ),
    bar(
        "C2r",
        "The published gate, all environments a step: the median adjusted Rand index reaches 0.9.",
        GATE,
        ARI,
        ARI_BAR,
    ),
    Claim(
        "C2s",
        "The published gate recovers families better when a step sees all environments than when it sees five.",
        ARI,
        "higher",
        GATE,
        "mixer",
        match="none",
    ),
)
ONE_FAMILY = (
    by_steps(
        "C3a",
        "On one family, five of nine environments a step, one meta-learner has a lower error than the published gate",
        "one_single_five",
        "one_mixer",
    ),
    by_steps(
        "C3b",
        "On one family a single meta-learner has a lower error than robust (ours) with 3 experts",
        "one_single",
        "one_robust",
    ),
)
SERIES = (
    Claim("C4a", "On Epilepsy2 routing is blurred.", untested="the recordings are in no package; a reader is here"),
    Claim(
        "C4b",
        "Synthetic control charts give good clusters.",
        untested="the series are here by formula; the grid was kept to differential equations",
    ),
)
NUMBER = (
    by_steps(
        "C5",
        "Eight experts for four families lose at most a quarter to four",
        "robust_eight",
        "robust",
        rule="non-inferiority",
        margin=TIE,
    ),
)
BEATS = "robust (ours) beats one meta-learner after a training of equal FLOPs."
ADAPTATION = tuple(
    lower(f"C6{letter}", text, "robust", rival, metric=f"{domain}/relative_mse_median")
    for letter, domain, rival, text in (
        ("a", "inside", "robust_zeros", "New settings inside the range: trying every expert beats starting at zero."),
        ("b", "outside", "robust_zeros", "New settings outside the range: trying every expert beats starting at zero."),
        ("c", "inside", "single_equal", f"New settings inside the range: {BEATS}"),
        ("d", "outside", "single_equal", f"New settings outside the range: {BEATS}"),
        ("e", "pendulum", "single_equal", f"An unseen family: {BEATS}"),
    )
)
TEN_FAMILIES = (
    lower(
        "C7a",
        "On the ten families of ODEBench robust (ours) has a lower median relative error than one meta-learner after a "
        "training of equal FLOPs.",
        "ten_robust",
        "ten_single_equal",
        metric=MEDIAN,
    ),
    bar(
        "C7b",
        "On ODEBench the adjusted Rand index over the families that can be told apart reaches 0.9.",
        "ten_robust",
        "partition/ari_identifiable",
        ARI_BAR,
    ),
    lower(
        "C7c",
        "On ODEBench the published gate has a lower median relative error than one meta-learner after a training of "
        "equal FLOPs.",
        "ten_mixer",
        "ten_single_equal",
        metric=MEDIAN,
    ),
    *(
        lower(f"C7{letter}", text, system, baseline, metric=GEOMETRIC)
        for letter, system, baseline, text in (
            (
                "d",
                "ten_robust",
                "ten_single_equal",
                "Family by family (geometric mean over ODEBench's ten) robust (ours) has a lower relative error than "
                "one meta-learner after a training of equal FLOPs.",
            ),
            (
                "e",
                "ten_mixer",
                "ten_single_equal",
                "Family by family on ODEBench the published gate has a lower relative error than one meta-learner "
                "after a training of equal FLOPs.",
            ),
            (
                "f",
                "ten_robust",
                "ten_mixer",
                "Family by family on ODEBench robust (ours) has a lower relative error than the published gate after a "
                "training of equal FLOPs.",
            ),
        )
    ),
    lower(
        "C7g",
        "On ODEBench robust (ours) has a lower mean squared error than one meta-learner after a training of equal "
        "FLOPs.",
        "ten_robust",
        "ten_single_equal",
    ),
    bar(
        "C7h",
        "On ODEBench the published gate's adjusted Rand index over the families that can be told apart reaches 0.9.",
        "ten_mixer",
        "partition/ari_identifiable",
        ARI_BAR,
    ),
)

OSCILLATORS = "--data.init_args.seen=[harmonic,double_well,van_der_pol]"
GRID = Grid(
    system="mixer",
    config="configs/mixer.yaml",
    variants=VARIANTS,
    claims=(*SHARED, *GATES, *ONE_FAMILY, *SERIES, *NUMBER, *ADAPTATION, *TEN_FAMILIES),
    headline=("robust", "single", "mixer_gate", "mixer", "single_five", "single_equal"),
    ladder=Ladder(
        levels={
            "three_alike": Variant(flags=(OSCILLATORS, "--data.init_args.source.init_args.likeness=0.8")),
            "three": Variant(flags=(OSCILLATORS,)),
            "four": Variant(),
            "six": Variant(
                flags=("--data.init_args.seen=[harmonic,lotka_volterra,double_well,van_der_pol,selkov,brusselator]",)
            ),
        },
        system="robust",
        baseline="single",
        metric=MEDIAN,
        direction="lower",
        text="Three oscillators with 80 per cent of one common oscillator mixed into each; the three as they are; four "
        "families; six. The mixture has four experts at every level.",
    ),
    data_seed_flags=("--data.init_args.seed", "--data.init_args.source.init_args.data_seed"),
    settings_tried=41,
    choice="Chosen on new initial conditions of the seen families and on partitions with data seeds 101 to 112: rate "
    "constant, cut twice, cosine, also for contexts; 0.005, 0.01, 0.02; 80 to 300 rounds; proximal weight 1, 10; "
    "6 + 6 or 3 + 9 steps on contexts and weights; 0 to 60 per cent of roll-outs; width 6, 8, 12, 16, 24; a fit "
    "every one or two steps. Three first grids were discarded. 80 rounds with the rate cut twice: perfect "
    "partitions, yet the error of one meta-learner. 120 rounds with a cosine: the same from better networks. "
    "Width 12, 3 + 9 steps, rate 0.01: lower errors, but partitions were lost (median adjusted Rand index 0.65): "
    "an expert trains its own piece of the contexts alone, so that clusters confirm the experts they were sent to "
    "by chance. Faster contexts, more fits, no hysteresis and a slower start of the weights mended some seeds and "
    "not others; ten rounds with experts drawn at random before the first fit mended all six that were tried "
    "(101, 102, 103, 105, 106, 111), as did the mean of all experts (105, 111). Then 300 rounds instead of 160, "
    "once a step had become cheaper: one meta-learner of width 12 has 1.0 and 1.5 times the mixture's mean "
    "squared error (seeds 105, 103), of width 8 2.1 and 2.8 times (105, 102), of width 6, too small for an expert "
    "as well, 1.5 times (105); hence 8. What is left of the mean errors lies in the double well, whose initial "
    "conditions straddle its separatrix: with seed 105 one of its 80 test trajectories runs into the saddle and "
    "carries 0.065 of its mean relative error of 0.068, while the median trajectory has 0.0004 and training "
    "trajectories 0.0015. Narrower and wider experts (6, 12, 16, 24), twice the roll- outs (60 per cent), more "
    "rounds and a weaker proximal term moved that trajectory (relative error 5 to 11) and did not bring it down.",
    show=(
        MSE,
        RELATIVE,
        GEOMETRIC,
        MEDIAN,
        "seen/reconstructed",
        ARI,
        PURITY,
        "partition/experts",
        "partition/abandoned",
        "inside/relative_mse_median",
        "outside/relative_mse_median",
        "pendulum/relative_mse_median",
    ),
)
