"""How often each 95 % interval of `poolnet.stats.paired` holds the truth, and each test rejects where there is nothing.

    python benchmarks/coverage.py [--simulations N] [--seed S] [--json]

Two arms are simulated whose true difference is known in closed form: on each example and seed a latent normal value,
with parts of the seed, of the example and of both, is right if above 0, or is the logarithm of a loss. An interval is
counted where the arms differ, a false positive where they are equal in truth, each in simulations of its own.
"""

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import click
import numpy as np
from scipy.stats import norm
from threadpoolctl import threadpool_limits

from poolnet.stats import paired

RESAMPLES = {"over_examples": 500, "two_way": 300}  # fewer than the defaults, which cost ten times as long
COVERAGE, FALSE_POSITIVES = (0.93, 0.97), 0.06
Rng = np.random.Generator


@dataclass(frozen=True)
class World:
    """Where values come from: standard deviations of the parts of the latent value, all but `shared` of each arm."""

    link: str  # normal, right (0 or 1) or nll (nats)
    S: int
    N: int
    seed: float = 0.0
    example: float = 0.0
    cell: float = 0.0
    shared: float = 1.0  # how hard an example is for both arms
    shift: float = 0.1  # of arm B's latent mean, where the arms differ

    def mean(self, latent: float) -> float:
        """The expected value at this latent mean: of a normal, a probit or a lognormal."""
        variance = self.seed**2 + self.example**2 + self.cell**2 + self.shared**2
        return {
            "normal": latent,
            "right": norm.cdf(latent / math.sqrt(variance)),
            "nll": math.exp(latent + variance / 2),
        }[self.link]

    def draw(self, rng: Rng, differ: bool) -> tuple[np.ndarray, float]:
        """Both arms' values (2, S, N), and the true mean of B - A."""
        base, shift = (1.0 if self.link == "right" else -2.0), (self.shift if differ else 0.0)
        latent = self.shared * rng.standard_normal(self.N) + np.array([base, base + shift])[:, None, None]
        parts = [(self.seed, (2, self.S, 1)), (self.example, (2, 1, self.N)), (self.cell, (2, self.S, self.N))]
        latent = latent + sum(scale * rng.standard_normal(shape) for scale, shape in parts if scale)
        latent = np.broadcast_to(latent, (2, self.S, self.N))
        values = {"normal": lambda x: x, "right": lambda x: (x > 0).astype(float), "nll": np.exp}[self.link](latent)
        return values, self.mean(base + shift) - self.mean(base)


Outcome = tuple[bool, bool]  # the interval holds the truth where the arms differ; p <= 0.05 where they do not


def by_interval(world: World, rng: Rng, interval: Callable[[np.ndarray, Rng], paired.Effect]) -> Outcome:
    values, truth = world.draw(rng, differ=True)
    effect = interval(values[1] - values[0], rng)
    nothing, _ = world.draw(rng, differ=False)
    return effect.low <= truth <= effect.high, interval(nothing[1] - nothing[0], rng).p <= 0.05


def over_seeds(world: World, rng: Rng) -> Outcome:
    return by_interval(world, rng, lambda d, rng: paired.over_seeds(d.mean(1)))


def over_examples(world: World, rng: Rng) -> Outcome:
    return by_interval(world, rng, lambda d, rng: paired.over_examples(d[0], rng, RESAMPLES["over_examples"]))


def two_way(world: World, rng: Rng) -> Outcome:
    return by_interval(world, rng, lambda d, rng: paired.two_way(d, rng, RESAMPLES["two_way"]))


def sign_flip(world: World, rng: Rng) -> bool:
    a, b = world.draw(rng, differ=False)[0].mean(2)
    return paired.sign_flip_of_means(b - a, rng) <= 0.05


def mcnemar(world: World, rng: Rng) -> bool:
    a, b = world.draw(rng, differ=False)[0][:, 0] > 0
    return paired.mcnemar(a, b).p <= 0.05


def equivalence(world: World, rng: Rng) -> bool:
    """The true difference is the margin itself, so that to find it smaller is an error."""
    (a, b), truth = world.draw(rng, differ=True)
    return paired.equivalence(paired.over_seeds((b - a).mean(1)), truth) <= 0.05


def holm(world: World, rng: Rng) -> bool:
    """Ten classes without a difference: to find one in any is an error."""
    a, b = world.draw(rng, differ=False)[0]
    classes = paired.per_class(b - a, np.arange(world.N) % 10)
    return min(found.p_holm for found in classes) <= 0.05


