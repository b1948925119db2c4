"""References are read as docker reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.errors import InvalidReference
from roost.oci.references import (
    ArchiveReference,
    LayoutReference,
    Reference,
    is_loopback,
    is_plain_http,
    parse,
    parse_remote,
)

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("library/debian", "docker.io/library/debian:latest"),
        ("me/thing", "docker.io/me/thing:latest"),
        ("index.docker.io/debian", "docker.io/library/debian:latest"),
        ("localhost/thing", "localhost/thing:latest"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
        ("127.0.0.1:7767/default", "127.0.0.1:7767/default:latest"),
        ("[::1]:5000/a:b", "[::1]:5000/a:b"),
        ("Host/thing", "Host/thing:latest"),
        ("ghcr.io/o/r@" + DIGEST, "ghcr.io/o/r@" + DIGEST),
        ("ghcr.io/o/r:v1@" + DIGEST, "ghcr.io/o/r:v1@" + DIGEST),
        ("a__b/c---d.e_f", "docker.io/a__b/c---d.e_f:latest"),
    ],
)
def test_normal_form(text, normal):
    found = parse_remote(text)
    assert str(found) == normal
    assert parse_remote(str(found)) == found
    assert parse_remote(found.familiar) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("Debian", "lower case"),
        ("a b", "repository name"),
        ("debian:", "not a tag"),
        ("debian:-x", "not a tag"),
        ("debian:" + "x" * 129, "not a tag"),
        ("debian@sha256:12", "64 hexadecimal"),
        ("debian@md5:" + HEX, "64 hexadecimal"),
        ("https://host.io/a", "leave out the https://"),
        ("host.io:0/a", "host"),
        ("host.io:99999/a", "host"),
        ("host.io/", "repository name"),
        ("/a", "repository name"),
        ("a//b", "repository name"),
        ("a/../b", "repository name"),
        ("--help", "repository name"),
        ("debian\n", "repository name"),
        ("débian", "repository name"),
        (HEX, "image id"),
        ("host.io/" + "a" * 300, "repository name"),
    ],
)
def test_what_is_none(text, says):
    with pytest.raises(InvalidReference, match=says):
        parse_remote(text)


def test_files():
    assert parse("oci:/srv/layout:v1") == LayoutReference(Path("/srv/layout"), "v1")
    assert str(parse("oci:/srv/layout")) == "oci:/srv/layout"
    archive = parse("docker-archive:/srv/a.tar:debian:12")
    assert isinstance(archive, ArchiveReference) and archive.tag == "docker.io/library/debian:12"
    for text in ("oci:", "docker-archive:", "oci:/a:b c"):
        with pytest.raises(InvalidReference):
            parse(text)


def test_docker_hubs_api_is_elsewhere():
    assert parse_remote("debian").api_host == "registry-1.docker.io"
    assert parse_remote("ghcr.io/a/b").api_host == "ghcr.io"


@pytest.mark.parametrize(
    ("host", "listed", "plain"),
    [
        ("127.0.0.1:7767", (), True),
        ("127.9.9.9", (), True),
        ("localhost:80", (), True),
        ("[::1]:5000", (), True),
        ("registry.lan:5000", (), False),
        ("registry.lan:5000", ("registry.lan",), True),
        ("registry.lan:5000", ("registry.lan:5000",), True),
        ("registry.lan:5001", ("registry.lan:5000",), False),
        ("localhost.example.org", (), False),
        ("127.0.0.1.example.org", (), False),
    ],
)
def test_plain_http(host, listed, plain):
    assert is_plain_http(host, listed) is plain
    if not listed:
        assert is_loopback(host) is plain


component = st.from_regex(r"[a-z0-9]+((\.|_|__|-{1,3})[a-z0-9]+){0,2}", fullmatch=True).filter(lambda s: len(s) < 30)
hosts = st.sampled_from(["docker.io", "localhost", "localhost:5000", "ghcr.io", "a.b-c.d:443", "[::1]:5", "UPPER"])
tags = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@given(hosts, st.lists(component, min_size=2, max_size=4), tags, st.booleans())
def test_what_is_written_is_read_back(host, parts, tag, pinned):
    reference = Reference(host, "/".join(parts), tag)
    if pinned:
        reference = reference.with_digest(parse_remote("x@" + DIGEST).digest)  # type: ignore[arg-type]
    assert parse_remote(str(reference)) == reference


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_a_typed_error(text):
    try:
        found = parse(text)
    except InvalidReference as error:
        assert error.exit_code == 2
        return
    if isinstance(found, Reference):
        assert parse_remote(str(found)) == found
        assert not any(character.isspace() for character in str(found))
        assert ".." not in found.path.split("/")
