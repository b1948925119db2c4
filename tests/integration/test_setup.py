"""`make setup` and `make clean` on this host: idempotent, repairing, and never touching what is not theirs.

What would change the host (packages, policy-rc.d, os-release) is tried in a mount namespace of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "scripts/setup"
COPIED = ["src", "scripts", "pyproject.toml", "requirements.lock", "LICENSE", "README.md"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="roost-test-setup-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def copy_to(target: Path) -> Path:
    target.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)
    return target


def setup(checkout: Path, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "scripts/setup", *arguments],
        env={**os.environ, "ROOST_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def isolated(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell script in a mount namespace of its own: what it mounts over the host is seen by nobody else."""
    return subprocess.run(
        ["unshare", "--mount", "--propagation=private", "bash", "-euc", script, "bash", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_environment_serves_the_servers_user_from_a_private_checkout(folder):
    checkout = copy_to(folder / "private" / "checkout")
    (folder / "private").chmod(0o700)
    cache = folder / "cache"
    first = setup(checkout, cache, PYTHONDONTWRITEBYTECODE="1")
    assert first.returncode == 0, first.stderr
    venv = (checkout / ".venv").readlink()
    assert venv.is_relative_to(cache)

    # The server's user can run it, from its own directory and with what a shell of root's leaves in the environment.
    program = "import roost, roost.settings, grpc, sys; print(roost.__file__)"
    ran = subprocess.run(
        ["setpriv", "--reuid=roost", "--regid=roost", "--init-groups", venv / "bin/python", "-c", program],
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(venv), "installed, not a link into the checkout"
    # Compiled, else every start would compile anew: the user cannot write there.
    package = Path(ran.stdout.strip()).parent
    assert (package / "__pycache__" / f"errors.{sys.implementation.cache_tag}.pyc").is_file()
    assert not list(checkout.rglob("*.egg-info")) and not (checkout / "dist").exists()

    began = time.monotonic()
    again = setup(checkout, cache)
    assert again.returncode == 0 and time.monotonic() - began < 3.0
    assert "installed" not in again.stdout and "ready" in again.stdout

    # A changed source is installed; so is one whose installation was interrupted.
    (checkout / "src/roost/added.py").write_text("VALUE = 1\n")
    assert setup(checkout, cache).returncode == 0
    assert (package / "added.py").is_file()
    (venv / ".sources").unlink()
    (package / "added.py").unlink()
    assert setup(checkout, cache).returncode == 0
    assert (package / "added.py").is_file()

    # Two at once: both succeed.
    (checkout / "src/roost/added.py").write_text("VALUE = 2\n")
    environment = {**os.environ, "ROOST_CACHE_DIR": str(cache)}
    both = [
        subprocess.Popen([checkout / "scripts/setup"], env=environment, stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(120) for process in both] == [0, 0]

    # An environment that somebody made by hand is not thrown away.
    (checkout / ".venv").unlink()
    (checkout / ".venv").mkdir()
    refused = setup(checkout, cache)
    assert refused.returncode == 4 and "move it away" in refused.stderr


def test_a_host_that_is_not_supported_is_told_why(folder):
    checkout = copy_to(folder / "checkout")
    for text, says in (
        ('ID=debian\nVERSION_ID="11"\nPRETTY_NAME="Debian 11"\n', "too old"),
        ('ID=ubuntu\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04"\n', "too old"),
        ('ID=fedora\nVERSION_ID=41\nPRETTY_NAME="Fedora 41"\n', "not supported"),
    ):
        (folder / "os-release").write_text(text)
        done = isolated(
            'mount --bind "$1" "$(readlink -f /etc/os-release)"; "$2"',
            folder / "os-release",
            checkout / "scripts/setup",
        )
        assert done.returncode == 6 and says in done.stderr and "->" in done.stderr


def test_without_root_it_says_so(folder):
    checkout = copy_to(folder / "checkout")
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", checkout / "scripts/setup"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5 and "sudo make setup" in done.stderr


def test_the_demo_says_what_it_needs_before_it_begins(folder):
    checkout = copy_to(folder / "checkout")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    demo = checkout / "scripts/demo"
    done = subprocess.run([*as_nobody, demo], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and "sudo make demo" in done.stderr
    done = subprocess.run([demo, "exec", "demo"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 6 and "`make demo` first" in done.stderr


def test_a_private_python_on_path_is_passed_over(folder):
    private = folder / "private"
    private.mkdir(mode=0o700)
    (private / "python3").symlink_to("/usr/bin/python3")
    script = 'source "$1"; find_python; echo "$python $python_version"'
    found = isolated(script, ROOT / "scripts/setup", PATH=f"{private}:{os.environ['PATH']}")
    assert found.returncode == 0, found.stderr
    assert str(private) not in found.stdout


HIDE_SKOPEO = 'mount --bind /dev/null "$(command -v skopeo)"; '
FAKE_APT = """#!/bin/sh
echo "$@" >>"{log}"
for word in "$@"; do case $word in
    -s) cat "{plan}"; exit 0 ;;
    install) /usr/sbin/policy-rc.d docker-registry start; echo "policy $?" >>"{log}"; {act} ;;
esac; done
"""


def fake_apt(folder: Path, plan: str, act: str = "true") -> Path:
    (folder / "plan").write_text(plan)
    binaries = folder / "bin"
    binaries.mkdir()
    (binaries / "apt-get").write_text(FAKE_APT.format(log=folder / "apt.log", plan=folder / "plan", act=act))
    (binaries / "apt-get").chmod(0o755)
    return binaries


def own_sbin(folder: Path) -> str:
    """Shell that gives the namespace a /usr/sbin in which it may write, with an administrator's policy in it."""
    (folder / "upper").mkdir()
    (folder / "work").mkdir()
    (folder / "upper/policy-rc.d").write_text("#!/bin/sh\nexit 42\n")
    (folder / "upper/policy-rc.d").chmod(0o755)
    return f"mount -t overlay none -o lowerdir=/usr/sbin,upperdir={folder}/upper,workdir={folder}/work /usr/sbin; "


def test_a_conflict_stops_before_anything_is_changed(folder):
    binaries = fake_apt(folder, "Remv containerd.io [1.7]\nInst skopeo\nRemv docker-ce\n")
    done = isolated(
        HIDE_SKOPEO + own_sbin(folder) + '"$1" --tests',
        ROOT / "scripts/setup",
        PATH=f"{binaries}:{os.environ['PATH']}",
    )
    assert done.returncode == 4, done.stdout + done.stderr
    assert "containerd.io docker-ce" in done.stderr and "->" in done.stderr
    assert "skopeo" in done.stdout, "what would be installed is printed first"
    assert "policy" not in (folder / "apt.log").read_text()
    assert (folder / "upper/policy-rc.d").read_text() == "#!/bin/sh\nexit 42\n"


@pytest.mark.parametrize("act", ["exit 1", "kill -TERM $PPID; exit 1", "kill -KILL $PPID; sleep 0.2; exit 1"])
def test_no_daemon_starts_and_the_administrators_policy_comes_back(folder, act):
    binaries = fake_apt(folder, "Inst skopeo\n", act)
    script = (
        HIDE_SKOPEO
        + own_sbin(folder)
        + '"$1" --tests || echo "exit $?"; "$1" --dry-run >/dev/null; /usr/sbin/policy-rc.d || echo "policy $?"'
    )
    done = isolated(script, SETUP, PATH=f"{binaries}:{os.environ['PATH']}")
    asked = (folder / "apt.log").read_text()
    assert "policy 101" in asked, "while apt runs no daemon may start"
    assert "--no-remove --no-install-recommends" in asked
    assert "exit 0" not in done.stdout and "policy 42" in done.stdout, done.stdout + done.stderr
    assert not (folder / "upper/policy-rc.d.before-roost").is_file()


def test_a_dry_run_changes_nothing(folder):
    binaries = fake_apt(folder, "")
    done = isolated(
        HIDE_SKOPEO + '"$1" --tests --dry-run', ROOT / "scripts/setup", PATH=f"{binaries}:{os.environ['PATH']}"
    )
    assert done.returncode == 0 and "skopeo" in done.stdout
    assert not (folder / "apt.log").exists()


# --- clean --------------------------------------------------------------------------------------------------------


def cgroup_roots() -> list[Path]:
    roots = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point, kind, options = Path(before.split(" ")[4]), after.split(" ")[0], after.split(" ")[2]
        if kind == "cgroup2" or (kind == "cgroup" and "freezer" in options.split(",")):
            roots.append(point)
    return roots


def test_clean_takes_all_of_a_crashed_test_and_nothing_else(folder):
    name = f"roost-tc{os.getpid() % 100000}"  # an interface's name has 15 characters at most
    state, run = Path("/var/tmp", name), Path("/run", name)
    precious = folder / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    group = cgroup_roots()[0]
    started: list[subprocess.Popen[bytes]] = []

    def start(where: Path | None, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "300"], env={**os.environ, **(environment or {})}, start_new_session=True)
        started.append(process)
        if where is not None:
            where.mkdir(parents=True, exist_ok=True)
            (where / "cgroup.procs").write_text(str(process.pid))
        return process

    # What CNI and a killed shim leave in directories that all containerds share: told apart by what they point at.
    cached = Path("/var/lib/cni/results")
    cached.mkdir(parents=True, exist_ok=True)
    theirs, mine = cached / f"cni-loopback-{name}x-lo", cached / f"cni-loopback-{name}-lo"
    for entry, owner in ((theirs, "/run/roost"), (mine, str(run))):
        sandbox = {"name": "lo", "sandbox": f"{owner}/node/netns/cni-1"}
        entry.write_text(json.dumps({"networkName": "cni-loopback", "result": {"interfaces": [sandbox]}}))
    shared = Path("/run/containerd/s")
    shared.mkdir(parents=True, exist_ok=True)
    sockets = [shared / f"{name}-mine", shared / f"{name}-theirs"]
    for path in sockets:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))

    real = group / "roost" / name  # a workspace of a real roost that happens to have the test's name
    try:
        (state / "pool").mkdir(parents=True)
        (state / "bound").mkdir()
        run.mkdir()
        bundle = run / "node/containerd/io.containerd.runtime.v2.task/k8s.io/abc"
        bundle.mkdir(parents=True)
        (bundle / "address").write_text(f"unix://{sockets[0]}")
        image = state / "pool.img"
        with image.open("wb") as empty:
            empty.truncate(128 << 20)
        subprocess.run(["mkfs.btrfs", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, state / "pool"], check=True)
        subprocess.run(["mount", "--bind", precious, state / "bound"], check=True)
        subprocess.run(["nft", "add", "table", "inet", name], check=True)
        subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
        contained = start(group / name / "container")
        for file, word in (
            (group / name / "container/cgroup.freeze", "1"),
            (group / name / "container/freezer.state", "FROZEN"),
        ):
            if file.exists():
                file.write_text(word)
        daemon = start(None, {"ROOST_DAEMON": f"{run}/node/containerd.pid"})
        bystander = start(None, {"ROOST_DAEMON": "/run/roost/node/containerd.pid"})
        of_the_real_one = start(real)

        done = subprocess.run([ROOT / "scripts/clean", "--only", name], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert contained.wait(5) == -9 and daemon.wait(5) == -9
        assert bystander.poll() is None and of_the_real_one.poll() is None
        assert (precious / "file").read_text() == "kept", "a removal never walks into a mount"
        assert not state.exists() and not run.exists() and not (group / name).exists()
        assert name not in Path("/proc/self/mountinfo").read_text()
        assert str(image) not in subprocess.run(["losetup", "-l"], capture_output=True, text=True).stdout
        assert name not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
        assert not Path("/sys/class/net", name).exists()
        assert theirs.exists() and not mine.exists()
        assert sockets[1].exists() and not sockets[0].exists()

        again = subprocess.run([ROOT / "scripts/clean", "--only", name], capture_output=True, text=True, timeout=60)
        assert again.returncode == 0 and "nothing to remove" in again.stdout
    finally:
        for process in started:
            process.kill()
            process.wait()
        subprocess.run([ROOT / "scripts/clean", "--only", name], capture_output=True)
        for path in (theirs, mine, *sockets):
            path.unlink(missing_ok=True)
        if real.exists():
            deadline = time.monotonic() + 5
            while (real / "cgroup.procs").read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            real.rmdir()
            if not any(path.is_dir() for path in real.parent.iterdir()):
                real.parent.rmdir()


@pytest.mark.parametrize("name", ["roost", "roost-", "home", "roost-../x", "*"])
def test_clean_refuses_names_that_are_not_the_demos_or_a_tests(name):
    done = subprocess.run([ROOT / "scripts/clean", "--only", name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
