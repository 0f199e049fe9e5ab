"""The engine on FSDP2, torch's fully_shard. Accelerate's, which is for GPUs alone, is not used."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from naign.distributed.engine import Engine
from naign.distributed.host import count_ranks

UNIT = 1_000_000  # parameters, at least, of a module whose weights are gathered by themselves


class FsdpEngine(Engine):
    """Engine whose ranks each hold a part of the float32 weights, gradients and moments; float32 or bfloat16. On
    several hosts the ranks of each have all parts together (HSDP): only gradients pass between hosts.
    """

    sharded = gathers = True
    _kind = "FSDP2"
    _ungraded = torch.no_grad

    def _shard(self) -> None:
        world = self.accelerator.num_processes
        local = count_ranks()
        if 1 < local < world and world % local == 0:
            mesh = init_device_mesh(
                self.accelerator.device.type,
                (world // local, local),
                mesh_dim_names=("hosts", "ranks"),
            )
        else:
            mesh = init_device_mesh(self.accelerator.device.type, (world,))
        for module in reversed(list(self.bare.modules())):  # parts first, the network last
            left = 0
            for value in module.parameters():
                if not isinstance(value, DTensor):
                    left += value.numel()
            is_unit = left >= UNIT and not isinstance(module, nn.ModuleList | nn.ModuleDict)
            if is_unit or module is self.bare:
                fully_shard(module, mesh=mesh)
        for part in ("encode", "decode"):
            if hasattr(self.bare, part):
                register_fsdp_forward_method(self.bare, part)

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.network = self.bare
        self.optimizer = optimizer
        self._adam = optimizer

    def forward(self, x: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return super().forward(x)

    def sample(self, x: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return super().sample(x)
