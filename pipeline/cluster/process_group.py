"""The process group of a job's workers, on the network that Ray's nodes share.

With Ray's own set-up, the store of rank 0 listens on every address of its machine, without a password, and gloo uses
the address of the machine's host name, which is often 127.0.0.1 and not reachable from other machines. Here, both
listen on the node's address in Ray's network only.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

_STORES: list[Any] = []  # keeps the store of rank 0 alive until the process group refers to it


def torch_config(backend: str) -> Any:
    """Return a `TorchConfig` of Ray Train that sets up this process group.

    Args:
        backend: "gloo" or "nccl".
    """
    from ray.train.torch import TorchConfig

    class OnRaysNetwork(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            class Backend(super().backend_cls):  # type: ignore[misc]
                def on_start(self, worker_group: Any, backend_config: Any) -> None:
                    import ray

                    host, port = worker_group.execute_single(0, _listen)
                    size, timeout = len(worker_group), backend_config.timeout_s
                    joining = [
                        worker_group.execute_single_async(
                            rank, _join, backend_config.backend, host, port, rank, size, timeout
                        )
                        for rank in range(size)
                    ]
                    ray.get(joining)

            return Backend

    return OnRaysNetwork(backend=backend)


# ---------- on a worker
def _listen() -> tuple[str, int]:
    """Open the store on the address of rank 0's node, and return its host and port."""
    import ray
    from torch.distributed import TCPStore

    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    # Without the socket, the store would listen on every address. The store owns the socket from here on.
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    _STORES.append(store)
    return host, port


def _join(backend: str, host: str, port: int, rank: int, size: int, seconds: float) -> None:
    """Join the process group through the store of rank 0; called on every rank."""
    import torch.distributed as dist

    _use_rays_interface()
    timeout = timedelta(seconds=seconds)
    store = (
        _STORES.pop()
        if rank == 0
        else dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    )
    if backend == "nccl":  # As in Ray: a rank that waits for a dead rank exits.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _use_rays_interface() -> None:
    """Make gloo and NCCL use the interface with the node's address, unless the environment names one."""
    import psutil
    import ray

    own = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
