"""What git's exit means: redaction of its stderr, and the typed error for each kind of failure.

git has one exit status (128) for nearly everything, so the text decides.  It is asked for in the C locale; the server's
own words (`remote: …`) and ssh's come in whatever wording the other side has.  The patterns are tried in order, the
most specific first: "Authentication failed" after a 401 is a refusal of credentials even when the text also says that
the repository could not be read.  tests/unit/test_repos_corpus.json holds real texts with the class each must get.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from roost.errors import (
    BadRef,
    CloneFailed,
    HostDiskFull,
    ProtocolNotAllowed,
    RepoAuth,
    RepoCorrupt,
    RepoHostKey,
    RepoNotFound,
    RepoTimeout,
    RepoUnreachable,
    RoostError,
)

STDERR_MAX: Final = 32 << 10
_MESSAGE_MAX: Final = 600

_USERINFO = re.compile(r"(://)[^/@\s'\"]+@")
_HEADER = re.compile(r"(?i)\b(authorization|proxy-authorization|cookie|private-token|x-api-key)\b\s*[:=][^\r\n]*")
_TOKEN = re.compile(
    r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|gl[a-z]{2,6}-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{12,}"
    r"|ATBB\w{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
_QUERY = re.compile(r"(?i)([?&](?:[\w-]*token|password|passwd|secret|key|signature|sig)=)[^&\s'\"]+")
_CONTROL = re.compile(r"[^\t\n\x20-\x7e\u00a0-\U0010ffff]")

_KINDS: Final[tuple[tuple[type[RoostError], re.Pattern[str]], ...]] = tuple(
    (kind, re.compile("|".join(patterns), re.IGNORECASE))
    for kind, patterns in (
        (HostDiskFull, (r"no space left on device", r"disk quota exceeded")),
        (
            ProtocolNotAllowed,
            (
                r"transport '[^']*' not allowed",
                r"unable to find remote helper for",
                r"protocol .* (?:not supported|disabled)",
            ),
        ),
        (
            RepoHostKey,
            (r"host key verification failed", r"remote host identification has changed", r"no matching host key type"),
        ),
        (
            # Before a broken transfer: whoever sends damaged bytes also makes the transfer end early.
            RepoCorrupt,
            (
                r"fsck error",
                r"pack has (?:bad|\d+ unresolved)",
                r"pack (?:is corrupted|signature mismatch|has junk)",
                r"inflate returned|inflate: data stream error|serious inflate inconsistency",
                r"object .* (?:is corrupt|corrupted)",
                r"bad (?:band|pack header|line length|object)",
                r"remote did not send all necessary objects",
                r"missing (?:blob|tree|commit|necessary) ",
                r"did not receive expected object",
                r"unable to read (?:tree|sha1 file)",
            ),
        ),
        (
            RepoUnreachable,
            (
                r"bytes of body are still expected",
                r"unexpected disconnect while reading sideband",
                r"early eof",
                r"the remote end hung up unexpectedly",
                r"transfer closed with",
                r"could not resolve (?:host|proxy)",
                r"temporary failure in name resolution",
                r"name or service not known",
                r"failed to connect to",
                r"couldn't connect to server",
                r"connection refused",
                r"connection timed out",
                r"connection reset",
                r"no route to host",
                r"network is unreachable",
                r"operation timed out",
                r"kex_exchange_identification",
                r"connection closed by (?!.*\[preauth\])",
                r"banner exchange",
                r"ssl certificate problem",
                r"server certificate verification failed",
                r"certificate subject name .* does not match",
                r"does not match target host name",
                r"gnutls_handshake\(\) failed",
                r"ssl_error_syscall",
                r"tls connection was non-properly terminated",
                r"ssl_connect",
                r"proxy connect aborted",
                r"received http code \d+ from proxy",
                r"unable to look up ",
                r"the requested url returned error: (?:408|429|5\d\d)",
                r"empty reply from server",
                r"unable to connect to",
            ),
        ),
        (
            RepoAuth,
            (
                r"authentication failed",
                r"permission denied \([\w,-]*(?:publickey|password|keyboard-interactive|gssapi)[\w,-]*\)",
                r"could not read (?:username|password) for",
                r"invalid username or (?:password|token)",
                r"http basic: access denied",
                r"the requested url returned error: (?:401|403|407)",
                r"too many authentication failures",
                r"sign_and_send_pubkey",
                r"access denied(?! or repository not exported)",
                r"support for password authentication was removed",
            ),
        ),
        (
            BadRef,
            (
                r"remote branch .* not found in upstream",
                r"couldn't find remote ref",
                r"not our ref",
                r"unknown revision or path",
                r"invalid refspec",
            ),
        ),
        (
            RepoNotFound,
            (
                r"repository '[^']*' not found",
                r"repository not found",
                r"does not appear to be a git repository",
                r"the requested url returned error: (?:404|410)",
                r"repository '[^']*' does not exist",
                r"project you were looking for could not be found",
                r"no such file or directory\W+fatal: could not read from remote",
                r"not valid: is this a git repository",
                r"access denied or repository not exported",
            ),
        ),
        (RepoCorrupt, (r"invalid index-pack output", r"protocol error", r"invalid (?:path|object|gitfile)", r"bundle")),
    )
)

_SAYING: Final = re.compile(
    r"(?:fatal|error|remote|ssh|warning|ERROR): |Permission denied|Host key|kex_|Connection|WARNING"
)
_NOISE: Final = (
    "cloning into",
    "hint:",
    "please make sure you have",
    "and the repository exists",
    "warning: permanently added",
)


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """The text without credentials and without control characters that would drive a terminal."""
    for secret in sorted((one for one in secrets if len(one) >= 4), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _USERINFO.sub(r"\1***@", text)
    text = _HEADER.sub(r"\1: ***", text)
    text = _QUERY.sub(r"\1***", text)
    text = _TOKEN.sub("***", text)
    return _CONTROL.sub("", text)


def error_class(stderr: str) -> type[RoostError]:
    """The kind of failure that git's (or ssh's) text tells of; CloneFailed when nothing fits."""
    for kind, pattern in _KINDS:
        if pattern.search(stderr):
            return kind
    return CloneFailed


def classify(exit_code: int, stderr: str, *, what: str) -> RoostError:
    """The error to raise for a git command that ended with this status and (redacted) text."""
    kind = error_class(stderr)
    message = f"{what}: {summary(stderr)}" if summary(stderr) else f"{what}: git ended with status {exit_code}"
    details = {"exit_code": exit_code, "stderr": stderr[-4096:]}
    if kind is RepoUnreachable and re.search(r"certificate", stderr, re.IGNORECASE):
        next_step = "Name the host's CA in [repos] ca_file, if its certificate is to be trusted."
        return RepoUnreachable(message, next_step=next_step, details=details)
    return kind(message, details=details)


def timed_out(what: str, seconds: float, *, progress: bool) -> RepoTimeout:
    """The error for a git command that was ended by us."""
    if progress:
        return RepoTimeout(
            f"{what}: nothing came for {seconds:g} s",
            next_step="Check the repository's host and the network, or raise [repos] progress_timeout_s.",
        )
    return RepoTimeout(f"{what}: not done after {seconds:g} s")


def summary(stderr: str) -> str:
    """The lines that say something, as one line of bounded length."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.lower().startswith(_NOISE) and set(line) - set("@-= ")]
    said = [line for line in lines if _SAYING.search(line)] or lines
    joined = "; ".join(dict.fromkeys(said))
    return joined if len(joined) <= _MESSAGE_MAX else "… " + joined[-_MESSAGE_MAX:]
