"""Delete what nobody needs: on a server, and of local state.

What goes is found anew each time, from what the server and the records say. So a clean that was cut off is finished by
the same command. The order is such that nothing is left over without what leads to it: versions, then runs, those of a
sweep before the sweep, each after its model and before its record; then the other records, and the caches.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from mlflow.entities import Run, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path

from poolnet.errors import NoAnswer, RunError
from poolnet.files import home, locked
from poolnet.models import champions
from poolnet.runs import run_record
from poolnet.runs.run_record import RunRecord
from poolnet.text import aligned, progress, step
from poolnet.tracking import addresses, names, registry, server_runs, servers, sync
from poolnet.tracking.publication import Publication, is_complete
from poolnet.tracking.registry import NAME
from poolnet.tracking.servers import Client
from poolnet.upkeep import KINDS, needed, superseded

DAY = 86_400_000  # ms
DEAD_DAYS = 7  # after which a run that says RUNNING, and has no record here, is taken for one that was killed
CACHES = ("features", "exports", "data/received", "pruned", "unpacked", "digests.json")  # the last two of old versions
TITLES = {
    "versions": "model versions, never champion",
    "failed": "failed and killed runs",
    "superseded": "runs of superseded sweeps",
    "records": "published records here",
    "caches": "files of caches here",
}
SHOWN = 3  # names in a line
TROUBLE = "could not go"  # so begins why something stays that was to go


@dataclasses.dataclass
class Plan:
    """What goes, by kind, and what stays though it seems not to be needed.

    `kept` has the names of what stays, by reason. `left` are the records of superseded runs, which go with them.
    """

    versions: list[ModelVersion] = dataclasses.field(default_factory=list)
    failed: list[Run] = dataclasses.field(default_factory=list)
    superseded: list[Run] = dataclasses.field(default_factory=list)
    records: list[RunRecord] = dataclasses.field(default_factory=list)
    caches: list[Path] = dataclasses.field(default_factory=list)
    left: list[Publication] = dataclasses.field(default_factory=list)
    kept: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def keep(self, name: str, why: str) -> None:
        self.kept.setdefault(why, []).append(name)

    def names(self, kind: str) -> list[str]:
        """Return the names of what goes of a kind."""
        match kind:
            case "versions":
                return [str(version.version) for version in self.versions]
            case "failed" | "superseded":
                return [server_runs.name_of(run) for run in getattr(self, kind)]
            case "records":
                return [run.name for run in self._records]
        return [path.relative_to(home()).as_posix() for path in self.caches]

    def size(self, kind: str) -> int | None:
        """Return the bytes of what goes of a kind, or None.

        Of artifacts, they are known if a folder of this machine holds them.
        """
        match kind:
            case "versions":
                return None
            case "failed" | "superseded":
                sizes = [_artifacts(run) for run in getattr(self, kind)]
                return None if None in sizes else sum(size or 0 for size in sizes)
            case "records":
                return sum(_bytes(run.folder) for run in self._records)
        return sum(map(_bytes, self.caches))

    @property
    def _records(self) -> list[RunRecord]:
        return [*(publication.run for publication in self.left), *self.records]


# --- finding ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Found:
    """What there is: an experiment's runs, deleted ones too, by id.

    `versions` are those of all registered models, and `publications` the records here. What is from after `before`, in
    ms since 1970, stays.
    """

    client: Client
    experiment_id: str
    runs: dict[str, Run]
    versions: list[ModelVersion]
    publications: list[Publication]
    before: int


def find(client: Client | None, experiment_id: str, kinds: Collection[str], days: float) -> Plan:
    """Find what goes of an experiment, and of local state.

    Of the `kinds`, only what is older than so many days goes. For caches alone, no server is needed.
    """
    step("Looking for what nobody needs")
    plan, before = Plan(), run_record.now() - round(days * DAY)
    if client:
        more = {"run_view_type": ViewType.ALL, "max_results": 1000}
        runs = {run.info.run_id: run for run in servers.all_pages(client.search_runs, [experiment_id], "", **more)}
        publications = [*_publications(client.uri, plan)]
        found = _Found(client, experiment_id, runs, needed.all_versions(client), publications, before)
        if "versions" in kinds:
            _find_versions(plan, found)
        _find_runs(plan, found, kinds)
        if "records" in kinds:
            _find_records(plan, found)
    if "caches" in kinds:
        _find_caches(plan, before)
    return plan


def _publications(uri: str, plan: Plan) -> Iterator[Publication]:
    """Yield the records here that belong to a server."""
    for name in run_record.names():
        try:
            publication = Publication(RunRecord(run_record.folder() / name), uri)
            if servers.home_of(publication.run) == uri:
                yield publication
        except sync.DAMAGED:
            plan.keep(name, "are damaged records; poolnet sync says how")


def _find_versions(plan: Plan, found: _Found) -> None:
    """Find the versions of an experiment's runs that never were champion."""
    stay = needed.by_promotions(found.client, found.versions)
    for version in sorted(found.versions, key=lambda version: int(version.version)):
        if version.name == NAME and version.run_id in found.runs:
            if str(version.version) in stay:
                plan.keep(
                    str(version.version), "are versions with an alias, or that a promotion decided about or names"
                )
            elif version.creation_timestamp < found.before:
                plan.versions.append(version)


