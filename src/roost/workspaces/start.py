"""One start of a workspace, step by step: room, image, user, volume, seed, container, repository.

Every step looks first and does only what is missing, so a start that was cut off anywhere, by a crash of anything, is
completed by running it again.  What was found out goes to the server as facts with the report, and comes back with the
next assignment: a restart then asks the engine for nothing it need not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from roost import faults
from roost.errors import EngineFailed, InternalError, RoostError, SeedFailed, from_problem
from roost.runtimes.protocol import (
    LABEL_LAYOUT,
    LABEL_OWNER,
    LABEL_START,
    LABEL_TENANT,
    LABEL_WORKSPACE,
    ContainerSpec,
    ContainerState,
    ImageInfo,
    ImageRef,
    RegistryAuth,
    Runtime,
    Tool,
    VolumeMount,
)
from roost.workspaces.model import Assignment, Facts, Report, StepReport, UserFact
from roost.workspaces.startlog import StartLog

log = structlog.get_logger()

MEMORY_SHARE = 0.75
"""Of the node's memory, when no limit was given."""


class Repositories(Protocol):
    """Where a repository comes from; the sync service will be a second one behind it."""

    async def place(self, assignment: Assignment, user: UserFact, path: str, note: Callable[[str], None]) -> str:
        """Put the repository at `path` in the running container, unless something is there; returns the commit."""
        ...


@dataclass(frozen=True)
class StartTools:
    """What a start works with."""

    runtime: Runtime
    repositories: Repositories
    room: Callable[[], Awaitable[None]]
    """Raises PoolFull or HostDiskFull when no new start may be made."""
    auth: Callable[[ImageRef], Awaitable[RegistryAuth | None]]
    repo_path: str
    allow_sudo: bool


@dataclass
class Step:
    """What a step says about itself when it is over."""

    detail: str = ""
    skipped: bool = False


