"""Settings: defaults that people rely on do not change by accident, each is documented, bad ones name themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from roost import settings as module
from roost.errors import InvalidConfig
from roost.settings import Settings
from scripts import reference

GiB = 1 << 30
DEFAULTS = {
    "state_dir": "/var/lib/roost",
    "run_dir": "/run/roost",
    "cache_dir": "/var/cache/roost",
    "log_level": "info",
    "server": {"host": "127.0.0.1", "port": 7766, "user": "roost", "allowed_hosts": []},
    "database": {"url": ""},
    "node": {"instance": "roost", "relist_s": 30.0, "engine_start_timeout_s": 20.0},
    "pool": {
        "initial_bytes": 4 * GiB,
        "step_bytes": 2 * GiB,
        "max_bytes": 0,
        "reserve_bytes": 2 * GiB,
        "refuse_percent": 90.0,
        "quotas": True,
    },
    "network": {"subnet": "10.208.0.0/16", "allow": [], "dns": [], "mtu": 0},
    "registry": {"port": 7767, "plain_http": [], "pull_timeout_s": 1800.0, "progress_timeout_s": 60.0},
    "workspaces": {
        "default_image": "",
        "cpus": 0.0,
        "memory_bytes": 0,
        "disk_bytes": 20 * GiB,
        "pids": 4096,
        "sudo": True,
        "stop_grace_s": 10.0,
        "trash_days": 7.0,
        "log_keep_days": 7.0,
    },
    "repos": {
        "allow_protocols": ["https", "ssh"],
        "command_timeout_s": 300.0,
        "progress_timeout_s": 60.0,
        "repo_path": "{home}/{repo}",
        "ca_file": "",
    },
    "net": {"allow": []},
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    import os

    for name in list(os.environ):
        if name.startswith("ROOST_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(module, "DEFAULT_CONFIG", tmp_path / "none.toml")
    module.load.cache_clear()
    yield
    module.load.cache_clear()


def test_the_defaults_are_frozen():
    assert Settings().model_dump(mode="json") == DEFAULTS


def test_every_setting_is_documented():
    undocumented = [".".join(path) for path, field in reference.fields(Settings) if not field.description]
    assert undocumented == []


def test_the_file_is_read_and_the_environment_is_above_it(tmp_path, monkeypatch):
    file = tmp_path / "roost.toml"
    file.write_text('state_dir = "/srv/roost"\n[server]\nport = 1234\nhost = "127.0.0.2"\n')
    monkeypatch.setenv("ROOST_CONFIG", str(file))
    monkeypatch.setenv("ROOST_SERVER__PORT", "4321")
    found = module.load()
    assert (found.state_dir, found.server.host, found.server.port) == (Path("/srv/roost"), "127.0.0.2", 4321)


def test_the_state_directory_has_its_short_name(monkeypatch):
    monkeypatch.setenv("ROOST_STATE_DIR", "/srv/a")
    monkeypatch.setenv("ROOST_RUN_DIR", "/run/a")
    found = module.load()
    assert found.server_state == Path("/srv/a/server") and found.api_socket == Path("/run/a/server/api.sock")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[server]\nport = 0\n", "server.port"),
        ("[server]\nprot = 80\n", "server.prot"),
        ('[node]\ninstance = "Roost 1"\n', "node.instance"),
        ('[repos]\nallow_protocols = ["ftp"]\n', "repos.allow_protocols"),
    ],
)
def test_a_bad_value_is_named(tmp_path, monkeypatch, text, named):
    file = tmp_path / "roost.toml"
    file.write_text(text)
    monkeypatch.setenv("ROOST_CONFIG", str(file))
    with pytest.raises(InvalidConfig, match=named.replace(".", r"\.")):
        module.load()


def test_a_file_that_is_no_toml_is_named(tmp_path, monkeypatch):
    file = tmp_path / "roost.toml"
    file.write_text("[server\n")
    monkeypatch.setenv("ROOST_CONFIG", str(file))
    with pytest.raises(InvalidConfig, match=r"roost\.toml"):
        module.load()


def test_a_named_file_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("ROOST_CONFIG", "/nonexistent/roost.toml")
    with pytest.raises(InvalidConfig, match="does not exist"):
        module.load()
