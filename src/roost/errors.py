"""Every error roost shows to people: one tree, stable codes.

A class is a *code*: what went wrong, its HTTP status, its exit code, whether trying again can help, and the next
step for the reader.  An instance adds the sentence about this very case.  The server sends an error as RFC 9457
problem+json (`to_problem`), the command line rebuilds it (`from_problem`), docs/reference/errors.md is generated
from the tree.  Exit codes are those of the interface: 1 failed, 2 usage, 3 not found, 4 conflict, 5 refused,
6 a dependency is missing, 7 timed out.

Code outside this module raises only leaves; it catches the seven families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class RoostError(Exception):
    """Root of the tree; never raised itself."""

    code: ClassVar[str] = "roost"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    title: ClassVar[str] = "roost failed"
    next_step: ClassVar[str] = "Look at the log of the part named in the message."

    def __init__(
        self, message: str = "", *, next_step: str | None = None, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message or self.title)
        self.message = message or self.title
        self.hint = next_step or self.next_step
        self.details: dict[str, Any] = dict(details or {})

    def to_problem(self) -> dict[str, Any]:
        """The error as an RFC 9457 problem document (JSON-ready)."""
        return {
            "type": f"https://roost.dev/errors/{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.message,
            "code": self.code,
            "next_step": self.hint,
            "exit_code": self.exit_code,
            "retryable": self.retryable,
            "details": self.details,
        }


# --- the seven families -------------------------------------------------------------------------------------------


class Failed(RoostError):
    """The work was tried and did not succeed (exit 1)."""

    code, status, exit_code, title = "failed", 500, 1, "The operation failed"


class Usage(RoostError):
    """What was asked does not make sense as written (exit 2)."""

    code, status, exit_code, title = "usage", 422, 2, "Wrong usage"
    next_step = "See `roost --help`, or the help of the verb."


class NotFound(RoostError):
    """The thing named does not exist, or not for this caller (exit 3)."""

    code, status, exit_code, title = "not_found", 404, 3, "Not found"
    next_step = "`roost ls` shows what is there."


class Conflict(RoostError):
    """The request contradicts the present state (exit 4)."""

    code, status, exit_code, title = "conflict", 409, 4, "Conflict"


class Refused(RoostError):
    """Understood and refused: authentication, policy, quota, or it cannot be done as asked (exit 5)."""

    code, status, exit_code, title = "refused", 403, 5, "Refused"


class Unavailable(RoostError):
    """A dependency or the network is missing; trying again later may help (exit 6)."""

    code, status, exit_code, title, retryable = "unavailable", 503, 6, "Something roost depends on is missing", True


class TimedOut(RoostError):
    """The time for it ran out (exit 7)."""

    code, status, exit_code, title, retryable = "timeout", 504, 7, "Timed out", True
    next_step = "Try again; if it stays, look at `roost doctor`."


# --- leaves: ours -------------------------------------------------------------------------------------------------


class InternalError(Failed):
    """A defect of roost itself: something happened that no other code names."""

    code, title = "internal", "roost hit a defect of its own"
    next_step = "Run again with --debug and report what it prints."


class InvalidConfig(Usage):
    """A settings file or ROOST_… variable cannot be used."""

    code, title = "config.invalid", "The configuration is not valid"
    next_step = "`roost config` shows every setting with its documentation; mend the one named."


class InvalidName(Usage):
    """A workspace name breaks the rule of names."""

    code, title = "workspace.invalid_name", "Not a valid workspace name"
    next_step = "Use 1-40 of a-z, 0-9 and single dashes, starting and ending with a letter or digit."


class InvalidRequest(Usage):
    """A value in a request is out of its range or of the wrong form."""

    code, title = "request.invalid", "The request is not valid"


class InvalidReference(Usage):
    """An image reference cannot be read."""

    code, title = "image.invalid_reference", "Not a valid image reference"
    next_step = "Write it as docker does: registry/name:tag or registry/name@sha256:…"


class WorkspaceNotFound(NotFound):
    """No workspace of that name."""

    code, title = "workspace.not_found", "No such workspace"


class WorkspaceExists(Conflict):
    """The name is taken by a workspace made from something else."""

    code, title = "workspace.exists", "The name is taken"
    next_step = "Choose another with --name, or `roost rm` the other one."


class WorkspaceNotRunning(Conflict):
    """The verb needs a running workspace."""

    code, title = "workspace.not_running", "The workspace is not running"
    next_step = "`roost start NAME` starts it."


class WorkspaceStartFailed(Failed):
    """A start ended in an error that no other code names."""

    code, title = "workspace.start_failed", "The workspace did not start"
    next_step = "`roost logs NAME` has the log of this start; `roost start NAME` tries again."


class Superseded(Conflict):
    """Another request changed the desired state while this one was waited for."""

    code, title = "workspace.superseded", "Another request took over"
    next_step = "`roost show NAME` shows the state that is wanted now."


class WaitTimeout(TimedOut):
    """What is wanted of a workspace has not come about in the time one was ready to wait."""

    code, title = "workspace.timeout", "Not there in time"
    next_step = "It goes on; `roost show NAME` and `roost events NAME` say how far it is."


class NothingThere(NotFound):
    """The API has nothing at that path."""

    code, title = "request.not_found", "Nothing at that path"
    next_step = "Is the client older or newer than the server? `roost version` shows both."


class StaleUpload(NotFound):
    """The uploaded bundle is gone (used, expired, or never complete)."""

    code, title = "upload.not_found", "The upload is gone"
    next_step = "Run the command again: it sends the bundle anew."


# --- leaves: access -----------------------------------------------------------------------------------------------


class Unauthenticated(Refused):
    """No or wrong credentials."""

    code, status, title = "auth.required", 401, "Not authenticated"
    next_step = "Set ROOST_TOKEN, or run as root on the server's host."


class HostNotAllowed(Refused):
    """The Host header names a host this server does not serve (protection against DNS rebinding)."""

    code, status, title = "auth.host", 421, "Host not served here"
    next_step = "Use the address the server listens on."


class NeedsRoot(Refused):
    """The command must run as root on the host."""

    code, title = "host.needs_root", "This needs root"
    next_step = "Run it with sudo, or point ROOST_SERVER_URL and ROOST_TOKEN at a running server."


# --- leaves: host -------------------------------------------------------------------------------------------------


class MissingFeature(Unavailable):
    """The kernel or host lacks something that this needs."""

    code, title, retryable = "host.missing_feature", "The host lacks a feature", False
    next_step = "`roost doctor` says what is missing and how to get it."


class MissingProgram(Unavailable):
    """A program roost runs is not installed."""

    code, title, retryable = "host.missing_program", "A program is missing", False
    next_step = "Run `make setup`, or install the package named."


class PortInUse(Conflict):
    """Another process listens where one of ours must."""

    code, title = "host.port_in_use", "The port is in use"
    next_step = "Stop the other process, or set another port (`roost config` lists the settings)."


class AlreadyRunning(Conflict):
    """Another process of the same kind serves this state directory."""

    code, title = "process.already_running", "It is already running"
    next_step = "Use the running one, or stop it first."


class ProcessFailed(Unavailable):
    """A process that roost starts did not come up or died."""

    code, title = "process.failed", "A process did not start"


class ServerUnreachable(Unavailable):
    """No server answers at the address."""

    code, title = "server.unreachable", "The server does not answer"
    next_step = "`roost up` starts it; `roost doctor` says why it may not come up."


class NodeUnreachable(Unavailable):
    """No node is connected to the server."""

    code, title = "node.unreachable", "The node is not connected"
    next_step = "Start it with `roost node start`; `roost doctor` says why it may not come up."


class NodeTimeout(TimedOut):
    """The node is connected and does not answer in time."""

    code, title = "node.timeout", "The node took too long"
    next_step = "Look at the node's log; `roost node stop` and `roost node start` leave workspaces running."


class ServerTimeout(TimedOut):
    """The server does not answer in time."""

    code, title = "server.timeout", "The server took too long"
    next_step = "Try again; if it stays, look at the server's log and at `roost doctor`."


class InvalidAnswer(Failed):
    """What answered is not a roost server, or not one this client understands."""

    code, title = "server.invalid_answer", "The server's answer makes no sense"
    next_step = "Check ROOST_SERVER_URL; `roost version` shows both versions."


class PoolFull(Refused):
    """The pool has no room for a new start."""

    code, status, title = "pool.full", 507, "The storage pool is full"
    next_step = "Delete what is not needed (`roost ls`, `roost rm`), or enlarge the pool ([pool] max_bytes)."


class HostDiskFull(Refused):
    """The host's disk has reached the reserve that roost never uses."""

    code, status, title = "host.disk_full", 507, "The host's disk is full"
    next_step = "Free space on the host; roost keeps [pool] reserve_bytes untouched."


