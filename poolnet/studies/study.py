"""Studies: a question and the runs that answer it.

A study is one TOML file, see `experiments/`:

question = "Which pooling loses less?"
data = "glyphs"                # as for `poolnet train --data`
seeds = [1, 2, 3]              # the same for each arm, so that runs are compared in pairs
folds = 5                      # each letter is tested once, by networks that saw none of its family; by default 1 split
primary = "accuracy"           # or "loss": what decides, and what `margin` and [tune] are about
margin = 0.5                   # points of accuracy, or nats: within this margin, the arms count as equivalent
optimum = false                # whether to compare the arms at the lowest train loss there is, too
register = false               # whether the model of each run becomes a version of `poolnet`

[grid]                         # options of `poolnet train`, each with one value or a list of values
pool = ["max", "avg"]

[tune]                         # values of `lr` or `batch_size`, of which each arm takes its best on val, fold by fold
lr = [0.001, 0.01]

[arms]                         # two arms or more: of two, the second is compared with the first
max = { pool = "max" }
avg = { pool = "avg" }
"""

import dataclasses
import difflib
import itertools
import math
import statistics
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shown  # cut where it is long or deep
from typing import Any

from poolnet.errors import InputError
from poolnet.training.config import TrainConfig

SIZE, RUNS = 1_000_000, 10_000  # bytes of a file, and its runs: more is a mistake
MARGINS = {"accuracy": 0.5, "loss": 0.01}  # points and nats: a difference that nobody would change a model for
FOLDS, ARMS = 20, 10  # at most
KEYS = ("question", "data", "seeds", "folds", "primary", "margin", "optimum", "register", "grid", "tune", "arms")
TUNED = ("lr", "batch_size")  # what may differ between arms without being the question
OPTIONS: dict[str, Any] = {
    field.name: field.type for field in dataclasses.fields(TrainConfig) if field.name not in ("data", "fold", "seed")
}

Point = dict[str, Any]  # a value for each option that the study sets


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as read from its TOML file.

    `grid` and `tune` hold the values of each option. `arms` are points of the grid. Each arm has all `seeds` and all
    `folds`, which are `fold` settings: one empty text if the file's own splits are used.
    """

    path: Path
    text: str  # of the file
    question: str
    data: str
    seeds: tuple[int, ...]
    folds: tuple[str, ...]
    primary: str  # accuracy or loss
    margin: float  # points or nats
    optimum: bool
    grid: dict[str, tuple]
    tune: dict[str, tuple]
    arms: dict[str, Point]

    @property
    def name(self) -> str:
        return self.path.stem

    def configs(self) -> list[TrainConfig]:
        """Return the settings of every combination, fold and seed.

        They are ordered seed by seed. So a sweep that is cut off has pairs of runs.
        """
        points = _points(self.grid | self.tune)
        return [self._config(seed, fold, point) for seed in self.seeds for fold in self.folds for point in points]

    def candidates(self, arm: str, fold: str) -> list[list[TrainConfig]]:
        """Return the settings that may be an arm's in a fold.

        There is one list for each combination of tuned values, by seed.
        """
        single = {option: values[0] for option, values in self.grid.items() if len(values) == 1}
        points = [single | self.arms[arm] | tuned for tuned in _points(self.tune)]
        return [[self._config(seed, fold, point) for seed in self.seeds] for point in points]

    def arm(self, name: str, score: Callable[[TrainConfig], float] = lambda config: 0.0) -> list[TrainConfig]:
        """Return the settings of an arm's runs, by seed and fold.

        Of the candidates of a fold, those with the highest mean `score` over seeds are taken, and the first of equals.
        """
        best = [
            max(self.candidates(name, fold), key=lambda configs: statistics.fmean(map(score, configs)))
            for fold in self.folds
        ]
        return [config for configs in zip(*best, strict=True) for config in configs]

    def all_of(self, arm: str) -> list[TrainConfig]:
        """Return all settings that an arm's runs may have."""
        return [config for fold in self.folds for configs in self.candidates(arm, fold) for config in configs]

    def val_score(self, scores: Mapping[str, float]) -> float:
        """Return the score that [tune] chooses by: more is better."""
        return scores["val_acc"] if self.primary == "accuracy" else -scores["val_loss"]

    def _config(self, seed: int, fold: str, point: Point) -> TrainConfig:
        return TrainConfig(**{"data": self.data, "seed": seed, "fold": fold, **point})


def _points(table: dict[str, tuple]) -> list[Point]:
    """Return every combination of the values of options."""
    return [dict(zip(table, values, strict=True)) for values in itertools.product(*table.values())]


def read(path: Path, data: str = "", device: str = "") -> Study:
    """Read and check a study file.

    `data` and `device` replace the study's own. Raises `InputError`, which names the file, the line or key, and the
    remedy.
    """
    text = _read_text(path)
    try:
        raw = tomllib.loads(text)
        if device and isinstance(raw.get("grid"), dict):
            raw["grid"]["device"] = device
        return _checked(path, text, raw, data)
    except tomllib.TOMLDecodeError as error:  # which names line and column
        raise InputError(f"{path}: found no valid TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: found tables or lists nested too deep, expected a study") from None
    except ValueError as error:  # ours, or of a number of more than 4,300 digits
        raise InputError(f"{path}: {error}") from None


def _read_text(path: Path) -> str:
    expected = "expected a study such as experiments/*.toml"
    try:
        _typed("the study's file", str(path), str)
        if not path.is_file():  # a folder; or a pipe or device, which has no end
            raise InputError(f"{path}: cannot be read (found no file); {expected}")
        if path.stat().st_size > SIZE:
            raise InputError(f"{path}: found {path.stat().st_size:,} bytes, {expected}")
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows' editor makes
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read, since it is not in UTF-8; save it as such") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); {expected}") from None


