"""`roost doctor`: what this host has and lacks, what that means for roost, and how to get it.

Everything is looked at where it stands, in parallel, within a second, and nothing is changed: no server, no node and no
engine needs to run.  A check that cannot be made is a `warn` with the reason, never a crash of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from roost.node.doctor import host, kernel, others, programs
from roost.node.doctor.check import Check, Probe, Status
from roost.settings import Settings

__all__ = ["Check", "Status", "checks", "missing"]

_PROBES: tuple[Probe, ...] = (
    host.host,
    kernel.kernel,
    kernel.cgroups,
    kernel.lazy,
    kernel.btrfs,
    host.disk,
    programs.engine,
    programs.network,
    programs.git,
    programs.tools,
    host.ports,
    others.docker,
    others.kubernetes,
)


def checks(settings: Settings) -> list[Check]:
    """All checks, in a fixed order; blocks for less than a second."""
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="doctor") as pool:
        pending = [(probe, pool.submit(_run, probe, settings)) for probe in _PROBES]
        found: list[Check] = []
        for probe, future in pending:
            try:
                found += future.result()
            except OSError as error:
                found.append(Check(probe.__name__, "warn", f"cannot be looked at: {error}", "not known"))
    return found


def _run(probe: Probe, settings: Settings) -> list[Check]:
    return list(probe(settings))


def missing(found: Iterable[Check]) -> list[Check]:
    """Those without which no workspace starts."""
    return [check for check in found if check.required and check.status == "lack"]
