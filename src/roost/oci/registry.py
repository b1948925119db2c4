"""A client of one registry (OCI distribution specification 1.1), as much of it as roost needs.

Synchronous: uploads and downloads are long and belong to a thread or a process of their own, never to an event loop.
A request that can be repeated is repeated when the connection breaks or the registry is busy (429, 5xx); an upload
begins a new session each time, because registries differ in what they keep of a broken one.
"""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from roost.errors import ImageAuth, ImageInvalid, ImageNotFound, RegistryUnreachable
from roost.oci.layers import (
    CHUNK_BYTES,
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    IMAGE_INDEX,
    IMAGE_MANIFEST,
    digest_bytes,
)
from roost.oci.references import Digest, is_loopback

Progress = Callable[[int, int], None]
"""Bytes done, bytes in all."""

MANIFEST_MAX_BYTES = 4 << 20  # what the specification asks registries to take
_ACCEPT = ", ".join((IMAGE_MANIFEST, IMAGE_INDEX, DOCKER_MANIFEST, DOCKER_MANIFEST_LIST))
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHALLENGE = re.compile(r'([a-zA-Z_]+)="([^"]*)"')


@dataclass(frozen=True)
class Manifest:
    """A manifest or index as the registry holds it."""

    content: bytes
    media_type: str
    digest: Digest


