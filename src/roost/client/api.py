"""The server's API as typed calls."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import IO, Any

from roost.client.address import Address, find_server
from roost.client.http import PIECE, Http, error_of, workspace_path
from roost.client.models import Document, Event, Health, LimitRequest, LogLine, RepoRequest, Workspace
from roost.errors import NodeUnreachable, RoostError, ServerTimeout, ServerUnreachable, WaitTimeout, from_problem

RECONNECT_S = 30.0
"""Seconds a server may be away while somebody waits for a workspace: long enough for its restart."""
_POLL_S = 15.0
_PULL_S = 3600.0


class AsyncClient:
    """One server; holds no connection between calls.

    Every call raises ServerUnreachable, ServerTimeout and Unauthenticated beside what its docstring names; an error of
    the server comes as the class it has there.
    """

    def __init__(self, address: Address | None = None) -> None:
        self.address = find_server() if address is None else address
        self.http = Http(self.address)

    async def health(self, timeout_s: float = 5.0) -> Health:
        document = await self.http.call("GET", "/health", timeout_s=timeout_s)
        try:
            node = bool(document["node"]["connected"])
            return Health(str(document["status"]), str(document["version"]), node, document)
        except (KeyError, TypeError) as error:
            raise ServerUnreachable(f"what answers at {self.address} is not a roost server") from error

    async def nodes(self) -> list[Document]:
        return list((await self.http.call("GET", "/nodes"))["items"])

    async def images(self) -> list[Document]:
        return list((await self.http.call("GET", "/images"))["items"])

    async def pull_image(self, ref: str) -> Document:
        """Fetch an image to the node; returns when it is there. Raises ImageNotFound, RegistryUnreachable, …"""
        document: Document = await self.http.call("POST", "/images/pull", json_body={"ref": ref}, timeout_s=_PULL_S)
        return document

    # workspaces

    async def create(
        self,
        name: str,
        *,
        image: str | None = None,
        user: str | None = None,
        repo: RepoRequest | None = None,
        limits: LimitRequest | None = None,
    ) -> Workspace:
        """Make a workspace; it starts at once. Raises WorkspaceExists, InvalidName, StaleUpload, …"""
        body = {
            "name": name,
            "image": image,
            "user": user,
            "repo": asdict(repo) if repo is not None else None,
            "limits": asdict(limits or LimitRequest()),
        }
        return Workspace.of(await self.http.call("POST", "/workspaces", json_body=body))

    async def workspaces(self, deleted: bool = False) -> list[Workspace]:
        """All of them, by name; with `deleted` those in the trash too."""
        found: list[Workspace] = []
        cursor: str | None = None
        while True:
            page = await self.http.call("GET", "/workspaces", {"deleted": deleted, "cursor": cursor})
            found += [Workspace.of(item) for item in page["items"]]
            cursor = page.get("next")
            if not cursor:
                return found

    async def workspace(self, name: str) -> Workspace:
        """Raises WorkspaceNotFound."""
        return Workspace.of(await self.http.call("GET", workspace_path(name)))

    async def request(self, name: str, verb: str) -> Workspace:
        """Change what is wanted: start, stop, restart, undelete or delete. Raises WorkspaceNotFound."""
        if verb == "delete":
            return Workspace.of(await self.http.call("DELETE", workspace_path(name)))
        return Workspace.of(await self.http.call("POST", workspace_path(name, verb)))

    async def settled(self, name: str, generation: int, timeout_s: float) -> Workspace:
        """Wait until what is wanted has come about or failed (see `observed`). Raises WaitTimeout, Superseded.

        A server that goes away meanwhile has RECONNECT_S to come back.
        """
        deadline = time.monotonic() + timeout_s
        patience = _Patience()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"{name!r} did not settle within {timeout_s:g} s")
            span = min(left, _POLL_S)
            params = {"generation": generation, "timeout_s": round(span, 3)}
            try:
                found = await self.http.call("GET", workspace_path(name, "settled"), params, timeout_s=span + 15.0)
                return Workspace.of(found)
            except (ServerTimeout, WaitTimeout):
                patience.reset()
                await self._check_node(name)
                await asyncio.sleep(0.05)
            except ServerUnreachable as error:
                await patience.wait(error)

    async def _check_node(self, name: str) -> None:
        """Raise NodeUnreachable when nobody is there who could do what is waited for."""
        try:
            connected = (await self.health()).node_connected
        except (ServerUnreachable, ServerTimeout):
            return
        if not connected:
            raise NodeUnreachable(
                f"no node is connected to the server; what is wanted of {name!r} will be done when one is"
            )

    # streams

    async def events(
        self, name: str | None = None, *, follow: bool = False, after: int = 0
    ) -> AsyncGenerator[Event, None]:
        """What happened, oldest first; with `follow` what happens, too, across a restart of the server."""
        path = "/events" if name is None else workspace_path(name, "events")
        patience = _Patience()
        while True:
            try:
                async with aclosing(self._messages(path, {"follow": follow, "after": after})) as messages:
                    async for document in messages:
                        patience.reset()
                        event = Event.of(document)
                        after = max(after, event.id or 0)
                        yield event
                if not follow:
                    return
                await asyncio.sleep(0.1)
            except (ServerUnreachable, ServerTimeout) as error:
                if not follow:
                    raise
                await patience.wait(error)

    async def logs(self, name: str, *, follow: bool = False, previous: bool = False) -> AsyncGenerator[LogLine, None]:
        """The log of the newest start and the container's output, or of the start before. Raises WorkspaceNotFound."""
        params = {"follow": follow, "previous": previous}
        async with aclosing(self._messages(workspace_path(name, "logs"), params)) as messages:
            async for document in messages:
                yield LogLine(
                    str(document.get("at") or ""),
                    str(document.get("channel") or "stdout"),
                    str(document.get("text") or ""),
                    document,
                )

    async def _messages(self, path: str, params: dict[str, Any]) -> AsyncGenerator[Document, None]:
        async with self.http.open("GET", path, params) as response:
            if response.status >= 400:
                await response.json()
                raise error_of(response.status, b"")
            async with aclosing(response.messages()) as messages:
                async for message in messages:
                    document = json.loads(message)
                    if document.get("type") == "error" and "problem" in document:
                        raise from_problem(document["problem"])
                    yield document

    # uploads

    async def upload(self, file: IO[bytes]) -> str:
        """Send a file, streamed; its id. Raises HostDiskFull."""

        async def pieces() -> AsyncIterator[bytes]:
            while piece := await asyncio.to_thread(file.read, PIECE):
                yield piece

        async with self.http.open("POST", "/uploads", body=pieces(), timeout_s=60.0) as response:
            return str((await response.json())["upload"])


class _Patience:
    """How long one goes on asking a server that is away."""

    def __init__(self) -> None:
        self._since: float | None = None

    def reset(self) -> None:
        self._since = None

    async def wait(self, error: RoostError) -> None:
        """Pause before the next attempt; raises `error` when it was enough."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > RECONNECT_S:
            raise error
        await asyncio.sleep(0.2)
