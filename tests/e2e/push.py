"""Push a folder as a one-layer image to a registry on loopback."""

from __future__ import annotations

from pathlib import Path
