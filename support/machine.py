"""Where a run computes: device, precision, processes, compilation."""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.options import require


@dataclass
class Machine:
    """This process: its device, its place among the processes, its precision."""
    device: torch.device
    rank: int = 0
    world: int = 1
    dtype: torch.dtype = torch.float32  # of mixed precision; float32 means none

    def __str__(self):
        return f"{self.world} × {self.device.type}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def is_main_process(self):
        """Whether this process prints and writes files."""
        return self.rank == 0

    def print(self, text):
        """Print a line, once and not once per process."""
        if self.is_main_process:
            print(text, flush=True)

    def progress(self, total, description):
        """A progress bar over images, in the main process and on a terminal only."""
        disable = None if self.is_main_process else True  # None: where there is no terminal
        return tqdm(total=total, desc=description, unit="img", leave=False, disable=disable)

    def broadcast_buffers(self, model):
        """Give every process the main one's buffers, such as the statistics of a batch norm."""
        for buffer in model.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)

    def autocast(self):
        """The context in which a model runs in mixed precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def grad_scaler(self):
        """A gradient scaler, which float16 needs; for other precisions it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def shard(self, batch):
        """This process's part of what belongs to a whole batch: (B, …) → (B / world, …)."""
        return batch.chunk(self.world)[self.rank]

    def all_reduce_mean(self, values):
        """The average of a tensor over the processes."""
        values = values / self.world
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def main_process_first(self, action):
        """Do something once on each computer, such as a download, while other processes wait."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            action()
        if self.world > 1:
            dist.barrier()


def start(device=None, amp=True, batch_size=0, accumulate=1):
    """Set up this process, alone or one of torchrun's: its Machine. Raises BadInput where a batch
    can't be cut into equal parts; batch_size is 0 where nothing is trained."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    require(batch_size % (world * accumulate) == 0, f"--batch-size: {batch_size} must be divisible "
            f"by {world} processes × --accumulate {accumulate}")
    device = find_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Machine(device, rank, world, mixed_precision(device) if amp else torch.float32)


def find_device(name=None):
    """The torch.device called name, or the fastest; of several GPUs this process's own."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    name = name or ("cuda" if gpus else "mps" if mps else "cpu")
    # The same in all processes. gloo doesn't know mps.
    there = {"cuda": processes <= gpus, "mps": mps and processes == 1, "cpu": True}[name]
    require(there, f"--device: there is no {name} device for each of {processes} processes here")
    if name == "cuda":
        torch.cuda.set_device(rank)
        torch.set_float32_matmul_precision("high")
    return torch.device("cuda", rank) if name == "cuda" else torch.device(name)


def mixed_precision(device):
    """bfloat16 where hardware has it, of CPUs only x86 is asked; float16 on older GPUs."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def distribute(model, machine, compile=False, replay=False):
    """The model, compiled if asked for, with gradients averaged over several processes.
    With replay, one GPU alone repeats a compiled step as a CUDA graph: a small model's kernels take
    less time than a CPU needs to start them. Graphs can't add up gradients of micro-batches."""
    if compile:
        graph = replay and machine.device.type == "cuda" and machine.world == 1
        model.compile(mode="reduce-overhead" if graph else None)
    return DistributedDataParallel(model) if machine.world > 1 else model


def gradients_averaged(model, last):
    """The context of a backward pass: processes average gradients in the last micro-batch only."""
    parallel = isinstance(model, DistributedDataParallel)
    return model.no_sync() if parallel and not last else contextlib.nullcontext()
