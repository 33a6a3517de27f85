# SPDX-License-Identifier: Apache-2.0
"""HoME: do normalised experts, the hierarchy mask, feature-gates and self-gates pay for rare tasks, and at what price?

Two regimes. ``once_*``: one pass over 480,000 rows, as a log in production is read, each network at the learning rate
that benchmarks/home_rates.py found for it; the claims are C9. All others: four passes over 60,000 rows at one rate for
all, where rare labels are memorised (train 0.88, test 0.69); C1 to C6 are what the paper claims, as far as it can be
tested here (docs/papers/home.md), with controls, C7, which no model may break, and C8, ours. C9 was written when the
first regime's rates had been chosen on the validation domain and after three seeds of HoME and MMoE at one rate each
had been seen.
On the generated log the scores are GAUC with the true probabilities in place of labels (``gauc_expected``): the same
ranking of models, without the noise of a few hundred positives. The rare tasks are those of the category
``interaction``, the dense ones those of ``watch``. Data seeds draw functions, users, items and labels anew; intervals
are over data seeds.
"""

from __future__ import annotations

from benchmarks.evidence.grid import Claim, Grid, Ladder, Variant

SETTING = ("benchmarks/evidence/home.yaml",)
FOUR_PASSES = ("benchmarks/evidence/home_four_passes.yaml",)
MOVIELENS_EXPERTS = ("--model.init_args.net.init_args.bank.init_args.num_experts=21",)
"""On MovieLens, whose features are wider, 21 experts of MMoE have as many parameters as HoME."""
STRESS = ("benchmarks/evidence/home_stress.yaml",)
DATA_SEED_FLAGS = ("--data.init_args.seed", "--data.init_args.source.init_args.data_seed")
ORDER = DATA_SEED_FLAGS[:1]
"""What a data seed sets where the data are real: their order."""
RARE, DENSE, ALL = "seen.interaction/gauc_expected", "seen.watch/gauc_expected", "seen/gauc_expected"
LOSS = 0.005
"""Half a point of GAUC: the loss that non-inferiority accepts. Set before any run."""
DATA_SEEDS, MODEL_SEEDS = 5, 3
RIVALS = ("single_task", "shared_bottom", "omoe", "mmoe_norm", "ml_mmoe", "adatt_sp", "adatt", "cross_stitch", "stem")
ABLATIONS = (
    "no_norm",
    "no_mask",
    "no_feature_gates",
    "no_self_gates",
    "one_level",
    "one_category",
    "relu",
)
CONTROLS = ("random_categories", "uniform_gates", "shuffled_gates")


def once(*names: str, flags: tuple[str, ...] = (), pairs: int = 3) -> Variant:
    """One pass over the rows of the base config, with overlays of configs/baselines on top: each at its own rate."""
    return Variant((*SETTING, *(f"configs/baselines/home_{name}.yaml" for name in names)), flags, pairs)


def variant(*names: str, more: tuple[str, ...] = (), pairs: int = 3) -> Variant:
    """Four passes over few rows with overlays of configs/baselines below: one rate for all."""
    overlays = tuple(f"configs/baselines/home_{name}.yaml" for name in names)
    return Variant((*SETTING, *overlays, *FOUR_PASSES, *more), pairs=pairs)


ONCE = ("cgc", "ple", "single_task", "layer_norm", "mmoe_layer_norm", "adatt")


def movielens(*names: str, flags: tuple[str, ...] = ()) -> Variant:
    """MovieLens-100K, real data: a data seed draws their order alone."""
    overlays = tuple(f"configs/baselines/home_{name}.yaml" for name in names)
    files = (*SETTING, "configs/data/ml100k.yaml", *overlays, "benchmarks/evidence/home_ml100k.yaml")
    return Variant(files, flags, pairs=8, data_seed_flags=ORDER)


VARIANTS = {
    "once_home": once(pairs=8),
    "once_mmoe": once("mmoe", pairs=8),
    "once_mmoe_flops": once("mmoe", flags=("--model.init_args.net.init_args.bank.init_args.num_experts=28",)),
    **{f"once_{name}": once(name) for name in ONCE},
    "home": variant(pairs=DATA_SEEDS * MODEL_SEEDS),
    "mmoe": variant("mmoe", pairs=DATA_SEEDS * MODEL_SEEDS),
    "cgc": variant("cgc", pairs=DATA_SEEDS),
    "ple": variant("ple", pairs=DATA_SEEDS),
    "home_ml100k": movielens(),
    "mmoe_ml100k": movielens("mmoe", flags=MOVIELENS_EXPERTS),
    "layer_norm_ml100k": movielens("layer_norm"),
    "mmoe_layer_norm_ml100k": movielens("mmoe_layer_norm", flags=MOVIELENS_EXPERTS),
    "layer_norm": variant("layer_norm", pairs=DATA_SEEDS),
    "mmoe_layer_norm": variant("mmoe_layer_norm", pairs=DATA_SEEDS),
    **{name: variant(name) for name in (*RIVALS, *ABLATIONS, *CONTROLS, "uncertainty")},
    "stress": variant(more=STRESS),
    "stress_no_norm": variant("no_norm", more=STRESS),
}


