"""Decide which version of `poolnet` becomes champion.

A paired test on the same validation examples decides. Its level is shared among the challengers, see `budget`.
"""

import contextlib
import dataclasses
import os
import time

import numpy as np
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking.client import MlflowClient

from poolnet.errors import InputError
from poolnet.models import BUDGET, budget, champions
from poolnet.models.budget import Turn, Untested
from poolnet.stats import paired
from poolnet.stats.paired import Effect, PairedTest
from poolnet.text import NATS, POINTS, interval, marked, p_value, step
from poolnet.tracking import model_card, names, registry, result_runs, server_runs, training_runs
from poolnet.tracking.registry import NAME
from poolnet.training.config import POOLS

REMEMBERED = 100  # champions before the present one, as far as a tag of MLflow holds them


@dataclasses.dataclass(frozen=True)
class Paired:
    """A comparison of champion and challenger on the same letters.

    There are `n` letters. `points` and `nats` are the difference of the challenger from the champion: in accuracy
    (points) and in loss (nats).
    """

    n: int
    families: int | None  # None if the data name none, and each letter counts on its own
    points: Effect
    nats: Effect
    paired_test: PairedTest  # only_a: the champion alone is right
    p_inferior: float | None  # that the challenger is worse by the margin or more, where one was given

    def better(self, challengers: int) -> bool:
        """Whether the challenger is better, as one of so many."""
        return self.paired_test.p < paired.ALPHA / challengers and self.paired_test.only_b > self.paired_test.only_a

    def not_worse(self, challengers: int) -> bool:
        """Whether the challenger is not worse by the margin."""
        return self.p_inferior is not None and self.p_inferior < paired.NOT_WORSE / challengers

    def __str__(self) -> str:
        points, nats, test = self.points, self.nats, self.paired_test
        families = "each a family of its own, as the data name none"
        if self.families:
            families = f"of {self.families:,} families"
        return (
            f"On the same {self.n:,} validation images, {families}: {points.estimate:{POINTS}} points, 95 % interval "
            f"{interval(points.low, points.high, POINTS)} ({test.only_b} right by it alone, {test.only_a} by the "
            f"champion alone, p of the exact paired test {p_value(test.p)}), and {nats.estimate:{NATS}} nats, "
            f"{interval(nats.low, nats.high, NATS)}"
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """A decision about which version holds an alias.

    `kind` is first, better, not worse, forced or rollback. If nothing changes, it is refused or unchanged.
    """

    alias: str
    kind: str
    version: int  # the challenger, or for a rollback the champion that comes back
    over: int | None  # the champion when it was decided
    margin: float | None = None
    val: Paired | None = None
    test: Paired | None = None
    earlier: tuple[int, ...] = ()  # the champions before the one that it makes
    challenger: Turn | None = None  # None if there was no test
    untested: str = ""  # why there was none

    @property
    def promoted(self) -> bool:
        return self.kind not in ("refused", "unchanged")

    @property
    def sentence(self) -> str:
        within = f"not worse by {self.margin or 0:g} points"
        over = f" instead of version {self.over}" if self.over else ""
        verbs = {
            "first": f"is the first {self.alias}",
            "better": f"is {self.alias}{over}, being better",
            "not worse": f"is {self.alias}{over}, being {within}",
            "forced": f"is {self.alias}{over}, by force and not by evidence",
            "rollback": f"is {self.alias} again{over}: rolled back",
            "unchanged": f"is {self.alias} already",
            "refused": f"is not {self.alias}: it is not shown to be better than version {self.over}"
            + (f", nor to be {within}" if self.margin else ""),
        }
        if self.kind == "refused" and self.untested:
            return f"Version {self.version} is not {self.alias}: it was not tested. {self.untested}."
        text = f"Version {self.version} {verbs[self.kind]}."
        if self.val:
            text += f" {self.val}"
            p = self.val.p_inferior
            text += "." if p is None else f"; p of being worse by the margin {p_value(p)}."
        if self.challenger:
            text += self._rule(self.challenger)
        if self.test:
            text += f" On test, which decides nothing: {self.test.points.estimate:{POINTS}} points."
        return text

    def _rule(self, turn: Turn) -> str:
        """Say at which level the challenger was tested, and why."""
        text = f" It is challenger {turn} of version {self.over}, so p must be below {turn.level:.2g}"
        text += f", that of the margin below {paired.NOT_WORSE / turn.budget:.2g}" if self.margin else ""
        if turn.spent > 1.001 * paired.ALPHA:
            text += f"; with the budget raised, the levels of all tests against that add up to {turn.spent:.2g}"
        return f"{text}."


def promote(
    client: MlflowClient, uri: str, alias: str, margin: float | None, force: bool, back: bool, challengers: int
) -> Decision:
    """Make a model champion if it is better.

    `challengers` is the budget of the champion. With `back`, the previous champion gets the alias again instead. The
    decision is written down in any case.
    """
    decision = rollback(client, alias) if back else decide(client, uri, alias, margin, force, challengers)
    enact(client, decision)
    publish(client, decision)
    return decision


# --- deciding ---------------------------------------------------------------------------------------------------------


def decide(
    client: MlflowClient, uri: str, alias: str, margin: float | None, force: bool, challengers: int = BUDGET
) -> Decision:
    """Decide whether a model becomes champion of the alias.

    The model is the one at `uri`, which may also name a run, or the newest version if `uri` is empty. A model that is
    no version of `poolnet` yet becomes one, unless this raises. Then it takes its turn among the `challengers` of the
    champion. Nothing else is changed yet.

    Raises `InputError` if the model is none that `poolnet train` or `poolnet register` logged, or cannot be loaded
    without pickle, if it has another pool than the alias names, or if it was trained on other data than the champion.
    With `force`, other data are no error.
    """
    pool = alias.removeprefix("champion-")
    newest = "" if uri else registry.newest(client, pool=pool if pool in POOLS else "").version
    challenger = _challenger(client, uri or f"models:/{NAME}/{newest}")
    if pool in POOLS and pool != alias and pool != challenger.pool:
        raise InputError(f"--alias {alias}: found a {challenger.pool} model in {challenger.title}, expected {pool}")
    champion = champions.holder(client, alias)
    earlier = tuple(champions.before(client, alias, champion))
    if not champion:
        return Decision(alias, "first", _registered(client, challenger), None, margin, earlier=earlier)
    over = int(champion.version)
    if over == challenger.version:
        return Decision(alias, "unchanged", over, over, margin, earlier=earlier)
    val = test = None
    try:
        val = _paired(client, champion, challenger, "val", margin)
        with contextlib.suppress(InputError):  # it decides nothing
            test = _paired(client, champion, challenger, "test", margin)
    except InputError:
        if not force:
            raise
    version, turn, untested = _registered(client, challenger), None, ""
    if val:
        try:
            with champions.alone(client):
                turn = budget.take(client, champion, version, challenger.run, challengers)
        except Untested as reason:
            untested = str(reason)
            val, test = (val, test) if force else (None, None)  # numbers would be a look at it
    if val and turn and (val.better(turn.budget) or val.not_worse(turn.budget)):
        kind = "better" if val.better(turn.budget) else "not worse"
    else:
        kind = "forced" if force else "refused"
    return Decision(alias, kind, version, over, margin, val, test, (*earlier, over), turn, untested)


@dataclasses.dataclass(frozen=True)
class _Challenger:
    """A model that may become champion, with its run."""

    pool: str
    run: Run
    model_id: str
    version: int | None  # None if it is not registered yet

    @property
    def title(self) -> str:
        return f"version {self.version}" if self.version else server_runs.name_of(self.run)


def _challenger(client: MlflowClient, uri: str) -> _Challenger:
    loaded = registry.load(uri, check_export=True)
    if not loaded.model_id or (loaded.version and loaded.version.name != NAME):
        raise InputError(
            f"{uri}: found no version of {NAME}, expected a registered one, as in models:/{NAME}/1, or a run"
        )
    title = f"{NAME} version {loaded.version.version}" if loaded.version else uri
    run = _run(client, loaded.run_id, title)
    own = registry.logged(client, run)
    if not own or own.model_id != loaded.model_id:  # it is the run's predictions that are compared
        raise InputError(f"{uri}: found a model that is not the one its run was scored with, expected that")
    version = int(loaded.version.version) if loaded.version else None
    if not version and run.info.status != "FINISHED":
        raise InputError(f"{uri}: found its run {run.info.status}, expected a finished one")
    return _Challenger(loaded.pool, run, loaded.model_id, version)


def _registered(client: MlflowClient, challenger: _Challenger) -> int:
    """Return the challenger's version, which is made if missing."""
    if challenger.version:
        return challenger.version
    run = challenger.run
    card = model_card.of_run(run, challenger.pool, run.data.params.get("seed", ""))
    with champions.alone(client):  # of two at once, the second finds the version
        return registry.register(client, run.info.run_id, challenger.model_id, card)


def _paired(
    client: MlflowClient, champion: ModelVersion, challenger: _Challenger, split: str, margin: float | None
) -> Paired:
    """Compare the predictions of both models example by example.

    These are the predictions that the runs of the two models logged.
    """
    step(f"Comparing the two on {split}")
    runs = [_run(client, champion.run_id, f"{NAME} version {champion.version}"), challenger.run]
    titles = [f"version {champion.version}", challenger.title]
    _check_data(runs, titles)
    a, b = (
        training_runs.predictions(client, run.info.run_id, title, split)
        for run, title in zip(runs, titles, strict=True)
    )
    y, group = a.y, b.group if a.group is None else a.group  # which only one has, if the other is of an earlier version
    if not np.array_equal(y, b.y):
        raise InputError(f"{titles[1]}: found other labels in its predictions of {split} than in those of {titles[0]}")
    if group is not None and b.group is not None and not np.array_equal(group, b.group):
        raise InputError(f"{titles[1]}: found other groups in its predictions of {split} than in those of {titles[0]}")
    families = None if group is None else len(np.unique(group))
    if (families or len(y)) < 2:
        what = "example" if group is None else "family"
        raise InputError(f"{titles[1]}: found {families or len(y)} {what} of {split}, expected 2 or more")
    (right_a, nll_a), (right_b, nll_b) = (paired.per_example(each.logits, y) for each in (a, b))
    for title, run, nll in zip(titles, runs, (nll_a, nll_b), strict=True):
        loss, logged = nll.mean(), run.data.metrics.get(f"{split}_loss", np.nan)
        if not abs(loss - logged) < 1e-5:
            raise InputError(f"{title}: found predictions of {split} with loss {loss:.6f}, but {logged:.6f} logged")
    return Paired(
        n=len(y),
        families=families,
        points=paired.clustered(100.0 * (right_b.astype(float) - right_a), group),
        nats=paired.clustered(nll_b - nll_a, group),
        paired_test=paired.paired_test(right_a, right_b, group),
        p_inferior=paired.non_inferiority(right_a, right_b, margin / 100, group) if margin else None,
    )


def _check_data(runs: list[Run], titles: list[str]) -> None:
    """Refuse two runs on different data or folds."""
    (digest, fold, splits), (other_digest, other_fold, other_splits) = map(_digests, runs)
    same = (digest and digest == other_digest) or ("val" in splits and splits == other_splits)
    if same and fold == other_fold:
        return
    champion, challenger = (
        f"{text[:16] or 'unknown'}{part and f' fold {part}'}"
        for text, part in ((digest, fold), (other_digest, other_fold))
    )
    raise InputError(
        f"{titles[1]}: found data SHA-256 {challenger}, but that of the champion, {titles[0]}, is {champion}; train "
        "both on the same data, or decide without a test: --force"
    )


def _digests(run: Run) -> tuple[str, str, dict[str, str]]:
    """Return what tells the data of two runs apart.

    It is the digest of the data set, the fold, and the digests of the splits. The last stay the same if a later version
    of poolnet adds families to a data set.
    """
    inputs = run.inputs.dataset_inputs if run.inputs else []
    splits = {tag.value: each.dataset.digest for each in inputs for tag in each.tags if tag.key == names.CONTEXT}
    return run.data.tags.get(names.DATA_SHA256, ""), run.data.params.get("fold", ""), splits


def _run(client: MlflowClient, run_id: str | None, title: str) -> Run:
    if run := server_runs.get_run(client, run_id or ""):
        return run
    raise InputError(f"{title}: its run {run_id} is not on the server")


def rollback(client: MlflowClient, alias: str) -> Decision:
    """Decide to give the alias back to the previous champion.

    A second rollback gives it to the champion before that one.
    """
    present = champions.holder(client, alias)
    earlier = champions.before(client, alias, present)
    if present and (over := champions.unfinished_rollback(client, alias, present)):  # killed: this command ends it
        return Decision(alias, "rollback", int(present.version), over, earlier=tuple(earlier))
    if not earlier:
        raise InputError(f"--rollback: found no champion before the present one of {alias}")
    over = int(present.version) if present else None
    return Decision(alias, "rollback", earlier[-1], over, earlier=tuple(earlier[:-1]))


# --- writing down -----------------------------------------------------------------------------------------------------


def enact(client: MlflowClient, decision: Decision) -> None:
    """Write the decision on the version and carry it out.

    Raises `RunError` if another decision has come first.
    """
    alias, version, over = decision.alias, decision.version, decision.over
    if decision.kind == "unchanged":
        replaced = decision.earlier[-1] if decision.earlier else None
        champions.mark_replaced(client, alias, version, replaced)  # where a promotion was killed before that
        return
    text = f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}: {decision.sentence}"
    tags = _tags(decision)
    if decision.kind == "refused":
        champions.describe(client, alias, version, tags, text)
        return
    holder = champions.holder(client, alias)
    if not (decision.kind == "rollback" and holder and int(holder.version) == version):  # else it only was not ended
        tags[f"{alias}.before"] = " ".join(map(str, decision.earlier[-REMEMBERED:]))
        champions.crown(client, alias, version, over, tags, text)
    if decision.kind == "rollback" and over:
        champions.forget(client, alias, over)


