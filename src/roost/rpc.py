"""The one door to grpcio, with its fork handlers off.

gRPC's core hangs handlers on fork() that stop its pollers.  When another thread is inside the core at that moment the
child dies in them (`Check failed: next_worker->state == KICKED`, grpcio 1.85) before it can exec: every git that the
node starts as another user was at risk.  No forked child of ours ever uses gRPC, so they are not wanted.  The core
reads the variable when the module is imported: whoever imports grpc imports it from here.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio

__all__ = ["grpc"]
