"""Opening the database and bringing its schema up to date.

SQLite runs in WAL with synchronous=FULL: an accepted request survives a power cut; the handful of writes of a restart
cost about a millisecond each.  Migrations run in a thread (Alembic is synchronous) and only when the recorded revision
is not the newest, so that an ordinary start imports no Alembic.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from roost.errors import HostDiskFull, InvalidConfig

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).with_name("migrations")
HEAD = "0001"
"""Newest revision; a test holds it against the files."""


def sqlite_url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


def _pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class Database:
    """One engine and its sessions."""

    def __init__(self, url: str) -> None:
        try:
            self.engine: AsyncEngine = create_async_engine(url)
        except (SQLAlchemyError, ImportError) as error:
            raise InvalidConfig(f"setting database.url: {error}") from error
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine.sync_engine, "connect", _pragmas)
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        # SQLite knows no SELECT … FOR UPDATE: in the one process that opens it, a lock makes read-then-write whole.
        self._writing = asyncio.Lock() if self.engine.dialect.name == "sqlite" else nullcontext()

    async def migrate(self) -> None:
        """Bring the schema to HEAD; does nothing when it is there."""
        if await self._revision() == HEAD:
            return
        url = self.engine.url.render_as_string(hide_password=False)
        await asyncio.to_thread(upgrade, url)

    async def _revision(self) -> str | None:
        async with self.engine.connect() as connection:
            try:
                row = (await connection.execute(text("SELECT version_num FROM alembic_version"))).first()
            except SQLAlchemyError:  # no such table: a new database
                return None
            return str(row[0]) if row else None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session for queries."""
        async with self._sessions() as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A session whose reads and writes are one transaction, whole or not at all. Raises HostDiskFull."""
        try:
            async with self._writing, self._sessions() as session, session.begin():
                yield session
        except OperationalError as error:
            if "disk is full" in str(error.orig) or "disk I/O error" in str(error.orig):
                raise HostDiskFull(f"the database cannot be written: {error.orig}") from error
            raise

    async def close(self) -> None:
        await self.engine.dispose()


def upgrade(url: str) -> None:
    """Bring a database to HEAD with Alembic (synchronous; call in a thread)."""
    from alembic import command

    command.upgrade(_alembic(url), "head")


def downgrade(url: str, revision: str) -> None:
    """Take a database back to a revision, `base` for nothing (synchronous; call in a thread)."""
    from alembic import command

    command.downgrade(_alembic(url), revision)


def _alembic(url: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config
