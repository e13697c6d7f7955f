"""Where the workers of a job meet: torch's process group, on the network that Ray's nodes have in common.

Ray's own set-up has rank 0's store listen on every address of its machine, without a password; and gloo takes the
address that a machine's name stands for, on many 127.0.0.1, which no other machine can reach. Here, both listen on
the node's address in Ray's network and on no other.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

_STORES: list[Any] = []  # rank 0's, until its process group holds it too


def torch_config(backend: str) -> Any:
    """Ray Train's `TorchConfig` whose process group is set up as said above.

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
    """Rank 0: open the store on the node's address; returns where."""
    import ray
    from torch.distributed import TCPStore

    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    # Given only a port, the store would listen everywhere. The socket is the store's from here on.
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    _STORES.append(store)
    return host, port


def _join(backend: str, host: str, port: int, rank: int, size: int, seconds: float) -> None:
    """Every rank: the process group, by way of rank 0's store."""
    import torch.distributed as dist

    _use_rays_interface()
    timeout = timedelta(seconds=seconds)
    store = (
        _STORES.pop()
        if rank == 0
        else dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    )
    if backend == "nccl":  # as Ray has it: a rank that waits for a dead one ends
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _use_rays_interface() -> None:
    """Have gloo and NCCL use the interface that has the node's address, unless the environment names one."""
    import psutil
    import ray

    own = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
