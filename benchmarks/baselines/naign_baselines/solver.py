"""Another number of evaluations for a trained rectified flow; its weights stay as they are.

python -m naign_baselines.solver runs/mnist_flow --evaluations 39 --to runs/mnist_flow-39
"""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from naign.errors import InputError, exit_on_input_error
from naign.model.naign import NAIGN, read_settings
from naign_baselines.rectified_flow import FlowNetworkConfig, RectifiedFlow


def main(
    run: Positional[str],
    /,
    *,
    to: Path,
    evaluations: int = 10,
    solver: Literal["heun", "euler"] = "heun",
) -> None:
    """Write the flow of a run as a model that samples in another way.

    Args:
        run: A run, a checkpoint or an exported model: its folder.
        to: Folder to write.
        evaluations: How often a sample evaluates the velocity.
        solver: heun (two evaluations a step, an odd last one is Euler's) or euler.
    """
    model = NAIGN.from_pretrained(run)
    if not isinstance(model.network, RectifiedFlow):
        raise InputError(f"the model in {run} is not a rectified flow")
    settings = dict(model.metadata["model"])
    settings["evaluations"] = evaluations
    settings["solver"] = solver
    config = read_settings("model", settings)
    assert isinstance(config, FlowNetworkConfig)
    model.network.evaluations = config.evaluations
    model.network.solver = config.solver
    metadata = model.metadata | {"model": asdict(config)}
    NAIGN(model.network, metadata, model.state).save_pretrained(to)
    print(f"exported: {to / 'model.safetensors'}")


if __name__ == "__main__":
    with exit_on_input_error("solver"):
        tyro.cli(main)
