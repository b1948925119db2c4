"""Workspaces: desired and observed state, what drives one to the other."""