class HomeFull(Refused):
    """The workspace's HOME has reached its limit."""

    code, status, title = "home.full", 507, "HOME is full"
    next_step = "Delete files in the workspace, or give it a larger --disk."


class PoolBroken(Failed):
    """The pool cannot be made, mounted or grown."""

    code, title = "pool.broken", "The storage pool cannot be used"


class SeedFailed(Failed):
    """HOME could not be filled from the image."""

    code, title = "home.seed_failed", "HOME could not be seeded"
    next_step = "`roost logs NAME` has the reason; `roost start NAME` goes on where it stopped."


class UnknownUser(Usage):
    """The image has no such user."""

    code, title = "user.unknown", "The image has no such user"
    next_step = "Name a user of the image, a uid, or leave it out."


class UnusableHome(Refused):
    """HOME of the user lies where no volume may be mounted."""

    code, title = "user.unusable_home", "HOME lies where it cannot be persisted"
    next_step = "Use an image whose user has a HOME such as /home/NAME or /root."


# --- leaves: engine, images ---------------------------------------------------------------------------------------


class EngineUnreachable(Unavailable):
    """The container engine does not answer."""

    code, title = "engine.unreachable", "The container engine does not answer"
    next_step = "`roost doctor` says what the engine lacks; the node restarts it by itself."


