"""What happens to our containers, from containerd's event stream.

containerd tells of every task by the engine's id, execs too; which container of ours that is, CRI knows as long as the
container is listed, and we remember a little longer, for the event of its own removal.  Nothing is replayed: who
listens looks at everything once after it began to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError

from roost.errors import EngineUnreachable
from roost.runtimes.cri import methods
from roost.runtimes.cri.containers import Containers
from roost.runtimes.cri.engine import Engine
from roost.runtimes.cri.podspec import name_of
from roost.runtimes.cri.proto import cri_pb2, events_pb2, taskevents_pb2
from roost.runtimes.protocol import ContainerId, RuntimeEvent

_TOPICS = ("/tasks/start", "/tasks/exit", "/tasks/oom", "/tasks/delete")
_REMEMBERED = 4096
_SETTLE_S = 2.0


class Events:
    def __init__(self, engine: Engine, containers: Containers, namespace: str) -> None:
        self._engine = engine
        self._containers = containers
        self._filters = [f'namespace=={namespace},topic=="{topic}"' for topic in _TOPICS]
        self._names: dict[str, ContainerId | None] = {}

    async def subscribe(self) -> AsyncIterator[RuntimeEvent]:
        for item in await self._containers.listed():
            self._remember(item.id, name_of(item.labels))
        request = events_pb2.SubscribeRequest(filters=self._filters)
        async for envelope in self._engine.stream(methods.EVENTS, request, timeout_s=None):
            engine_id = _container_of(envelope)
            if engine_id is None:
                continue
            name = await self._name(engine_id)
            if name is None:
                continue
            if envelope.topic in ("/tasks/exit", "/tasks/delete"):
                await self._settled(engine_id)
            yield RuntimeEvent(name)
        raise EngineUnreachable("containerd ended its event stream")

    async def _settled(self, engine_id: str) -> None:
        """CRI hears of an end by the same stream as we do: return when its answer has changed."""
        deadline = asyncio.get_running_loop().time() + _SETTLE_S
        while asyncio.get_running_loop().time() < deadline:
            found = await self._containers.listed(engine_id=engine_id)
            if all(item.state != cri_pb2.CONTAINER_RUNNING for item in found):
                return
            await asyncio.sleep(0.01)

    async def _name(self, engine_id: str) -> ContainerId | None:
        if engine_id not in self._names:
            found = await self._containers.listed(engine_id=engine_id)
            # A sandbox is a task, too, and no container: unknown, and remembered as such.
            self._remember(engine_id, name_of(found[0].labels) if found else None)
        return self._names[engine_id]

    def _remember(self, engine_id: str, name: ContainerId | None) -> None:
        while len(self._names) >= _REMEMBERED:
            del self._names[next(iter(self._names))]
        self._names[engine_id] = name


def _container_of(envelope: events_pb2.Envelope) -> str | None:
    """The engine's id of the container that an event is about; None for events of execs and what we do not know."""
    kind = envelope.event.type_url.rpartition("/")[2]
    try:
        match kind:
            case "containerd.events.TaskExit":
                exit_ = taskevents_pb2.TaskExit.FromString(envelope.event.value)
                return exit_.container_id if exit_.id in ("", exit_.container_id) else None
            case "containerd.events.TaskDelete":
                gone = taskevents_pb2.TaskDelete.FromString(envelope.event.value)
                return gone.container_id if gone.id in ("", gone.container_id) else None
            case "containerd.events.TaskOOM":
                return taskevents_pb2.TaskOOM.FromString(envelope.event.value).container_id
            case "containerd.events.TaskStart":
                return taskevents_pb2.TaskStart.FromString(envelope.event.value).container_id
    except DecodeError:
        return None
    return None
