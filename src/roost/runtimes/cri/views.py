"""An image's root file system as a directory of this host, and programs of ours run beside it.

The engine makes a read-only snapshot (View) of the image's top layer, we mount it.  Two things hold it: a lease of the
engine, which expires by itself if we never come back, and a directory `<run_dir>/views/<id>/` of ours, by which the
next process finds mounts that a killed one left.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from roost import faults
from roost.errors import EngineFailed, ImageNotFound, PoolFull, RoostError
from roost.linux.mount import MountFlag, mount, mounts, unmount
from roost.runtimes.cri import methods
from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.engine import Engine, absent, said
from roost.runtimes.cri.images import Images
from roost.runtimes.cri.proto import leases_pb2, mount_pb2, snapshots_pb2
from roost.runtimes.programs import run_tool
from roost.runtimes.protocol import ImageInfo, Tool, ToolResult, VolumeName

log = structlog.get_logger()

_LEASE_LABEL = "roost.dev/view"
_EXPIRY = "containerd.io/gc.expire"
_EXPIRY_SLACK_S = 300.0
_OPTION_PAGE = 4095
"""mount(2) takes one page of options."""
_KILL_S = 5.0


class Views:
    def __init__(self, config: CriConfig, engine: Engine, images: Images) -> None:
        self._config = config
        self._engine = engine
        self._images = images
        self._folder = config.run_dir / "views"
        self._open: set[str] = set()

    async def run(self, tool: Tool, image: ImageInfo, volume: VolumeName | None, timeout_s: float) -> ToolResult:
        paths = {}
        if volume is not None:
            paths["{volume}"] = str(await asyncio.to_thread(self._config.volumes.path, volume))
        async with self._mounted(image, timeout_s) as root:
            paths["{image}"] = str(root)
            args = [_filled(arg, paths) for arg in tool.args]
            return await run_tool([self._config.python], tool.module, args, timeout_s)

    @asynccontextmanager
    async def _mounted(self, image: ImageInfo, timeout_s: float) -> AsyncIterator[Path]:
        found = await self._images.find(image.digest)
        if found is None:
            raise ImageNotFound(f"image {image.ref} is no longer here", next_step="Try again: it is pulled.")
        name = f"roost-view-{secrets.token_hex(8)}"
        folder = self._folder / name
        self._open.add(name)
        try:
            expires = datetime.now(UTC) + timedelta(seconds=timeout_s + _EXPIRY_SLACK_S)
            labels = {_LEASE_LABEL: name, _EXPIRY: expires.strftime("%Y-%m-%dT%H:%M:%SZ")}
            await self._engine.call(methods.LEASE_CREATE, leases_pb2.CreateRequest(id=name, labels=labels))
            request = snapshots_pb2.ViewSnapshotRequest(
                snapshotter=self._config.snapshotter, key=name, parent=found.chain_id
            )
            try:
                view = await self._engine.call(methods.SNAPSHOT_VIEW, request, lease=name)
            except EngineFailed as error:
                if "no space left on device" in said(error):
                    raise PoolFull(f"no room to look into the image: {said(error)}") from error
                raise
            faults.point("cri.view.made")
            await asyncio.to_thread(_mount_view, view.mounts, folder)
            faults.point("cri.view.mounted")
            yield folder / "root"
        finally:
            task = asyncio.ensure_future(self._discard(name))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                await asyncio.wait([task], timeout=_KILL_S)
                raise

    async def _discard(self, name: str) -> None:
        """Unmount and remove; what fails is left to the lease's expiry and to the next `recover`."""
        try:
            await asyncio.to_thread(_unmount_view, self._folder / name)
            remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter=self._config.snapshotter, key=name)
            with suppress(EngineFailed):
                await self._engine.call(methods.SNAPSHOT_REMOVE, remove)
            try:
                await self._engine.call(methods.LEASE_DELETE, leases_pb2.DeleteRequest(id=name))
            except EngineFailed as error:
                if not absent(error):
                    raise
        except (OSError, RoostError) as error:
            log.warning("a view stays until its lease expires", view=name, error=str(error))
        finally:
            self._open.discard(name)

    async def recover(self) -> None:
        """Remove what an earlier process of ours left: mounts first, then snapshots and leases."""
        folders = await asyncio.to_thread(
            lambda: [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        )
        leases = await self._engine.call(
            methods.LEASE_LIST, leases_pb2.ListRequest(filters=[f'labels."{_LEASE_LABEL}"'])
        )
        for name in sorted({*folders, *(lease.id for lease in leases.leases)} - self._open):
            log.info("a view of an earlier run is removed", view=name)
            await self._discard(name)


def _filled(arg: str, paths: dict[str, str]) -> str:
    for key, value in paths.items():
        arg = arg.replace(key, value)
    return arg


def _mount_view(parts: Sequence[mount_pb2.Mount], folder: Path) -> None:
    """Mount a snapshot at `<folder>/root`, read-only, and inert: no set-uid programs, no devices."""
    root = folder / "root"
    root.mkdir(mode=0o700, parents=True)
    flags = MountFlag.RDONLY | MountFlag.NOSUID | MountFlag.NODEV
    for part in parts:
        options = [option for option in part.options if option not in ("ro", "rw", "bind", "rbind")]
        if part.type == "bind" or {"bind", "rbind"} & set(part.options):
            mount(part.source, root, "", MountFlag.BIND)
            mount("", root, "", MountFlag.REMOUNT | MountFlag.BIND | flags)
        elif part.type == "overlay":
            mount("overlay", root, "overlay", flags, ",".join(_short(options, folder)))
        else:
            mount(part.source, root, part.type, flags, ",".join(options))


def _short(options: list[str], folder: Path) -> list[str]:
    """overlay's options so that many layers fit: by short links where the snapshotter's paths are too long."""
    if len(",".join(options)) <= _OPTION_PAGE:
        return options
    short = []
    for option in options:
        key, _, value = option.partition("=")
        if key == "lowerdir":
            links = []
            for number, layer in enumerate(value.split(":")):
                link = folder / f"{number:x}"
                link.symlink_to(layer)
                links.append(str(link))
            option = f"lowerdir={':'.join(links)}"
        short.append(option)
    return short


def _unmount_view(folder: Path) -> None:
    root = str(folder / "root")
    for entry in reversed(mounts()):
        if entry.target == root:
            unmount(root, detach=True)
    shutil.rmtree(folder, ignore_errors=True)
