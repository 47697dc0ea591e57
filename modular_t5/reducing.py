"""Averaging gradients over processes without sending those of modules that a step leaves out.

`DistributedDataParallel` averages the gradients of all parameters, bucket by bucket, also of those that no process used. Here every
process knows the step's plan, and with it the buckets that hold nothing.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


@dataclass
class RunningParameters:
    """The parameters, by `id`, that the step at hand uses; what of all bytes was sent so far."""

    ids: set[int] = field(default_factory=set)
    sent: int = 0
    left_out: int = 0


def reduce_running(running: RunningParameters, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DDP: all-reduce a bucket if one of its parameters runs, else leave it as it is on every process."""
    size = bucket.buffer().nbytes
    if any(id(parameter) in running.ids for parameter in bucket.parameters()):
        running.sent += size
        return allreduce_hook(None, bucket)  # of the default group
    running.left_out += size
    return noop_hook(None, bucket)


def watch_running(model: DistributedDataParallel) -> RunningParameters:
    """Register the hook; set `ids` before every backward."""
    running = RunningParameters()
    model.register_comm_hook(running, reduce_running)
    return running


def trained_ids(modules: list[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
