"""What the API tells, as frozen values; each keeps the document it was read from (`--json` prints that, whole)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from roost.errors import RoostError, ServerUnreachable, WorkspaceStartFailed, from_problem

Document = dict[str, Any]


@dataclass(frozen=True)
class Repo:
    url: str | None
    branch: str | None
    name: str
    path: str | None


@dataclass(frozen=True)
class Step:
    """One step of a start."""

    step: str
    status: str
    """running, done, skipped or failed."""
    ms: float
    detail: str = ""

    @classmethod
    def of(cls, document: Document) -> Step:
        return cls(
            str(document.get("step", "")),
            str(document.get("status", "")),
            float(document.get("ms") or 0.0),
            str(document.get("detail") or ""),
        )


@dataclass(frozen=True)
class LastStart:
    start: int
    total_ms: float | None
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Workspace:
    """A workspace as the server sees it."""

    id: str
    name: str
    image: str
    desired: str
    observed: str
    reason: str
    settled: bool
    generation: int
    start: int
    owner: str
    runtime: str
    user: str | None
    home: str | None
    repo: Repo | None
    created_at: str
    updated_at: str
    started_at: str | None
    trash_until: str | None
    last_start: LastStart | None
    error: RoostError | None
    document: Document = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: Document) -> Workspace:
        """Read a document of the API. Raises ServerUnreachable when it is something else."""
        try:
            repo, last, problem = document.get("repo"), document.get("last_start"), document.get("error")
            return cls(
                id=document["id"],
                name=document["name"],
                image=document["image"],
                desired=document["desired"],
                observed=document["observed"],
                reason=document.get("reason") or "",
                settled=bool(document["settled"]),
                generation=int(document["generation"]),
                start=int(document["start"]),
                owner=document.get("owner") or "",
                runtime=document.get("runtime") or "",
                user=document.get("user"),
                home=document.get("home"),
                repo=Repo(repo.get("url"), repo.get("branch"), repo["name"], repo.get("path")) if repo else None,
                created_at=document.get("created_at") or "",
                updated_at=document.get("updated_at") or "",
                started_at=document.get("started_at"),
                trash_until=document.get("trash_until"),
                last_start=LastStart(
                    int(last.get("start") or 0),
                    last.get("total_ms"),
                    tuple(Step.of(step) for step in last.get("steps") or ()),
                )
                if last
                else None,
                error=from_problem(problem) if problem else None,
                document=document,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerUnreachable(f"what answers is not a roost server of this version ({error!r})") from error

    def raise_if_failed(self) -> Workspace:
        """Itself; raises the error that the workspace is in."""
        if self.observed == "error":
            raise self.error or WorkspaceStartFailed(self.reason or f"{self.name!r} is in an error")
        return self


@dataclass(frozen=True)
class Event:
    """Something that happened to a workspace."""

    id: int | None
    """None: a note that is not kept."""
    name: str
    at: str
    kind: str
    """state, step or note."""
    start: int
    from_state: str | None
    to_state: str | None
    step: Step | None
    detail: str
    error: RoostError | None
    document: Document = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: Document) -> Event:
        problem = document.get("error")
        return cls(
            id=document.get("id"),
            name=str(document.get("name") or ""),
            at=str(document.get("at") or ""),
            kind=str(document.get("kind") or ""),
            start=int(document.get("start") or 0),
            from_state=document.get("from"),
            to_state=document.get("to"),
            step=Step.of(document) if document.get("step") else None,
            detail=str(document.get("detail") or ""),
            error=from_problem(problem) if problem else None,
            document=document,
        )


@dataclass(frozen=True)
class LogLine:
    at: str
    channel: str
    """stdout, stderr, or start: the log of the start's steps."""
    text: str
    document: Document = field(repr=False, compare=False)


@dataclass(frozen=True)
class Health:
    status: str
    version: str
    node_connected: bool
    document: Document = field(repr=False, compare=False)


@dataclass(frozen=True)
class RepoRequest:
    """A repository for a new workspace: of a URL, or of an upload (then the URL is only its origin)."""

    name: str
    url: str | None = None
    upload: str | None = None
    branch: str | None = None


@dataclass(frozen=True)
class LimitRequest:
    """None: the server's default; 0: no limit."""

    cpus: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    pids: int | None = None
