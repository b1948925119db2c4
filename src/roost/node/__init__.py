"""The agent on each host: it starts, adopts and supervises what workspaces run on, as root."""