# The shared part is 0 where only the difference counts and it would cancel.
ROWS = [
    ("over_seeds, normal", over_seeds, World("normal", 5, 1, seed=1, shared=0)),
    ("over_seeds, normal", over_seeds, World("normal", 10, 1, seed=1, shared=0)),
    ("over_examples, 0/1", over_examples, World("right", 1, 1823, example=0.4)),
    ("over_examples, nll", over_examples, World("nll", 1, 1823, example=0.4, shared=1.5)),
    ("two_way, 0/1, seeds vary", two_way, World("right", 3, 500, seed=0.5, example=0.2, cell=0.2)),
    ("two_way, 0/1, seeds vary", two_way, World("right", 10, 1823, seed=0.5, example=0.2, cell=0.2)),
    ("two_way, 0/1, examples vary", two_way, World("right", 5, 1823, seed=0.01, example=0.7, cell=0.05)),
    ("two_way, 0/1, both vary", two_way, World("right", 3, 500, seed=0.05, example=0.6, cell=0.3)),
    ("two_way, 0/1, both vary", two_way, World("right", 5, 1823, seed=0.03, example=0.6, cell=0.3)),
    ("two_way, 0/1, cells vary", two_way, World("right", 5, 1823, cell=0.5)),
    ("two_way, nll, seeds vary", two_way, World("nll", 5, 500, seed=0.3, example=0.1, cell=0.2)),
    ("two_way, nll, examples vary", two_way, World("nll", 5, 1823, seed=0.01, example=0.7, cell=0.05)),
    ("two_way, nll, both vary", two_way, World("nll", 3, 500, seed=0.05, example=0.6, cell=0.3)),
    ("two_way, nll, both vary", two_way, World("nll", 10, 1823, seed=0.06, example=0.6, cell=0.3)),
    ("sign_flip, normal", sign_flip, World("normal", 6, 1, seed=1, shared=0)),
    ("sign_flip, normal", sign_flip, World("normal", 10, 1, seed=1, shared=0)),
    ("mcnemar", mcnemar, World("right", 1, 1823, example=0.4)),
    ("equivalence at the margin", equivalence, World("normal", 5, 1, seed=1, shared=0, shift=3.0)),
    ("equivalence at the margin", equivalence, World("normal", 10, 1, seed=1, shared=0, shift=3.0)),
    ("holm, any of 10 classes", holm, World("right", 5, 1000, seed=0.03, example=0.6, cell=0.3)),
]


@dataclass(frozen=True)
class Result:
    what: str
    S: int
    N: int
    coverage: float | None
    false_positives: float
    simulations: int
    se: float  # the larger Monte-Carlo standard error of the two shares
    within: bool


def simulate(row: int, simulations: int, seed: int) -> Result:
    """One row of the table; the numbers drawn depend on the row and on `seed` only."""
    what, test, world = ROWS[row]
    rng = np.random.default_rng([seed, row])
    with threadpool_limits(1, user_api="blas"):  # the other cores have rows of their own
        outcomes = np.array([test(world, rng) for _ in range(simulations)])
    *coverage, false_positives = outcomes.reshape(simulations, -1).mean(0)
    shares = np.array([*coverage, false_positives])
    se = np.sqrt(shares * (1 - shares) / simulations).max()
    least, most = COVERAGE[0], 1.0 if test is two_way else COVERAGE[1]
    within = false_positives <= FALSE_POSITIVES and all(least <= share <= most for share in coverage)
    covered = float(coverage[0]) if coverage else None
    return Result(what, world.S, world.N, covered, float(false_positives), simulations, float(se), bool(within))


def table(results: list[Result]) -> str:
    lines = [f"{'what':30}{'S':>4}{'N':>7}{'coverage':>10}{'false pos.':>12}{'simulations':>13}{'MC se':>8}"]
    for x in results:
        coverage = "" if x.coverage is None else f"{x.coverage:.3f}"
        numbers = f"{x.S:4}{x.N:7,}{coverage:>10}{x.false_positives:12.3f}{x.simulations:13,}{x.se:8.4f}"
        lines.append(f"{x.what:30}{numbers}{'' if x.within else '  *'}")
    return "\n".join(lines)


@click.command()
@click.option("--simulations", default=2000, show_default=True, type=click.IntRange(1), help="Of each row.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the simulations.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(simulations: int, seed: int, as_json: bool) -> None:
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(simulate, range(len(ROWS)), [simulations] * len(ROWS), [seed] * len(ROWS)))
    outside = sum(not result.within for result in results)
    if as_json:
        click.echo(json.dumps({"rows": [vars(result) for result in results], "all_within": not outside}))
    else:
        bounds = "coverage {:.2f} to {:.2f} (two_way: at least {:.2f})".format(*COVERAGE, COVERAGE[0])
        found = f"{outside} of {len(results)} rows do not (*)" if outside else "all rows do"
        click.echo(f"{table(results)}\nIn {bounds}, false positives at most {FALSE_POSITIVES:.2f}: {found}.")
    sys.exit(bool(outside))


if __name__ == "__main__":
    main()
