#!/bin/sh
# Generate the protobuf modules of the container engine's wire from our own minimal .proto files.
# Usage: scripts/protos.sh [OUT]   OUT: a directory that stands for src/ (default: src itself). Needs grpcio-tools.
set -eu
cd "$(dirname "$0")/.."
out=${1:-src}
mkdir -p "$out"
exec "${PYTHON:-python3}" -m grpc_tools.protoc -Isrc --python_out="$out" --pyi_out="$out" src/roost/runtimes/cri/proto/*.proto
