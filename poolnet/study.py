"""Studies: a question, and the runs that answer it. One TOML file each, see `experiments/`.

question = "Which pooling loses less?"
data = "glyphs"                # as for `poolnet train --data`
seeds = [1, 2, 3]              # the same ones for every arm, so that runs are compared in pairs
margin = 0.5                   # points of accuracy, within which the arms count as equivalent

[grid]                         # options of `poolnet train`, each one value or a list of them
pool = ["max", "avg"]

[arms]                         # what is compared, the second with the first
max = { pool = "max" }
avg = { pool = "avg" }
"""

import dataclasses
import difflib
import itertools
import tomllib
from pathlib import Path

from poolnet.config import InputError, TrainConfig

MARGIN = 0.5  # points: a difference that nobody would change a model for
KEYS = ("question", "data", "seeds", "margin", "grid", "arms")
OPTIONS = {field.name: field.type for field in dataclasses.fields(TrainConfig) if field.name not in ("data", "seed")}

Point = dict[str, object]  # a value for each option that the study sets


@dataclasses.dataclass(frozen=True)
class Study:
    """`grid` holds the values of each option, `arms` two points of it; both arms have all `seeds`."""

    path: Path
    question: str
    data: str
    seeds: tuple[int, ...]
    margin: float
    grid: dict[str, tuple]
    arms: dict[str, Point]

    @property
    def name(self) -> str:
        return self.path.stem

    def configs(self) -> list[TrainConfig]:
        """Every combination, seed by seed, so that a sweep that is cut off has pairs."""
        points = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return [TrainConfig(data=self.data, seed=seed, **point) for seed in self.seeds for point in points]

    def arm(self, name: str) -> list[TrainConfig]:
        """The runs of an arm, by seed."""
        single = {option: values[0] for option, values in self.grid.items() if len(values) == 1}
        return [TrainConfig(data=self.data, seed=seed, **single | self.arms[name]) for seed in self.seeds]


def read(path: Path, data: str = "") -> Study:
    """The study in a file, on its own data or on others. Raises `InputError` with file, line or key, and the cure."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:  # which names line and column
        raise InputError(f"{path}: found no valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a study such as experiments/*.toml") from None
    try:
        return _checked(path, raw, data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _checked(path: Path, raw: dict, data: str) -> Study:
    _refuse_unknown("", raw, KEYS)
    for key in ("question", "seeds", "grid", "arms"):
        if key not in raw:
            raise InputError(f"{key}: missing; see `poolnet sweep --help` for what a study holds")
    grid, arms = _table(raw, "grid"), _table(raw, "arms")
    _refuse_unknown("grid.", grid, OPTIONS)
    study = Study(
        path,
        _typed("question", raw["question"], str),
        data or _typed("data", raw.get("data", TrainConfig.data), str),
        _values("seeds", raw["seeds"], int),
        _typed("margin", raw.get("margin", MARGIN), float),
        {option: _values(f"grid.{option}", values, OPTIONS[option]) for option, values in grid.items()},
        {name: _arm(name, arm, grid) for name, arm in arms.items()},
    )
    if not 0 < study.margin < 100:
        raise InputError(f"margin: found {study.margin}, expected points of accuracy above 0, such as {MARGIN}")
    if len(study.arms) != 2:
        raise InputError(f"arms: found {len(study.arms)}, expected two; what the second has over the first is reported")
    study.configs()  # which refuses values out of range
    for name, arm in study.arms.items():
        for option, values in study.grid.items():
            choice = f"one of grid.{option}: {', '.join(map(str, values))}"
            if option in arm and arm[option] not in values:
                raise InputError(f"arms.{name}.{option}: found {arm[option]!r}, expected {choice}")
            if option not in arm and len(values) > 1:
                raise InputError(f"arms.{name}: leaves {option} open; add {choice}")
    one, other = study.arms
    if study.arm(one) == study.arm(other):
        raise InputError(f"arms.{other}: the same as arms.{one}; give it another value of an option in grid")
    return study


def _refuse_unknown(prefix: str, found: dict, known: tuple | dict) -> None:
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            cure = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise InputError(f"{prefix}{key}: unknown; {cure}")


def _table(raw: dict, key: str) -> dict:
    if not isinstance(raw[key], dict) or not raw[key]:
        raise InputError(f"{key}: found {raw[key]!r}, expected a table, [{key}] and lines below it")
    return raw[key]


def _arm(name: str, arm: object, grid: dict) -> Point:
    if not isinstance(arm, dict) or not arm:
        raise InputError(f'arms.{name}: found {arm!r}, expected options and values such as {{ pool = "max" }}')
    _refuse_unknown(f"arms.{name}.", arm, grid)
    return {option: _typed(f"arms.{name}.{option}", value, OPTIONS[option]) for option, value in arm.items()}


def _values(key: str, found: object, kind: type) -> tuple:
    """One value, or a list of different ones."""
    values = tuple(_typed(key, value, kind) for value in (found if isinstance(found, list) else [found]))
    if not values:
        raise InputError(f"{key}: found an empty list, expected at least one value")
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{key}: found {value!r} twice, expected different values")
    return values


def _typed(key: str, value: object, kind: type) -> object:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        names = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{key}: found {value!r}, expected {names[kind]}")
    return value