class EngineFailed(Failed):
    """The container engine answered with an error that no other code names."""

    code, title = "engine.failed", "The container engine refused"


class EngineTimeout(TimedOut):
    """The container engine did not answer in time."""

    code, title = "engine.timeout", "The container engine took too long"


class ContainerNotFound(NotFound):
    """The engine has no such container."""

    code, title = "container.not_found", "No such container"


class ContainerCrashed(Failed):
    """PID 1 of a workspace ended by itself."""

    code, title = "container.crashed", "The container ended by itself"
    next_step = "`roost logs NAME --previous` has its last words; roost starts it again by itself."


class VolumeNotFound(NotFound):
    """The runtime has no such volume."""

    code, title = "volume.not_found", "No such volume"


class ImageNotFound(NotFound):
    """The registry has no such image, or not for us."""

    code, title = "image.not_found", "No such image"
    next_step = "Check the name and tag; `roost image ls` shows what is here, `roost image bootstrap NAME` builds one."


class ImageAuth(Refused):
    """The registry wants other credentials."""

    code, title = "image.auth", "The registry refused the credentials"
    next_step = "Log in with `docker login` as root on the node, or use a public image."


class RegistryUnreachable(Unavailable):
    """The registry does not answer."""

    code, title = "registry.unreachable", "The registry does not answer"
    next_step = "Check the address and the network; plain http needs the host in [registry] plain_http."


class ImageInvalid(Failed):
    """The image cannot be unpacked or its configuration makes no sense."""

    code, title = "image.invalid", "The image cannot be used"


class ImageBuildFailed(Failed):
    """`roost image bootstrap` did not finish."""

    code, title = "image.build_failed", "The image could not be built"


# --- leaves: exec -------------------------------------------------------------------------------------------------


class ExecNotFound(NotFound):
    """The command does not exist in the workspace."""

    code, title, exit_code = "exec.command_not_found", "No such command in the workspace", 127
    next_step = "Check the command's name and the PATH inside."


