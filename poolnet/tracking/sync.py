"""Publish run records to tracking servers, and prune them.

This is for runs that are not being trained: it publishes what a server lacks, and removes local folders.
"""

import contextlib
import dataclasses
import filecmp
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import files
from poolnet.errors import InputError, NoAnswer, RunError
from poolnet.files import home
from poolnet.runs import run_record
from poolnet.runs.run_record import RunRecord
from poolnet.text import aligned
from poolnet.tracking import addresses, names, registry, server_runs, servers
from poolnet.tracking.publication import (
    Publication,
    artifact_files,
    as_metrics,
    find_run,
    forget,
    outstanding,
    steps,
    upload_new,
)
from poolnet.tracking.server_runs import agrees

LOCK_SECONDS = 10  # in which another process publishes a run of the usual size

DAMAGED = (AttributeError, LookupError, TypeError, ValueError)  # what a record of another form may raise


def is_final(error: Exception) -> bool:
    """Whether publishing again would fail in the same way.

    This is so if the server refuses, if something is missing here, or if the run is damaged.
    """
    ours = isinstance(error, (*DAMAGED, RunError)) and not isinstance(error, (files.Locked, NoAnswer))
    return ours or servers.is_refusal(error)


def one_line(error: Exception, where: str = "") -> str:
    """Return an error as one line of text.

    The line of a server error begins with the address of the server, if it is given as `where`.
    """
    if isinstance(error, (InputError, RunError)):
        return str(error)
    if isinstance(error, DAMAGED):
        return f"damaged record ({error!r})"
    why = servers.reason(error)
    return f"{where}: {why}{servers.pointer(error)}" if where else why


def find(text: str) -> RunRecord:
    """Find the run that a text names.

    The name may also be the one that MLflow shows. Raises `InputError` if there is no such run.
    """
    return RunRecord(run_record.folder() / find_name(text))


def find_name(text: str) -> str:
    """Return the name of the run that `find` finds.

    Its record may be damaged.
    """
    name, store = run_record.find_name(text), addresses.sqlite_file(addresses.own())
    if not name and (not store or store.exists()):
        with contextlib.suppress(MlflowException, NoAnswer, RunError):  # then only names on disk are known
            run = server_runs.find_run(servers.own_client(), text)  # somebody may have renamed it there
            name = run_record.find_name(run.info.run_id) if run else None
    if not name:
        raise InputError(f"{text}: no such run in {run_record.folder()}")
    return name


# --- poolnet sync ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One run in the table of `poolnet sync`."""

    run: str
    state: str = "unreadable"  # or training, FINISHED, KILLED, FAILED, removed
    server: str = ""
    found: str = ""  # in the JSON: what the server lacks, or why that is not known
    did: str = "nothing"
    ok: bool = True

    @property
    def published(self) -> bool:
        """Whether the server has the whole run now."""
        return self.ok and (self.found == "nothing" or self.did.startswith("published"))

    @property
    def news(self) -> str:
        """What was outstanding and what became of it, if anything."""
        parts = [_counted_words(self.found)] * (self.found not in ("", "nothing"))
        parts += [self.did] * (self.did not in ("nothing", "would do nothing"))
        return ": ".join(parts)


def sync(name: str, to: str | None = None, dry_run: bool = False, prune: bool = False) -> Row:
    """Publish everything that a server lacks of a run.

    The server is the run's own, or the one at the address `to`. All errors are caught and put into the row.
    """
    row = Row(name)
    try:
        run = find(name)
        row.run, row.state = run.name, (run.ended() or {"status": "KILLED"})["status"]
        if run.is_training():
            row.state, row.found = "training", "its own process publishes it"
        elif dry_run:
            _preview(row, run, to, prune)
        else:
            with files.locked(run.folder / "publish.lock", LOCK_SECONDS):
                _publish(row, run, to, prune)
            if row.did.endswith("checked"):
                remove(run)
                row.did += ", removed"
    except Exception as error:  # of a damaged record, a server, or the way to it: it is said, and the others go on
        row.state = "unreadable" if isinstance(error, DAMAGED) and not row.server else row.state
        row.did, row.ok = one_line(error), False
    return row


def checked_names(runs: Iterable[str]) -> list[str]:
    """Return the names of the runs, as `find` finds them.

    Raises `InputError` for an unknown run.
    """
    return [find_name(run) for run in runs]


