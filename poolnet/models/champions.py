"""Store which version is champion and which were before.

An alias of MLflow points to the champion. Tags of the versions hold the history. A version that became champion has two
tags. Their names begin with the alias and a dot:

- `since`: when it became champion; empty or missing if it was rolled back.
- `before`: which versions were champion before it and were not rolled back, the latest last.

MLflow cannot set an alias on a condition. So a promotion first claims the registered model, see `alone`.
"""

import contextlib
import random
import re
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.errors import NoAnswer, RunError
from poolnet.runs import provenance
from poolnet.tracking import model_card, registry, servers
from poolnet.tracking.registry import NAME

OLD_LEDGER = "poolnet-promotions"  # a registered model in which earlier versions of poolnet kept the history
DESCRIPTION_LIMIT = 5000  # characters, of MLflow's column in a database
DECISION = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC: ")  # so it begins in the description of a version
CLAIM = "poolnet.claim."  # with a random text, a tag of the registered model
CLAIM_SECONDS = 20  # after which a claim is one of a process that was killed


def holder(client: MlflowClient, alias: str) -> ModelVersion | None:
    """Return the version that has the alias, or None."""
    try:
        return client.get_model_version_by_alias(NAME, alias)
    except MlflowException as error:
        if error.error_code not in registry.MISSING:
            raise
        return None


def before(client: MlflowClient, alias: str, champion: ModelVersion | None) -> list[int]:
    """Return the earlier champions that still exist, the latest last.

    They are the champions before `champion`. If `champion` is None, because its version or alias was deleted, the last
    known champion counts as the latest one before.
    """
    versions = {int(version.version): version for version in client.search_model_versions(f"name = '{NAME}'")}
    last = champion or _last_known(alias, list(versions.values()))
    if last and f"{alias}.before" in last.tags:
        earlier = [int(number) for number in last.tags[f"{alias}.before"].split()]
    else:
        earlier = _old_ledger(client, alias, last)
    if last and not champion:
        earlier.append(int(last.version))
    return [number for number in earlier if number in versions]


def _last_known(alias: str, versions: list[ModelVersion]) -> ModelVersion | None:
    known = [version for version in versions if version.tags.get(f"{alias}.since")]
    return max(known, key=lambda version: version.tags[f"{alias}.since"], default=None)


def _old_ledger(client: MlflowClient, alias: str, champion: ModelVersion | None) -> list[int]:
    """Return the earlier champions from the old ledger.

    Earlier versions of poolnet kept the history there. Each entry names the entry that it follows. An entry that does
    not follow the last valid one is skipped.
    """
    champions: list[int] = []
    last = 0
    entries = client.search_model_versions(f"name = '{OLD_LEDGER}' AND tags.alias = '{alias}'")
    for entry in sorted(entries, key=lambda entry: int(entry.version)):
        tags = entry.tags
        if int(tags["after"]) != last:
            continue
        last, version, over = int(entry.version), int(tags["version"]), tags[f"{alias}.over"]
        if over.isdecimal() and champions[-1:] != [int(over)]:  # somebody had set the alias by hand
            champions.append(int(over))
        if tags["kind"] != "rollback":
            champions.append(version)
        while champions and champions[-1] != version:
            champions.pop()
    if champions and champion and champions[-1] == int(champion.version):
        champions.pop()
    return champions


@contextlib.contextmanager
def alone(client: MlflowClient) -> Iterator[None]:
    """Keep other promotions away in the block, on all machines.

    A promotion writes its claim, a tag of the registered model, and then reads all claims. So of two at the same moment
    at least one sees the other. It takes its claim back and tries again a little later, with a new one. A claim that
    stays is one of a process that was killed, and is removed. Raises `RunError` if others do not end.
    """
    seen: dict[str, float] = {}  # when each claim was seen first, so none may come back
    until = time.monotonic() + 3 * CLAIM_SECONDS
    while others := _claim(client, key := f"{CLAIM}{uuid.uuid4().hex[:12]}"):
        _unclaim(client, key)
        now = time.monotonic()
        for other in others:
            if now - seen.setdefault(other, now) > CLAIM_SECONDS:
                _unclaim(client, other)
        if now > until:
            raise RunError(f"{NAME}: other promotions are under way for {3 * CLAIM_SECONDS} s; try again later")
        time.sleep(random.uniform(0.1, 0.5))
    try:
        yield
    finally:
        with contextlib.suppress(MlflowException, NoAnswer):
            _unclaim(client, key)


