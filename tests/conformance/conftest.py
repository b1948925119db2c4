from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from roost.runtimes.fake import FakeRuntime
from roost.runtimes.protocol import ImageRef
from tests.conformance.engine import TestEngine
from tests.conformance.images import Layer, build
from tests.conformance.subjects import REF, UPGRADE, CriSubject, FakeSubject, Subject

NEEDED = ("containerd", "runc", "ctr", "busybox")


@pytest.fixture(scope="session")
def cri_engine() -> Iterator[TestEngine]:
    """A containerd of our own with two images; one for all tests of a run."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(missing or NEEDED)}")
    engine = TestEngine()

    async def begin() -> None:
        await engine.start()
        await engine.add_image(REF, build())
        await engine.add_image(UPGRADE, build(Layer(files={"etc/release": (b"second\n", 0o644, 0)})))

    async def end() -> None:
        await engine.stop()

    # In a thread, since a fixture of a running loop may be who asks for us.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(asyncio.run, begin()).result()
            yield engine
        finally:
            thread.submit(asyncio.run, end()).result()


@pytest.fixture(params=["fake", "cri"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    """Each runtime in turn."""
    made: Subject
    if request.param == "fake":
        fake = FakeRuntime(tmp_path)
        image = fake.add_image(REF, user="dev", env=("FROM_IMAGE=yes",), labels={"made-by": "roost-test"})
        made = FakeSubject(fake, image, fake.add_image(UPGRADE, user="dev", env=("FROM_IMAGE=yes",)), fake=fake)
    else:
        engine: TestEngine = request.getfixturevalue("cri_engine")
        made = await cri_subject(engine)
    before = open_files()
    try:
        yield made
    finally:
        await made.done()
    assert open_files() - before <= 0, "descriptors are left"


@pytest.fixture
async def cri(cri_engine: TestEngine) -> AsyncIterator[CriSubject]:
    """The real one only, for what the fake cannot have."""
    made = await cri_subject(cri_engine)
    try:
        yield made
    finally:
        await made.done()


async def cri_subject(engine: TestEngine) -> CriSubject:
    runtime = engine.runtime()
    image, upgrade = await runtime.image(ImageRef(REF)), await runtime.image(ImageRef(UPGRADE))
    assert image is not None and upgrade is not None
    return CriSubject(runtime, image, upgrade, engine=engine)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
