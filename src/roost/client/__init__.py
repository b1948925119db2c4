"""The client of roost's API: typed, asynchronous, and quick to import (see `http`).

`roost.client.sockets` (commands, ssh-agent) is not imported here: websockets cost 60 ms that `roost ls` has no use for.
"""

from roost.client.address import Address, find_server, local_paths, parse_server_url
from roost.client.api import AsyncClient
from roost.client.models import Event, Health, LimitRequest, LogLine, RepoRequest, Step, Workspace

__all__ = [
    "Address",
    "AsyncClient",
    "Event",
    "Health",
    "LimitRequest",
    "LogLine",
    "RepoRequest",
    "Step",
    "Workspace",
    "find_server",
    "local_paths",
    "parse_server_url",
]
