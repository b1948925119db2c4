"""The host's own apt sources, so that an image comes from the mirrors this host uses: local ones too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

APT = Path("/etc/apt")


def host_suite() -> str:
    """Code name of the host's release, such as `bookworm`."""
    values = {}
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        values[name] = value.strip('"')
    return values.get("VERSION_CODENAME") or "bookworm"


def for_suite(suite: str, host: str = "") -> list[str]:
    """Source lines (sources.list(5)) for a release: the host's own release with its updates and security; another one
    from the host's first mirror. Empty: the host has none that fits."""
    host = host or host_suite()
    own = [line for line in host_sources() if _suite_of(line).split("-")[0].split("/")[0] == host]
    distribution = [line for line in own if _is_distribution(line)]
    if suite == host:
        return distribution or own
    mirrors = [line for line in distribution if _suite_of(line) == host]
    return [line.replace(f" {host} ", f" {suite} ", 1) for line in mirrors[:1]]


def host_sources() -> Iterator[str]:
    """Every enabled binary source of the host, as one-line entries (sources.list(5)), deb822 files too."""
    for file in (APT / "sources.list", *sorted((APT / "sources.list.d").glob("*.list"))):
        if file.is_file():
            for line in file.read_text(errors="replace").splitlines():
                text = line.partition("#")[0].strip()
                if text.startswith(("deb ", "deb\t")):
                    yield re.sub(r"\s+", " ", text)
    for file in sorted((APT / "sources.list.d").glob("*.sources")):
        for block in re.split(r"\n\s*\n", file.read_text(errors="replace")):
            fields: dict[str, str] = {}
            last = ""
            for line in block.splitlines():
                if line.startswith("#"):
                    continue
                if line[:1].isspace():
                    fields[last] = f"{fields.get(last, '')}\n{line.strip()}"
                elif ":" in line:
                    last, _, value = line.partition(":")
                    last = last.strip().lower()
                    fields[last] = value.strip()
            if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
                continue
            key = fields.get("signed-by", "")
            options = f"[signed-by={key}] " if key.startswith("/") else ""
            for uri in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield f"deb {options}{uri} {suite} {' '.join(fields.get('components', '').split())}".strip()


def _suite_of(line: str) -> str:
    words = re.sub(r"\[[^]]*\]", "", line).split()
    return words[2] if len(words) > 2 else ""


def _is_distribution(line: str) -> bool:
    """Whether a source is the distribution itself: a third party's has no component `main` of a release of its name
    that we could tell apart, but does not end in /debian, /debian-security or /ubuntu."""
    words = re.sub(r"\[[^]]*\]", "", line).split()
    path = words[1].rstrip("/")
    return "main" in words[3:] and re.search(r"/(debian|debian-security|ubuntu|ubuntu-ports)$", path) is not None
