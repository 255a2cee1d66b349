"""Say what other designs of a comparison would find.

A design has a number of seeds and of tested examples. What a difference varies by is measured: a part between seeds and
a part between families. The first shrinks with the number of seeds, the second with the number of families.
"""

import dataclasses

from poolnet.errors import InputError
from poolnet.stats import paired
from poolnet.stats.paired import Parts
from poolnet.studies.comparison import UNITS, Comparison, Ranking
from poolnet.text import aligned, wrapped

SEEDS = (1, 3, 5, 10)
TESTED = {"one split": 0.1, "all folds": 1.0, "twice as many": 2.0, "four times": 4.0}  # shares of all examples


@dataclasses.dataclass(frozen=True)
class Plan:
    """A design, and the smallest differences that it finds.

    A difference is found four times in five. The numbers are in points for accuracy and in nats for loss. `margin` is
    the smallest within which the arms could be called equivalent.
    """

    seeds: int
    tested: str
    examples: int
    families: int
    accuracy: float
    loss: float
    margin: float  # of the primary measure


@dataclasses.dataclass(frozen=True)
class Designs:
    """The designs for one comparison."""

    measured_on: str
    varied: str
    primary: str
    designs: tuple[Plan, ...]


def designs(found: Comparison | Ranking) -> Designs:
    """Return what designs of other sizes would find.

    The parts are those of the last arm minus the first. The splits of a file test a tenth of it, as those of
    `poolnet prepare` do. Raises `InputError` if there are too few families.
    """
    one, other = found.arms[0], found.arms[-1]
    parts = {measure: paired.parts(found.difference(measure, one, other), found.group) for measure in UNITS}
    plans, whole = [], 1.0 if found.folds else TESTED["one split"]
    for seeds in SEEDS if len(found.seeds) > 1 else (1,):
        for tested, part in TESTED.items():
            share = part / whole  # of what was tested
            families = round(share * found.families)
            if families < 2:
                continue
            scaled = {measure: _scaled(each, seeds, share, families) for measure, each in parts.items()}
            least = {measure: paired.smallest_effect(each.se, each.df) for measure, each in scaled.items()}
            decides = scaled[found.primary]
            margin = paired.smallest_margin(paired.Effect(0, 0, 0, decides.se, decides.df, 1))
            sizes = round(share * len(found.y)), families
            plans.append(Plan(seeds, tested, *sizes, least["accuracy"], least["loss"], margin))
    if not plans:
        raise InputError(f"--plan: found {found.families} families in {found.data}, expected two or more")
    return Designs(f"{other.name} minus {one.name} on {found.title}", found.varied, found.primary, tuple(plans))


def _scaled(parts: Parts, seeds: int, share: float, families: int) -> Parts:
    """Return the parts of a design with other sizes."""
    between_seeds = parts.seeds * parts.S / seeds if seeds > 1 else 0.0
    return Parts(between_seeds, parts.groups / share, seeds, families, round(share * parts.N))


def table(found: Designs) -> str:
    """Return the designs as text for a terminal."""
    head = ["seeds", "tested", "examples", "families", "points", "nats", "margin"]
    rows = [[str(d.seeds), d.tested, f"{d.examples:,}", f"{d.families:,}", *_digits(d)] for d in found.designs]
    note = (
        f"Measured: {found.measured_on}. A test at 5 % finds a difference of as many points of accuracy, or nats of "
        "loss, four times in five. Within the margin, in "
        f"{UNITS[found.primary][0]}, equal arms could be called equivalent. With one seed, all this is about other "
        "examples alone."
    )
    return "\n".join([*aligned([head, *rows]), "", *wrapped(note)])


def _digits(plan: Plan) -> list[str]:
    return [f"{plan.accuracy:.2f}", f"{plan.loss:.4f}", f"{plan.margin:.2g}"]