def table(rows: list[Row]) -> str:
    """Return the rows as lines for the terminal.

    One line for each server says how many runs it has. Only runs with something outstanding have lines of their own.
    """
    if not rows:
        return f"No runs in {run_record.folder()}"
    lines = []
    for server in sorted({row.server for row in rows}):
        group = [row for row in rows if row.server == server]
        if server:
            lines.append(f"{_counted(group)} on {server}")
        if shown := [row for row in group if row.news]:
            lines += aligned([("run", "state", "outstanding"), *((row.run, row.state, row.news) for row in shown)])
    return "\n".join(lines)


def _counted(rows: list[Row]) -> str:
    """Say how many of a server's runs it has completely."""
    total, published = len(rows), sum(row.published for row in rows)
    if published < total:
        return f"{published:,} of {total:,} runs published"
    return f"{total:,} runs, all published" if total > 1 else "1 run, published"


def _counted_words(found: str) -> str:
    """Shorten words such as `artifact a, artifact b` to `2 artifacts`."""
    words: dict[str, list[str]] = {}
    for word in found.split(", "):
        words.setdefault(word.partition(" ")[0], []).append(word)
    return ", ".join(each[0] if len(each) == 1 else f"{len(each)} {kind}s" for kind, each in words.items())


def _open(row: Row, run: RunRecord, to: str | None) -> Publication:
    publication = Publication(run, addresses.absolute(to, Path.cwd()) if to else servers.home_of(run))
    row.server = publication.key
    return publication


def _preview(row: Row, run: RunRecord, to: str | None, prune: bool) -> None:
    missing = lacking(_open(row, run, to))
    row.found = _listed(missing)
    otherwise = f"would {'check and remove it' if prune and run.finished else 'do nothing'}"
    row.did = "would publish it" if missing else otherwise


def _publish(row: Row, run: RunRecord, to: str | None, prune: bool) -> None:
    if not (run.folder / "record.json").exists():
        row.state, row.found = "removed", "another process has pruned it"
        return
    run.mark_if_dead()
    publication = _open(row, run, to)
    missing = lacking(publication)
    row.found = _listed(missing)
    if missing:
        forget(publication, missing)
        upload_new(publication)
        row.did = "published"
        if not run.finished:
            row.did += f"; go on with: {run_record.resume_command(run.name)}"
    if prune and not run.finished:
        row.did = f"kept: {run_record.resume_command(run.name)} needs it"
    elif prune and (missing := lacking(publication, every_byte=True)):
        forget(publication, missing)
        row.did, row.ok = f"kept: {_listed(missing)}; to publish that again: poolnet sync {run.name}", False
    elif prune:
        row.did = "published, checked" if row.did == "published" else "checked"


def remove(run: RunRecord) -> None:
    """Remove the local folder of a run.

    The folder is first moved out of the folder of runs. So a process that is killed leaves no half of a run there. Then
    the files are deleted one by one, together with what earlier killed processes have left.
    """
    gone = home() / "pruned"
    gone.mkdir(exist_ok=True)
    run.folder.rename(gone / run.name)
    shutil.rmtree(gone, ignore_errors=True)


# --- what a server lacks ---------------------------------------------------------------------------------------------


def lacking(publication: Publication, every_byte: bool = False) -> dict[str, list[str]]:
    """Return what the server lacks of a run.

    The result maps each step of the publication with missing parts to words for these parts. Steps that are not
    published yet are judged by what is remembered here. The other steps are judged by what the server lists, which
    takes a handful of calls. With `every_byte`, they are judged by the contents that the server returns.
    """
    expected = (*steps(publication.run), "metrics", "status")
    server_run = find_run(publication)
    if publication.server_copy.stand_in:
        return {}
    if not server_run or not publication.server_copy.run_id:
        return {step: ["everything"] for step in expected}
    missing = {step: [step] for step in outstanding(publication)}
    with servers.as_environment(publication.uri):
        model = registry.logged(publication.client, server_run) if "model" in expected else None
        for step in expected:
            if step not in missing and (words := _lacks(publication, server_run, model, step, every_byte)):
                missing[step] = words
    if "model" in missing:  # and with it what is said of it
        missing |= {step: missing.get(step, []) for step in ("scores", "version", "summary") if step in expected}
    return missing