def _checked(path: Path, text: str, raw: dict, data: str) -> Study:
    _refuse_unknown("", raw, KEYS)
    for key in ("question", "seeds", "grid", "arms"):
        if key not in raw:
            raise InputError(f"{key}: missing; see `poolnet sweep --help` for what a study holds")
    grid, arms, tune = _table(raw, "grid"), _table(raw, "arms"), _table(raw, "tune") if "tune" in raw else {}
    _refuse_unknown("grid.", grid, OPTIONS)
    _refuse_unknown("tune.", tune, TUNED)
    register = {"register": (_typed("register", raw.get("register", False), bool),)}
    primary = _typed("primary", raw.get("primary", "accuracy"), str)
    if primary not in MARGINS:
        raise InputError(f"primary: found {primary!r}, expected one of {', '.join(MARGINS)}")
    study = Study(
        path,
        text,
        " ".join(_typed("question", raw["question"], str).split()),
        _typed("data", data or raw.get("data", TrainConfig.data), str),
        _values("seeds", raw["seeds"], int),
        _folds(_typed("folds", raw.get("folds", 1), int)),
        primary,
        _typed("margin", raw.get("margin", MARGINS[primary]), float),
        _typed("optimum", raw.get("optimum", False), bool),
        register | {option: _values(f"grid.{option}", values, OPTIONS[option]) for option, values in grid.items()},
        {option: _values(f"tune.{option}", values, OPTIONS[option]) for option, values in tune.items()},
        {_typed("arms", name, str): _arm(name, arm, grid) for name, arm in arms.items()},
    )
    if not 0 < study.margin < 100:
        unit = "points of accuracy" if primary == "accuracy" else "nats"
        raise InputError(f"margin: found {study.margin}, expected {unit} above 0, such as {MARGINS[primary]}")
    _check_grid(study)
    _check_arms(study)
    return study


def _folds(count: int) -> tuple[str, ...]:
    if not 1 <= count <= FOLDS:
        raise InputError(f"folds: found {count}, expected a whole number from 2 to {FOLDS}, or 1 for the file's splits")
    return tuple(f"{k}/{count}" for k in range(1, count + 1)) if count > 1 else ("",)


def _check_grid(study: Study) -> None:
    for option, values in study.tune.items():
        if option in study.grid:
            raise InputError(f"tune.{option}: found it in grid too, expected it in one of them")
        if len(values) < 2:
            raise InputError(f"tune.{option}: found one value, expected two or more to choose from")
    runs = math.prod(map(len, (study.seeds, study.folds, *study.grid.values(), *study.tune.values())))
    if runs > RUNS:
        raise InputError(f"grid: found {runs:,} runs, seeds and combinations, expected at most {RUNS:,}")
    if len(study.grid.get("register", ())) > 1:
        raise InputError("grid.register: found true and false, expected one of them, which trains the same")
    study.configs()  # which refuses values out of range


def _check_arms(study: Study) -> None:
    if not 2 <= len(study.arms) <= ARMS:
        raise InputError(f"arms: found {len(study.arms)}, expected two to {ARMS}; of two, the second is compared")
    for name, arm in study.arms.items():
        for option, values in study.grid.items():
            choice = f"one of grid.{option}: {', '.join(map(str, values))}"
            if option in arm and arm[option] not in values:
                raise InputError(f"arms.{name}.{option}: found {arm[option]!r}, expected {choice}")
            if option not in arm and len(values) > 1:
                raise InputError(f"arms.{name}: leaves {option} open; add {choice}")
    for one, other in itertools.combinations(study.arms, 2):
        if study.arm(one) == study.arm(other):
            raise InputError(f"arms.{other}: the same as arms.{one}; give it another value of an option in grid")


def _refuse_unknown(prefix: str, table: dict, known: tuple | dict) -> None:
    for key in table:
        if key not in known:
            _typed("a key", key, str)
            close = difflib.get_close_matches(key[:100], known, 1)
            cure = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise InputError(f"{prefix}{key}: unknown; {cure}")


def _table(raw: dict, key: str) -> dict:
    if not isinstance(raw[key], dict) or not raw[key]:
        raise InputError(f"{key}: found {shown(raw[key])}, expected a table, [{key}] and lines below it")
    return raw[key]


def _arm(name: str, arm: object, grid: dict) -> Point:
    if not isinstance(arm, dict) or not arm:
        raise InputError(f'arms.{name}: found {shown(arm)}, expected options and values such as {{ pool = "max" }}')
    _refuse_unknown(f"arms.{name}.", arm, grid)
    return {option: _typed(f"arms.{name}.{option}", value, OPTIONS[option]) for option, value in arm.items()}


def _values(key: str, raw: object, kind: type) -> tuple:
    """Return the checked values of a key as a tuple.

    `raw` is one value, or a list of different values.
    """
    values = tuple(_typed(key, value, kind) for value in (raw if isinstance(raw, list) else [raw]))
    if not values:
        raise InputError(f"{key}: found an empty list, expected at least one value")
    (value, times), *_ = Counter(values).most_common(1)
    if times > 1:
        raise InputError(f"{key}: found {shown(value)} twice, expected different values")
    return values


def _typed(key: str, value: Any, kind: type) -> Any:
    if type(value) is int and abs(value) >= 2**63:
        raise InputError(f"{key}: found a number of {value.bit_length()} bits, expected less than 2**63")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        names = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{key}: found {shown(value)}, expected {names[kind]}")
    if kind is str and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in "".join(str(value).split())):
        # no text in UTF-8, or it would move the cursor
        raise InputError(f"{key}: found {value!a}, expected text that a screen can show")
    return value
