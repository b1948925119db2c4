"""All settings: nested, documented, frozen by a test.

Sources, later ones win: the defaults below, the TOML file (`ROOST_CONFIG`, else /etc/roost/roost.toml), the
environment (`ROOST_SECTION__KEY`).  Three names of the interface stand above the sections: `ROOST_STATE_DIR`,
`ROOST_RUN_DIR`, `ROOST_LOG_LEVEL`.  The docstring under each field is its documentation: `roost config` prints it,
docs/reference/settings.md is generated from it.

The command line does not import this module on its quick paths (pydantic costs 0.2 s): see `roost.client`.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from roost.errors import InvalidConfig

DEFAULT_CONFIG = Path("/etc/roost/roost.toml")
GiB = 1 << 30


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ServerSettings(Section):
    host: str = "127.0.0.1"
    """Address the API listens on. Everything but loopback needs TLS in front."""
    port: int = Field(default=7766, ge=1, le=65535)
    """TCP port of the API."""
    user: str = "roost"
    """System user the server runs as when started by root."""
    allowed_hosts: list[str] = []
    """Further names accepted in the Host header, beside loopback names (protection against DNS rebinding)."""


class DatabaseSettings(Section):
    url: str = ""
    """SQLAlchemy URL; empty: SQLite in the server's state directory."""


class NodeSettings(Section):
    instance: str = Field(default="roost", pattern=r"^[a-z][a-z0-9-]{0,23}$")
    """Name of this installation on the host: nft table, CNI network, cgroup and systemd names derive from it."""
    relist_s: float = Field(default=30.0, gt=0)
    """Seconds between two full comparisons with the engine, beside its events."""
    engine_start_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds the container engine may take to answer after it was started."""


class PoolSettings(Section):
    initial_bytes: int = Field(default=4 * GiB, ge=256 << 20)
    """Size of a new loop file; used only where the state directory is not on btrfs."""
    step_bytes: int = Field(default=2 * GiB, ge=64 << 20)
    """The loop file grows by this much, before the room is needed."""
    max_bytes: int = Field(default=0, ge=0)
    """The loop file never grows beyond this; 0: up to the reserve."""
    reserve_bytes: int = Field(default=2 * GiB, ge=0)
    """Free bytes of the host's file system that the pool never takes."""
    refuse_percent: float = Field(default=90.0, gt=0, le=100)
    """New starts are refused when the pool is fuller than this."""
    quotas: bool = True
    """Limit HOME by btrfs simple quotas where the kernel has them (6.7+); else usage is measured only."""


class NetworkSettings(Section):
    subnet: str = "10.208.0.0/16"
    """IPv4 range of the workspaces' addresses on this node; must not be in use on the host."""
    allow: list[str] = []
    """Hosts and CIDR ranges that are private and may yet be reached from workspaces."""
    dns: list[str] = []
    """Name servers for workspaces; empty: those of the host that are not loopback."""
    mtu: int = Field(default=0, ge=0)
    """MTU of the workspaces' interfaces; 0: the kernel's default."""


class RegistrySettings(Section):
    port: int = Field(default=7767, ge=1, le=65535)
    """Loopback port of the private registry that holds bootstrapped images."""
    plain_http: list[str] = []
    """Registry hosts (host or host:port) spoken to without TLS, beside loopback."""
    pull_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds a pull may take in all."""
    progress_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds a pull may go without progress before the registry counts as dead."""


class WorkspaceSettings(Section):
    default_image: str = ""
    """Image of a workspace made without --image; empty: the newest bootstrapped image named `default`."""
    cpus: float = Field(default=0.0, ge=0)
    """CPU limit of a new workspace in cores; 0: all of the node's."""
    memory_bytes: int = Field(default=0, ge=0)
    """Memory limit; 0: 75 % of the node's memory."""
    disk_bytes: int = Field(default=20 * GiB, ge=0)
    """Limit of HOME; 0: none."""
    pids: int = Field(default=4096, ge=0)
    """Limit of processes; 0: none."""
    sudo: bool = True
    """Let processes gain privileges inside the container (sudo); off sets no_new_privs and drops all capabilities."""
    stop_grace_s: float = Field(default=10.0, ge=0)
    """Seconds between SIGTERM and SIGKILL at a stop."""
    trash_days: float = Field(default=7.0, ge=0)
    """Days a deleted workspace's HOME can be had back by `roost undelete`."""
    log_keep_days: float = Field(default=7.0, ge=0)
    """Days the logs of earlier starts are kept."""


class RepoSettings(Section):
    allow_protocols: list[Literal["https", "ssh", "http", "file", "git"]] = ["https", "ssh"]
    """Protocols a repository URL may have."""
    command_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds one git command may take in all (`GIT_COMMAND_TIMEOUT`)."""
    progress_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds a git command may go without output before it counts as dead."""
    repo_path: str = "{home}/{repo}"
    """Where a repository lies in a workspace."""
    ca_file: str = ""
    """Further CA certificates (PEM file) for https repositories."""


class NetSettings(Section):
    allow: list[str] = []
    """Hosts and CIDR ranges that are private and may yet be reached by clones on behalf of users."""


class Settings(BaseSettings):
    """The whole configuration of one host."""

    model_config = SettingsConfigDict(
        env_prefix="ROOST_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    state_dir: Path = Path("/var/lib/roost")
    """Everything that must survive a reboot."""
    run_dir: Path = Path("/run/roost")
    """Sockets, pid files, mounts: everything that need not."""
    cache_dir: Path = Path("/var/cache/roost")
    """Downloads and builds that can be made again."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    node: NodeSettings = NodeSettings()
    pool: PoolSettings = PoolSettings()
    network: NetworkSettings = NetworkSettings()
    registry: RegistrySettings = RegistrySettings()
    workspaces: WorkspaceSettings = WorkspaceSettings()
    repos: RepoSettings = RepoSettings()
    net: NetSettings = NetSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_file())

    # Where things are.  One place, so that the command line, the node and the tests agree.

    @property
    def server_state(self) -> Path:
        """Owned by the server's user, 0700."""
        return self.state_dir / "server"

    @property
    def node_state(self) -> Path:
        """Owned by root."""
        return self.state_dir / "node"

    @property
    def server_run(self) -> Path:
        return self.run_dir / "server"

    @property
    def node_run(self) -> Path:
        return self.run_dir / "node"

    @property
    def api_socket(self) -> Path:
        """Unix socket of the API; who may use it is decided by peer credentials."""
        return self.server_run / "api.sock"

    @property
    def admin_token_file(self) -> Path:
        return self.server_state / "admin-token"


def config_file() -> Path:
    """The settings file: `ROOST_CONFIG`, else /etc/roost/roost.toml."""
    return Path(os.environ.get("ROOST_CONFIG") or DEFAULT_CONFIG)


@cache
def load() -> Settings:
    """Read the settings once; InvalidConfig names the setting and what is wrong with it."""
    path = config_file()
    if os.environ.get("ROOST_CONFIG") and not path.exists():
        raise InvalidConfig(f"ROOST_CONFIG names {path}, which does not exist")
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidConfig(f"setting {where}: {first['msg']}", details={"file": str(path)}) from error
    except (ValueError, OSError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
