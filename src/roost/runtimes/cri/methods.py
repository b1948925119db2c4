"""The engine's methods as typed values: path on the wire, message in, message out.

Written by hand instead of generated client stubs: those are untyped.  A unit test holds each against the service
descriptors of the .proto files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from roost.runtimes.cri.proto import (
    containers_pb2,
    content_pb2,
    cri_pb2,
    events_pb2,
    leases_pb2,
    snapshots_pb2,
    tasks_pb2,
)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True)
class Method(Generic[RequestT, ResponseT]):
    """One method; `Engine.call` answers with one message, `Engine.stream` with many."""

    path: str
    request: type[RequestT]
    response: type[ResponseT]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


_RUNTIME = "/runtime.v1.RuntimeService/"
_IMAGES = "/runtime.v1.ImageService/"
_TASKS = "/containerd.services.tasks.v1.Tasks/"
_SNAPSHOTS = "/containerd.services.snapshots.v1.Snapshots/"
_LEASES = "/containerd.services.leases.v1.Leases/"

STATUS = Method(_RUNTIME + "Status", cri_pb2.StatusRequest, cri_pb2.StatusResponse)
RUN_POD_SANDBOX = Method(_RUNTIME + "RunPodSandbox", cri_pb2.RunPodSandboxRequest, cri_pb2.RunPodSandboxResponse)
STOP_POD_SANDBOX = Method(_RUNTIME + "StopPodSandbox", cri_pb2.StopPodSandboxRequest, cri_pb2.StopPodSandboxResponse)
REMOVE_POD_SANDBOX = Method(
    _RUNTIME + "RemovePodSandbox", cri_pb2.RemovePodSandboxRequest, cri_pb2.RemovePodSandboxResponse
)
LIST_POD_SANDBOX = Method(_RUNTIME + "ListPodSandbox", cri_pb2.ListPodSandboxRequest, cri_pb2.ListPodSandboxResponse)
CREATE_CONTAINER = Method(_RUNTIME + "CreateContainer", cri_pb2.CreateContainerRequest, cri_pb2.CreateContainerResponse)
START_CONTAINER = Method(_RUNTIME + "StartContainer", cri_pb2.StartContainerRequest, cri_pb2.StartContainerResponse)
STOP_CONTAINER = Method(_RUNTIME + "StopContainer", cri_pb2.StopContainerRequest, cri_pb2.StopContainerResponse)
REMOVE_CONTAINER = Method(_RUNTIME + "RemoveContainer", cri_pb2.RemoveContainerRequest, cri_pb2.RemoveContainerResponse)
LIST_CONTAINERS = Method(_RUNTIME + "ListContainers", cri_pb2.ListContainersRequest, cri_pb2.ListContainersResponse)
CONTAINER_STATUS = Method(_RUNTIME + "ContainerStatus", cri_pb2.ContainerStatusRequest, cri_pb2.ContainerStatusResponse)
CONTAINER_STATS = Method(_RUNTIME + "ContainerStats", cri_pb2.ContainerStatsRequest, cri_pb2.ContainerStatsResponse)

LIST_IMAGES = Method(_IMAGES + "ListImages", cri_pb2.ListImagesRequest, cri_pb2.ListImagesResponse)
IMAGE_STATUS = Method(_IMAGES + "ImageStatus", cri_pb2.ImageStatusRequest, cri_pb2.ImageStatusResponse)
PULL_IMAGE = Method(_IMAGES + "PullImage", cri_pb2.PullImageRequest, cri_pb2.PullImageResponse)

TASK_EXEC = Method(_TASKS + "Exec", tasks_pb2.ExecProcessRequest, Empty)
TASK_START = Method(_TASKS + "Start", tasks_pb2.StartRequest, tasks_pb2.StartResponse)
TASK_WAIT = Method(_TASKS + "Wait", tasks_pb2.WaitRequest, tasks_pb2.WaitResponse)
TASK_KILL = Method(_TASKS + "Kill", tasks_pb2.KillRequest, Empty)
TASK_RESIZE = Method(_TASKS + "ResizePty", tasks_pb2.ResizePtyRequest, Empty)
TASK_CLOSE_IO = Method(_TASKS + "CloseIO", tasks_pb2.CloseIORequest, Empty)
TASK_DELETE_PROCESS = Method(_TASKS + "DeleteProcess", tasks_pb2.DeleteProcessRequest, tasks_pb2.DeleteResponse)
TASK_LIST_PIDS = Method(_TASKS + "ListPids", tasks_pb2.ListPidsRequest, tasks_pb2.ListPidsResponse)

CONTAINER_GET = Method(
    "/containerd.services.containers.v1.Containers/Get",
    containers_pb2.GetContainerRequest,
    containers_pb2.GetContainerResponse,
)
SNAPSHOT_VIEW = Method(_SNAPSHOTS + "View", snapshots_pb2.ViewSnapshotRequest, snapshots_pb2.ViewSnapshotResponse)
SNAPSHOT_STAT = Method(_SNAPSHOTS + "Stat", snapshots_pb2.StatSnapshotRequest, snapshots_pb2.StatSnapshotResponse)
SNAPSHOT_REMOVE = Method(_SNAPSHOTS + "Remove", snapshots_pb2.RemoveSnapshotRequest, Empty)
SNAPSHOT_LIST = Method(_SNAPSHOTS + "List", snapshots_pb2.ListSnapshotsRequest, snapshots_pb2.ListSnapshotsResponse)
LEASE_CREATE = Method(_LEASES + "Create", leases_pb2.CreateRequest, leases_pb2.CreateResponse)
LEASE_DELETE = Method(_LEASES + "Delete", leases_pb2.DeleteRequest, Empty)
LEASE_LIST = Method(_LEASES + "List", leases_pb2.ListRequest, leases_pb2.ListResponse)
CONTENT_STATUSES = Method(
    "/containerd.services.content.v1.Content/ListStatuses",
    content_pb2.ListStatusesRequest,
    content_pb2.ListStatusesResponse,
)
EVENTS = Method("/containerd.services.events.v1.Events/Subscribe", events_pb2.SubscribeRequest, events_pb2.Envelope)
