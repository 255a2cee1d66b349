"""Who is champion, in an order that all agree on.

MLflow has no compare-and-set for aliases, but it gives out the version numbers of a registered model one by one. So the
versions of `poolnet-promotions` are a ledger: each names the champion of an alias, and the entry that its decision
rested on. Of two that rest on the same entry the first counts, on whatever machine they were made, and alias and
versions are then made to say so. An alias that somebody set by hand is respected until the next decision.
"""

import contextlib
import dataclasses

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import registry
from poolnet.config import RunError
from poolnet.registry import NAME

LEDGER = "poolnet-promotions"  # a registered model, for its numbers
ABOUT = "The ledger of `poolnet promote`: each version is a version of poolnet that became champion, in their order."
DESCRIPTION_LIMIT = 5000  # characters, of MLflow's column in a database


@dataclasses.dataclass(frozen=True)
class Entry:
    number: int
    kind: str  # of the decision; `rollback` takes champions away
    version: int
    over: str  # the champion that it replaced, or none
    settled: bool  # whether alias and versions say it
    text: str
    tags: dict[str, str]  # for the version


def entries(client: MlflowClient, alias: str) -> list[Entry]:
    """The entries of an alias that count, in their order: each rests on the one before."""
    found: list[Entry] = []
    versions = client.search_model_versions(f"name = '{LEDGER}' AND tags.alias = '{alias}'")
    for version in sorted(versions, key=lambda version: int(version.version)):
        if int(version.tags["after"]) == (found[-1].number if found else 0):
            found.append(_entry(version))
    return found


def _entry(version: ModelVersion) -> Entry:
    tags = version.tags
    passed_on = {key: value for key, value in tags.items() if key.startswith(f"{tags['alias']}.")}
    over = passed_on[f"{tags['alias']}.over"]
    number, champion = int(version.version), int(tags["version"])
    return Entry(number, tags["kind"], champion, over, "settled" in tags, version.description, passed_on)


def holder(client: MlflowClient, alias: str) -> ModelVersion | None:
    """The version that has the alias."""
    try:
        return client.get_model_version_by_alias(NAME, alias)
    except MlflowException as error:
        if error.error_code not in registry.MISSING:
            raise
        return None


def present(client: MlflowClient, alias: str) -> tuple[int, ModelVersion | None]:
    """The number of the last entry, or 0, and the version that has the alias then: nothing came in between."""
    while True:
        settle(client, alias)
        before, version, after = entries(client, alias), holder(client, alias), entries(client, alias)
        if len(before) == len(after) and all(entry.settled for entry in after[-1:]):
            return (after[-1].number if after else 0), version


def champions_before(client: MlflowClient, alias: str, present: ModelVersion | None) -> list[int]:
    """The versions that were champion before the present one and not rolled back, as far as they still exist; those
    that somebody made so by hand are known from the entry that replaced them."""
    champions: list[int] = []
    for entry in entries(client, alias):
        if entry.over.isdecimal() and champions[-1:] != [int(entry.over)]:
            champions.append(int(entry.over))
        if entry.kind != "rollback":
            champions.append(entry.version)
        while champions and champions[-1] != entry.version:
            champions.pop()
    if champions and present and champions[-1] == int(present.version):
        champions.pop()
    return [version for version in champions if _is_there(client, version)]


def append(
    client: MlflowClient, alias: str, version: int, kind: str, after: int, tags: dict[str, str], text: str
) -> None:
    """Make the version champion, unless another one has been made so since entry number `after`: `RunError`."""
    with contextlib.suppress(MlflowException):  # of which one says that it exists, as it usually does
        client.create_registered_model(LEDGER, description=ABOUT)
    source = client.get_model_version(NAME, str(version))
    entry = {**tags, "alias": alias, "kind": kind, "version": str(version), "after": str(after)}
    model_id = registry.logged_id(source)  # without which a server does not take the source
    mine = client.create_model_version(LEDGER, source.source, source.run_id, entry, None, text, model_id=model_id)
    if int(mine.version) not in [entry.number for entry in entries(client, alias)]:
        client.delete_model_version(LEDGER, mine.version)
        settle(client, alias)
        winner = entries(client, alias)[-1].version
        raise RunError(
            f"version {version}: another promotion came first, and version {winner} is {alias} now; nothing was "
            "changed, decide again"
        )
    settle(client, alias)


def settle(client: MlflowClient, alias: str) -> None:
    """Let alias and versions say what the last entry says, also where its own process died before it could."""
    found = entries(client, alias)
    while found and not found[-1].settled:
        last = found[-1]
        if _is_there(client, last.version):
            client.set_registered_model_alias(NAME, alias, str(last.version))
            describe(client, alias, last.version, last.tags, last.text)
        if last.over.isdecimal() and _is_there(client, int(last.over)):
            client.set_model_version_tag(NAME, last.over, f"{alias}.replaced_by", str(last.version))
        newer = entries(client, alias)[-1]
        if newer.number == last.number:
            client.set_model_version_tag(LEDGER, str(last.number), "settled", "yes")
            return
        # It may have been settled meanwhile, and this process have set the alias back: so once more.
        found = [dataclasses.replace(newer, settled=False)]


def _is_there(client: MlflowClient, version: int) -> bool:
    return bool(client.search_model_versions(f"name = '{NAME}' AND version_number = '{version}'"))


def describe(client: MlflowClient, alias: str, version: int, tags: dict[str, str], text: str) -> None:
    """A decision on the version that it is about: its numbers as tags, its text first in the description."""
    known = client.get_model_version(NAME, str(version))
    for key in known.tags:
        if key.startswith(f"{alias}.") and key not in tags:  # of an earlier decision
            client.delete_model_version_tag(NAME, str(version), key)
    for key, value in tags.items():
        client.set_model_version_tag(NAME, str(version), key, value)
    before = known.description or ""
    whole = "\n\n".join(filter(None, (text, before)))
    if text not in before and len(whole) <= DESCRIPTION_LIMIT:  # else tags and ledger say it: others' words stay
        client.update_model_version(NAME, str(version), whole)
