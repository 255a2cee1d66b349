"""What the report of a comparison says, whatever its form."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from poolnet.stats import paired
from poolnet.stats.many import Contrast
from poolnet.stats.paired import Effect
from poolnet.studies import comparison
from poolnet.studies.comparison import UNITS, Arm, Comparison, Design, Ranking
from poolnet.text import DIGITS, NATS, POINTS, SHARE, interval, p_value, spread
from poolnet.tracking import names
from poolnet.training.config import ARM_OPTIONS, SAME_RUN

Rows = list[list[str]]
EFFECT = ["difference", "mean", "95 % interval", "p"]  # the head of a table


@dataclasses.dataclass(frozen=True)
class Page:
    """The tables and lines of a report.

    `effects` are the differences. `optimum` and `optimum_effects` are the arms and the differences at the lowest train
    loss there is. They have no rows if the runs did not look for it.
    """

    found: Comparison | Ranking
    arms: Rows
    arms_note: str
    effects: Rows
    effects_note: str
    optimum: Rows
    optimum_effects: Rows
    optimum_note: str
    tests: list[str]
    classes: Rows
    design: list[str]


def of(found: Comparison | Ranking) -> Page:
    """Return what a report says of a comparison."""
    return Page(
        found,
        arms=_arms(found),
        arms_note="Mean and standard deviation over seeds." if len(found.seeds) > 1 else "One seed an arm.",
        effects=_effects(found) if isinstance(found, Comparison) else _contrasts(found, found.acc, found.nll),
        effects_note=_effects_note(found) if isinstance(found, Comparison) else _contrasts_note(found),
        optimum=_optimum(found) if found.at_optimum else [],
        optimum_effects=_optimum_effects(found) if found.at_optimum else [],
        optimum_note=_optimum_note(found) if found.at_optimum else "",
        tests=_tests(found) if isinstance(found, Comparison) else [_calibrated(found)],
        classes=_classes(found) if isinstance(found, Comparison) else [],
        design=_design(found),
    )


# --- of any number of arms ------------------------------------------------------------------------------------------


def _arms(found: Design) -> Rows:
    rows = [["arm", "n", "test accuracy", "test loss", "val accuracy"]]
    for arm in found.arms:
        scores = arm_scores(found, arm)
        cells = (spread(scores[key]) for key in ("test_acc", "test_loss", "val_acc"))
        rows.append([arm.name, str(len(found.seeds)), *cells])
    return rows


def arm_scores(found: Design, arm: Arm) -> dict[str, list[float]]:
    """Return the scores of an arm by name.

    Each list has one value per seed. Over folds, a score is that of all their letters.
    """
    val = arm.histories["val_acc"][:, -1].reshape(len(found.seeds), -1)
    return {
        "test_acc": arm.right.mean(1).tolist(),
        "test_loss": arm.nll.mean(1).tolist(),
        "val_acc": val.mean(1).tolist(),
        "ece": [each.ece for each in arm.calibration],
    }


def _optimum(found: Design) -> Rows:
    """Return the arms at the optimum."""
    rows = [["at the lowest train loss", "test accuracy", "test loss"]]
    for arm in found.arms:
        assert arm.optimum
        rows.append([arm.name, f"{arm.optimum.right.mean():{SHARE}}", f"{arm.optimum.nll.mean():{SHARE}}"])
    return rows


def _optimum_effects(found: Comparison | Ranking) -> Rows:
    """Return the differences at the optimum."""
    if isinstance(found, Ranking):
        return _contrasts(found, found.acc_at_optimum, found.nll_at_optimum)
    assert found.optimum
    acc, nll = (
        ["accuracy, points", *_cells(found.optimum.acc, POINTS)],
        ["loss, nats", *_cells(found.optimum.nll, NATS)],
    )
    return [EFFECT, acc, nll]


def _optimum_note(found: Comparison | Ranking) -> str:
    if isinstance(found, Comparison):
        says = found.verdict_at_optimum
    else:
        says = comparison.best_in_words(found.best_at_optimum, [arm.name for arm in found.arms])
    what = "examples" if found.group is None else "families"
    return (
        f"This is the lowest train loss that Newton's method finds, whatever the seed. There, by test {found.primary}: "
        f"{says}. The intervals are about other {what}."
    )


def _calibrated(found: Design) -> str:
    ece = ", ".join(f"{arm.name} {spread(arm_scores(found, arm)['ece'])}" for arm in found.arms)
    return f"Expected calibration error (ECE): {ece}"


def _design(found: Design) -> list[str]:
    differing, equal = [], []
    for name in SAME_RUN:
        values = [str(getattr(arm.runs[0].config, name)) for arm in found.arms]
        if name in found.tuned:
            chosen = ", ".join(f"{arm.name} {found.chosen(arm)}" for arm in found.arms)
            differing.append(f"{name}, chosen on val by {found.primary}: {chosen}")
        elif len(set(values)) > 1:
            differing.append(f"{name} {', '.join(f'{v} in {a.name}' for v, a in zip(values, found.arms, strict=True))}")
        elif name not in ("fold", "seed"):
            equal.append(f"{name} {values[0]}")
    pairs = f"seeds {', '.join(map(str, found.seeds))}, each of which gives all arms the same order of images"
    if len({arm.runs[0].config.seed for arm in found.arms}) > 1:
        pairs = "the seeds are the arms"
    commits = sorted({run.commit[:10] or "unknown" for run in found.runs})
    lines = [
        f"The arms differ in: {'; '.join(differing)}.",
        f"Equal in all: {', '.join(equal)}, device {found.runs[0].device}; {pairs}.",
        f"Data: {found.data}, SHA-256 {found.data_sha256[:DIGITS]}, {found.size}, the same for all arms.",
        f"Code: commit {', '.join(commits)}.",
        "Nothing was chosen by the test split here: all arms are scored with their final weights.",
    ]
    if found.folds:
        unseen = ", by networks that saw none of its family" if found.group is not None else ""
        lines.insert(3, f"Folds {', '.join(found.folds)}: each example is tested once{unseen}.")
    return lines


# --- of two arms ----------------------------------------------------------------------------------------------------


def _named_effects(c: Comparison) -> dict[str, tuple[str, Effect]]:
    """Return each effect by name, with a label.

    The first two effects are over all that varies. The label of another says what alone varies.
    """
    effects = {"acc": ("accuracy, points", c.acc), "nll": ("loss, nats", c.nll)}
    what = "examples" if c.group is None else "families"
    if c.acc_over_seeds and c.nll_over_seeds:
        effects |= {
            "acc_over_seeds": ("points, other seeds", c.acc_over_seeds),
            "nll_over_seeds": ("nats, other seeds", c.nll_over_seeds),
            "acc_over_examples": (f"points, other {what}", c.acc_over_examples),
            "nll_over_examples": (f"nats, other {what}", c.nll_over_examples),
        }
    return effects


def _effects(c: Comparison) -> Rows:
    rows = [EFFECT]
    for name, (label, effect) in _named_effects(c).items():
        rows.append([label, *_cells(effect, POINTS if name.startswith("acc") else NATS)])
    return rows


def _cells(effect: Effect, form: str) -> list[str]:
    mean = round(effect.estimate, 9)  # or two ways to sum the same numbers may show two
    return [f"{mean:{form}}", interval(effect.low, effect.high, form), p_value(effect.p)]


def _effects_note(c: Comparison) -> str:
    alone = ", or about those that a row names" if len(c.seeds) > 1 else ""
    return (
        f"{c.b.name} minus {c.a.name}. Intervals and p are about other {c.varied}{alone}. The {c.primary} decides, as "
        "the study says." if c.primary == "loss" else
        f"{c.b.name} minus {c.a.name}. Intervals and p are about other {c.varied}{alone}."
    )  # fmt: skip


def _tests(c: Comparison) -> list[str]:
    unit, form = UNITS[c.primary]
    reach = paired.smallest_margin(c.effect)
    lines = [
        f"Equivalence within ±{c.margin:g} {unit}, two one-sided tests at 5 %: p {p_value(c.equivalence_p)}. The "
        f"smallest margin within reach of this design was {_plain(reach, form)} {unit}",
        f"Smallest difference that such a design finds four times in five: ±{_plain(c.smallest_effect, form)} {unit}",
    ]
    what = "examples" if c.group is None else "families"
    lines.append(
        f"Exact paired test, the signs of {c.families:,} {what} flipped: right by {c.b.name} alone {c.paired.only_b:,} "
        f"times, by {c.a.name} alone {c.paired.only_a:,}; p {p_value(c.paired.p)}"
    )
    if c.sign_flip_p is not None:
        least = 2.0 ** (1 - len(c.seeds))
        lines.append(
            f"Exact sign-flip test over {len(c.seeds)} seeds, accuracy: p {p_value(c.sign_flip_p)}, of at least "
            f"{p_value(least)}; it says how stable training is, not what other letters would show"
        )
    return [*lines, _calibrated(c)]


def _plain(value: float, form: str) -> str:
    return f"{value:{form.replace('+', '')}}"


def _classes(c: Comparison) -> Rows:
    rows = [["class", "n", "points", "95 % interval", "p", "p, Holm"]]
    for of_class in c.per_class:
        effect, name = of_class.effect, c.classes[of_class.label]
        if math.isnan(effect.estimate):
            rows.append([name, str(of_class.n), "-", "-", "-", "-"])
        else:
            rows.append([name, f"{of_class.n:,}", *_cells(effect, POINTS), p_value(of_class.p_holm)])
    return rows


# --- of more arms ---------------------------------------------------------------------------------------------------


def _pair(found: Design, contrast: Contrast) -> str:
    return f"{found.arms[contrast.b].name} minus {found.arms[contrast.a].name}"


def _contrasts(found: Ranking, acc: Sequence[Contrast], nll: Sequence[Contrast]) -> Rows:
    rows = [["difference", "mean", "95 % interval", "p, Holm"]]
    for contrasts, (unit, form) in zip((acc, nll), UNITS.values(), strict=True):
        for each in contrasts:
            effect, name = each.effect, f"{_pair(found, each)}, {unit}"
            rows.append([name, *_cells(effect, form)[:2], p_value(each.p_holm)])
    return rows


def _contrasts_note(found: Ranking) -> str:
    return (
        f"The intervals of all pairs hold at once with 95 %, for accuracy and for loss each. They are about other "
        f"{found.varied}. An arm is not shown to be worse than the best if its interval with no other arm is wholly on "
        "the worse side."
    )


# --- for machines ---------------------------------------------------------------------------------------------------


def contents(found: Comparison | Ranking) -> dict:
    """Return the whole comparison as a dictionary for JSON.

    The keys are the names in the JSON file.
    """
    whole = {
        "question": found.question,
        "verdict": found.verdict,
        "winner": found.winner,
        "sentence": found.sentence,
        "primary": found.primary,
        "arms": [_arm_contents(found, arm) for arm in found.arms],
        f"margin_{UNITS[found.primary][0]}": found.margin,
        "n_seeds": len(found.seeds),
        "n_folds": len(found.folds),
        "n_examples": len(found.y),
        "n_families": None if found.group is None else found.families,
        "seeds": found.seeds,
        "varied": found.varied,
        "data": found.data,
        "data_sha256": found.data_sha256,
        "caveats": found.caveats,
    }
    return whole | (_of_two(found) if isinstance(found, Comparison) else _of_many(found))


def _arm_contents(found: Design, arm: Arm) -> dict:
    at_optimum = None
    if arm.optimum:
        at_optimum = {"test_acc": float(arm.optimum.right.mean()), "test_loss": float(arm.optimum.nll.mean())}
    return {
        "name": arm.name,
        "options": {name: getattr(arm.runs[0].config, name) for name in ARM_OPTIONS},
        "tuned": {option: [getattr(run.config, option) for run in arm.runs] for option in found.tuned},
        "seeds": [run.config.seed for run in arm.runs],
        "folds": [run.config.fold for run in arm.runs],
        "runs": [run.run_id for run in arm.runs],
        **arm_scores(found, arm),
        "at_optimum": at_optimum,
    }


def _of_two(c: Comparison) -> dict:
    unit = UNITS[c.primary][0]
    return {
        "effects": {name: effect for name, (_, effect) in _named_effects(c).items()},
        "at_optimum": c.optimum,
        "verdict_at_optimum": c.verdict_at_optimum if c.optimum else None,
        "equivalence_p": c.equivalence_p,
        f"smallest_margin_{unit}": paired.smallest_margin(c.effect),
        f"smallest_effect_{unit}": c.smallest_effect,
        "sign_flip_p": c.sign_flip_p,
        "paired_test": c.paired,
        "per_class": [
            {"letter": c.classes[each.label], "n": each.n, **vars(each.effect), "p_holm": each.p_holm}
            for each in c.per_class
        ],
    }


def _of_many(r: Ranking) -> dict:
    def plain(contrasts: Sequence[Contrast]) -> list[dict]:
        return [
            {"a": r.arms[each.a].name, "b": r.arms[each.b].name, **vars(each.effect), "p_holm": each.p_holm}
            for each in contrasts
        ]

    return {
        "not_worse_than_the_best": r.best,
        "contrasts": {"acc": plain(r.acc), "nll": plain(r.nll)},
        "at_optimum": {
            "not_worse_than_the_best": r.best_at_optimum,
            "acc": plain(r.acc_at_optimum),
            "nll": plain(r.nll_at_optimum),
        },
    }


def metrics(found: Comparison | Ranking) -> dict[str, float]:
    """Return the metrics of the comparison's run in MLflow."""
    values: dict[str, float] = {"n_seeds": len(found.seeds), "n_examples": len(found.y), "n_families": found.families}
    if found.folds:
        values["n_folds"] = len(found.folds)
    if isinstance(found, Comparison):
        values |= _effect_metrics(found)
    for letter, arm in zip("abcdefghij", found.arms, strict=False):
        values |= {f"{letter}_{name}_mean": statistics.mean(s) for name, s in arm_scores(found, arm).items()}
        if arm.optimum:
            values[f"{letter}_optimum_acc"] = float(arm.optimum.right.mean())
            values[f"{letter}_optimum_loss"] = float(arm.optimum.nll.mean())
    return names.section("compare", values)


def _effect_metrics(c: Comparison) -> dict[str, float]:
    unit = UNITS[c.primary][0]
    values = {"p_equivalence": c.equivalence_p, "p_paired": c.paired.p, f"margin_{unit}": c.margin}
    values[f"smallest_effect_{unit}"] = c.smallest_effect
    for name, effect in (("points", c.acc), ("nats", c.nll)):
        values |= {f"effect_{name}": effect.estimate, f"effect_{name}_low": effect.low}
        values |= {f"effect_{name}_high": effect.high, f"p_{name}": effect.p}
    if c.sign_flip_p is not None:
        values["p_sign_flip"] = c.sign_flip_p
    if c.optimum:
        values |= {"optimum_points": c.optimum.acc.estimate, "optimum_nats": c.optimum.nll.estimate}
    return values
