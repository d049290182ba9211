"""Running an app: one socket, one uvicorn server, one line when it is ready.

The socket is bound here, before anything is loaded, so that a port in use is told at once and in one
sentence. A host that others can reach needs an API key: a model on an open port is somebody else's free
model. On SIGINT or SIGTERM the server drains: `/ready` turns to 503 and new requests are refused with a hint to
try elsewhere, while it goes on listening, so that a balancer sees a server that is leaving and not a dead port;
what is under way goes on for `grace_s`, then each is told that the server is shutting down and ended, and the
engines are stopped. Ctrl-C during that does not wait.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from rorqual.errors import ConfigError
from rorqual.serve.border import Traffic

log = logging.getLogger(__name__)
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they and not we close them


def serve(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    grace_s: int = 10,
    on_bound: Callable[[], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Returns when told to stop. `on_bound` is called once the address is taken, before models are loaded; `on_ready`
    gets the URL (the default logs it); port 0 picks a free one.

    Raises ConfigError for a host or port that cannot be served, and whatever an engine raised when it was
    started.
    """
    listener = listen(app, host, port)
    if on_bound is not None:
        on_bound()
    try:
        Server(app, listener, grace_s=grace_s, on_ready=on_ready).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has stopped in good order
        pass
    except SystemExit:  # ... and exits when the app did not start
        if app.state.startup_error is None:
            raise
    finally:
        listener.close()
    if app.state.startup_error is not None:
        raise app.state.startup_error


def listen(app: FastAPI, host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError with what to do instead."""
    if not is_loopback(host) and not app.state.keyring.usable:
        raise ConfigError(
            f"{host} can be reached from other machines, and no API key is set",
            remedy="make one with `rorqual keys create`, or serve on 127.0.0.1",
        )
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is not a port", remedy="choose one between 1 and 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"cannot serve on {host}:{port}: {error}", remedy="give an address of this machine"
        ) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1)  # SO_REUSEADDR lets two sockets bind one port; only one of them may listen
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            remedy = f"stop what uses it, or choose another with --port, for example --port {port + 1}"
            raise ConfigError(f"port {port} on {host} is in use", remedy=remedy) from error
        raise ConfigError(f"cannot serve on {host}:{port}: {error.strerror}", remedy="choose another --port") from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. No name is looked up: any but localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """uvicorn with this server's settings. `run` blocks; `should_exit = True`, from any thread, stops it."""

    def __init__(
        self,
        app: FastAPI,
        listener: socket.socket,
        *,
        grace_s: int = 10,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,  # serve.border writes one with the request id
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=grace_s,
        )
        super().__init__(config)
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._on_ready = on_ready or (lambda url: log.info("serving on %s", url))
        self._traffic: Traffic = app.state.traffic
        self._grace_s = grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Until here uvicorn would print the traceback of an engine that failed to start; `serve` raises it.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._on_ready(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._traffic.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace_s
        while self._traffic.in_flight and loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        self.config.timeout_graceful_shutdown = max(0, end - loop.time())  # type: ignore[assignment]
        await super().shutdown(sockets)
