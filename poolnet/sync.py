"""Journals and servers brought together, when no training is under way: caught up with, pruned, restored."""

import contextlib
import dataclasses
import filecmp
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import addresses, journal, registry, stores
from poolnet.config import InputError, NoAnswer, RunError, aligned
from poolnet.files import replacing
from poolnet.journal import Journal
from poolnet.tracking import FILES, Publication, Refused, agrees, as_metrics


def is_final(error: Exception) -> bool:
    """Whether trying again is of no use: the server knows who asks and refuses, or the run was deleted there."""
    forbidden = isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)
    return forbidden or (isinstance(error, (Refused, RunError)) and not isinstance(error, NoAnswer))


def mark_if_dead(run: Journal) -> None:
    """A run whose process died without a word is KILLED, and can be resumed."""
    run.mark_if_dead()


# --- poolnet sync ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What `poolnet sync` found of a run, and did."""

    run: str
    state: str  # training, FINISHED, KILLED, FAILED, or unreadable
    server: str
    found: str
    did: str
    ok: bool = True


def sync(
    runs: Iterable[str], to: str | None, dry_run: bool, prune: bool, on_bytes: Callable[[int], None] = lambda size: None
) -> Iterator[Row]:
    """Publish what is outstanding of these runs, or of all, each to its own server or to another."""
    to = to and addresses.absolute(to, Path.cwd())
    for name in runs or journal.names():
        try:
            run = _found(name)
        except InputError as error:
            yield Row(name, "unreadable", "", str(error), "nothing", ok=False)
            continue
        if run.is_training():
            yield Row(run.name, "training", "", "its own process publishes it", "nothing")
            continue
        yield _dry(run, to, prune) if dry_run else _synced(run, to, prune, on_bytes)


def check_input(runs: Iterable[str], to: str | None) -> None:
    """Refuse names that no run has, and an address that is none."""
    for name in runs:
        _found(name)
    if to:
        addresses.check(to, "--to")


def _found(name: str) -> Journal:
    run = journal.find(name)
    if not run:
        raise InputError(f"{name}: no such run in {journal.folder()}")
    return run


def outstanding_bytes(runs: Iterable[str], to: str | None) -> int:
    """The size of the files that `sync` would upload, as far as is known before it looks."""
    total = 0
    for name in runs or journal.names():
        with contextlib.suppress(InputError):
            run = _found(name)
            total += Publication(run, to or stores.home_of(run)).outstanding_bytes()
    return total


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    if not rows:
        return f"No runs in {journal.folder()}"
    heads = ("run", "state", "outstanding", "done", "server")
    lines = [heads, *((row.run, row.state, row.found, row.did, row.server) for row in rows)]
    return "\n".join(aligned(lines))


def _outstanding(publication: Publication) -> str:
    """What is outstanding, in words."""
    return (", ".join(publication.outstanding()) or "nothing") if publication.held["run_id"] else "everything"


def _dry(run: Journal, to: str | None, prune: bool) -> Row:
    publication = Publication(run, to or stores.home_of(run))
    state = (run.ended() or {"status": "KILLED"})["status"]
    otherwise = f"would {'check and remove it' if prune and run.finished else 'do nothing'}"
    would = "would publish it" if publication.outstanding() else otherwise
    return Row(run.name, state, publication.key, _outstanding(publication), would)


def _synced(run: Journal, to: str | None, prune: bool, on_bytes: Callable[[int], None]) -> Row:
    mark_if_dead(run)
    state = (run.ended() or {"status": "training"})["status"]
    with FileLock(run.folder / "publish.lock"):  # of two at once, the second finds that there is nothing to do
        publication = Publication(run, to or stores.home_of(run), on_bytes=on_bytes)
        found, did = _outstanding(publication), "nothing"
        if publication.outstanding():
            error = _publish(publication)
            if error:
                return Row(run.name, state, publication.key, found, error, ok=False)
            did = "published"
            if not run.finished:
                did += f"; go on with: {journal.resume_command(run.name)}"
        if not prune:
            return Row(run.name, state, publication.key, found, did)
        if not run.finished:
            return Row(run.name, state, publication.key, found, f"kept: {journal.resume_command(run.name)} needs it")
        try:
            left = missing(publication)
        except Exception as error:  # as above
            left = [stores.reason(error)]
    if left:
        return Row(run.name, state, publication.key, found, f"kept: {'; '.join(left)}", ok=False)
    shutil.rmtree(run.folder)
    did = "checked, removed" if did == "nothing" else f"{did}, checked, removed"
    return Row(run.name, state, publication.key, found, did)


