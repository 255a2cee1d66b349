"""Commands as processes of their own whose imports are done, which take seven seconds for each.

A server imports once, and forks for each command. The new process has its own environment, folder, streams and signals,
as one that was started. Where a fork after such imports is unsafe, commands are started.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from pathlib import Path

PYTHON = [sys.executable, "-m"]
ROOT = str(Path(__file__).parent.parent)
POOLNET = [*PYTHON, "poolnet"]
IMPORTS = (
    *("poolnet.runs.train_run", "poolnet.runs.figures", "poolnet.tracking.upload_process"),
    *("poolnet.studies.sweep", "poolnet.studies.crew", "poolnet.studies.report", "poolnet.models.promote"),
    *("mlflow.cli", "mlflow.projects", "mlflow.store.tracking.sqlalchemy_store", "torch.export._trace"),
)
SERVER = "FORKING_SERVER"  # the variable of the environment that holds its address
NUMBER = 16  # bytes of one that is sent


@contextlib.contextmanager
def serving():
    """A server for the commands of this process and of those that it starts."""
    if sys.platform != "linux":
        yield
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        os.environ[SERVER] = f"{folder}/socket"
        listener.bind(os.environ[SERVER])
        listener.listen()
        script = Path(folder) / "python"
        script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", __file__])} "$@"')
        script.chmod(0o755)
        command, environment = [sys.executable, __file__, str(listener.fileno())], os.environ | {"PYTHONPATH": ROOT}
        pipe = {"stdin": subprocess.PIPE, "pass_fds": [listener.fileno()]}  # at whose end it ends
        with subprocess.Popen(command, env=environment, **pipe):
            listener.close()
            yield
            os.environ.pop(SERVER)


def path():
    """The PATH of a shell whose `python` has its imports done, if there is a server."""
    before = [str(Path(os.environ[SERVER]).parent)] if SERVER in os.environ else []
    return os.pathsep.join([*before, os.environ["PATH"]])


def python():
    """Such a `python` for a command line, if there is a server."""
    return shlex.quote(f"{Path(os.environ[SERVER]).parent}/python") if SERVER in os.environ else None


def use():
    """Have publishers, and the processes of tracking servers, begun by the server too."""
    from mlflow.utils import process

    from poolnet.tracking import pages, publisher
    from poolnet.upkeep import parts

    for module in (pages, parts, process, publisher):
        module.subprocess = _changed(subprocess, Popen=start)


def draw_once(folder):
    """Draw the figures of a first run or evaluation only, and give them to the others of all processes.

    To draw them takes longer than all the rest.
    """
    from poolnet.runs import figures

    draw, save = figures.of_run, figures.save_all

    @functools.wraps(save)
    def save_all(to, drawn):
        place = folder / ("run" if isinstance(drawn, tuple) else "-".join(drawn))
        if not place.exists():
            own = Path(tempfile.mkdtemp(dir=folder))
            save(own, draw(*drawn) if isinstance(drawn, tuple) else drawn)
            with contextlib.suppress(OSError):  # of another process that was faster
                own.rename(place)
        to.mkdir(exist_ok=True)
        for path in place.iterdir():
            (to / path.name).write_bytes(path.read_bytes())

    figures.of_run, figures.save_all = (lambda *result: result), save_all


def _changed(module, **names):
    return types.SimpleNamespace(**{**vars(module), **names})


def start(command, **options):
    """`subprocess.Popen` for a command that hears Ctrl-C whatever started the tests; one of Python's is forked."""
    if SERVER in os.environ and command[0] == sys.executable and "preexec_fn" not in options:
        return Forked(command, **options)
    if sys.platform != "win32":
        options.setdefault("preexec_fn", hear_ctrl_c)
    return subprocess.Popen(command, **options)


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Forked(subprocess.Popen):
    """The process of a command, made and waited for by the server; all else is as ever."""

    def _execute_child(self, *given):
        told = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments
        message = json.dumps(
            {
                "words": told["args"][1:],
                "folder": str(told["cwd"] or Path.cwd()),
                "environment": dict(told["env"] or os.environ),
                "session": told["start_new_session"],
            }
        ).encode()
        streams = [told[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[SERVER])
        socket.send_fds(
            self._server, [_sent(len(message))], [number if end == -1 else end for number, end in enumerate(streams)]
        )
        self._server.sendall(message)
        self._close_pipe_fds(
            *(told[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )
        self.pid, self._child_created = _received(self._server), True

    def _internal_poll(self, **_):
        if self.returncode is None and (status := self._try_wait(os.WNOHANG))[0]:
            self._handle_exitstatus(status[1])
        return self.returncode

    def _try_wait(self, flags):
        if not select.select([self._server], [], [], 0 if flags else None)[0]:
            return 0, 0
        with self._server:
            return self.pid, _received(self._server)


def _sent(number):
    return str(number).encode().ljust(NUMBER)


def _received(connection):
    return int(connection.recv(NUMBER, socket.MSG_WAITALL))


def _serve(listener):
    """Returns in the process of each command, with what it is told."""
    for name in IMPORTS:
        importlib.import_module(name)
    schema = sys.modules["mlflow.store.db.utils"]  # of which each command would read all migrations
    schema._get_latest_schema_revision = functools.cache(schema._get_latest_schema_revision)
    schema._get_latest_schema_revision()
    gc.freeze()  # so that memory stays shared
    assert threading.active_count() == 1, "a fork would leave the other threads behind"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # from 3.12 Python warns of a fork beside the threads of OpenBLAS, which stops them for it
    with listener, warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection = listener.accept()[0]
            if not os.fork():
                break
            connection.close()
        else:
            os._exit(0)
    with connection, warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        length, streams, _, _ = socket.recv_fds(connection, NUMBER, 3)
        told = json.loads(connection.recv(int(length), socket.MSG_WAITALL))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():
            connection.sendall(_sent(pid))
            with contextlib.suppress(OSError):  # nobody waits for it any more
                connection.sendall(_sent(os.waitpid(pid, 0)[1]))
            os._exit(0)
    _begin(streams, told)
    return told


def _begin(streams, told):
    """Be as a process that was started with this."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    if told["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    tempfile.tempdir = None
    sys.argv = told["words"][1:]


def _fork_workers():
    """Have the workers of a sweep forked too.

    A worker ends when a pipe from its sweep is closed, so it must not keep those of the others open.
    """
    from distributed import nanny, process

    for module in (nanny, process):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    begin, work, pipes = process.AsyncProcess.__init__, process.AsyncProcess._run.__func__, []

    def __init__(self, *given, **named):
        begin(self, *given, **named)
        pipes.append(self._keep_child_alive)

    def _run(cls, *given):
        for pipe in pipes:
            pipe.close()
        work(cls, *given)

    process.AsyncProcess.__init__, process.AsyncProcess._run = __init__, classmethod(_run)


def _end(code):
    """End as Python does, but clean no memory up: that would copy all of what processes share."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def _forget_application():
    """Have a tracking server made anew, as the environment says."""
    for name in [*sys.modules]:
        if name.startswith("mlflow.server"):
            del sys.modules[name]


def _main(*words):
    """The `python` of a shell or of pytest-xdist, or the server."""
    if words[0].startswith("-"):
        return start([sys.executable, *words]).wait()
    listener = socket.socket(fileno=int(words[0]))
    folder = Path(listener.getsockname()).parent
    option, *words = _serve(listener)["words"]
    if option != "-m":  # a worker of the tests
        return exec(words[-1], {"__name__": "__main__"})
    use()
    draw_once(folder)
    _fork_workers()
    if words[0] == "uvicorn":
        _forget_application()
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return _end(end.code)
    return _end(0)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
