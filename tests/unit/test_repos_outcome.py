"""What git's text means, and that nothing secret or dangerous for a terminal is left in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.errors import RepoCorrupt
from roost.repos import outcome
from roost.repos.clone import command_timeout
from roost.repos.git import HARDENING, Git, parse_progress, proxies
from roost.repos.towards import proxy_for
from roost.repos.unbundle import config_text, read_meta
from roost.repos.urls import parse_url

CORPUS = json.loads(Path(__file__).with_name("test_repos_corpus.json").read_text())


@pytest.mark.parametrize("row", CORPUS, ids=[row["name"] for row in CORPUS])
def test_corpus(row):
    error = outcome.classify(row["exit"], row["stderr"], what="cloning x")
    assert type(error).__name__ == row["class"]
    assert error.message.startswith("cloning x: ") and "\n" not in error.message and len(error.message) < 700
    assert "Cloning into" not in error.message


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter22@h/x",
        "https://hunter22@h/x",
        "Authorization: Basic hunter22",
        "> authorization: Bearer hunter22",
        "https://h/x?private_token=hunter22&a=b",
        "token ghp_hunter22hunter22hunter22",
        "glpat-hunter22hunter22hunter22",
        "the password was hunter22.",
    ],
)
def test_redacted(text):
    assert "hunter22" not in outcome.redact(text, ("hunter22",) if "password" in text else ())


@given(st.text(max_size=200))
def test_no_control_characters_are_left(text):
    cleaned = outcome.redact(text)
    assert not any(char < " " and char not in "\n\t" for char in cleaned) and "\x7f" not in cleaned


@pytest.mark.parametrize(
    "line, expected",
    [
        ("Receiving objects:  42% (25/60), 1.20 MiB | 2.00 MiB/s", ("Receiving objects", 42, 25, 60, False)),
        ("remote: Counting objects: 100% (5/5), done.", ("Counting objects", 100, 5, 5, True)),
        ("remote: Enumerating objects: 17, done.", ("Enumerating objects", None, 17, None, True)),
        ("Resolving deltas:   0% (0/9)", ("Resolving deltas", 0, 0, 9, False)),
        ("Updating files: 100% (3/3), done.", ("Updating files", 100, 3, 3, False)),
        ("fatal: x: 12", None),
        ("remote: Total 32 (delta 0), reused 0", None),
    ],
)
def test_progress(line, expected):
    found = parse_progress(line)
    assert (found and (found.phase, found.percent, found.done, found.total, found.remote)) == expected


def test_the_environment_is_built_from_nothing(monkeypatch, tmp_path):
    strangers = ("GIT_DIR", "GIT_CONFIG_PARAMETERS", "LD_PRELOAD", "SSH_AUTH_SOCK", "ROOST_TOKEN", "GIT_TRACE")
    for name in strangers:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    env = Git(home=tmp_path, protocols=("https",)).environment()
    assert not set(strangers) & set(env)
    assert env["GIT_ALLOW_PROTOCOL"] == "https" and env["https_proxy"] == "http://proxy:3128"
    assert env["HOME"] == str(tmp_path) and env["GIT_CONFIG_GLOBAL"] == "/dev/null"
    config = {env[f"GIT_CONFIG_KEY_{n}"]: env[f"GIT_CONFIG_VALUE_{n}"] for n in range(int(env["GIT_CONFIG_COUNT"]))}
    assert config == {**dict(HARDENING), "protocol.https.allow": "always"}


def test_proxies():
    env = {"HTTPS_PROXY": "http://p:1", "no_proxy": "inner.example,10.0.0.1"}
    assert proxies(env) == {"https_proxy": "http://p:1", "no_proxy": "inner.example,10.0.0.1"}
    assert proxy_for(parse_url("https://h/x"), env) == "http://p:1"
    assert proxy_for(parse_url("https://git.inner.example/x"), env) is None
    assert proxy_for(parse_url("http://h/x"), env) is None


def test_command_timeout():
    assert command_timeout(300, {}) == 300
    assert command_timeout(300, {"GIT_COMMAND_TIMEOUT": "12.5"}) == 12.5
    with pytest.raises(Exception, match="GIT_COMMAND_TIMEOUT"):
        command_timeout(300, {"GIT_COMMAND_TIMEOUT": "soon"})


def test_what_a_bundle_says_is_not_believed():
    hostile = {
        "format": 1,
        "branch": 'x"]\n[core]\nfsmonitor=evil',
        "commit": "--help",
        "shallow": ["1" * 40, "../x", 5],
        "worktree": "yes",
        "remotes": {
            "origin": "https://u:p@h/x.git",
            "evil": "ext::sh -c x",
            'a"]\n[core]': "https://h/x",
            "local": "/etc",
            "n": 5,
        },
        "branches": {
            "main": ["origin", "refs/heads/main"],
            'q"\\uote': ["origin", "refs/heads/x"],
            "b": ["nowhere", "refs/heads/b"],
            "c": ["origin", "refs/heads/c\nfsmonitor = x"],
        },
    }
    meta = read_meta(json.dumps(hostile))
    assert (meta.branch, meta.commit, meta.worktree, meta.shallow) == (None, None, False, ("1" * 40,))
    assert dict(meta.remotes) == {"origin": "https://h/x.git"}
    assert set(meta.branches) == {"main"} or all("\n" not in name for name in meta.branches)
    text = config_text(meta)
    assert "fsmonitor" not in text and text.count("[remote") == 1
    for bad in ("", "[]", "{}", '{"format": 2}', "nonsense"):
        with pytest.raises(RepoCorrupt):
            read_meta(bad)
