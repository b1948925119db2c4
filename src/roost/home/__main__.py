"""`python -m roost.home resolve|seed`: one JSON document on stdout; an error is {"error": …} and its exit code."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from roost.errors import InternalError, RoostError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m roost.home", description="HOME of a workspace's user.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("resolve", help="user and HOME from the image")
    one.add_argument("--image", required=True, help="root directory of the image")
    one.add_argument("--image-user", default="", help="USER of the image's configuration")
    one.add_argument("--user", default="", help="the user asked for")
    one.add_argument("--home", default="", help="the HOME asked for")
    two = verbs.add_parser("seed", help="fill a volume from the image's HOME")
    two.add_argument("--image", required=True, help="root directory of the image")
    two.add_argument("--volume", required=True, help="root directory of the volume")
    two.add_argument("--home", required=True, help="HOME in the image")
    two.add_argument("--uid", required=True)
    two.add_argument("--gid", required=True)
    two.add_argument("--image-digest", required=True, help="sha256:… of the image's configuration")
    return parser


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    # Each verb imports only what it needs: both are on the path of every start.
    from roost.home.resolve import checked_id, resolve

    if arguments.verb == "resolve":
        return resolve(arguments.image, arguments.image_user, arguments.user, arguments.home)
    from roost.home.seed import seed

    return seed(
        image=arguments.image,
        volume=arguments.volume,
        home=arguments.home,
        uid=checked_id(arguments.uid),
        gid=checked_id(arguments.gid),
        image_digest=arguments.image_digest,
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        document: dict[str, Any] = _run(arguments)
        code = 0
    except RoostError as error:
        document, code = {"error": error.to_problem()}, error.exit_code
    except Exception as error:  # the program's edge: its caller reads JSON; the trace goes to stderr
        import traceback

        traceback.print_exc()
        problem = InternalError(f"roost.home {arguments.verb}: {type(error).__name__}: {error}")
        document, code = {"error": problem.to_problem()}, problem.exit_code
    json.dump(document, sys.stdout)
    sys.stdout.write("\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
