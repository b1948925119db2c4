"""Images: what is here, and how it comes here.

An image's identity is the digest of its configuration, which is what CRI calls the image's id.  What the configuration
says (user, environment) CRI gives only in the verbose answer of ImageStatus, as JSON whose form is containerd's
(`chainID`, `imageSpec`; pkg/cri/server/image_status.go).

A pull is one call that answers when all is done, and containerd 1.6 puts no bound on a registry that accepts a
connection and then says nothing.  So the pull is watched from beside: bytes of the content store's open ingests must
grow, or layers must be being unpacked, else it counts as dead.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import structlog

from roost.errors import (
    EngineFailed,
    EngineTimeout,
    HostDiskFull,
    ImageAuth,
    ImageInvalid,
    ImageNotFound,
    InvalidReference,
    PoolFull,
    RegistryUnreachable,
    RoostError,
)
from roost.runtimes.cri import methods
from roost.runtimes.cri.auth import registry_host
from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.engine import Engine, absent, said
from roost.runtimes.cri.proto import content_pb2, cri_pb2, snapshots_pb2
from roost.runtimes.protocol import ImageDigest, ImageInfo, ImageRef, RegistryAuth

log = structlog.get_logger()

_WATCH_S = 1.0


@dataclass(frozen=True)
class EngineImage:
    """An image as the engine holds it."""

    info: ImageInfo
    chain_id: str
    """Name of the snapshot that is its whole root file system."""


class Images:
    def __init__(self, config: CriConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine

    async def find(self, ref: str) -> EngineImage | None:
        """By reference or by digest; None when it is not here or not unpacked."""
        image = await self._status(ref)
        if image is None:
            return None
        stat = snapshots_pb2.StatSnapshotRequest(snapshotter=self._config.snapshotter, key=image.chain_id)
        try:
            await self._engine.call(methods.SNAPSHOT_STAT, stat)
        except EngineFailed as error:
            if absent(error):
                return None
            raise
        return image

    async def get(self, ref: ImageRef) -> ImageInfo | None:
        found = await self.find(ref)
        return found.info if found else None

    async def list(self) -> list[ImageInfo]:
        answer = await self._engine.call(methods.LIST_IMAGES, cri_pb2.ListImagesRequest())
        refs = [ref for image in answer.images for ref in (image.repo_tags or image.repo_digests)]
        found = await asyncio.gather(*(self.find(ref) for ref in refs if ref not in self._config.hidden_images))
        return [image.info for image in found if image is not None]

    async def _status(self, ref: str) -> EngineImage | None:
        request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=ref), verbose=True)
        try:
            answer = await self._engine.call(methods.IMAGE_STATUS, request)
        except EngineFailed as error:
            if absent(error):
                return None
            if "invalid reference" in said(error) or "could not parse" in said(error):
                raise InvalidReference(f"{ref!r} is not an image reference: {said(error)}") from error
            raise
        if not answer.image.id:
            return None
        try:
            verbose: dict[str, Any] = json.loads(answer.info["info"])
            config = verbose["imageSpec"].get("config") or {}
            chain_id = str(verbose["chainID"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise EngineFailed(f"the engine says of image {ref} what cannot be understood: {error!r}") from error
        info = ImageInfo(
            ref=ImageRef(ref),
            digest=ImageDigest(answer.image.id),
            size_bytes=answer.image.size,
            env=tuple(config.get("Env") or ()),
            user=str(config.get("User") or ""),
            working_dir=str(config.get("WorkingDir") or ""),
            labels=dict(config.get("Labels") or {}),
        )
        return EngineImage(info, chain_id)

    # pull

    async def pull(self, ref: ImageRef, auth: RegistryAuth | None) -> ImageInfo:
        request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=ref))
        if auth is not None:
            request.auth.username, request.auth.password = auth.username, auth.password
        pull = asyncio.create_task(
            self._engine.call(methods.PULL_IMAGE, request, timeout_s=self._config.pull_timeout_s), name=f"pull {ref}"
        )
        watch = asyncio.create_task(self._stalled(), name=f"watch pull {ref}")
        try:
            await asyncio.wait([pull, watch], return_when=asyncio.FIRST_COMPLETED)
            if not pull.done():
                await watch  # raises what kept it from watching
                raise RegistryUnreachable(
                    f"{registry_host(ref)} sent nothing of {ref} for {self._config.pull_progress_timeout_s:g} s"
                )
            await pull
        except EngineTimeout as error:
            raise EngineTimeout(f"pulling {ref} took longer than {self._config.pull_timeout_s:g} s") from error
        except EngineFailed as error:
            raise pull_error(ref, said(error), authenticated=auth is not None) from error
        finally:
            for task in (pull, watch):
                task.cancel()
            await asyncio.gather(pull, watch, return_exceptions=True)
        found = await self.find(ref)
        if found is None:
            raise ImageInvalid(f"{ref} was pulled, and the engine does not hold it unpacked")
        return found.info

    async def _stalled(self) -> None:
        """Return when the content store has not moved for the progress timeout and nothing is being unpacked."""
        last: object = None
        loop = asyncio.get_running_loop()
        since = loop.time()
        while loop.time() - since < self._config.pull_progress_timeout_s:
            await asyncio.sleep(min(_WATCH_S, self._config.pull_progress_timeout_s / 4))
            now = await self._progress()
            if now is None or now != last:
                since, last = loop.time(), now

    async def _progress(self) -> object:
        """Something that changes when bytes come in; None while layers are unpacked."""
        statuses = await self._engine.call(methods.CONTENT_STATUSES, content_pb2.ListStatusesRequest())
        if statuses.statuses:
            return frozenset((status.ref, status.offset) for status in statuses.statuses)
        request = snapshots_pb2.ListSnapshotsRequest(
            snapshotter=self._config.snapshotter, filters=['kind==active,name~="extract-"']
        )
        async for answer in self._engine.stream(methods.SNAPSHOT_LIST, request):
            if answer.info:
                return None
        return frozenset()


_AUTH = ("no basic auth credentials", "401 unauthorized", "403 forbidden", "status code 401", "status code 403")
_DENIED = ("authorization failed", "insufficient_scope", "pull access denied", "unauthorized")
_INVALID = (
    "no match for platform",
    "failed to extract layer",
    "failed commit on ref",
    "failed size validation",
    "unexpected commit digest",
    "unsupported media type",
    "unexpected media type",
    "failed to unpack",
    "failed to decode",
    "invalid checksum digest",
    "wrong diff id",
)
_UNREACHABLE = (
    "connection refused",
    "connection reset",
    "no such host",
    "network is unreachable",
    "no route to host",
    "i/o timeout",
    "tls handshake timeout",
    "server misbehaving",
    "temporary failure in name resolution",
    "http: server gave http response to https client",
    "x509:",
    "tls: ",
    "unexpected eof",
    ": eof",
    "context deadline exceeded",
    "status code 5",
    "50x",
    "502 bad gateway",
    "503 service unavailable",
    "500 internal server error",
    "504 gateway timeout",
    "429 too many requests",
    "proxyconnect",
    "malformed http response",
)


def pull_error(ref: str, text: str, *, authenticated: bool = False) -> RoostError:
    """The leaf that a failed pull's message means; gRPC's code says little (Unknown for most)."""
    lower, host = text.lower(), registry_host(ref)
    if any(word in lower for word in ("invalid reference format", "failed to parse image reference")):
        return InvalidReference(f"{ref!r} is not an image reference: {text}")
    if "no space left on device" in lower or "disk quota exceeded" in lower:
        # Layers are fetched to the host's disk and extracted into the pool.
        return (PoolFull if "extract" in lower else HostDiskFull)(f"no room for {ref}: {text}")
    if any(word in lower for word in _INVALID):
        return ImageInvalid(f"{ref} cannot be used: {text}")
    if any(word in lower for word in _AUTH):
        return ImageAuth(f"{host} refused to give {ref}: {text}")
    if any(word in lower for word in _DENIED):
        # Registries that hide what one may not see say this of images that do not exist, too.
        if authenticated:
            return ImageAuth(f"{host} refused to give {ref} with these credentials: {text}")
        return ImageNotFound(
            f"{host} has no {ref}, or not without credentials: {text}",
            next_step="Check the name and tag; for a private image, `docker login` as root on the node.",
        )
    if "x509:" in lower:
        return RegistryUnreachable(
            f"{host} shows a certificate that is not trusted: {text}",
            next_step="Install the registry's CA on the node, or check the address.",
        )
    if "http response to https client" in lower:
        return RegistryUnreachable(
            f"{host} speaks plain http: {text}", next_step=f"Add {host!r} to [registry] plain_http if that is meant."
        )
    if any(word in lower for word in _UNREACHABLE):
        return RegistryUnreachable(f"{host} does not answer: {text}")
    if lower.rstrip().endswith("not found") or "manifest unknown" in lower or "name unknown" in lower:
        return ImageNotFound(f"{host} has no {ref}")
    return EngineFailed(f"pulling {ref} failed: {text}")