def _listed(missing: dict[str, list[str]]) -> str:
    return ", ".join(dict.fromkeys(word for words in missing.values() for word in words)) or "nothing"


def _lacks(
    publication: Publication, server_run: Run, model: LoggedModel | None, step: str, every_byte: bool
) -> list[str]:
    """Return in words what the server lacks of a step."""
    run, client = publication.run, publication.client
    match step:
        case "start":
            params, config = server_run.data.params, run.record["config"]
            return [f"param {name}" for name, value in config.items() if not agrees(params.get(name, ""), value)]
        case "inputs":
            inputs = server_run.inputs.dataset_inputs if server_run.inputs else []
            digests = {entry.dataset.digest for entry in inputs}
            splits = run.record["data"]["splits"]
            return [f"dataset {split['name']}" for split in splits if split["sha256"][:32] not in digests]
        case "model":
            if not model or model.status != LoggedModelStatus.READY:
                return ["model"]
            has_files = bool(client.list_logged_model_artifacts(model.model_id))
            return [] if has_files and not (every_byte and _differs(run, model)) else ["model"]
        case "scores":
            return [] if model and {metric.key for metric in model.metrics or ()} else ["scores of the model"]
        case "version":
            run_id = server_run.info.run_id
            ok = model and (registry.is_withdrawn(model) or registry.version_of(client, run_id, model.model_id))
            return [] if ok else ["version of the model"]
        case "summary":
            return [] if server_run.data.tags.get(names.NOTE) else ["description"]
        case "metrics":
            return _lacks_metrics(client, run, server_run, every_byte)
        case "status":
            end = run.ended()
            return ["status"] if end and end["status"] != server_run.info.status else []
        case _:
            return _lacks_files(client, server_run.info.run_id, artifact_files(run, step), every_byte)


def _differs(run: RunRecord, model: LoggedModel) -> bool:
    """Whether the server's model has other weights than the run.

    The weights are those of the model as it is loaded. A model that cannot be loaded counts as different.
    """
    try:
        net = registry.load(f"models:/{model.model_id}").net
    except (InputError, MlflowException, OSError):
        return True
    expected = {name: array for name, array in (run.load_tensors("model") or {}).items() if name != "example"}
    weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    return weights.keys() != expected.keys() or any(
        weights[name].tobytes() != array.tobytes() for name, array in expected.items()
    )


def _lacks_metrics(client: MlflowClient, run: RunRecord, server_run: Run, every_value: bool) -> list[str]:
    """Return the names of metrics that the server lacks.

    The last value of each metric is compared. With `every_value`, all values are compared.
    """
    expected: dict[str, list] = {}
    for record in sorted(run.metrics(), key=lambda record: record["step"]):
        for metric in as_metrics(record):
            expected.setdefault(metric.key, []).append((metric.step, metric.timestamp, metric.value))
    # earlier versions published some under the name that they have in the record
    known = {names.METRICS.get(name, name): (name, value) for name, value in server_run.data.metrics.items()}
    wrong = [name for name, values in expected.items() if known.get(name, ("", None))[1] != values[-1][2]]
    for name in [name for name in expected if name in known] if every_value else []:
        history = client.get_metric_history(server_run.info.run_id, known[name][0])
        if {(metric.step, metric.timestamp, metric.value) for metric in history} != set(expected[name]):
            wrong.append(name)
    return [f"metric {name}" for name in dict.fromkeys(wrong)]


def _lacks_files(
    client: MlflowClient, run_id: str, paths: list[tuple[Path, str | None]], every_byte: bool
) -> list[str]:
    """Return the names of files that the server lacks.

    The sizes of the files are compared. With `every_byte`, their contents are compared too.
    """
    listed = {file.path: file.file_size for _, folder in paths[:1] for file in client.list_artifacts(run_id, folder)}
    missing = []
    for path, folder in paths:
        name = f"{folder}/{path.name}" if folder else path.name
        same = name in listed and listed[name] in (None, path.stat().st_size)
        if not same or (every_byte and not _same(client, run_id, name, path)):
            missing.append(f"artifact {path.name}")
    return missing


def _same(client: MlflowClient, run_id: str, name: str, path: Path) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return filecmp.cmp(path, client.download_artifacts(run_id, name, scratch), shallow=False)
        except (MlflowException, OSError):
            return False
