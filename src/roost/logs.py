"""How our processes log: one structured line an event, to stderr."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str) -> None:
    """Send structlog and the standard library's loggers to stderr; human on a terminal, JSON lines elsewhere."""
    number = logging.getLevelNamesMapping()[level.upper()]
    human = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.ExceptionRenderer() if not human else structlog.processors.StackInfoRenderer(),
            structlog.dev.ConsoleRenderer() if human else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    form = "%(levelname)s %(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=max(number, logging.WARNING), format=form)