def _publish(publication: Publication, attempts: int = 2) -> str:
    """Publish the rest. Returns what stood in the way, if anything."""
    for attempt in range(attempts):
        try:
            publication.advance()
            return ""
        except Exception as error:  # whatever a server, or the way to it, may raise: it is said
            problem = stores.reason(error)
            if is_final(error) or "refused" in problem:
                break
            if attempt + 1 < attempts:
                time.sleep(1)
    return problem


def missing(publication: Publication) -> list[str]:
    """What a finished run's folder holds and the server does not, everything fetched and compared."""
    run, client, found = publication.run, publication.client, publication.find()
    if not found or found.info.lifecycle_stage == "deleted":
        return ["the run"]
    wrong = [] if found.info.status == "FINISHED" else ["the status"]
    for name, value in run.record["config"].items():
        if not agrees(found.data.params.get(name, ""), value):
            wrong.append(f"param {name}")
    expected = {(m.key, m.step, m.timestamp, m.value) for record in run.metrics() for m in as_metrics(record)}
    for name in {key for key, *_ in expected}:
        history = client.get_metric_history(found.info.run_id, name)
        if {(m.key, m.step, m.timestamp, m.value) for m in history} != {m for m in expected if m[0] == name}:
            wrong.append(f"metric {name}")
    digests = {entry.dataset.digest for entry in found.inputs.dataset_inputs}
    wrong += [f"dataset {s['name']}" for s in run.record["data"]["splits"] if s["sha256"][:32] not in digests]
    for name in FILES:
        wrong += [
            f"artifact {path.name}"
            for path, folder in publication.files(name)
            if not _same(client, found.info.run_id, path, folder)
        ]
    model = registry.logged(client, found)
    if not model or model.status != LoggedModelStatus.READY:
        wrong.append("the model")
    elif run.record["config"]["register"] and not registry.version_of(client, found.info.run_id, model.model_id):
        wrong.append("the model version")
    return wrong


def _same(client: MlflowClient, run_id: str, path: Path, folder: str | None) -> bool:
    if not path.exists():  # git.diff of a clean checkout
        return True
    with tempfile.TemporaryDirectory() as scratch:
        name = f"{folder}/{path.name}" if folder else path.name
        try:
            fetched = Path(client.download_artifacts(run_id, name, scratch))
        except (MlflowException, OSError):
            return False
        return filecmp.cmp(path, fetched, shallow=False)


# --- runs that are only on the server --------------------------------------------------------------------------------


def restore(name: str, timeout: float) -> Journal:
    """The journal of a run whose folder is gone, from what the server has: all but the state of training.

    Its epochs are trained again, to the same figures; those recorded stay as they are.
    """
    from poolnet.train import EpochRecord  # and with it torch

    stores.limit(timeout)
    uri = addresses.own()
    where = addresses.shown(uri)
    nowhere = InputError(f"{name}: no such run, neither in {journal.folder()} nor on {where}")
    try:
        if (path := addresses.sqlite_file(uri)) and not path.exists():
            raise nowhere
        client = stores.client_of(uri)
        found = stores.look_up(client, name)
        if not found:
            raise nowhere
        info, tags = found.info, found.data.tags
        if not journal.is_name(tags.get("poolnet.run", "")):  # somebody's tag, which must not name another folder
            raise InputError(f"{name}: found no journal's name in the run on {where}, expected a run of poolnet train")
        if info.status in ("RUNNING", "FINISHED"):
            state = "is FINISHED" if info.status == "FINISHED" else "is RUNNING, perhaps on another machine, says"
            raise InputError(
                f"{name}: its folder is not in {journal.folder()}, and it {state} {where}; start a new run"
            )
        fields = {field.name for field in dataclasses.fields(EpochRecord)}
        steps: dict[int, dict] = {}
        for key in found.data.metrics:
            for metric in client.get_metric_history(info.run_id, key):
                if metric.step == 0 or key in fields:  # and not somebody's own
                    step = steps.setdefault(metric.step, {"t": metric.timestamp, "step": metric.step, "metrics": {}})
                    step["metrics"][key] = metric.value
        with tempfile.TemporaryDirectory() as scratch:
            record = Path(client.download_artifacts(info.run_id, "record.json", scratch)).read_bytes()
    except (MlflowException, NoAnswer) as error:
        raise InputError(
            f"{name}: its folder is not in {journal.folder()}, and {where} cannot give it back: {stores.reason(error)}"
        ) from None
    folder = journal.folder() / tags["poolnet.run"]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(step) + "\n" for step in sorted(steps.values(), key=lambda step: (step["t"], step["step"]))]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    with replacing(folder / "record.json") as part:  # last, since with it the run exists
        part.write_bytes(record)
    run = Journal(folder)
    Publication(run, uri).adopt(info)
    return run