class ExecNotExecutable(Refused):
    """The command exists and cannot be executed."""

    code, title, exit_code = "exec.not_executable", "The command cannot be executed", 126
    next_step = "Check its mode and format."


class ExecFailed(Failed):
    """The engine could not run the command."""

    code, title = "exec.failed", "The command could not be run"


class CopyFailed(Failed):
    """`roost cp` did not copy everything."""

    code, title = "cp.failed", "The copy did not finish"


# --- leaves: repositories -----------------------------------------------------------------------------------------


class InvalidRepository(Usage):
    """Neither a repository URL nor a local git repository."""

    code, title = "repo.invalid", "Not a repository"
    next_step = "Give a git URL (https, ssh), a local git repository, or the name of a workspace."


class RepoNotTrusted(Refused):
    """The local repository belongs to another user; git refuses to read it."""

    code, title = "repo.not_trusted", "The repository belongs to another user"
    next_step = "If you trust it: git config --global --add safe.directory PATH"


class ProtocolNotAllowed(Refused):
    """The URL's protocol is not allowed here."""

    code, title = "repo.protocol", "The protocol is not allowed"
    next_step = "Use https or ssh, or add it to [repos] allow_protocols."


class AddressNotAllowed(Refused):
    """The URL leads to a private address that policy does not allow."""

    code, title = "net.address_not_allowed", "The address is not allowed"
    next_step = "Add the host or range to [net] allow, if it is meant."


class RepoAuth(Refused):
    """The repository needs credentials that were not there or were refused."""

    code, title = "repo.auth", "The repository refused the credentials"
    next_step = "Use an ssh URL with an agent (`ssh-add`), or clone from a local path."


class RepoNotFound(NotFound):
    """The host has no such repository (or hides it from us)."""

    code, title = "repo.not_found", "No such repository"
    next_step = "Check the URL."


class BadRef(NotFound):
    """The repository has no such branch, tag or commit."""

    code, title = "repo.bad_ref", "No such branch"
    next_step = "Check --branch; `git ls-remote URL` lists what the repository has."


class RepoUnreachable(Unavailable):
    """The repository's host does not answer."""

    code, title = "repo.unreachable", "The repository's host does not answer"
    next_step = "Check the URL and the network of the node."


class RepoTimeout(TimedOut):
    """git took longer than it may."""

    code, title = "repo.timeout", "git took too long"
    next_step = "Try again, or raise [repos] command_timeout_s."


class RepoHostKey(Refused):
    """The ssh host key changed, or is not known."""

    code, title = "repo.host_key", "The ssh host key does not match"
    next_step = "If the host really changed its key, remove the old one from the node's known_hosts."


class RepoCorrupt(Failed):
    """What came is not a sound repository."""

    code, title = "repo.corrupt", "The repository is damaged"


class CloneFailed(Failed):
    """git failed in a way that no other code names."""

    code, title = "repo.clone_failed", "git could not clone"


def all_errors() -> Iterator[type[RoostError]]:
    """Every class of the tree, parents before children, in the order of definition."""

    def walk(cls: type[RoostError]) -> Iterator[type[RoostError]]:
        yield cls
        for sub in cls.__subclasses__():
            yield from walk(sub)

    return walk(RoostError)


def by_code(code: str) -> type[RoostError] | None:
    """The class of a stable code, or None."""
    return next((cls for cls in all_errors() if cls.code == code), None)


def _family(exit_code: object) -> type[RoostError]:
    """The family with that exit code; `Failed` when there is none."""
    return next((family for family in RoostError.__subclasses__() if family.exit_code == exit_code), Failed)


def from_problem(problem: Mapping[str, Any]) -> RoostError:
    """Rebuild an error from its problem document; an unknown code (a newer server's) becomes its family, same words."""
    cls = by_code(str(problem.get("code", ""))) or _family(problem.get("exit_code"))
    details = problem.get("details")
    error = cls(
        str(problem.get("detail") or problem.get("title") or ""),
        next_step=str(problem["next_step"]) if problem.get("next_step") else None,
        details=details if isinstance(details, Mapping) else None,
    )
    return error