def _claim(client: MlflowClient, key: str) -> list[str]:
    """Claim the registered model; return the claims of others."""
    try:
        client.set_registered_model_tag(NAME, key, provenance.user())
    except MlflowException as error:
        if error.error_code not in registry.MISSING:
            raise
        with contextlib.suppress(MlflowException):  # of which one says that another process was faster
            client.create_registered_model(NAME, description=model_card.DESCRIPTION)
        client.set_registered_model_tag(NAME, key, provenance.user())
    return [tag for tag in client.get_registered_model(NAME).tags if tag.startswith(CLAIM) and tag != key]


def _unclaim(client: MlflowClient, key: str) -> None:
    client.delete_registered_model_tag(NAME, key)


def crown(client: MlflowClient, alias: str, version: int, over: int | None, tags: dict[str, str], text: str) -> None:
    """Make the version champion, unless another promotion came first.

    `over` is the version that was champion when this was decided, or None if there was no champion. The tags of the
    version are set before the alias. If the process is killed between the two, the same command does all of it again.
    Raises `RunError` if another promotion has come first.
    """
    tags = {**tags, f"{alias}.since": datetime.now(UTC).isoformat(timespec="milliseconds")}
    with alone(client):
        _refuse_if_changed(client, alias, over, version)
        describe(client, alias, version, tags, text)
        _refuse_if_changed(client, alias, over, version)
        client.set_registered_model_alias(NAME, alias, str(version))
        _refuse_if_changed(client, alias, version, version)
        mark_replaced(client, alias, version, over)


def _refuse_if_changed(client: MlflowClient, alias: str, expected: int | None, version: int) -> None:
    champion = holder(client, alias)
    if (int(champion.version) if champion else None) != expected:
        now = f"version {champion.version} is {alias} now" if champion else f"nothing is {alias} now"
        raise RunError(f"version {version}: another promotion came first, and {now}; try the same command again")


def mark_replaced(client: MlflowClient, alias: str, version: int, over: int | None) -> None:
    """Tag the previous champion with the version that replaced it."""
    for replaced in client.search_model_versions(f"name = '{NAME}' AND version_number = '{over}'") if over else []:
        if replaced.tags.get(f"{alias}.replaced_by") != str(version):
            client.set_model_version_tag(NAME, replaced.version, f"{alias}.replaced_by", str(version))


def remove_tag(client: MlflowClient, version: int | str, key: str) -> None:
    """Delete a version's tag, or empty it.

    On a server with users, only who may delete versions may delete their tags.
    """
    try:
        client.delete_model_version_tag(NAME, str(version), key)
    except MlflowException as error:
        if not servers.is_forbidden(error):
            raise
        client.set_model_version_tag(NAME, str(version), key, "")


def forget(client: MlflowClient, alias: str, version: int) -> None:
    """Remove a rolled-back champion from the history.

    A champion that was rolled back does not count as an earlier champion. Its tag `since` is removed.
    """
    remove_tag(client, version, f"{alias}.since")


def unfinished_rollback(client: MlflowClient, alias: str, champion: ModelVersion) -> int | None:
    """Return the version whose rollback was killed halfway, or None.

    Halfway means that `champion` had come back already, but the rolled-back version still has its tag `since`.
    """
    tags = champion.tags
    if tags.get(f"{alias}.decision") != "rollback" or not tags[f"{alias}.over"].isdecimal():
        return None
    over, since = tags[f"{alias}.over"], f"{alias}.since"
    versions = client.search_model_versions(f"name = '{NAME}' AND version_number = '{over}'")
    return int(over) if any((version.tags.get(since) or "~") < tags.get(since, "") for version in versions) else None


def describe(client: MlflowClient, alias: str, version: int, tags: dict[str, str], text: str) -> None:
    """Write a decision on the version that it is about.

    The numbers become tags. The text becomes a paragraph of the description, before earlier decisions and after all
    else, if all of it fits in `DESCRIPTION_LIMIT` characters.
    """
    before = client.get_model_version(NAME, str(version))
    kept = {f"{alias}.since", f"{alias}.before"}  # a decision that changes nothing leaves the history
    for key in before.tags.keys() - tags.keys() - kept:
        if key.startswith(f"{alias}."):  # of an earlier decision
            remove_tag(client, version, key)
    for key, value in tags.items():
        client.set_model_version_tag(NAME, str(version), key, value)
    description = before.description or ""
    paragraphs = description.split("\n\n") if description else []
    decisions = [place for place, paragraph in enumerate(paragraphs) if DECISION.match(paragraph)]
    paragraphs.insert(decisions[0] if decisions else len(paragraphs), text)
    whole = "\n\n".join(paragraphs)
    if text not in description and len(whole) <= DESCRIPTION_LIMIT:  # else the tags say it: others' words stay
        client.update_model_version(NAME, str(version), whole)
