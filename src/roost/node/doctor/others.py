"""Other places to run workspaces, which roost does not need: Docker and Kubernetes."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from roost.node.doctor.check import Check
from roost.settings import Settings

_ANSWER_S = 0.3


def docker(settings: Settings) -> Iterable[Check]:
    """Whether a Docker answers on its local socket."""
    meaning = "not needed: a further place to run workspaces, in a coming release"
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not address.startswith("unix://"):
        yield Check("Docker", "warn", f"DOCKER_HOST is {address}; only local sockets are looked at", meaning)
        return
    path = address.removeprefix("unix://")
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_ANSWER_S)
            client.connect(path)
            client.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            reply = client.recv(4096).decode(errors="replace")
    except OSError as error:
        detail = f"{path} does not answer ({error.strerror or error})" if Path(path).exists() else f"no {path}"
        yield Check("Docker", "lack", detail, meaning, "`apt-get install docker.io`, if you want it")
        return
    found = re.search(r"(?mi)^server: *(.+?)\r?$", reply)
    yield Check("Docker", "have", f"{found[1] if found else 'it'} answers on {path}", meaning)


def kubernetes(settings: Settings) -> Iterable[Check]:
    """Whether a configuration of Kubernetes is there; it is not tried."""
    meaning = "not needed: a further place to run workspaces, in a coming release"
    named = [Path(item) for item in os.environ.get("KUBECONFIG", "").split(":") if item]
    for file in [*named, Path.home() / ".kube/config"]:
        if file.is_file():
            yield Check("Kubernetes", "have", f"a configuration in {file} (not tried)", meaning)
            return
    if Path("/var/run/secrets/kubernetes.io/serviceaccount/token").is_file():
        yield Check("Kubernetes", "have", "this is a pod with a service account", meaning)
        return
    yield Check("Kubernetes", "lack", "no kubeconfig", meaning, "set KUBECONFIG, if you want it")
