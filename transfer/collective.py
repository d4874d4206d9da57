import socket
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import ProcessGroupGloo


class Group:
    def __init__(self, pg, t):
        self.pg, self.t = pg, t

    def broadcast(self, b):
        self.pg.broadcast(b, 0, self.t).wait(self.t)

    def abort(self):
        pass


class Backend:
    name = "gloo"
    device = torch.device("cpu")

    def __init__(self, a):
        self.a = a

    def meet(self, store, epoch, rank, world, timeout_s):
        t = timedelta(seconds=timeout_s)
        o = ProcessGroupGloo._Options()
        o._timeout = t
        o._devices = [ProcessGroupGloo.create_device(hostname=self.a)]
        return Group(ProcessGroupGloo(PrefixStore(f"weights/{epoch}", store), rank, world, o), t)


def create_backend(name, *, own_address, device):
    return Backend(own_address)


def nccl_available():
    return False


def gpu_identity(d):
    return ""


def host_store(address, timeout_s):
    with socket.create_server((address, 0)) as l:
        port = l.getsockname()[1]
        return TCPStore(
            address,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=l.detach(),
        ), port


def join_store(host, port, timeout_s):
    return TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )
