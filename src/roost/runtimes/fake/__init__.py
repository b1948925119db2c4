"""A runtime in memory for tests: it passes the conformance suite, and can be told to fail."""

from roost.runtimes.fake.runtime import FakeRuntime

__all__ = ["FakeRuntime"]
