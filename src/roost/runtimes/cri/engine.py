"""One connection to containerd: calls with a deadline, errors of our tree.

containerd serves CRI and its own API on one socket.  CRI works in the namespace `k8s.io` by itself; containerd's own
API takes the namespace from the metadata of each call, CRI ignores it there.

The channel reconnects by itself.  gRPC would pause up to two minutes between attempts; containerd is restarted by the
node within milliseconds, so the pauses are short here, and a call made while it is away fails at once with
EngineUnreachable instead of waiting.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from roost.errors import EngineFailed, EngineTimeout, EngineUnreachable, MissingFeature, RoostError
from roost.rpc import grpc
from roost.runtimes.cri.methods import Method, RequestT, ResponseT

QUICK_S = 15.0
"""Bound of a call that only reads the engine's own state; generous, for a host that swaps."""

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 300),
    # Channels of one process share connections, and so the pause after a failed one, unless told otherwise.
    ("grpc.use_local_subchannel_pool", 1),
)


def absent(error: EngineFailed) -> bool:
    """Whether the engine's answer was that there is no such thing."""
    return error.details.get("status") == grpc.StatusCode.NOT_FOUND.name


def said(error: EngineFailed) -> str:
    """The engine's own words."""
    return str(error.details.get("text", error.message))


def translate(error: grpc.aio.AioRpcError, method: str) -> RoostError:
    """An error of the transport as one of ours; an answer of the engine as EngineFailed."""
    text = error.details() or str(error.code())
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return EngineUnreachable(f"containerd does not answer ({method}): {text}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return EngineTimeout(f"containerd did not answer in time ({method}): {text}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return MissingFeature(f"the container engine does not know {method}: {text}")
        case code:
            details = {"method": method, "status": code.name, "text": text}
            return EngineFailed(f"{method}: {text}", details=details)


class Engine:
    """Calls to containerd. Made outside of a loop, used inside of one."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self.socket = socket
        self._metadata = (("containerd-namespace", namespace),)
        self._channel: grpc.aio.Channel | None = None
        self._unary: dict[str, Any] = {}

    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(f"unix:{self.socket}", options=_OPTIONS)
        return self._channel

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        self._unary.clear()
        if channel is not None:
            await channel.close(None)

    async def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float | None = QUICK_S,
        lease: str | None = None,
    ) -> ResponseT:
        """One call; None as timeout only for calls that wait for something and are cancelled by their owner.

        `lease`: what is made by this call belongs to that lease. Raises EngineUnreachable, EngineTimeout,
        MissingFeature, EngineFailed.
        """
        unary = self._unary.get(method.path)
        if unary is None:
            unary = self._unary[method.path] = self._connected().unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
        metadata = (*self._metadata, ("containerd-lease", lease)) if lease else self._metadata
        try:
            answer = await unary(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise translate(error, method.name) from error
        assert isinstance(answer, method.response)
        return answer

    async def stream(
        self, method: Method[RequestT, ResponseT], request: RequestT, *, timeout_s: float | None = QUICK_S
    ) -> AsyncIterator[ResponseT]:
        """A call with many answers. Raises as `call` does, at any time."""
        stream = self._connected().unary_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        call = stream(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise translate(error, method.name) from error
        finally:
            with suppress(RuntimeError):  # the loop may be closing
                call.cancel()