@dataclass
class Start:
    """A run of all steps for one assignment."""

    assignment: Assignment
    tools: StartTools
    log: StartLog
    report: Callable[[Report], None]
    steps: list[StepReport] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    """Facts found out by this run."""
    fresh: bool = False
    """The volume was made by this run."""

    async def run(self) -> None:
        """Drive the workspace to ready. Raises what a step raises; the steps tell how far it came."""
        a = self.assignment
        async with self._step("image") as step:
            await self.tools.room()
            image = await self._image(step)
        async with self._step("user") as step:
            user = await self._user(image, step)
        async with self._step("volume") as step:
            await self._volume(step)
        async with self._step("seed") as step:
            await self._seed(image, user, step)
        async with self._step("container") as step:
            await self._container(image, user, step)
        if a.spec.repo is not None:
            async with self._step("repository") as step:
                await self._repository(user, step)
        self.found["ever_ready"] = True

    @asynccontextmanager
    async def _step(self, name: str) -> AsyncIterator[Step]:
        a, begun, step = self.assignment, time.monotonic(), Step()
        faults.point(f"start.{name}.before")

        def say(status: Any) -> StepReport:
            ms = (time.monotonic() - begun) * 1000
            return StepReport(step=name, status=status, ms=round(ms, 3), detail=step.detail)

        def send(item: StepReport) -> None:
            found = Facts.model_validate(self.found) if self.found else None
            self.report(Report(workspace=a.workspace, generation=a.generation, start=a.start, step=item, facts=found))

        send(say("running"))
        try:
            yield step
        except Exception as defect:
            error = defect if isinstance(defect, RoostError) else InternalError(f"{type(defect).__name__}: {defect}")
            if error is not defect:
                log.exception("a step failed by our fault", workspace=a.workspace, step=name)
            step.detail = error.message
            self.log.write(f"{name}: failed: {error.message}")
            self.steps.append(say("failed"))
            send(self.steps[-1])
            if error is defect:
                raise
            raise error from defect
        done = say("skipped" if step.skipped else "done")
        self.log.write(f"{name}: {done.status} in {done.ms:.0f} ms {done.detail}".rstrip())
        self.steps.append(done)
        send(done)
        faults.point(f"start.{name}.after")

    async def _image(self, step: Step) -> ImageInfo:
        ref = ImageRef(self.assignment.spec.image)
        image = await self.tools.runtime.image(ref)
        if image is not None:
            step.skipped, step.detail = True, "present"
        else:
            self.log.write(f"pulling {ref}")
            image = await self.tools.runtime.pull(ref, await self.tools.auth(ref))
            step.detail = f"pulled, {image.size_bytes / 1e6:.1f} MB"
        return image

    async def _user(self, image: ImageInfo, step: Step) -> UserFact:
        facts = self.assignment.facts
        if facts.user is not None and facts.image_digest == image.digest:
            step.skipped, step.detail = True, facts.user.name
            return facts.user
        user = await resolve_user(self.tools.runtime, image, self.assignment.spec.user)
        self.found |= {"image_digest": str(image.digest), "user": user}  # one is told with the other, or not at all
        step.detail = f"{user.name} ({user.uid}:{user.gid}), HOME {user.home}"
        return user

    async def _volume(self, step: Step) -> None:
        a, runtime = self.assignment, self.tools.runtime
        try:
            self.fresh = await runtime.create_volume(a.volume, a.spec.limits.disk_bytes, self._lasting_labels())
            step.detail = "made" if self.fresh else ""
        except EngineFailed:
            if all(volume.name != a.volume or volume.trashed_at is None for volume in await runtime.volumes()):
                raise
            # A start that overtook the stop of an undelete, or the retry of one: HOME is still in the trash.
            await runtime.restore_volume(a.volume)
            await runtime.create_volume(a.volume, a.spec.limits.disk_bytes, self._lasting_labels())
            step.detail = "back from the trash"
        if self.fresh:  # whatever an earlier volume of that name held is not in this one
            self.found |= {"seeded_digest": None, "repo_path": None, "repo_commit": None}

    async def _seed(self, image: ImageInfo, user: UserFact, step: Step) -> None:
        a = self.assignment
        if a.facts.seeded_digest == image.digest and not self.fresh:
            step.skipped, step.detail = True, "already seeded"
            return
        tool = Tool(
            "roost.home",
            (
                "seed", "--image", "{image}", "--volume", "{volume}", "--home", user.home,
                "--uid", str(user.uid), "--gid", str(user.gid), "--image-digest", str(image.digest),
            ),
        )  # fmt: skip
        outcome = await _run_json(self.tools.runtime, tool, image, a)
        self.found["seeded_digest"] = str(image.digest)
        step.detail = f"{outcome.get('state', '')}: {outcome.get('files', 0)} files, {outcome.get('bytes', 0)} bytes"

    async def _container(self, image: ImageInfo, user: UserFact, step: Step) -> None:
        a, runtime = self.assignment, self.tools.runtime
        status = await runtime.status(a.container)
        labels = self._labels()
        if status is not None:
            same = status.labels.get(LABEL_START) == labels[LABEL_START]
            if same and status.state is ContainerState.running:
                step.skipped, step.detail = True, "running"
                return
            await runtime.delete(a.container)
            faults.point("start.container.deleted")
        limits = a.spec.limits.of_container()
        if not limits.memory_bytes:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            limits = type(limits)(limits.cpus, int(total * MEMORY_SHARE), limits.pids)
        await runtime.create(
            ContainerSpec(
                container=a.container,
                image=image,
                user=user.container_user(),
                hostname=a.spec.name,
                env=environment(a, user),
                working_dir=user.home,
                mounts=(VolumeMount(a.volume, user.home),),
                limits=limits,
                labels=labels,
                allow_sudo=self.tools.allow_sudo,
            )
        )
        faults.point("start.container.created")
        await runtime.start(a.container)

    async def _repository(self, user: UserFact, step: Step) -> None:
        a = self.assignment
        assert a.spec.repo is not None
        if a.facts.repo_path is not None and not self.fresh:
            step.skipped, step.detail = True, a.facts.repo_path
            return
        path = self.tools.repo_path.format(home=user.home.rstrip("/"), repo=a.spec.repo.name)
        commit = await self.tools.repositories.place(a, user, path, self.log.write)
        self.found |= {"repo_path": path, "repo_commit": commit}
        step.detail = f"{path} at {commit[:12]}" if commit else path

    def _labels(self) -> dict[str, str]:
        return {**self._lasting_labels(), LABEL_START: str(self.assignment.start)}

    def _lasting_labels(self) -> dict[str, str]:
        """Those of the volume too, which outlives every start."""
        a = self.assignment
        return {
            LABEL_WORKSPACE: a.workspace,
            LABEL_TENANT: a.spec.tenant,
            LABEL_OWNER: a.spec.owner,
            LABEL_LAYOUT: a.spec.layout,
        }


def environment(assignment: Assignment, user: UserFact) -> dict[str, str]:
    """What every process of a workspace finds in its environment, beside the image's own."""
    env = {
        "HOME": user.home,
        "USER": user.name,
        "LOGNAME": user.name,
        "WORKSPACE_DIR": user.home,
        "ROOST_WORKSPACE": assignment.spec.name,
    }
    return {**env, "SHELL": user.shell} if user.shell else env


async def resolve_user(runtime: Runtime, image: ImageInfo, wanted: str | None) -> UserFact:
    """Whom a workspace of that image runs as. Raises UnknownUser, UnusableHome."""
    args = ["resolve", "--image", "{image}", "--image-user", image.user]
    if wanted:
        args += ["--user", wanted]
    outcome = await _run_json(runtime, Tool("roost.home", tuple(args)), image, None)
    return UserFact.model_validate(outcome["user"])


async def _run_json(runtime: Runtime, tool: Tool, image: ImageInfo, a: Assignment | None) -> dict[str, Any]:
    result = await runtime.run_tool(tool, image, a.volume if a else None)
    try:
        outcome = json.loads(result.stdout)
        if not isinstance(outcome, dict):
            raise ValueError("not an object")
    except ValueError as error:
        tail = result.stderr.decode(errors="replace")[-2000:]
        raise SeedFailed(f"{tool.module} {tool.args[0]} ended with {result.exit_code}: {tail}") from error
    if "error" in outcome:
        raise from_problem(outcome["error"])
    if result.exit_code != 0:
        raise InternalError(f"{tool.module} {tool.args[0]} ended with {result.exit_code} and named no error")
    return outcome
