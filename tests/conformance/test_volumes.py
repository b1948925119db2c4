"""Volumes: trash keeps, restore brings back, purge destroys only what is in the trash; tools see directories."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import pytest

from roost.errors import EngineTimeout, ImageNotFound, VolumeNotFound
from roost.runtimes.protocol import ImageDigest, Tool, VolumeInfo, VolumeName
from tests.conformance.subjects import Subject

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def tools_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' tool is no part of the installed package, and the working directory is not searched."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"))


SEES = Tool("tests.conformance.tool", ("{image}", "{volume}"))


async def info(subject: Subject) -> VolumeInfo | None:
    return next((found for found in await subject.runtime.volumes() if found.name == subject.volume), None)


async def test_trash_restore_purge(subject: Subject) -> None:
    runtime, name = subject.runtime, subject.volume
    await subject.up()
    assert (await subject.run("sh", "-c", "echo precious >kept")).code == 0
    await runtime.delete(subject.container)
    await runtime.purge_volume(name)  # in use: left alone
    found = await info(subject)
    assert found is not None and found.trashed_at is None
    await runtime.trash_volume(name)
    await runtime.trash_volume(name)
    found = await info(subject)
    assert found is not None and found.trashed_at is not None and abs(found.trashed_at - time.time()) < 60
    with pytest.raises(VolumeNotFound):
        await runtime.create(subject.spec(2))
    await runtime.restore_volume(name)
    await runtime.restore_volume(name)
    await subject.up(3)
    assert (await subject.run("cat", "kept")).out == b"precious\n"
    await runtime.delete(subject.container)
    await runtime.trash_volume(name)
    await runtime.purge_volume(name)
    await runtime.purge_volume(name)
    assert await info(subject) is None
    with pytest.raises(VolumeNotFound):
        await runtime.restore_volume(name)


async def test_absent_volumes(subject: Subject) -> None:
    await subject.runtime.trash_volume(VolumeName("roost-none-home"))
    await subject.runtime.purge_volume(VolumeName("roost-none-home"))
    with pytest.raises(VolumeNotFound):
        await subject.runtime.run_tool(SEES, subject.image, VolumeName("roost-none-home"))


async def test_a_tool_sees_image_and_volume(subject: Subject) -> None:
    await subject.runtime.create_volume(subject.volume, 0, {})
    for _ in range(2):
        result = await subject.runtime.run_tool(SEES, subject.image, subject.volume)
        assert result.exit_code == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["volume"] == ["first", "second"], "each run left a file there"
    if subject.real:
        assert {"bin", "etc", "home"} <= set(seen["image"])
        assert seen["read_only"] is True


async def test_a_tool_with_an_image_of_several_layers(subject: Subject) -> None:
    await subject.runtime.create_volume(subject.volume, 0, {})
    result = await subject.runtime.run_tool(SEES, subject.upgrade, subject.volume)
    assert result.exit_code == 0, result.stderr


async def test_a_tool_that_fails_and_one_that_hangs(subject: Subject) -> None:
    result = await subject.runtime.run_tool(Tool("tests.conformance.tool", ("--fail",)), subject.image)
    assert (result.exit_code, result.stdout, result.stderr) == (9, b"", b"no\n")
    begun = time.monotonic()
    with pytest.raises(EngineTimeout):
        await subject.runtime.run_tool(Tool("tests.conformance.tool", ("--hang",)), subject.image, timeout_s=2)
    assert time.monotonic() - begun < 10
    hanging = asyncio.create_task(subject.runtime.run_tool(Tool("tests.conformance.tool", ("--hang",)), subject.image))
    await asyncio.sleep(0.5)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(hanging, 10)


async def test_a_tool_needs_its_image(subject: Subject) -> None:
    gone = type(subject.image)(subject.image.ref, ImageDigest("sha256:" + "0" * 64), 0)
    with pytest.raises(ImageNotFound):
        await subject.runtime.run_tool(SEES, gone)


async def test_a_tool_is_not_taken_from_the_working_directory(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/json.py").write_text("raise SystemExit('hijacked')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(p).absolute()) for p in sys.path if p))
    monkeypatch.chdir(tmp_path / "here")
    await subject.runtime.create_volume(subject.volume, 0, {})
    result = await subject.runtime.run_tool(SEES, subject.image, subject.volume)
    assert result.exit_code == 0, result.stderr