class RegistryClient:
    """Speaks to one registry; a context manager. Raises ImageNotFound, ImageAuth, ImageInvalid, RegistryUnreachable."""

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool,
        auth: tuple[str, str] | None = None,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 60.0,
        attempts: int = 3,
    ) -> None:
        """`host` is `name[:port]` of the API; `timeout_s` is without a byte moving, not for the whole."""
        self.host = host
        self._auth = auth
        self._plain_http = plain_http
        self._attempts = attempts
        self._tokens: dict[str, str] = {}
        self._basic = False
        self._http = httpx.Client(
            base_url=f"{'http' if plain_http else 'https'}://{host}/v2/",
            timeout=httpx.Timeout(timeout_s, connect=connect_timeout_s),
            follow_redirects=True,
            trust_env=not is_loopback(host),  # a proxy has no business with loopback
        )

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # asking

    def ping(self) -> None:
        """Return if a registry answers there and takes our credentials."""
        self._request("GET", "", scope="", what=f"registry {self.host}")

    def manifest(self, path: str, selector: str) -> Manifest:
        """A manifest by tag or digest; one got by digest is verified."""
        what = f"{self.host}/{path}:{selector}"
        reply = self._request("GET", f"{path}/manifests/{selector}", f"repository:{path}:pull", what, accept=_ACCEPT)
        content = reply.content
        if len(content) > MANIFEST_MAX_BYTES:
            raise ImageInvalid(f"{what}: the manifest has {len(content)} bytes")
        digest = digest_bytes(content)
        if selector.startswith("sha256:") and selector != digest:
            raise ImageInvalid(f"{what}: the registry sent something else ({digest})")
        return Manifest(content, reply.headers.get("content-type", IMAGE_MANIFEST).partition(";")[0].strip(), digest)

    def manifest_digest(self, path: str, selector: str) -> Digest | None:
        """What a tag points to now; None: no such tag."""
        try:
            reply = self._request(
                "HEAD", f"{path}/manifests/{selector}", f"repository:{path}:pull", f"{path}:{selector}", accept=_ACCEPT
            )
        except ImageNotFound:
            return None
        found: str | None = reply.headers.get("docker-content-digest")
        return Digest(found) if found else self.manifest(path, selector).digest

    def blob_size(self, path: str, digest: Digest) -> int | None:
        """Size in bytes of a blob of this repository; None: not there."""
        try:
            reply = self._request("HEAD", f"{path}/blobs/{digest}", f"repository:{path}:pull", f"blob {digest}")
        except ImageNotFound:
            return None
        return int(reply.headers.get("content-length", 0))

    def blob(self, path: str, digest: Digest, limit_bytes: int = MANIFEST_MAX_BYTES) -> bytes:
        """A small blob (a configuration), verified."""
        reply = self._request("GET", f"{path}/blobs/{digest}", f"repository:{path}:pull", f"blob {digest}")
        if len(reply.content) > limit_bytes or digest_bytes(reply.content) != digest:
            raise ImageInvalid(f"{self.host}/{path}: blob {digest} is not what its digest says")
        return reply.content

    def tags(self, path: str) -> list[str]:
        """All tags of a repository; none: no such repository."""
        try:
            reply = self._request("GET", f"{path}/tags/list", f"repository:{path}:pull", f"{self.host}/{path}")
        except ImageNotFound:
            return []
        return [str(tag) for tag in (self._json(reply).get("tags") or [])]

    # sending

    def mount_blob(self, path: str, digest: Digest, source: str) -> bool:
        """Have a blob of repository `source` in `path` too, without sending it; False: it must be sent."""
        scope = f"repository:{path}:pull,push"
        reply = self._request(
            "POST", f"{path}/blobs/uploads/?mount={digest}&from={source}", scope, f"blob {digest}", repeat=False
        )
        if reply.status_code == 201:
            return True
        self._http.delete(self._location(reply), headers=self._headers(scope))  # the session it opened instead
        return False

    def upload_bytes(self, path: str, data: bytes) -> Digest:
        """Send a small blob unless it is there."""
        digest = digest_bytes(data)
        if self.blob_size(path, digest) is None:
            self._upload(path, digest, len(data), lambda: iter((data,)))
        return digest

    def upload_file(self, path: str, digest: Digest, file: Path, progress: Progress | None = None) -> bool:
        """Send a file as a blob; False: it was there and nothing was sent. Raises OSError for the file."""
        size = file.stat().st_size
        if self.blob_size(path, digest) is not None:
            if progress:
                progress(size, size)
            return False

        def chunks() -> Iterator[bytes]:
            sent = 0
            with file.open("rb") as source:
                while data := source.read(CHUNK_BYTES):
                    yield data
                    sent += len(data)
                    if progress:
                        progress(sent, size)

        self._upload(path, digest, size, chunks)
        return True

    def put_manifest(self, path: str, selector: str, content: bytes, media_type: str = IMAGE_MANIFEST) -> Digest:
        """Store a manifest under a tag (or its digest); its blobs must be there. Returns its digest."""
        scope, what = f"repository:{path}:pull,push", f"{self.host}/{path}:{selector}"
        self._request("PUT", f"{path}/manifests/{selector}", scope, what, content=content, media_type=media_type)
        return digest_bytes(content)

    def _upload(self, path: str, digest: Digest, size: int, body: Callable[[], Iterator[bytes]]) -> None:
        scope, what = f"repository:{path}:pull,push", f"blob {digest} of {self.host}/{path}"
        for attempt in range(1, self._attempts + 1):
            session = self._request("POST", f"{path}/blobs/uploads/", scope, what)
            url = self._location(session)
            url = f"{url}{'&' if '?' in url else '?'}digest={digest}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            try:
                reply = self._http.put(url, content=body(), headers=headers | self._headers(scope))
            except httpx.TransportError as error:
                if attempt == self._attempts:
                    raise self._unreachable(error) from error
            else:
                if reply.is_success:
                    return
                if reply.status_code not in _BUSY or attempt == self._attempts:
                    raise self._refused(reply, what)
            time.sleep(self._pause(attempt, None))

    # one request

    def _request(
        self,
        method: str,
        url: str,
        scope: str,
        what: str,
        *,
        accept: str = "*/*",
        content: bytes | None = None,
        media_type: str = "",
        repeat: bool = True,
    ) -> httpx.Response:
        """A successful reply; logs in when asked to, repeats what may be repeated."""
        authenticated, attempt = False, 0
        while True:
            attempt += 1
            headers = {"Accept": accept} | ({"Content-Type": media_type} if media_type else {}) | self._headers(scope)
            try:
                reply = self._http.request(method, url, headers=headers, content=content)
            except httpx.TransportError as error:
                if attempt >= self._attempts or not repeat or isinstance(error, httpx.UnsupportedProtocol):
                    raise self._unreachable(error) from error
                time.sleep(self._pause(attempt, None))
                continue
            if reply.status_code == 401 and not authenticated:
                authenticated = True
                self._login(reply, scope)
                continue
            if reply.status_code in _BUSY and attempt < self._attempts and repeat:
                time.sleep(self._pause(attempt, reply))
                continue
            if not reply.is_success:
                raise self._refused(reply, what)
            return reply

    def _headers(self, scope: str) -> dict[str, str]:
        if self._basic and self._auth:
            return {"Authorization": f"Basic {b64encode(':'.join(self._auth).encode()).decode()}"}
        token = self._tokens.get(scope)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _login(self, reply: httpx.Response, scope: str) -> None:
        challenge = reply.headers.get("www-authenticate", "")
        kind = challenge.partition(" ")[0].lower()
        if kind == "basic" and self._auth:
            self._basic = True
            return
        if kind != "bearer":
            raise ImageAuth(f"registry {self.host} wants credentials and there are none")
        values = dict(_CHALLENGE.findall(challenge))
        realm = values.get("realm", "")
        # Credentials must not go out in the clear because a registry says so.
        if urlsplit(realm).scheme != "https" and not (self._plain_http and urlsplit(realm).scheme == "http"):
            raise ImageAuth(f"registry {self.host} names {realm!r} for its tokens, which is not https")
        parameters = {key: values[key] for key in ("service",) if key in values} | ({"scope": scope} if scope else {})
        try:
            answer = self._http.get(realm, params=parameters, auth=self._auth)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not answer.is_success:
            raise ImageAuth(f"registry {self.host} gave no token for {scope or 'anything'} (HTTP {answer.status_code})")
        document = self._json(answer)
        self._tokens[scope] = str(document.get("token") or document.get("access_token") or "")

    def _location(self, reply: httpx.Response) -> str:
        location: str = reply.headers.get("location", "")
        if not location:
            raise ImageInvalid(f"registry {self.host} opened an upload without saying where")
        return urljoin(str(reply.url), location)

    @staticmethod
    def _pause(attempt: int, reply: httpx.Response | None) -> float:
        asked = reply.headers.get("retry-after", "") if reply is not None else ""
        return min(10.0, float(asked)) if asked.isdecimal() else 0.2 * float(2 ** (attempt - 1))

    def _json(self, reply: httpx.Response) -> dict[str, Any]:
        try:
            document = reply.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise RegistryUnreachable(f"{self.host} does not answer as a registry does")
        return document

    def _unreachable(self, error: httpx.TransportError) -> RegistryUnreachable:
        if isinstance(error, httpx.TimeoutException):
            return RegistryUnreachable(f"registry {self.host} does not answer in time")
        return RegistryUnreachable(f"registry {self.host}: {error or type(error).__name__}")

    def _refused(self, reply: httpx.Response, what: str) -> Exception:
        said = ""
        if "json" in reply.headers.get("content-type", ""):
            try:
                errors = reply.json().get("errors") or []
                said = "; ".join(f"{entry.get('code', '')} {entry.get('message', '')}".strip() for entry in errors)
            except (ValueError, AttributeError):
                said = ""
        status = reply.status_code
        text = f"{what}: {said or reply.reason_phrase or 'refused'} (HTTP {status})"
        if status in (401, 403):
            return ImageAuth(text)
        if status == 404:
            return ImageNotFound(text)
        if status in _BUSY:
            return RegistryUnreachable(text)
        return ImageInvalid(text)