def _find_runs(plan: Plan, found: _Found, kinds: Collection[str]) -> None:
    """Find failed and superseded runs, and the records of the latter."""
    failed = set(_failed(plan, found)) if "failed" in kinds else set()
    old = superseded.runs(found.client, found.runs.values()) if "superseded" in kinds else ()
    going = _unneeded(plan, found, [*(found.runs[run_id] for run_id in failed), *old])
    parents = {run.data.tags.get(names.PARENT) for run in going.values()}
    for run in sorted(going.values(), key=lambda run: run.info.run_id in parents):
        if run.info.lifecycle_stage == "active":
            (plan.failed if run.info.run_id in failed else plan.superseded).append(run)
    for publication in found.publications:
        if publication.server_copy.run_id in going.keys() - failed and publication.run.finished:
            plan.left.append(publication)


def _unneeded(plan: Plan, found: _Found, candidates: Collection[Run]) -> dict[str, Run]:
    """Return the candidates that nothing needs, by id."""
    going: dict[str, Run] = {}
    of_model = needed.runs_of_models(found.runs.values())
    named = needed.by_results(found.client, of_model) if candidates else needed.Named()
    going_versions = {version.version for version in plan.versions}
    kept = [each for each in found.versions if each.name != NAME or each.version not in going_versions]
    staying = {run_id for each in kept for run_id in (each.run_id, of_model.get(registry.logged_id(each) or ""))}
    here = {*run_record.names()}
    for run in candidates:
        if why := _why_kept(run, named, staying, here):
            plan.keep(server_runs.name_of(run), why)
        elif (run.info.end_time or run.info.start_time) < found.before:
            going[run.info.run_id] = run
    for run in _parents_of_others(going, found.runs):
        plan.keep(server_runs.name_of(run), "have runs below them that stay")
    return going


def _failed(plan: Plan, found: _Found) -> Iterator[str]:
    """Yield the ids of poolnet's runs that failed or were killed."""
    for run_id, run in found.runs.items():
        if run.info.lifecycle_stage == "active" and needed.is_poolnets(run):
            begun = run.info.status not in ("FINISHED", "FAILED", "KILLED")
            if run.info.status in ("FAILED", "KILLED") or (begun and _is_dead(found.client, run)):
                yield run_id
            elif begun:
                plan.keep(server_runs.name_of(run), f"are RUNNING; after {DEAD_DAYS} days without a step they go")


def _is_dead(client: Client, run: Run) -> bool:
    """Whether a run that says RUNNING has not logged for long."""
    alive = run_record.now() - DEAD_DAYS * DAY
    if run.info.start_time > alive:
        return False
    steps = client.get_metric_history(run.info.run_id, "val_loss") if "val_loss" in run.data.metrics else []
    return all(step.timestamp < alive for step in steps)


def _why_kept(run: Run, named: needed.Named, staying: Collection[str | None], here: Collection[str]) -> str:
    """Say why a run stays, or return an empty text.

    `staying` are the ids of the runs of versions that stay, and `here` the names of the records on this machine.
    """
    name = run.data.tags.get(names.RUN)
    if run.info.status != "FINISHED" and name in here:
        again = run_record.resume_command("RUN")
        return f"can go on: {again}; to give a run up, remove its folder in {run_record.folder()}"
    if names.PROMOTION in run.data.tags:
        return "tell of a promotion"
    return "are versions that stay" if run.info.run_id in staying else named.why(run)


def _parents_of_others(going: dict[str, Run], runs: Mapping[str, Run]) -> list[Run]:
    """Take the parents of runs that stay from those that go."""
    taken: list[Run] = []
    while True:
        stay = [run for run in runs.values() if run.info.lifecycle_stage == "active" and run.info.run_id not in going]
        parents = going.keys() & {run.data.tags.get(names.PARENT) for run in stay}
        if not parents:
            return taken
        taken += [going.pop(run_id) for run_id in sorted(parents)]


def _find_records(plan: Plan, found: _Found) -> None:
    """Find the records of finished runs that the server has.

    Here that is judged by what is remembered, and before they are removed by what the server returns.
    """
    left = {publication.run.name for publication in plan.left}
    for publication in found.publications:
        run, end = publication.run, publication.run.ended()
        ours = publication.server_copy.experiment_id in ("", found.experiment_id) and run.name not in left
        if ours and end and run.finished and end["t"] < found.before:
            try:
                complete = is_complete(publication)
            except RunError:  # of a damaged one
                complete = False
            if complete:
                plan.records.append(run)
            else:
                plan.keep(run.name, "are records that are not wholly published; publish them with: poolnet sync")


def _find_caches(plan: Plan, before: int) -> None:
    """Find the files of caches, unless runs are trained here."""
    files = [file for name in CACHES for file, stat in _files(home() / name).items() if stat.st_mtime * 1000 < before]
    for name in run_record.names() if files else ():
        with contextlib.suppress(*sync.DAMAGED):
            run = RunRecord(run_record.folder() / name)
            if not run.ended() and run.is_training():
                plan.keep(name, "are being trained, and may use the caches")
                return
    plan.caches = files


