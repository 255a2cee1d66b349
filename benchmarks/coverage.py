"""How often each 95 % interval of `poolnet.stats` holds the truth, and each test rejects where there is nothing.

    python benchmarks/coverage.py [--simulations N] [--seed S] [--json]
    python benchmarks/coverage.py --data small.npz [--simulations N]

Worlds are simulated whose truth is known in closed form. In each the letters of a group (a family of fonts) share a
part of what makes them hard. Beside each share is that of the methods before: bootstraps in the limit of many
resamples, Wilson and McNemar as if letters were independent, a level of 5 % for everything.

With --data the world is a file. All its letters are the population, and a tenth of its groups is drawn as the test
split, with replacement, so that the population is as good as infinite. No truth is assumed then but the file's own.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
from scipy.special import bdtr, expit, ndtr, ndtri, softmax, stdtr, stdtrit
from threadpoolctl import threadpool_limits

from poolnet.stats import many, paired, scores

BOUNDS = {  # of each kind of row
    "interval": (0.925, 0.99),
    "test": (0.0, 0.06),
    "non-inferiority": (0.0, 0.035),
    "series": (0.0, 0.05),
}
CHALLENGERS, BUDGET = 50, 10  # of a series of promotions
SPLITS = ("train", "val", "test")
MARGIN = 0.01  # of non-inferiority
Rng = np.random.Generator


# --- the methods before -----------------------------------------------------------------------------------------------


def _effect(estimate: float, se: float, df: float) -> paired.Effect:
    reach = stdtrit(df, 0.975) * se
    p = 2 * stdtr(df, -abs(estimate) / se) if se else float(not estimate)
    return paired.Effect(estimate, estimate - reach, estimate + reach, se, df, p)


def before(d: np.ndarray) -> paired.Effect:
    """The bootstrap over letters, or that over seeds and letters (Owen 2007)."""
    S, N = d.shape
    if S == 1:
        return _effect(d.mean(), d.std() / math.sqrt(N), np.inf)
    by_seed, by_letter = d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    cells = ((d - by_seed - by_letter + d.mean()) ** 2).sum() / ((S - 1) * (N - 1))
    v_seeds, v_letters = by_seed.var(ddof=1) / S, by_letter.var(ddof=1) / N
    df = paired.Parts(v_seeds, v_letters, S, N, N).df
    return _effect(d.mean(), math.sqrt(v_seeds + v_letters + cells / (S * N)), df)


def mcnemar_before(a: np.ndarray, b: np.ndarray) -> float:
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def ece_before(logits: np.ndarray, rng: Rng, bins: int = 15, draws: int = 2000) -> float:
    top = softmax(logits, axis=1).max(1)
    index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], top, side="left")
    sd = np.sqrt(np.bincount(index, top * (1 - top), bins))
    return float(np.quantile(np.abs(rng.standard_normal((draws, bins))) @ sd / len(top), 0.95))


# --- worlds -----------------------------------------------------------------------------------------------------------


def _unequal(rng: Rng) -> np.ndarray:
    """100 families: half of them of one font or two, the largest of some hundred letters."""
    return np.repeat(np.arange(100), np.ceil(np.exp(rng.normal(2.3, 1.0, 100))).astype(int))


GROUPS = {
    "none": np.arange(1820),
    "185 fonts of 10": np.repeat(np.arange(185), 10),
    "100 families": _unequal(np.random.default_rng(1)),
    "20 fonts": np.repeat(np.arange(20), 10),
}


@dataclass(frozen=True)
class World:
    """Where values come from: standard deviations of the parts of the latent value.

    `group`, `letter`, `seed` and `cell` (of one seed on one letter) are of each arm. What is shared is how hard a group
    or a letter is for all arms.
    """

    link: str  # normal, right (0 or 1) or nll (nats)
    S: int
    group_of: np.ndarray
    seed: float = 0.0
    group: float = 0.0
    letter: float = 0.0
    cell: float = 0.0
    shared_group: float = 0.0
    shared: float = 1.0
    shift: float = 0.1  # of arm B's latent mean, where the arms differ

    @property
    def sd(self) -> float:
        parts = self.seed, self.group, self.letter, self.cell, self.shared_group, self.shared
        return math.sqrt(sum(part**2 for part in parts))

    @property
    def base(self) -> float:
        return 1.2 * self.sd if self.link == "right" else -2.0

    def mean(self, latent: float) -> float:
        """The expected value at this latent mean: of a normal, a probit or a lognormal."""
        if self.link == "normal":
            return latent
        return ndtr(latent / self.sd) if self.link == "right" else math.exp(latent + self.sd**2 / 2)

    def draw(self, rng: Rng, *means: float) -> np.ndarray:
        """Values (arms, S, N) of arms with these latent means."""
        K, S, N, G = len(means), self.S, len(self.group_of), self.group_of[-1] + 1
        latent = np.array(means)[:, None, None] + self.shared * rng.standard_normal(N)
        if self.shared_group:
            latent = latent + self.shared_group * rng.standard_normal(G)[self.group_of]
        if self.group:
            latent = latent + self.group * rng.standard_normal((K, 1, G))[..., self.group_of]
        parts = (self.seed, (K, S, 1)), (self.letter, (K, 1, N)), (self.cell, (K, S, N))
        latent = latent + sum(scale * rng.standard_normal(shape) for scale, shape in parts if scale)
        latent = np.broadcast_to(latent, (K, S, N))
        return {"normal": lambda x: x, "right": lambda x: x > 0, "nll": np.exp}[self.link](latent)


def old(link: str, S: int, N: int, **parts: float) -> World:
    """A world without groups."""
    return World(link, S, np.arange(N), **parts)


# The parts are such that the design effects are about those of the real letters by family: 1.2 of the difference in
# accuracy, 2.1 of that in loss, 4 to 5 of the accuracy of one model. The stronger ones are 3, 7 and 6.
REAL = {"shared_group": 0.83, "shared": 0.45, "group": 0.12, "letter": 0.29}
STRONGER = {"shared_group": 0.85, "shared": 0.4, "group": 0.3, "letter": 0.15}
FAMILIES = [
    ("none", "none", {"shared": 1.0, "letter": 0.4}),
    ("185 fonts of 10", "real", REAL),
    ("185 fonts of 10", "stronger", STRONGER),
    ("100 families", "real", REAL),
    ("20 fonts", "real", REAL),
]


# --- what is simulated ------------------------------------------------------------------------------------------------

Outcome = tuple[str, str, bool, bool]  # what, its kind, and whether it happened: now and before


def covers(effect: paired.Effect | scores.Share, truth: float) -> bool:
    return bool(effect.low <= truth <= effect.high)


def difference(world: World, rng: Rng) -> Iterator[Outcome]:
    a, b = world.draw(rng, world.base, world.base + world.shift).astype(float)
    truth = world.mean(world.base + world.shift) - world.mean(world.base)
    yield "difference", "interval", covers(paired.clustered(b - a, world.group_of), truth), covers(before(b - a), truth)
    a, b = world.draw(rng, world.base, world.base).astype(float)
    yield "difference, p", "test", paired.clustered(b - a, world.group_of).p <= 0.05, before(b - a).p <= 0.05


def by_class(world: World, rng: Rng) -> Iterator[Outcome]:
    y = np.arange(len(world.group_of)) % 10
    if len(y) > 1000:  # of 20 letters, of which one or two tell the arms apart, an interval is no more than a guess
        a, b = world.draw(rng, world.base, world.base + world.shift).astype(float)
        truth = world.mean(world.base + world.shift) - world.mean(world.base)
        now, plain = paired.per_class(b - a, y, world.group_of)[0].effect, before((b - a)[:, y == 0])
        yield "one letter of ten", "interval", covers(now, truth), covers(plain, truth)
    a, b = world.draw(rng, world.base, world.base).astype(float)
    classes = paired.per_class(b - a, y, world.group_of)
    plain = paired.holm([before((b - a)[:, y == label]).p for label in range(10)]).min()
    yield "any of ten letters, Holm", "test", min(c.p_holm for c in classes) <= 0.05, plain <= 0.05


def over_seeds(world: World, rng: Rng) -> Iterator[Outcome]:
    a, b = world.draw(rng, world.base, world.base)
    effect = paired.over_seeds((b.astype(float) - a).mean(1))
    yield "over seeds", "interval", covers(effect, 0), covers(effect, 0)
    if world.link == "right":
        p = paired.sign_flip(b.sum(1) - a.sum(1))
        yield "sign-flip over seeds", "test", p <= 0.05, p <= 0.05


def tests(world: World, rng: Rng) -> Iterator[Outcome]:
    a, b = world.draw(rng, world.base, world.base)
    plain = mcnemar_before(a[0], b[0])  # of one seed, as there was none over seeds and letters
    yield "paired test", "test", paired.paired_test(a, b, world.group_of).p <= 0.05, plain <= 0.05
    if world.S == 1:
        worse = world.sd * ndtri(world.mean(world.base) - MARGIN)
        a, b = world.draw(rng, world.base, worse)[:, 0]
        now = paired.non_inferiority(a, b, MARGIN, world.group_of) <= paired.NOT_WORSE
        yield "not worse by 1 point", "non-inferiority", now, paired.non_inferiority(a, b, MARGIN) <= 0.05


def equivalence(world: World, rng: Rng) -> Iterator[Outcome]:
    """The true difference is the margin itself, so that to find it smaller is an error."""
    a, b = world.draw(rng, world.base, world.base + world.shift).astype(float)
    truth = world.mean(world.base + world.shift) - world.mean(world.base)
    effects = paired.clustered(b - a, world.group_of), before(b - a)
    now, plain = (paired.equivalence(effect, truth) <= 0.05 for effect in effects)
    yield "equivalent, at the margin", "test", now, plain


def several(world: World, rng: Rng) -> Iterator[Outcome]:
    x = world.draw(rng, *[world.base] * 4).astype(float)
    contrasts = many.simultaneous(x, world.group_of)
    plain = [before(x[c.b] - x[c.a]) for c in contrasts]
    all_now, all_before = (all(covers(e, 0) for e in each) for each in ([c.effect for c in contrasts], plain))
    yield "all 6 of 4 arms", "interval", all_now, all_before
    yield "any 2 of 4 arms, Holm", "test", min(c.p_holm for c in contrasts) <= 0.05, min(e.p for e in plain) <= 0.05


def series(world: World, rng: Rng) -> Iterator[Outcome]:
    """Challengers that are no better than a champion, one after the other, on the same validation letters."""
    champion, *others = world.draw(rng, *[world.base] * (1 + CHALLENGERS))[:, 0]

    def better(b: np.ndarray, p: float, level: float) -> bool:
        return bool(p < level and b.sum() > champion.sum())

    now = any(better(b, paired.paired_test(champion, b, world.group_of).p, 0.05 / BUDGET) for b in others[:BUDGET])
    yield f"{CHALLENGERS} challengers", "series", now, any(better(b, mcnemar_before(champion, b), 0.05) for b in others)


def one_model(world: World, rng: Rng) -> Iterator[Outcome]:
    """The scores of a model whose classes are not equally hard, and whose errors are any of the other nine."""
    N = len(world.group_of)
    y, hard = np.arange(N) % 10, np.linspace(0.7, 1.9, 10)
    latent = hard[y] + world.draw(rng, 0.0)[0, 0]
    rival = (y + rng.integers(1, 10, N)) % 10
    logits = np.full((N, 10), -30.0)
    logits[np.arange(N), y], logits[np.arange(N), rival] = 2 * latent, 0.0
    now = scores.of(logits, y, world.group_of)
    right, nll = paired.per_example(logits, y)
    share = np.bincount(y, minlength=10) / N
    recall = ndtr(hard / world.sd)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    loss = np.logaddexp(0, -2 * (hard[:, None] + world.sd * nodes)) @ weights / weights.sum()
    yield "accuracy", "interval", covers(now.acc, share @ recall), covers(scores.wilson(right), share @ recall)
    yield "loss", "interval", covers(now.loss, share @ loss), covers(before(nll[None]), share @ loss)
    said = share * recall + (share @ (1 - recall) - share * (1 - recall)) / 9
    truth = {"recall": recall, "precision": share * recall / said, "F1": 2 * share * recall / (share + said)}
    plain = scores.per_class(y, logits.argmax(1))
    for name, label in (("recall", 0), ("recall", 9), ("precision", 4), ("F1", 4)):
        each = [getattr(of[label], name.lower()) for of in (now.per_class, plain)]
        yield f"{name} of {'ABCDEFGHIJ'[label]}", "interval", *(covers(x, truth[name][label]) for x in each)


def calibrated(world: World, rng: Rng) -> Iterator[Outcome]:
    """A model whose probabilities are true, on letters of a group that are right together."""
    N = len(world.group_of)
    top = 0.25 + 0.74 * expit(1.5 + 1.2 * rng.standard_normal(N))
    right = ndtr(world.draw(rng, 0.0)[0, 0] / world.sd) < top
    logits = np.log(np.full((N, 10), 1.0) * ((1 - top) / 9)[:, None])
    logits[:, 3] = np.log(top)
    y = np.where(right, 3, 5)
    ece = paired.calibration(logits, y).ece
    now = ece > paired.ece_if_calibrated(logits, y, rng, world.group_of, draws=500)
    yield "ECE above chance", "test", now, ece > ece_before(logits, rng, draws=500)


def rows() -> list[tuple[str, str, Callable, World]]:
    """All rows: the world in words, its groups, what is simulated there, and the world."""
    found = []
    for S, N, parts in [
        (2, 1823, {"seed": 0.03, "letter": 0.6, "cell": 0.3}),
        (3, 500, {"seed": 0.5, "letter": 0.2, "cell": 0.2}),
        (10, 1823, {"seed": 0.5, "letter": 0.2, "cell": 0.2}),
        (5, 1823, {"seed": 0.01, "letter": 0.7, "cell": 0.05}),
        (3, 500, {"seed": 0.05, "letter": 0.6, "cell": 0.3}),
        (5, 1823, {"seed": 0.03, "letter": 0.6, "cell": 0.3}),
        (5, 1823, {"cell": 0.5}),
    ]:
        varies = "cells" if "letter" not in parts else "seeds" if parts["seed"] == 0.5 else "both"
        varies = "letters" if parts.get("seed") == 0.01 else varies
        found += [(f"{link}, {varies} vary", "none", difference, old(link, S, N, **parts)) for link in ("right", "nll")]
    found += [("right, seeds vary", "none", several, old("right", S, 1820, seed=0.2, letter=0.4)) for S in (3, 5)]
    found += [("normal", "none", over_seeds, old("normal", S, 1, seed=1, shared=0)) for S in (5, 10)]
    found += [("right", "none", over_seeds, old("right", S, 500, seed=0.1, cell=0.3)) for S in (6, 10)]
    for groups, strength, parts in FAMILIES:
        right = World("right", 1, GROUPS[groups], **parts)
        seeds = replace(right, S=3, seed=0.03, cell=0.15)
        found += [(f"right, {strength}", groups, run, right) for run in (difference, by_class, tests, series)]
        found += [(f"right, {strength}", groups, run, seeds) for run in (difference, by_class, equivalence)]
        found += [(f"right, {strength}", groups, several, replace(seeds, S=10))]
        found += [(f"right, {strength}", groups, tests, replace(seeds, seed=0.0))]
        found += [(f"nll, {strength}", groups, difference, replace(world, link="nll")) for world in (right, seeds)]
        latent = replace(right, link="normal")
        found += [(f"one model, {strength}", groups, run, latent) for run in (one_model, calibrated)]
    return found


ROWS = rows()


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    what: str
    world: str
    groups: str
    S: int
    N: int
    kind: str
    now: float
    before: float
    simulations: int

    @property
    def within(self) -> bool:
        """Whether the share is within its bounds; of fewer than 2,000 simulations within 3 standard errors of them."""
        low, high = BOUNDS[self.kind]
        slack = 0.0 if self.simulations >= 2000 else 3.0
        sd = [slack * math.sqrt(bound * (1 - bound) / self.simulations) for bound in (low, high)]
        return low - sd[0] <= self.now <= high + sd[1]


def counted(outcomes: list[Outcome], world: str, groups: str, S: int, N: int, simulations: int) -> list[Result]:
    found: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for what, kind, *happened in outcomes:
        found.setdefault((what, kind), []).append(tuple(happened))
    shares = {key: np.mean(value, axis=0) for key, value in found.items()}
    return [
        Result(what, world, groups, S, N, kind, float(now), float(then), simulations)
        for (what, kind), (now, then) in shares.items()
    ]


def simulate(row: int, simulations: int, seed: int) -> list[Result]:
    """One row of the table; the numbers drawn depend on the row and on `seed` only."""
    name, groups, run, world = ROWS[row]
    rng = np.random.default_rng([seed, row])
    with threadpool_limits(1, user_api="blas"):  # the other cores have rows of their own
        outcomes = [outcome for _ in range(simulations) for outcome in run(world, rng)]
    return counted(outcomes, name, groups, world.S, len(world.group_of), simulations)


# --- a file's letters -------------------------------------------------------------------------------------------------


def population(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of two models (2, N, 10), labels and groups of all letters of a file.

    The models are ridge regressions on pooled pixels. How good they are does not matter.
    """
    with np.load(path) as file:
        keys = ("X", "y", "group") if "group_train" in file else ("X", "y")
        X, y, *group = (np.concatenate([file[f"{key}_{split}"] for split in SPLITS]) for key in keys)
    blocks = X.reshape(-1, 7, 4, 7, 4).astype(float) / 255
    logits = []
    for features in (blocks.max((2, 4)), blocks.mean((2, 4))):
        F = np.c_[features.reshape(len(y), -1), np.ones(len(y))]
        logits.append(8 * F @ np.linalg.solve(F.T @ F + np.eye(50), F.T @ np.eye(10)[y]))
    return np.array(logits), y, paired.group_index(group[0] if group else None, len(y))[0]


