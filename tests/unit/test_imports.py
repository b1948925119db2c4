"""The floors of docs/architecture.md hold, and HOME's programs run with nothing else installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_imports_point_downwards():
    lint = Path(sys.prefix) / "bin" / "lint-imports"
    environment = {"PYTHONPATH": "src", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_homes_programs_need_the_standard_library_only():
    # They run alone in an init container: no site-packages, only our sources.
    program = """
import json, pkgutil, importlib, sys
import roost.home
names = [m.name for m in pkgutil.walk_packages(roost.home.__path__, 'roost.home.') if not m.name.endswith('__main__')]
for name in names: importlib.import_module(name)
print(json.dumps([names, sorted(n for n in sys.modules if n.startswith('roost.'))]))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{program}"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    names, loaded = json.loads(done.stdout)
    assert names
    allowed = ("roost.home", "roost.linux", "roost.errors", "roost.faults")
    assert [name for name in loaded if not name.startswith(allowed)] == []
