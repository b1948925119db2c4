"""What people may name as a repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.errors import InvalidName, InvalidRepository, ProtocolNotAllowed
from roost.repos.urls import (
    Credential,
    LocalPath,
    RepoUrl,
    allowed_protocols,
    check_protocol,
    check_workspace_name,
    directory_name,
    parse,
    parse_url,
    strip_credentials,
    workspace_name,
)


@pytest.mark.parametrize(
    "source, url, scheme, host, port, name",
    [
        ("https://git.example/a/b.git", None, "https", "git.example", None, "b"),
        ("HTTPS://Git.Example./a/b/", "https://git.example/a/b/", "https", "git.example", None, "b"),
        ("http://h:8080/x", None, "http", "h", 8080, "x"),
        ("ssh://git@h:2222/~/x.git", None, "ssh", "h", 2222, "x"),
        ("git@h.example:team/x.git", None, "ssh", "h.example", None, "x"),
        ("h:x", None, "ssh", "h", None, "x"),
        ("git@[::1]:p/q", None, "ssh", "::1", None, "q"),
        ("https://[2001:db8::1]:443/p", None, "https", "2001:db8::1", 443, "p"),
        ("git://h/p", None, "git", "h", None, "p"),
        ("file:///srv/a%20b.git", None, "file", "", None, "a-b"),
        ("https://bücher.example/x", "https://xn--bcher-kva.example/x", "https", "xn--bcher-kva.example", None, "x"),
        ("git+ssh://h/p", "ssh://h/p", "ssh", "h", None, "p"),
    ],
)
def test_urls(source, url, scheme, host, port, name):
    parsed = parse_url(source)
    assert (parsed.url, parsed.scheme, parsed.host, parsed.port) == (url or source, scheme, host, port)
    assert parsed.repo_name == name and parsed.credential is None


@pytest.mark.parametrize(
    "source",
    [
        "", "  ", "-x", "--upload-pack=touch /x", "ssh://-oProxyCommand=x/p", "-oProxyCommand=x:p", "git@-h:p", "h:-p",
        "ext::sh -c x", "fd::17", "https://h", "https://h/", "https:///p", "https://h\n/p", "https://h/p%0a", "https://h/p%00",
        "ssh://u:secret@h/p", "ssh://-u@h/p", "ssh://u%20v@h/p", "file://host/p", "file:///", "ftp://h/p", "javascript://h/p",
        "https://h:0/p", "https://h:99999/p", "https://h:x/p", "https://a b/p", "https://h/p?token=x", "https://h/p#x",
        "https://h%2fx/p", "https://../p", "git://u@h/p", "h:", "a\x1bb", "https://u%0a:p@h/x", "https://[::1/p", "https://[x]/p",
    ],
)  # fmt: skip
def test_refused(source):
    with pytest.raises(InvalidRepository):
        parse(source)


@pytest.mark.parametrize("source", [".", "..", "./x", "/x/y", "~/x", "x", "x/y", "./a:b", "x/y:z"])
def test_paths(source):
    parsed = parse(source)
    assert isinstance(parsed, LocalPath)
    assert parsed.explicit == (source[0] in "./~")
    with pytest.raises(InvalidRepository):
        parse_url(source)


def test_credentials_are_apart_and_masked():
    parsed = parse_url("https://us%40er:p%3Aw@h/x")
    assert parsed.url == "https://h/x"
    assert parsed.credential == Credential("us@er", "p:w")
    token = parse_url("https://ghp_tokentoken@h/x")
    assert token.credential == Credential("ghp_tokentoken", "")
    for text in (repr(parsed), str(parsed), f"{parsed}", repr(parsed.credential), str(parsed.credential), repr(token)):
        assert "us@er" not in text and "p:w" not in text and "ghp_" not in text
    assert strip_credentials("https://u:p@h/x.git") == "https://h/x.git"
    assert strip_credentials("../elsewhere") is None


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_anything_is_read_or_refused(text):
    try:
        parsed = parse(text)
    except InvalidRepository:
        return
    assert not text.startswith("-")
    name = parsed.repo_name
    assert name and "/" not in name and not name.startswith((".", "-")) and name.lower() != ".git"
    check_workspace_name(parsed.workspace_name)
    if isinstance(parsed, RepoUrl):
        again = parse_url(parsed.url)
        assert again.url == parsed.url and again.host == parsed.host and again.credential is None
        assert not parsed.host.startswith("-") and not parsed.path.startswith("-")


_secret = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=20)


@given(_secret, _secret, st.sampled_from(["https", "http"]))
def test_a_password_never_shows(user, password, scheme):
    from urllib.parse import quote

    parsed = parse_url(f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@h.example/t/r.git")
    assert parsed.credential == Credential(user, password)
    assert parsed.url == f"{scheme}://h.example/t/r.git"
    assert repr(parsed) == f"RepoUrl('{scheme}://h.example/t/r.git', credential=***)"


@given(st.text(max_size=80))
def test_every_text_gives_a_valid_name(text):
    check_workspace_name(workspace_name(text))
    name = directory_name(text)
    assert len(name.encode()) <= 100 and name == Path(name).name and not name.startswith(".")


@pytest.mark.parametrize(
    "text, name",
    [("Ünï Code", "uni-code"), ("a--b", "a-b"), ("ls", "ls-repo"), ("日本", "workspace"), ("x" * 60, "x" * 40)],
)
def test_workspace_names(text, name):
    assert workspace_name(text) == name


@pytest.mark.parametrize("name", ["", "A", "a--b", "-a", "a-", "a" * 41, "ls", "show", "cancel", "rm", "a_b", "a\n"])
def test_names_that_are_refused(name):
    with pytest.raises(InvalidName):
        check_workspace_name(name)


@pytest.mark.parametrize("text, name", [("/a/.ssh", "ssh"), ("/p/.git", "p"), ("..", "repository"), ("/x/r.GIT/", "r")])
def test_directory_names(text, name):
    assert directory_name(text) == name


def test_protocols():
    check_protocol(parse_url("https://h/x"), ["https"])
    with pytest.raises(ProtocolNotAllowed):
        check_protocol(parse_url("h:x"), ["https"])
    assert allowed_protocols(["https"], {}) == ("https",)
    assert allowed_protocols(["https"], {"GIT_ALLOW_PROTOCOL": "ssh:ext:file"}) == ("ssh", "file")
    assert allowed_protocols(["https"], {"GIT_ALLOW_PROTOCOL": ""}) == ()


def test_the_command_line_imports_it_cheaply():
    code = "import sys, roost.repos.urls, roost.repos.bundle; "
    code += "print('pydantic' in sys.modules, 'asyncio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["False", "False"]
