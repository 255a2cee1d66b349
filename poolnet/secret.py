"""Keep secrets out of what is shown and stored.

They are the passwords, keys and tokens in tracking addresses and in the environment.
"""

import os
import re
from base64 import b64encode
from urllib.parse import quote, unquote

USER = re.compile(r"^(\w[\w+.-]*://[^:/?#@]*):(.*)@", re.DOTALL)  # up to the last @: the password may hold all others
SECRET = re.compile(r"pass|pwd|token|secret|key|auth|cred|sig|odbc_connect", re.IGNORECASE)  # keys of a query
VARIABLE = re.compile(r"(PASSWORD|TOKEN|SECRET|SECRET_KEY|ACCESS_KEY|CONNECTION_STRING)$|^MYSQL_PWD$")
SHORTEST = 6  # characters of a variable's value; a shorter one may be a word of any message


def shown(uri: str) -> str:
    """Return the address without its password and other secrets."""
    if uri.startswith("sqlite"):
        return uri
    without = re.sub(r"([?&;])([^?&;=]*)=[^&;]*", lambda pair: pair[1] if SECRET.search(pair[2]) else pair[0], uri)
    address, mark, query = USER.sub(r"\1@", without).partition("?")
    kept = [pair for pair in re.split("[&;]", query) if "=" in pair]
    return address + mark * bool(kept) + "&".join(kept)


def hidden(text: str) -> str:
    """Remove secrets from a message.

    These are the secrets of the addresses in the message, of this process's own address, and of its environment.
    """
    own_uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    text = text.replace(own_uri, shown(own_uri)) if own_uri else text
    for secret in sorted(_secrets(own_uri) | _of_environment(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(\w:/+[^\s:/?#@]*):\S*@", r"\1@", text)  # a path has one slash of it
    return re.sub(rf"([?&;]\w*(?:{SECRET.pattern})\w*=)[^\s&;'\")]+", r"\1***", text, flags=re.IGNORECASE)


def anonymous(url: str) -> str:
    """Return a web address without anything of a user.

    In the address of a repository, a token may be the name or the password.
    """
    return shown(re.sub(r"^(https?:)//[^/\s]*@", r"\1//", url))


def _secrets(uri: str) -> set[str]:
    """Return the secrets in an address, in all their forms."""
    match = USER.match(uri)
    pairs = [pair.partition("=") for pair in re.split("[?&;]", uri.partition("?")[2])]
    values = [value for key, _, value in pairs if SECRET.search(key)]
    logins = [(match[1].rpartition("/")[2], match[2])] if match else []
    return _forms([*values, *(password for _, password in logins)]) | _headers(logins)


def _of_environment() -> set[str]:
    values = {name: value.strip() for name, value in os.environ.items() if VARIABLE.search(name)}
    long = [value for value in values.values() if len(value) >= SHORTEST]
    login = (os.environ.get("MLFLOW_TRACKING_USERNAME", ""), values.get("MLFLOW_TRACKING_PASSWORD", ""))
    return _forms(long) | _headers([login] if all(login) else [])


def _forms(values: list[str]) -> set[str]:
    """Return the values, as they are and as in addresses."""
    quoted = (quote(value, safe="", errors="surrogateescape") for value in values)
    return {each for each in (*values, *map(unquote, values), *quoted) if len(each) > 2}


def _headers(logins: list[tuple[str, str]]) -> set[str]:
    """Return what a request says of a user and a password."""
    words = (f"{user}:{unquote(password)}" for user, password in logins)
    return {b64encode(word.encode(errors="surrogateescape")).decode() for word in words}
