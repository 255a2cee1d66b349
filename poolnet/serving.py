"""What `mlflow models serve` leaves out: an answer of 4xx to requests that it fails at.

MLflow's scoring server says 500 where a request has no content type, or JSON that Python refuses to read (thousands of
levels, integers of thousands of digits), and reads bodies of any size. Uvicorn, which it starts, takes a protocol from
its environment, and this one puts a guard before MLflow's application: UVICORN_HTTP=poolnet.serving:Protocol
"""

import asyncio
import json
from collections.abc import Awaitable, Callable

from uvicorn.protocols.http.auto import AutoHTTPProtocol

LIMIT = 64_000_000  # bytes of a body: some 7,000 images
READ = 1_000_000_000  # bytes of a body that is too large, and forgotten as it comes: few clients listen while they send
PATIENCE = 30  # seconds for a body

Message = dict
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
App = Callable[[dict, Receive, Send], Awaitable[None]]


class Protocol(AutoHTTPProtocol):
    """Uvicorn's own, with the guard."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.app = guarded(self.app)


class Refused(Exception):
    """Status and text of the answer to a request that is not passed on."""


def guarded(app: App) -> App:
    """An ASGI application that answers for this one where it would fail at a request."""

    async def guard(scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await app(scope, receive, send)
        held: list[Message] = []

        async def hold(message: Message) -> None:  # MLflow's 500 comes before its exception
            held.append(message)

        try:
            if b"content-type" not in dict(scope["headers"]):
                raise Refused(415, "Content-Type: found none, expected application/json")
            whole = [{"type": "http.request", "body": await _body(receive), "more_body": False}]
            await app(scope, lambda: _next(whole, receive), hold)
        except Refused as error:
            return await _refuse(send, *error.args)
        except (RecursionError, ValueError) as error:
            return await _refuse(send, 400, f"found JSON that cannot be read: {error}")
        for message in held:
            await send(message)

    return guard


async def _body(receive: Receive) -> bytes:
    """The whole body, as MLflow reads it too, if it is not too large and comes to its end."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            while size <= READ:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "found no end of the body")  # though nobody listens
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > LIMIT:
                    parts.clear()
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise Refused(408, f"found no end of the body within {PATIENCE} s") from None
    if size > LIMIT:
        raise Refused(413, f"found more than {LIMIT:,} bytes, expected at most so many")
    return b"".join(parts)


async def _next(whole: list[Message], receive: Receive) -> Message:
    return whole.pop() if whole else await receive()


async def _refuse(send: Send, status: int, text: str) -> None:
    body = json.dumps({"error_code": "BAD_REQUEST", "message": text}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