def drawn(path: Path, simulations: int, seed: int) -> list[Result]:
    """A tenth of the groups as the test split, again and again."""
    logits, y, group = population(path)
    rng, members = np.random.default_rng(seed), np.split(np.argsort(group), np.cumsum(np.bincount(group))[:-1])
    seen, said = [paired.per_example(each, y) for each in logits], logits[1].argmax(1)
    outcomes, whole = [], scores.per_class(y, said)
    for _ in range(simulations):
        chosen = [members[g] for g in rng.integers(len(members), size=len(members) // 10)]
        own = np.repeat(np.arange(len(chosen)), [len(each) for each in chosen])
        outcomes += of_letters(np.concatenate(chosen), own, seen, said, y, whole[int(rng.integers(10))])
    return counted(outcomes, path.name, f"{len(chosen)} of {len(members):,}", 1, len(y) // 10, simulations)


def of_letters(
    rows: np.ndarray, own: np.ndarray, seen: list, said: np.ndarray, y: np.ndarray, whole: scores.ClassScore
) -> Iterator[Outcome]:
    """The intervals from these rows of a file, in these groups, against the means of all its rows."""
    (right_a, nll_a), (right_b, nll_b) = seen
    label = whole.label
    acc, nll, of = right_b.astype(float) - right_a, nll_b - nll_a, y[rows] == label
    for name, d, sampled, groups, truth in (
        ("difference, accuracy", acc, rows, own, acc.mean()),
        ("difference, loss", nll, rows, own, nll.mean()),
        ("one letter of ten", acc, rows[of], own[of], acc[y == label].mean()),
        ("loss", nll_b, rows, own, nll_b.mean()),
    ):
        d = d[sampled]
        yield name, "interval", covers(paired.clustered(d, groups), truth), covers(before(d[None]), truth)
    share = right_b.mean()
    each = scores.wilson(right_b[rows], own), scores.wilson(right_b[rows])
    yield "accuracy", "interval", *(covers(x, share) for x in each)
    now, plain = (scores.per_class(y[rows], said[rows], groups)[label] for groups in (own, None))
    for name in ("precision", "recall", "f1"):
        truth = getattr(whole, name).estimate
        yield f"{name} of a letter", "interval", *(covers(getattr(x, name), truth) for x in (now, plain))


# --- showing ----------------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    lines = [f"{'what':27}{'world':22}{'groups':17}{'S':>3}{'N':>7}{'bounds':>15}{'now':>8}{'before':>8}"]
    for x in sorted(results, key=lambda x: list(BOUNDS).index(x.kind)):
        low, high = BOUNDS[x.kind]
        bounds = f"{low:g} to {high:g}" if low else f"at most {high:g}"
        row = f"{x.what:27}{x.world:22}{x.groups:17}{x.S:3}{x.N:7,}{bounds:>15}{x.now:8.3f}{x.before:8.3f}"
        lines.append(f"{row}{'' if x.within else '  *'}")
    return "\n".join(lines)


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Draw from the letters of this file instead."
)
@click.option("--simulations", default=2000, show_default=True, type=click.IntRange(1), help="Of each row.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the simulations.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(data: Path | None, simulations: int, seed: int, as_json: bool) -> None:
    with ProcessPoolExecutor() as pool:
        if data:
            results = drawn(data, simulations, seed)
        else:
            each = pool.map(partial(simulate, simulations=simulations, seed=seed), range(len(ROWS)))
            results = [result for row in each for result in row]
    outside = sum(not result.within for result in results)
    if as_json:
        click.echo(json.dumps({"rows": [vars(result) for result in results], "all_within": not outside}))
    else:
        found = f"{outside} of {len(results)} shares are not (*)" if outside else f"all {len(results)} shares are"
        click.echo(f"{table(results)}\n{simulations:,} simulations a row. Within the bounds: {found}.")
    sys.exit(bool(outside))


if __name__ == "__main__":
    main()
