"""Store which version is champion and which were before.

An alias of MLflow points to the champion. Tags of the versions hold the history. A version that became champion has two
tags. Their names begin with the alias and a dot:

- `since`: when it became champion.
- `before`: which versions were champion before it and were not rolled back, the latest last.

MLflow cannot set an alias on a condition. So the alias is read again just before it is set, and once more after that.
Two promotions on two machines within those milliseconds may not see each other. Then the later one stays.
"""

import re
from datetime import UTC, datetime

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.errors import RunError
from poolnet.files import home, locked
from poolnet.tracking import registry
from poolnet.tracking.registry import NAME

OLD_LEDGER = "poolnet-promotions"  # a registered model in which earlier versions of poolnet kept the history
DESCRIPTION_LIMIT = 5000  # characters, of MLflow's column in a database
DECISION = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC: ")  # so it begins in the description of a version
LOCK_SECONDS = 20  # for the few calls that set an alias


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
    known = [version for version in versions if f"{alias}.since" in version.tags]
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


def crown(client: MlflowClient, alias: str, version: int, over: int | None, tags: dict[str, str], text: str) -> None:
    """Make the version champion, unless another promotion came first.

    `over` is the version that was champion when this was decided, or None if there was no champion. The tags of the
    version are set before the alias. If the process is killed between the two, the same command does all of it again.
    Raises `RunError` if another promotion has come first.
    """
    tags = {**tags, f"{alias}.since": datetime.now(UTC).isoformat(timespec="milliseconds")}
    with locked(home() / "promote.lock", LOCK_SECONDS):
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


def forget(client: MlflowClient, alias: str, version: int) -> None:
    """Remove a rolled-back champion from the history.

    A champion that was rolled back does not count as an earlier champion. Its tag `since` is deleted.
    """
    client.delete_model_version_tag(NAME, str(version), f"{alias}.since")


def unfinished_rollback(client: MlflowClient, alias: str, champion: ModelVersion) -> int | None:
    """Return the version whose rollback was killed halfway, or None.

    Halfway means that `champion` had come back already, but the rolled-back version still has its tag `since`.
    """
    tags = champion.tags
    if tags.get(f"{alias}.decision") != "rollback" or not tags[f"{alias}.over"].isdecimal():
        return None
    over, since = tags[f"{alias}.over"], f"{alias}.since"
    versions = client.search_model_versions(f"name = '{NAME}' AND version_number = '{over}'")
    return int(over) if any(version.tags.get(since, "~") < tags.get(since, "") for version in versions) else None


def describe(client: MlflowClient, alias: str, version: int, tags: dict[str, str], text: str) -> None:
    """Write a decision on the version that it is about.

    The numbers become tags. The text becomes a paragraph of the description, before earlier decisions and after all
    else, if all of it fits in `DESCRIPTION_LIMIT` characters.
    """
    before = client.get_model_version(NAME, str(version))
    kept = {f"{alias}.since", f"{alias}.before"}  # a decision that changes nothing leaves the history
    for key in before.tags.keys() - tags.keys() - kept:
        if key.startswith(f"{alias}."):  # of an earlier decision
            client.delete_model_version_tag(NAME, str(version), key)
    for key, value in tags.items():
        client.set_model_version_tag(NAME, str(version), key, value)
    description = before.description or ""
    paragraphs = description.split("\n\n") if description else []
    decisions = [place for place, paragraph in enumerate(paragraphs) if DECISION.match(paragraph)]
    paragraphs.insert(decisions[0] if decisions else len(paragraphs), text)
    whole = "\n\n".join(paragraphs)
    if text not in description and len(whole) <= DESCRIPTION_LIMIT:  # else the tags say it: others' words stay
        client.update_model_version(NAME, str(version), whole)
