"""What ranks of tests/distributed/test_fsdp.py run."""

import os
from copy import deepcopy

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from naign.config import TrainConfig
from naign.distributed import fsdp
from naign.distributed.engine import Engine
from naign.model.networks import ConvConfig, build_network


def make(kind):
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    network = build_network(ConvConfig(width=7, code=5), (1, 8, 8))
    return kind(
        accelerator,
        network,
        TrainConfig(
            lr=1e-2,
            clip=0.5,
            batch=24,
            accumulate=2,
            ema=0.9,
        ),
    )


def train(engine, steps):
    rank = engine.accelerator.process_index
    for step in steps:
        for turn in range(2):
            generator = torch.Generator().manual_seed(1000 * step + 10 * turn + rank)
            images = torch.randn(
                engine.micro,
                1,
                8,
                8,
                generator=generator,
            )
            with engine.micro_batch():
                engine.backward((engine.forward(images) - images).square().mean())
        engine.step()


def hand_over(first, second):
    """Restore one engine's state into another one."""
    for name, kept in first.states():
        shapes = second.state_shapes(name)
        assert shapes.keys() == kept.keys()
        for key, value in kept.items():
            assert shapes[key] == tuple(value.shape)
        second.restore(name, deepcopy(kept), first.steps)


def state(engine):
    with torch.no_grad():
        found = {"code": engine._evaluate(engine.bare, "encode", torch.ones(2, 1, 8, 8))}
    found["sample"] = engine.sample(torch.ones(2, 1, 8, 8))
    for name, values in engine.states():
        for key, value in values.items():
            found[f"{key}.{name}"] = value.clone()
    for name, value in engine.ema.state_dict().items():
        found[f"average.{name}"] = value.clone()
    return found


def trained(rank, world):
    """The state after three steps of DDP, of FSDP2 with a unit for each module, and of FSDP2 restored after two."""
    os.environ["LOCAL_RANK"] = str(rank)
    local = 2 if world == 4 else world
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    fsdp.UNIT = 1
    ddp = make(Engine)
    whole = make(fsdp.FsdpEngine)
    first = make(fsdp.FsdpEngine)
    second = make(fsdp.FsdpEngine)
    for engine in (ddp, whole):
        train(engine, range(3))
    train(first, range(2))
    meshes = {value.device_mesh.shape for value in first.bare.parameters()}
    assert meshes == {(2, 2) if world == 4 else (world,)}
    hand_over(first, second)
    second.ema.load_state_dict(first.ema.state_dict())
    train(second, range(2, 3))
    return {"ddp": state(ddp), "whole": state(whole), "again": state(second)}
