"""The pictures of a run under way: what f makes of noise, of its own samples, and of damaged images."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from pipeline.data.degrade import KINDS, degrade
from pipeline.pictures import grid, rows, scatter


def draw_progress(
    network: Callable[[Tensor], Tensor],  # f without gradient
    latents: Tensor,  # (n, *shape): held fixed over the run, so that pictures can be compared
    examples: Tensor,  # (m, *shape) in the model's scale
) -> dict[str, Image.Image]:
    """Pictures by name: samples f(z), resamples f(f(z)), restorations; for points one scatter plot."""
    once = network(latents)
    twice = network(once)
    once, twice, examples = once.cpu(), twice.cpu(), examples.cpu()
    if once.ndim != 4:
        return {"samples": scatter([("f(z)", once), ("f(f(z))", twice)], behind=examples[:2000])}
    clean, lines = examples[:12], []
    for kind in KINDS:
        damaged = degrade(clean, kind)
        repaired = network(damaged.to(latents.device)).cpu()
        lines += [(kind.replace("_", " "), damaged), ("repaired", repaired)]
    return {
        "samples": grid(once, columns=8),
        "samples-twice": grid(twice, columns=8),
        "restorations": rows([("clean", clean), *lines]),
    }
