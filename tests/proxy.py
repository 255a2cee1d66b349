"""A proxy in front of a real server, which makes trouble on demand."""

import contextlib
import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Trouble(BaseHTTPRequestHandler):
    """Passes requests on to a real server, or answers with trouble."""

    protocol_version = "HTTP/1.1"
    upstream, trouble, requests = "", None, 0

    def do(self):
        type(self).requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.trouble in ("hang", self.command):
            self.server.over.wait(60)
            self.close_connection = True
            return
        status, kind, content = self.answer(body)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, body):
        if isinstance(self.trouble, int):
            return self.trouble, "text/plain", b"trouble"
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        with contextlib.closing(connection):
            return reply.status, reply.headers.get("Content-Type", ""), reply.read()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(server, kind=Trouble):
    """The address of a proxy in front of a server, and the class that serves there."""
    handler = type("Handler", (kind,), {"upstream": urlsplit(server).netloc})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        proxy.over = threading.Event()
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}", handler
        proxy.over.set()
        proxy.shutdown()
