"""News of workspaces within the server's process: for event streams, and for those who wait for a state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

QUEUE = 2048
"""News a subscriber may lag behind; then it is cut off and reads on from the database."""


@dataclass(frozen=True)
class News:
    """One event as the API shows it; `id` is None for what is not kept (a step that begins)."""

    workspace: str
    event: dict[str, Any]


class Bus:
    """Hands every piece of news to every subscriber."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[News | None]] = set()

    def publish(self, news: News) -> None:
        for queue in list(self._queues):
            try:
                queue.put_nowait(news)
            except asyncio.QueueFull:
                self._queues.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)

    @contextmanager
    def subscribe(self) -> Iterator[asyncio.Queue[News | None]]:
        """A queue of news from now on; None means: you lagged, or the server ends."""
        queue: asyncio.Queue[News | None] = asyncio.Queue(QUEUE)
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """End every subscription, so that a stopping server waits for nobody."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)
