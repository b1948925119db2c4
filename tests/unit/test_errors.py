"""The tree of errors: stable codes, exit codes of the interface, the same error on both sides of the wire."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from roost import errors
from scripts import reference

FAMILIES = {"Failed": 1, "Usage": 2, "NotFound": 3, "Conflict": 4, "Refused": 5, "Unavailable": 6, "TimedOut": 7}
# What the shell's own convention says of commands that cannot be run; nothing else leaves its family's exit code.
OWN_EXIT_CODES = {"exec.command_not_found": 127, "exec.not_executable": 126}


def all_leaves() -> list[type[errors.RoostError]]:
    return list(reference.leaves(errors.RoostError))


def test_the_families_are_seven_and_carry_the_exit_codes_of_the_interface():
    found = {family.__name__: family.exit_code for family in errors.RoostError.__subclasses__()}
    assert found == FAMILIES


def test_codes_are_unique():
    codes = [leaf.code for leaf in all_leaves()]
    assert len(codes) > 40
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("leaf", all_leaves(), ids=lambda leaf: leaf.__name__)
def test_a_leaf_says_all_that_a_reader_needs(leaf):
    own = vars(leaf)
    assert re.fullmatch(r"[a-z]+(\.[a-z_]+)?", leaf.code)
    assert "code" in own and "title" in own, "code and title are a leaf's own, not its family's"
    assert own.get("__doc__", "").strip().endswith(".")
    assert len(leaf.next_step.split()) >= 2
    assert leaf.title[0].isupper() or leaf.title.startswith(("roost ", "git "))
    family = next(base for base in leaf.__mro__ if base.__name__ in FAMILIES)
    assert leaf.exit_code == OWN_EXIT_CODES.get(leaf.code, FAMILIES[family.__name__])
    assert 400 <= leaf.status < 600


@pytest.mark.parametrize("leaf", all_leaves(), ids=lambda leaf: leaf.__name__)
def test_an_error_comes_back_from_its_problem_document(leaf):
    sent = leaf("this very case", next_step="Do that.", details={"where": "here", "count": 3})
    document = json.loads(json.dumps(sent.to_problem()))
    assert document["status"] == leaf.status and document["code"] == leaf.code and document["title"] == leaf.title
    got = errors.from_problem(document)
    assert type(got) is leaf
    assert (got.message, got.hint, got.details) == (sent.message, sent.hint, sent.details)
    assert got.exit_code == leaf.exit_code


def test_a_problem_of_a_newer_server_keeps_what_it_says():
    got = errors.from_problem({"status": 404, "code": "thing.of_tomorrow", "detail": "no such thing", "exit_code": 3})
    assert isinstance(got, errors.RoostError)
    assert got.exit_code == 3
    assert "no such thing" in str(got)


def test_without_a_message_the_title_speaks():
    assert str(errors.WorkspaceNotFound()) == errors.WorkspaceNotFound.title


@pytest.mark.parametrize("page", sorted(reference.PAGES))
def test_the_reference_page_is_what_the_sources_say(page):
    assert page not in reference.stale(), "run scripts/reference.py"


def test_every_error_raised_in_the_sources_is_a_leaf():
    raised = re.compile(rf"raise (?:errors\.)?({'|'.join([*FAMILIES, 'RoostError'])})\(")
    sources = Path(errors.__file__).parent
    found = [
        f"{file.relative_to(sources)}:{number}: {line.strip()}"
        for file in sorted(sources.rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if raised.search(line)
    ]
    assert found == [], "a family says nothing of what to do: raise one of its leaves"
