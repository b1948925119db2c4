"""The program git calls for a user name or password: asks the node over a unix socket, prints the answer.

Stands alone: it is copied beside the socket and run by the unprivileged user with a bare interpreter.  Called as
`askpass PROMPT`; the directory it lies in holds the socket and the nonce.  Status 1 and no output when refused.
"""

import json
import os
import socket
import sys


def main() -> int:
    here = os.path.dirname(os.path.abspath(sys.argv[0]))  # noqa: PTH100, PTH120 - pathlib costs 15 ms to import
    with open(os.path.join(here, "nonce"), encoding="ascii") as file:  # noqa: PTH118
        nonce = file.read()
    # A unix address has 108 bytes; by way of an open directory any depth will do.
    directory = os.open(here, os.O_PATH | os.O_DIRECTORY)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(f"/proc/self/fd/{directory}/socket")
    question = json.dumps({"nonce": nonce, "prompt": sys.argv[1] if len(sys.argv) > 1 else ""})
    connection.sendall(question.encode() + b"\n")
    answer = b""
    while chunk := connection.recv(4096):
        answer += chunk
    if not answer:
        return 1
    sys.stdout.buffer.write(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
