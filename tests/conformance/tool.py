"""A tool of the tests: tells what it sees of an image and a volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main(args: list[str]) -> int:
    if args == ["--fail"]:
        print("no", file=sys.stderr)
        return 9
    if args == ["--hang"]:
        subprocess.Popen(["sleep", "300"])
        time.sleep(300)
    image, volume = args
    names = os.listdir(volume)
    with open(os.path.join(volume, "second" if "first" in names else "first"), "w") as file:
        file.write("seen\n")
    document = {
        "image": sorted(os.listdir(image)),
        "volume": sorted(os.listdir(volume)),
        "read_only": bool(os.statvfs(image).f_flag & os.ST_RDONLY),
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
