"""Where a run computes: device, precision, processes, compilation."""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.options import BadInput


@dataclass
class Machine:
    """This process: its device, its place among the processes, its precision."""

    device: torch.device
    rank: int = 0
    world: int = 1
    dtype: torch.dtype = torch.float32  # of mixed precision; float32 means none

    @property
    def is_main_process(self):
        """Whether this process prints and writes files."""
        return self.rank == 0

    def __str__(self):
        processes = f" × {self.world}" if self.world > 1 else ""
        return f"{self.device.type}{processes}, {str(self.dtype).removeprefix('torch.')}"

    def print(self, text):
        """Print a line, once and not once per process."""
        if self.is_main_process:
            print(text, flush=True)

    def progress(self, total, description):
        """A progress bar over images, on a terminal and in the main process only."""
        silent = None if self.is_main_process else True  # None: tqdm looks for a terminal
        return tqdm(total=total, desc=description, unit="img", leave=False, disable=silent)

    def autocast(self):
        """The context in which a model runs in mixed precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def may_look(self, step, steps):
        """Whether to look at losses after a step of an epoch's: a GPU has to wait, so seldom."""
        return self.device.type == "cpu" or step % 10 == 9 or step + 1 == steps

    def shard(self, batch):
        """This process's part of what belongs to a whole batch: (B, …) → (B / world, …)."""
        return batch.chunk(self.world)[self.rank]

    def all_reduce_mean(self, values):
        """The average of a tensor over the processes."""
        values = values / self.world
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def broadcast_buffers(self, model):
        """Give every process the main one's buffers, such as the statistics of a batch norm."""
        for buffer in model.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)

    def main_process_first(self, action):
        """Do something once on each computer, such as a download, while other processes wait."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            action()
        if self.world > 1:
            dist.barrier()


def start(device=None, amp=True, batch_size=1, accumulate=1):
    """Set up this process, alone or one of torchrun's: its Machine. Raises BadInput."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if batch_size % (world * accumulate):
        raise BadInput(f"--batch-size: {batch_size} must be divisible by {world} processes × "
                       f"--accumulate {accumulate}")
    device = find_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Machine(device, rank, world, mixed_precision(device) if amp else torch.float32)


def find_device(name=None):
    """The torch.device called name, or the fastest; of several GPUs this process's own."""
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    name = name or ("cuda" if gpus else "mps" if mps else "cpu")
    if name == "cuda" and local_rank >= gpus or name == "mps" and not mps:
        raise BadInput(f"--device: there is no {name} device for process {local_rank} here")
    if name != "cuda":
        return torch.device(name)
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", local_rank)


def mixed_precision(device):
    """bfloat16 where the hardware computes in it, float16 on older GPUs, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def distribute(model, machine, compile=False):
    """The model, compiled if asked for, with gradients averaged over several processes."""
    if compile:
        model.compile()
    if machine.world == 1:
        return model
    ids = [machine.device] if machine.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def gradients_averaged(model, last):
    """The context of a backward pass: processes average gradients in a step's last part only."""
    parallel = isinstance(model, DistributedDataParallel)
    return model.no_sync() if parallel and not last else contextlib.nullcontext()
