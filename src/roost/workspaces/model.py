"""The words server and node share: what a workspace is, what is wanted of it, what was seen of it.

All are frozen pydantic models because they cross a boundary (database, the node's connection, the API) and are
validated there once.  Unknown fields are ignored: a newer peer may say more.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any, Literal, NewType

from pydantic import BaseModel, ConfigDict, Field

from roost.runtimes.protocol import ContainerId, ContainerUser, Limits, VolumeName

WorkspaceId = NewType("WorkspaceId", str)

DEFAULT_TENANT = "default"


class Desired(StrEnum):
    running = "running"
    stopped = "stopped"
    deleted = "deleted"
    """Container gone, HOME in the trash."""
    purged = "purged"
    """HOME destroyed; only after the trash period."""


class Observed(StrEnum):
    pending = "pending"
    creating = "creating"
    starting = "starting"
    running = "running"
    stopping = "stopping"
    stopped = "stopped"
    deleting = "deleting"
    deleted = "deleted"
    error = "error"


AIMS: dict[Desired, Observed] = {
    Desired.running: Observed.running,
    Desired.stopped: Observed.stopped,
    Desired.deleted: Observed.deleted,
    Desired.purged: Observed.deleted,
}
"""What is seen once a desire is met."""


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RepoSpec(Model):
    """A repository to lie in HOME: from a URL, or from an uploaded bundle (then `url` is only its origin)."""

    url: str | None = None
    upload: str | None = None
    branch: str | None = None
    name: str


class LimitSpec(Model):
    """Zero means no limit."""

    cpus: float = Field(default=0.0, ge=0)
    memory_bytes: int = Field(default=0, ge=0)
    disk_bytes: int = Field(default=0, ge=0)
    pids: int = Field(default=0, ge=0)

    def of_container(self) -> Limits:
        return Limits(cpus=self.cpus, memory_bytes=self.memory_bytes, pids=self.pids)


class WorkspaceSpec(Model):
    """What somebody asked for; changes only by a request."""

    name: str
    tenant: str = DEFAULT_TENANT
    owner: str
    image: str
    user: str | None = None
    layout: Literal["home"] = "home"
    repo: RepoSpec | None = None
    limits: LimitSpec = LimitSpec()
    trusted: bool = False
    """Asked for by the host's own admin: private addresses and plain loopback registries are his to use."""


class UserFact(Model):
    """runtimes.protocol.ContainerUser in JSON."""

    uid: int
    gid: int
    name: str
    home: str
    shell: str = ""
    groups: tuple[int, ...] = ()

    def container_user(self) -> ContainerUser:
        return ContainerUser(self.uid, self.gid, self.name, self.home, self.shell, self.groups)


class Facts(Model):
    """What a node found out about a workspace, so that the next start need not. All of it can be found again."""

    image_digest: str | None = None
    user: UserFact | None = None
    """As resolved for `image_digest`."""
    seeded_digest: str | None = None
    """Image whose HOME was seeded into the volume."""
    repo_path: str | None = None
    """Where the repository was placed; never placed again once it is set."""
    repo_commit: str | None = None
    ever_ready: bool = False


class Assignment(Model):
    """Server to node: make it so.  The newest (generation, start) wins; an older one is ignored."""

    workspace: WorkspaceId
    generation: int
    start: int
    desired: Desired
    spec: WorkspaceSpec
    facts: Facts

    @property
    def container(self) -> ContainerId:
        return container_of(self.workspace)

    @property
    def volume(self) -> VolumeName:
        return volume_of(self.workspace)


def container_of(workspace: WorkspaceId) -> ContainerId:
    return ContainerId(f"roost-{workspace}")


def volume_of(workspace: WorkspaceId) -> VolumeName:
    return VolumeName(f"roost-{workspace}-home")


StepStatus = Literal["running", "done", "skipped", "failed"]


class StepReport(Model):
    """One step of a start (or of a stop), as it begins (`running`) and as it ends."""

    step: str
    status: StepStatus
    at: float = Field(default_factory=time.time)
    ms: float = 0.0
    detail: str = ""


class Report(Model):
    """Node to server: what was seen.  At-least-once, in order for each workspace; `seq` is acknowledged."""

    seq: int = 0
    workspace: WorkspaceId
    generation: int
    start: int
    at: float = Field(default_factory=time.time)
    observed: Observed | None = None
    """None: only a step or a note."""
    reason: str = ""
    error: dict[str, Any] | None = None
    step: StepReport | None = None
    note: str = ""
    facts: Facts | None = None
    steps: tuple[StepReport, ...] = ()
    """With a final `observed`: all steps of this start."""
    total_ms: float | None = None
    crashed: bool = False
    """The container ended by itself."""
