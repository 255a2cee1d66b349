"""Start a team's tracking server on this machine, to try it out.

It has PostgreSQL, an object store and users with passwords. What it keeps stays in one folder, which only its owner can
read, and is there again at the next start.
"""

import contextlib
import json
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from poolnet import files
from poolnet.errors import InputError
from poolnet.files import home
from poolnet.text import Echo, pasted
from poolnet.tracking import servers
from poolnet.upkeep import parts, rights
from poolnet.upkeep.parts import ADMIN, HOST, Part

USERS = {"ada": "EDIT", "ben": "EDIT", "cleo": "READ"}  # beside the administrator
LOOK_SECONDS = 0.5  # between two looks at whether the parts still run


def folder() -> Path:
    """Return the folder of the team server, which is private."""
    place = home() / "team"
    place.mkdir(exist_ok=True)
    place.chmod(stat.S_IRWXU)  # on Windows, folders of a user are private already
    return place


@contextlib.contextmanager
def running(port: int, fresh: bool, echo: Echo) -> Iterator[list[Part]]:
    """Run the team server in the block; yield its parts.

    With `fresh`, all that an earlier one has kept is deleted first. Raises `InputError` if it cannot begin here, and
    `RunError` if a part does not start.
    """
    parts.check_installed()
    place = folder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.locked(home() / "team.lock", wait=1))
        parts.end_leftovers(place)
        parts.check_port(port)
        if fresh:
            shutil.rmtree(place)
            place = folder()
        for name in ("no_proxy", "NO_PROXY"):  # a company's proxy does not reach this machine's own servers
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
        started: list[Part] = []
        stack.callback(_stop, started)
        echo("Starting PostgreSQL, the object store and MLflow ...")
        keys = _keys(place)
        store, env = parts.object_store(place, keys["objects"])
        started.append(store)
        database, address = parts.postgres(place, keys["postgres"])
        started.insert(0, database)
        store.wait_until(lambda: parts.has_bucket(env))
        env |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": keys["flask"], "MLFLOW_AUTH_ADMIN_PASSWORD": keys[ADMIN]}
        server = parts.mlflow_server(place, port, address, env)
        started.append(server)
        server.wait_until(lambda: parts.mlflow_answers(port))
        _make_users(place, port, keys)
        yield started


def _stop(started: list[Part]) -> None:
    for part in reversed(started):
        part.stop()


def _keys(place: Path) -> dict[str, str]:
    """Return the passwords, which are made the first time."""
    path = place / "secrets.json"
    keys = files.read_json(path)
    if not keys:
        if (place / "postgres").exists():
            raise InputError(f"{path}: missing or damaged, so the data beside it cannot be opened; begin anew: --fresh")
        keys = {name: secrets.token_urlsafe(18) for name in ("postgres", "objects", "flask", ADMIN, *USERS)}
        parts.private(path, json.dumps(keys))
    return keys


def _make_users(place: Path, port: int, keys: dict[str, str]) -> None:
    """Create the users, and a file of settings for each."""
    uri = f"http://{HOST}:{port}"
    for user in (ADMIN, *USERS):
        settings = {"URI": uri, "USERNAME": user, "PASSWORD": keys[user]}
        lines = [f"MLFLOW_TRACKING_{name}={value}\n" for name, value in settings.items()]
        parts.private(place / f"{user}.env", "".join(lines))
    os.environ.update(settings_of(place, ADMIN))  # this process asks no other server
    client = servers.client_of(uri)
    for user, right in USERS.items():
        rights.create_user(client, user, keys[user])
        rights.grant(client, user, right)


def settings_of(place: Path, user: str) -> dict[str, str]:
    """Return the settings with which a user reaches the server."""
    lines = (place / f"{user}.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def watch(started: list[Part]) -> None:
    """Wait until a part ends, which raises `RunError`."""
    while True:
        for part in started:
            part.check()
        time.sleep(LOOK_SECONDS)


def how_to_use(port: int) -> str:
    """Say what to type to use the server as one of its users."""
    place = folder()
    users = ", ".join(f"{user} ({right})" for user, right in {ADMIN: "administrator", **USERS}.items())
    file = place / "ada.env"
    if sys.platform == "win32":
        export = f"Get-Content '{file}' | ForEach-Object {{ $k, $v = $_ -split '=', 2; Set-Item env:$k $v }}"
    else:
        export = f"set -a; {pasted('.', file)}; set +a"
    return "\n".join(
        [
            f"The team server is at http://{HOST}:{port}, for this machine only.",
            f"Users: {users}; their passwords are in {place}{os.sep}*.env.",
            f"To work as ada, type in another terminal:\n  {export}\n  poolnet train",
            f"Ctrl-C ends the server. Its data stay in {place}.",
        ]
    )