def _tags(decision: Decision) -> dict[str, str]:
    """Return the decision and its numbers as version tags.

    They are few and rounded, because the page of the registry shows them all.
    """
    tags = {"decision": decision.kind, "over": str(decision.over or "none")}
    if decision.challenger:
        tags["challenger"] = str(decision.challenger)
    for key, value in _numbers(decision).items():
        plain = "n" if key in ("n", "families", "margin_points") else key.partition("_")[0]
        tags[key] = {"n": f"{value:g}", "p": p_value(value)}.get(plain, f"{value:+.2f}")
    return {f"{decision.alias}.{key}": value for key, value in tags.items()}


def _numbers(decision: Decision) -> dict[str, float]:
    """Return the numbers that the decision rests on."""
    val, numbers = decision.val, dict[str, float]()
    if val:
        points = val.points
        numbers |= {"n": val.n} | ({"families": val.families} if val.families else {})
        numbers |= {"points": points.estimate, "points_low": points.low, "points_high": points.high}
        numbers["p"] = val.paired_test.p
    if val and val.p_inferior is not None and decision.margin:
        numbers |= {"margin_points": decision.margin, "p_inferior": val.p_inferior}
    if decision.test:
        numbers["test_points"] = decision.test.points.estimate
    return numbers


def publish(client: MlflowClient, decision: Decision) -> None:
    """Log the decision to the run that `mlflow run` made.

    The run then says that it has made this decision. Without `mlflow run` nothing is done here, and only the version
    says it.
    """
    if not os.environ.get("MLFLOW_RUN_ID"):
        return
    name, note = f"version {decision.version} is {decision.alias}", marked(decision.sentence)
    if decision.kind == "refused":  # the exit code makes it a failed run, which must say why
        name, note = f"Refused: version {decision.version} as {decision.alias}", f"Refused: {note}"
    tags, params = {names.PROMOTION: decision.kind, names.NOTE: note}, {"version": str(decision.version)}
    with result_runs.run(client, "", "promote", name) as run_id:
        result_runs.log(client, run_id, metrics=names.section("promote", _numbers(decision)), params=params, tags=tags)