def exact(name: str, text: str, system: str, metric: str, direction: str, value: float) -> Claim:
    """A claim about one variant that holds in every run."""
    return Claim(
        name,
        text,
        metric=f"experts/{metric}",
        direction=direction,  # type: ignore[arg-type]
        system=system,
        baseline_value=value,
        rule="exact",
        match="none",
    )


COLLAPSE = (
    exact(
        "C1a",
        "Batch norm and Swish leave next to no zero outputs in any expert.",
        "home",
        "zero_frac_max",
        "lower",
        0.01,
    ),
    exact(
        "C1b",
        "Plain ReLU experts have one with at least 30 per cent of zeros.",
        "no_norm",
        "zero_frac_max",
        "higher",
        0.3,
    ),
    Claim(
        "C1c",
        "With batch norm and Swish, experts' spreads differ no more than without.",
        metric="experts/dist_ratio",
        direction="lower",
        system="home",
        baseline="no_norm",
        rule="non-inferiority",
        margin=0.1,
        match="params",
    ),
    exact(
        "C1d",
        "Under stress, batch norm and Swish still leave next to no zeros.",
        "stress",
        "zero_frac_max",
        "lower",
        0.01,
    ),
    exact(
        "C1e",
        "Under stress a plain ReLU expert collapses by the paper's measure: more than 90 per cent zeros.",
        "stress_no_norm",
        "zero_frac_max",
        "higher",
        0.9,
    ),
)
MASK = (
    exact("C2a", "With the mask no gate weighs an expert of another category.", "home", "foreign_mass", "equal", 0.0),
    exact("C2b", "Control: without the mask gates do.", "no_mask", "foreign_mass", "higher", 0.01),
)
SELF_GATE = (
    exact(
        "C3a",
        "Self-gates keep more than 1 per cent of the gradient at a task's own expert when its gate ignores it.",
        "home",
        "own_gradient_kept",
        "higher",
        0.01,
    ),
    exact(
        "C3b", "Control: without self-gates nothing is left of it.", "no_self_gates", "own_gradient_kept", "lower", 1e-6
    ),
)


def rare(name: str, text: str, baseline: str, match: str = "params") -> Claim:
    """HoME is better on the rare tasks."""
    return Claim(name, f"In four passes, {text}", metric=RARE, system="home", baseline=baseline, match=match)  # type: ignore[arg-type]


RARE_TASKS = (
    rare("C4a", "on the rare tasks HoME beats MMoE of equal parameters.", "mmoe"),
    rare("C4b", "on the rare tasks HoME beats CGC of equal parameters.", "cgc"),
    rare("C4c", "on the rare tasks HoME beats PLE of equal parameters.", "ple"),
    rare("C4d", "on the rare tasks HoME beats MMoE with its own experts: more than the norm is at work.", "mmoe_norm"),
    rare("C4e", "on the rare tasks HoME beats a network per task.", "single_task"),
    rare("C4f", "the given categories beat ones dealt out at random.", "random_categories"),
    rare("C4g", "learned gates beat gates that weigh all experts alike.", "uniform_gates", "none"),
    rare("C4h", "gates that see their row beat gates that see another one.", "shuffled_gates"),
    Claim(
        "C4i",
        "In four passes, on the rare tasks of unseen populations HoME beats MMoE of equal parameters.",
        metric="unseen.interaction/gauc_expected",
        system="home",
        baseline="mmoe",
        match="params",
    ),
)
DENSE_TASKS = (
    Claim(
        "C5",
        "In four passes, on the dense tasks HoME loses no more than half a point against MMoE.",
        metric=DENSE,
        system="home",
        baseline="mmoe",
        rule="non-inferiority",
        margin=LOSS,
        match="params",
    ),
)
REAL = tuple(
    Claim(
        f"C6{letter}",
        f"On MovieLens-100K, {role} domains, the best epoch of each: {text}",
        metric=f"{role}/gauc",
        system=f"{system}_ml100k",
        baseline=f"{baseline}_ml100k",
        rule="non-inferiority",
        margin=LOSS,
        match="params",
        clustered=False,
    )
    for letter, role, system, baseline, text in (
        ("a", "seen", "home", "mmoe", "HoME's mean GAUC is no more than half a point below MMoE's."),
        ("b", "unseen", "home", "mmoe", "HoME's mean GAUC is no more than half a point below MMoE's."),
        ("c", "seen", "layer_norm", "mmoe_layer_norm", "the same where both have layer norm."),
        ("d", "unseen", "layer_norm", "mmoe_layer_norm", "the same where both have layer norm."),
    )
)
CEILING = (
    *(
        Claim(
            f"C7{letter}",
            f"Nothing leaks: {name} ranks no task of any domain better than the true probabilities do, in expectation.",
            metric="oracle/margin",
            system=system,
            baseline_value=0.0,
            rule="exact",
            match="none",
        )
        for letter, name, system in (("a", "HoME", "home"), ("b", "MMoE", "mmoe"))
    ),
    Claim(
        "C7c",
        "Nothing leaks: on the drawn labels, too, HoME stays below the true probabilities.",
        metric="seen/gauc",
        direction="lower",
        system="home",
        baseline="home",
        baseline_metric="oracle.seen/gauc",
    ),
)
LAYER_NORM = tuple(
    Claim(
        f"C8{letter}",
        text,
        metric=RARE,
        system="layer_norm",
        baseline=baseline,
        match="params",
    )
    for letter, baseline, text in (
        (
            "a",
            "home",
            "In four passes, on the rare tasks HoME with layer norm beats HoME with batch norm, as published.",
        ),
        ("b", "mmoe", "In four passes, on the rare tasks HoME with layer norm beats MMoE of equal parameters."),
        (
            "c",
            "mmoe_layer_norm",
            "In four passes, on the rare tasks HoME with layer norm beats MMoE with it: structure counts.",
        ),
    )
)
"""Ours: layer norm gained most in benchmarks/home_search.py, on the validation domain of other data seeds."""


