"""Logs: of the present start, of the one before, followed until the end."""

from __future__ import annotations

import asyncio
import time

import pytest

from roost.errors import ContainerNotFound
from roost.runtimes.protocol import Channel, LogLine
from tests.conformance.subjects import Subject, until


async def lines(subject: Subject, *, previous: bool = False) -> list[LogLine]:
    return [line async for line in subject.runtime.logs(subject.container, previous=previous)]


async def said(subject: Subject, count: int) -> list[LogLine]:
    """The log once it has so many lines: an engine writes it a moment later."""

    async def there() -> bool:
        return len(await lines(subject)) >= count

    await until(there, f"{count} lines of log")
    return await lines(subject)


async def test_lines(subject: Subject) -> None:
    await subject.up()
    await subject.say("first")
    await subject.say("zweite Zeile: ä")
    await subject.say("x" * 40000)
    found = await said(subject, 3)
    assert [line.text for line in found] == ["first", "zweite Zeile: ä", "x" * 40000]
    assert all(line.channel is Channel.stdout and abs(line.at - time.time()) < 60 for line in found)


async def test_logs_stay_and_the_previous_start_has_its_own(subject: Subject) -> None:
    await subject.up(1)
    await subject.say("of the first start")
    await said(subject, 1)
    with pytest.raises(ContainerNotFound):
        await lines(subject, previous=True)
    await subject.runtime.delete(subject.container)
    assert [line.text for line in await lines(subject)] == ["of the first start"]
    await subject.up(2)
    await subject.say("of the second start")
    assert [line.text for line in await said(subject, 1)] == ["of the second start"]
    assert [line.text for line in await lines(subject, previous=True)] == ["of the first start"]
    await subject.restart(10)
    assert await lines(subject) == []
    assert [line.text for line in await lines(subject, previous=True)] == ["of the second start"]


async def test_follow_ends_with_the_container(subject: Subject) -> None:
    await subject.up()
    await subject.say("before")
    await said(subject, 1)
    got: list[str] = []

    async def follow() -> None:
        async for line in subject.runtime.logs(subject.container, follow=True):
            got.append(line.text)

    following = asyncio.create_task(follow())

    async def has(count: int) -> bool:
        return len(got) >= count

    await until(lambda: has(1), "what was there before")
    await subject.say("while")
    await until(lambda: has(2), "what comes")
    await subject.say("last")
    await subject.runtime.stop(subject.container, 5)
    await asyncio.wait_for(following, 10)
    assert got == ["before", "while", "last"]
