"""roost: self-hosted development workspaces whose HOME persists."""

__version__ = "0.1.0"