def once_claim(letter: str, text: str, baseline: str, metric: str = RARE, system: str = "once_home") -> Claim:
    """In one pass a network is better than another of equal parameters."""
    match = "flops" if baseline == "once_mmoe_flops" else "params"
    return Claim(f"C9{letter}", f"In one pass {text}", metric, system=system, baseline=baseline, match=match)  # type: ignore[arg-type]


ONE_PASS = (
    once_claim("a", "HoME beats MMoE of equal parameters on the rare tasks.", "once_mmoe"),
    once_claim("b", "HoME beats MMoE of equal parameters on the dense tasks.", "once_mmoe", DENSE),
    once_claim(
        "c",
        "HoME beats MMoE of equal parameters on the rare tasks of unseen populations.",
        "once_mmoe",
        "unseen.interaction/gauc_expected",
    ),
    once_claim("d", "HoME beats MMoE of equal FLOPs (1.2 times the parameters) on the rare tasks.", "once_mmoe_flops"),
    once_claim("e", "HoME beats CGC of equal parameters on the rare tasks.", "once_cgc"),
    once_claim("f", "HoME beats PLE of equal parameters on the rare tasks.", "once_ple"),
    once_claim("g", "HoME beats AdaTT of equal parameters on the rare tasks.", "once_adatt"),
    once_claim("h", "HoME beats a network per task on the rare tasks.", "once_single_task"),
    once_claim(
        "i",
        "HoME with layer norm beats HoME with batch norm, as published, on the rare tasks.",
        "once_home",
        system="once_layer_norm",
    ),
    once_claim(
        "j",
        "HoME with layer norm beats MMoE with it on the rare tasks: structure counts.",
        "once_mmoe_layer_norm",
        system="once_layer_norm",
    ),
)

GRID = Grid(
    system="home",
    config="configs/home.yaml",
    variants=VARIANTS,
    claims=(*ONE_PASS, *COLLAPSE, *MASK, *SELF_GATE, *RARE_TASKS, *DENSE_TASKS, *REAL, *CEILING, *LAYER_NORM),
    # Every data seed once, then again with other model seeds: the first few pairs have data of their own.
    seeds=tuple((DATA_SEEDS * m + d, d) for m in range(MODEL_SEEDS) for d in range(1, DATA_SEEDS + 1)),
    headline=("once_home", "once_mmoe", "home", "mmoe", "cgc", "ple"),
    ladder=Ladder(
        levels={
            "agree": Variant(flags=("--data.init_args.source.init_args.rho=0.8",)),
            "unrelated": Variant(),
            "conflict": Variant(flags=("--data.init_args.source.init_args.rho=-0.8",)),
        },
        system="home",
        baseline="mmoe",
        metric=ALL,
        direction="higher",
        text="Correlation between what the two categories want: 0.8, 0, -0.8; all else is equal.",
    ),
    data_seed_flags=DATA_SEED_FLAGS,
    settings_tried=65,
    choice="One pass: each network at the best of 1e-3, 2e-3, 4e-3 and 8e-3, and of twice the highest while that was "
    "the best, on the validation domain with seed 100 (benchmarks/home_rates.py, 37 trainings; the network per task "
    "was still gaining at 3.2e-2, where the search stopped). Four passes: the learning rate, one for all, was chosen "
    "on the validation domain with seed 100 out of 1e-3, 2e-3, 4e-3 for HoME and MMoE: HoME's rare tasks did not care "
    "(0.669, 0.669, 0.668), MMoE's did (0.632, 0.675, 0.681). Numbers of experts and widths follow from equal "
    "parameters. benchmarks/home_search.py tries 22 settings more of that regime.",
    show=(
        RARE,
        DENSE,
        ALL,
        "unseen.interaction/gauc_expected",
        "unseen/gauc_expected",
        "seen/gauc",
        "experts/zero_frac_max",
    ),
)
