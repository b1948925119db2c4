"""Workspaces in a real SQLite database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect

from roost.db.engine import HEAD, MIGRATIONS, Database, downgrade, sqlite_url, upgrade
from roost.db.tables import Base
from roost.errors import InvalidConfig, InvalidName, WorkspaceExists, WorkspaceNotFound
from roost.workspaces.model import Desired, Observed, Report, WorkspaceId, WorkspaceSpec
from roost.workspaces.store import WorkspaceStore


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(sqlite_url(tmp_path / "roost.db"))
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
def store(database: Database) -> WorkspaceStore:
    return WorkspaceStore(database)


def spec(name: str = "w") -> WorkspaceSpec:
    return WorkspaceSpec(name=name, owner="root", image="127.0.0.1:1/x:1")


def seen(ident: str, observed: Observed, generation: int, start: int = 1) -> Report:
    return Report(workspace=WorkspaceId(ident), generation=generation, start=start, observed=observed)


async def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))

    async with database.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_migrations_down_and_up_again(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "x.db")
    await asyncio.to_thread(upgrade, url)
    await asyncio.to_thread(downgrade, url, "base")
    database = Database(url)
    async with database.engine.connect() as connection:
        tables = await connection.run_sync(lambda c: inspect(c).get_table_names())
    assert tables == ["alembic_version"]
    await database.migrate()
    assert await WorkspaceStore(database).all() == []
    await database.close()


def test_head_is_the_newest_file() -> None:
    assert max(path.name[1:5] for path in (MIGRATIONS / "versions").glob("v*.py")) == HEAD


def test_a_url_that_is_none() -> None:
    with pytest.raises(InvalidConfig):
        Database("nonsense")


async def test_create_get_and_the_name_clash(store: WorkspaceStore) -> None:
    change = await store.create(spec())
    assert (await store.get("w")).id == change.row.id
    with pytest.raises(WorkspaceExists):
        await store.create(spec())
    assert len(await store.all()) == 1


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a--b", "ls", "x" * 41, "a b", "ä", "a\n"])
async def test_names_that_are_none(store: WorkspaceStore, name: str) -> None:
    with pytest.raises(InvalidName):
        await store.create(spec(name))


async def test_delete_trash_undelete_and_purge(store: WorkspaceStore) -> None:
    first = (await store.create(spec())).row
    await store.request("w", Desired.deleted)
    with pytest.raises(WorkspaceNotFound):
        await store.get("w")
    assert (await store.latest("w")).id == first.id
    await store.apply(seen(first.id, Observed.deleted, 2))
    second = (await store.create(spec())).row
    with pytest.raises(WorkspaceExists):
        await store.undelete("w")
    assert second.id != first.id
    await store.request("w", Desired.deleted)
    back = (await store.undelete("w")).row
    assert (back.id, back.desired, back.live_name) == (second.id, "stopped", "w")
    purged = await store.purge_due(timedelta(0))
    assert [change.row.id for change in purged] == [first.id]
    await store.apply(seen(first.id, Observed.deleted, purged[0].row.generation))
    assert first.id not in {row.id for row in await store.all(deleted=True)}
    assert first.id not in {wanted.workspace for wanted in await store.assignments()}


async def test_many_writers_lose_no_update(store: WorkspaceStore) -> None:
    await store.create(spec())
    await asyncio.gather(*(store.request("w", Desired.running, anew=True) for _ in range(25)))
    row = await store.get("w")
    assert (row.generation, row.start) == (26, 26)


async def test_events_are_in_order_and_can_be_read_on(store: WorkspaceStore) -> None:
    ident = (await store.create(spec())).row.id
    await store.apply(seen(ident, Observed.creating, 1))
    await store.apply(seen(ident, Observed.running, 1))
    events = await store.events(ident, 0)
    assert [(event.kind, event.after) for event, _ in events] == [
        ("note", None), ("state", "creating"), ("state", "running"),
    ]  # fmt: skip
    after = await store.events(ident, events[1][0].id)
    assert [event.after for event, _ in after] == ["running"]
    assert {name for _, name in events} == {"w"}


async def test_a_report_about_nothing_we_know(store: WorkspaceStore) -> None:
    with pytest.raises(WorkspaceNotFound):
        await store.apply(seen("nothing", Observed.running, 1))


async def test_a_node_is_told_what_to_keep_up_and_not_what_failed_or_lies_in_the_trash(store: WorkspaceStore) -> None:
    for name, observed in (("runs", Observed.running), ("failed", Observed.error), ("new", None), ("gone", None)):
        ident = (await store.create(spec(name))).row.id
        if observed is not None:
            await store.apply(seen(ident, observed, 1))
        if name == "gone":
            await store.request(name, Desired.deleted)
            await store.apply(seen(ident, Observed.deleted, 2))
    assert {wanted.spec.name for wanted in await store.assignments()} == {"runs", "new"}
    await store.request("failed", Desired.running)
    assert "failed" in {wanted.spec.name for wanted in await store.assignments()}
