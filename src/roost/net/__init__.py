"""Outgoing connections: which addresses roost may speak to on behalf of users."""
