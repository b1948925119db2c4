"""User and HOME by the spec's rules, from trees that are made here; some of them hostile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from roost.errors import InvalidRequest, SeedFailed, UnknownUser, UnusableHome
from roost.home import resolve as module
from roost.home.resolve import check_home, checked_id, resolve
from roost.runtimes import protocol

PASSWD = """root:x:0:0:root:/root:/bin/bash
# a comment
bad line
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
games:x:5:60:games:/usr/games:/usr/sbin/nologin
dev:x:1000:1000:Dev,,,:/home/dev:/bin/zsh
1000x:x:1001:1001::/home/odd:/bin/sh
jenkins:x:1002:1002::/var/jenkins_home:/bin/sh
homeless:x:1003:1003:::/bin/sh
"""
GROUP = "root:x:0:\nsudo:x:27:dev,root\ndocker:x:999:dev\ndev:x:1000:dev\n2000:x:5000:\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    root = tmp_path / "image"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    (root / "root").mkdir()
    (root / "home/dev").mkdir(parents=True)
    return root


def test_names_agree_with_the_protocol(image: Path) -> None:
    assert module.TOOLS_DIR == protocol.TOOLS_DIR
    user = resolve(str(image), "dev")["user"]
    assert isinstance(user, dict)
    made = protocol.ContainerUser(**user)
    assert made == protocol.ContainerUser(1000, 1000, "dev", "/home/dev", "/bin/zsh", (27, 999))


@pytest.mark.parametrize(
    ("user", "image_user", "with_vscode", "name", "chosen_by"),
    [
        ("dev", "jenkins", True, "dev", "option"),
        ("", "jenkins", True, "jenkins", "image"),
        ("", "", True, "vscode", "vscode"),
        ("", "", False, "root", "default"),
        ("", "root", True, "root", "image"),
    ],
)
def test_the_order(image: Path, user: str, image_user: str, with_vscode: bool, name: str, chosen_by: str) -> None:
    if with_vscode:
        with open(image / "etc/passwd", "a") as file:
            file.write("vscode:x:1005:1005::/home/vscode:/bin/bash\n")
    found = resolve(str(image), image_user, user)
    assert found["chosen_by"] == chosen_by
    assert isinstance(found["user"], dict) and found["user"]["name"] == name
    assert found["image_home_exists"] is (name in ("dev", "root"))


@pytest.mark.parametrize(
    ("spec", "uid", "gid", "name", "groups"),
    [
        ("dev", 1000, 1000, "dev", (27, 999)),
        ("1000", 1000, 1000, "dev", (27, 999)),
        ("dev:docker", 1000, 999, "dev", ()),
        ("dev:12", 1000, 12, "dev", ()),
        ("1000:27", 1000, 27, "dev", ()),
        ("dev:2000", 1000, 2000, "dev", ()),  # digits are a number, though a group has that name
        ("4242", 4242, 0, "4242", ()),
        ("4242:4243", 4242, 4243, "4242", ()),
    ],
)
def test_forms_of_a_user(image: Path, spec: str, uid: int, gid: int, name: str, groups: tuple[int, ...]) -> None:
    user = resolve(str(image), spec, home="/home/x")["user"]
    assert isinstance(user, dict)
    assert (user["uid"], user["gid"], user["name"], user["groups"]) == (uid, gid, name, groups)
    assert user["home"] == "/home/x"


@pytest.mark.parametrize("spec", ["ghost", "dev:ghosts", ":dev", "dev:", "99999999999", "-1", "٣"])
def test_who_is_not_there(image: Path, spec: str) -> None:
    with pytest.raises(UnknownUser):
        resolve(str(image), spec, home="/home/x")


@pytest.mark.parametrize("spec", ["nobody", "games", "homeless", "4242"])
def test_homes_that_cannot_be_kept_ask_for_another(image: Path, spec: str) -> None:
    with pytest.raises(UnusableHome) as caught:
        resolve(str(image), spec)
    assert "--home" in caught.value.hint
    assert resolve(str(image), spec, home="/home/x/")["image_home_exists"] is False


@pytest.mark.parametrize(
    "home",
    [
        *("/", "//", "/usr", "/usr/", "/home/../etc", "/etc/x", "/nonexistent", "/bin", "/lib64", "/proc/1"),
        *("/opt/roost", "/opt", "/var", "/tmp", "/run/user/1", "relative", "", "/home/a\0b"),
    ],
)
def test_places_where_no_volume_may_be(home: str) -> None:
    with pytest.raises(UnusableHome):
        check_home(home)


@pytest.mark.parametrize("home", ["/root", "/home/a", "/library", "/var/jenkins_home", "/opt/app", "/usrx"])
def test_places_where_one_may(home: str) -> None:
    assert check_home(home) == home


def test_symlinks_stay_inside_the_image(image: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("evil:x:0:0::/root:/bin/sh\n")
    (image / "etc/passwd").rename(image / "real")
    (image / "etc/passwd").symlink_to("/real")  # absolute, but in the image
    assert resolve(str(image), "dev")["chosen_by"] == "image"
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to("../../secret")
    with pytest.raises(UnknownUser):
        resolve(str(image), "evil")


def test_a_passwd_that_is_no_file_does_not_hang(image: Path) -> None:
    (image / "etc/passwd").unlink()
    os.mkfifo(image / "etc/passwd")
    with pytest.raises(UnknownUser):
        resolve(str(image), "dev")
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").mkdir()
    with pytest.raises(UnknownUser):
        resolve(str(image), "dev")
    (image / "etc/passwd").rmdir()
    user = resolve(str(image), "")["user"]
    assert isinstance(user, dict) and (user["name"], user["home"]) == ("root", "/root")


def test_a_home_that_leads_into_the_system_is_refused(image: Path) -> None:
    (image / "home/dev").rmdir()
    (image / "home/dev").symlink_to("/etc")
    with pytest.raises(UnusableHome, match="is /etc in the image"):
        resolve(str(image), "dev")
    (image / "home/dev").unlink()
    (image / "var/home").mkdir(parents=True)
    (image / "home/dev").symlink_to("../var/home")
    assert resolve(str(image), "dev")["image_home_exists"] is True


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(SeedFailed):
        resolve(str(tmp_path / "absent"), "")


@pytest.mark.parametrize("text", ["", "x", "-1", "1.0", "4294967296"])
def test_ids(text: str) -> None:
    with pytest.raises(InvalidRequest):
        checked_id(text)


def run(*arguments: str) -> tuple[int, dict[str, object]]:
    env = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    command = [sys.executable, "-m", "roost.home", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, timeout=30, check=False)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return done.returncode, found


def test_the_program(image: Path) -> None:
    code, document = run("resolve", "--image", str(image), "--image-user", "dev")
    assert code == 0
    assert document == {
        "user": {
            "uid": 1000,
            "gid": 1000,
            "name": "dev",
            "home": "/home/dev",
            "shell": "/bin/zsh",
            "groups": [27, 999],
        },
        "chosen_by": "image",
        "image_home_exists": True,
    }
    code, document = run("resolve", "--image", str(image), "--user", "ghost")
    assert code == 2
    error = document["error"]
    assert isinstance(error, dict) and error["code"] == "user.unknown" and error["exit_code"] == 2


def test_it_starts_quickly_because_it_imports_little() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    code = "import sys, roost.home.__main__, roost.home.seed; print(' '.join(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"pydantic", "typer", "rich", "structlog", "asyncio", "sqlalchemy", "grpc"}
    code = (
        "import sys, roost.home.__main__, roost.home.seed; "
        "print(' '.join(m for m in sys.modules if m.startswith('roost.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30, check=True)
    rooms = {name.split(".")[1] for name in done.stdout.split()}
    assert rooms == {"home", "linux", "errors", "faults"}