def _files(path: Path) -> dict[Path, os.stat_result]:
    """Return the files below a path, or the file that it is."""
    found = {}
    for file in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):  # of one that another process has just removed
            if file.is_file():
                found[file] = file.stat()
    return found


def _bytes(path: Path) -> int:
    return sum(stat.st_size for stat in _files(path).values())


def _artifacts(run: Run) -> int | None:
    """Return the bytes of a run's artifacts, if they are here."""
    uri = run.info.artifact_uri
    folder = Path(local_file_uri_to_path(uri) if uri.startswith("file:") else uri)
    if not folder.is_absolute():  # an address
        return None
    models = [
        folder.parents[1] / "models" / each.model_id for each in (run.outputs.model_outputs if run.outputs else ())
    ]
    return sum(map(_bytes, (folder, *models)))


# --- deleting ---------------------------------------------------------------------------------------------------------


def carry_out(client: Client | None, plan: Plan) -> None:
    """Delete what a plan says.

    What cannot go, for example since the server lacks a part of a record, is added to what stays. Raises `RunError` if
    the server refuses or is away.
    """
    done, deletions = 0, [*_deletions(client, plan)]
    try:
        with progress(deletions, label="Deleting") as bar:
            for delete in bar:
                try:
                    delete()
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # else another process was faster
                        raise
                done += 1
    except (MlflowException, NoAnswer) as error:
        what = f"{done:,} of {len(deletions):,} deleted, the rest is as it was" if done else "nothing was deleted"
        why = servers.reason(error)
        if isinstance(error, MlflowException) and servers.is_forbidden(error):
            why = "deleting needs the right MANAGE; an administrator types: poolnet team grant USER --right manage"
            what += "; what is on this machine can go without: poolnet clean records caches --yes"
        raise RunError(f"{addresses.shown(client.uri) if client else home()}: {why} ({what})") from None


def _deletions(client: Client | None, plan: Plan) -> Iterator[Callable[[], None]]:
    """Yield what deletes each thing, in a safe order."""
    if client:
        yield from (partial(_delete_version, client, version) for version in plan.versions)
        yield from (partial(_delete_run, client, run) for run in (*plan.failed, *plan.superseded))
        yield from (partial(_remove_left, client, publication) for publication in plan.left)
    yield from (partial(_prune, plan, record) for record in plan.records)
    yield from (partial(_delete_file, file) for file in plan.caches)


def _remove_left(client: Client, publication: Publication) -> None:
    """Remove the record of a run, if the run was deleted."""
    if not server_runs.is_there(client, publication.server_copy.run_id):
        with locked(publication.run.folder / "publish.lock"):
            pass  # nobody publishes it now; on Windows, a lock that is held would keep the folder
        sync.remove(publication.run)


def _prune(plan: Plan, record: RunRecord) -> None:
    row = sync.sync(record.name, prune=True)
    if record.folder.exists():
        plan.keep(record.name, f"{TROUBLE}: {row.did}")


def _delete_file(file: Path) -> None:
    with contextlib.suppress(OSError):  # Windows keeps what another process has open
        file.unlink(missing_ok=True)


def _delete_version(client: Client, version: ModelVersion) -> None:
    """Delete a version, unless it was promoted just now."""
    with champions.alone(client):
        if not needed.is_used(client.get_model_version(NAME, version.version)):
            registry.withdraw(client, version)


def _delete_run(client: Client, run: Run) -> None:
    """Delete a run and its model, unless somebody goes on with it."""
    now = server_runs.get_run(client, run.info.run_id)
    if now and now.info.lifecycle_stage == "active" and now.info.status == run.info.status:
        if model := registry.logged(client, now):
            client.delete_logged_model(model.model_id)
        client.delete_run(run.info.run_id)


# --- showing ----------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """Return the plan as text for a terminal."""
    rows = []
    for kind, title in TITLES.items():
        if listed := plan.names(kind):
            size = plan.size(kind)
            if kind == "caches":
                shown = [name for name in CACHES if any(each.is_relative_to(home() / name) for each in plan.caches)]
            else:
                shown = listed
            rows.append([title, f"{len(listed):,}", "" if size is None else f"{size / 1e6:,.1f} MB", _few(shown)])
    lines = aligned([["what", "number", "size", "names"], *rows]) if rows else ["Found nothing to delete."]
    return "\n".join([*lines, *(f"Kept: {_few(kept)} {why}" for why, kept in plan.kept.items())])


def _few(listed: Iterable[str]) -> str:
    listed = [*listed]
    more = [f"and {len(listed) - SHOWN:,} more"] if len(listed) > SHOWN else []
    return ", ".join([*listed[:SHOWN], *more])


def contents(plan: Plan) -> dict[str, object]:
    """Return the plan as a dictionary for JSON.

    The keys are the names in the JSON output.
    """
    going = {kind: {"names": plan.names(kind), "bytes": plan.size(kind)} for kind in KINDS}
    return {"going": going, "kept": plan.kept}
