"""The page of `naign demo`, in Gradio."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any
from urllib.request import getproxies

import gradio
import numpy as np
import torch
from PIL import Image

from naign.data.damage import KINDS, degrade
from naign.data.scale import scaled
from naign.errors import InputError, one_line, require
from naign.evaluate.report import DAMAGE
from naign.model.naign import NAIGN
from naign.observe.pictures import grid, to_image

HOST = "127.0.0.1"
SIDE = 320  # pixels of the canvas' longer side, about
SAMPLES = 64  # at once at most
HELP = "Draw or upload an image, damage it, and let f repair it."
STYLE = ".pixels img {object-fit: contain !important; image-rendering: pixelated}"


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with bad input and a lack of memory shown as messages in the browser."""

    @functools.wraps(function)
    def call(*inputs: Any) -> Any:
        try:
            require((None not in inputs, "something is missing: draw or upload a picture, and fill in every field"))
            return function(*inputs)
        except (InputError, MemoryError, RuntimeError) as error:
            raise gradio.Error(one_line(error), print_exception=False) from None

    return call


def build(model: NAIGN, *, about: str) -> gradio.Blocks:
    """The page; `about` is Markdown at its top."""
    _, height, width = model.shape
    factor = max(1, SIDE // max(height, width))

    def repair(canvas: dict[str, Any], times: int, *strengths: float) -> tuple[Image.Image, Image.Image, str]:
        """What f is given, its answer, and the energies of both as text."""
        picture = canvas["composite"] or canvas["background"]
        require((picture, "there is no picture: draw one, or upload one"))
        small = picture.resize((width, height), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.array(small.convert("RGB"))).permute(2, 0, 1)
        given = scaled(pixels[None, : model.shape[0]])
        for kind, strength in zip(KINDS, strengths, strict=True):
            given = degrade(given, kind, strength=strength)
        answer = model.project(given, times=times)
        before = float(model.energy(given))
        after = float(model.energy(answer))
        text = f"Energy: **{before:.4g}** of what f was given, **{after:.4g}** of its answer."
        return to_image(given[0]), to_image(answer[0]), text

    def sample(n: int, seed: int, times: int) -> Image.Image:
        samples = model.sample(n, seed=seed, times=times)
        return grid(samples.cpu(), columns=min(n, 8))

    canvas = gradio.ImageEditor(
        {"background": Image.new("RGB", (width * factor, height * factor)), "layers": [], "composite": None},
        label="Draw",
        type="pil",
        image_mode="RGB",
        format="png",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=gradio.Brush(factor, colors=["#ffffff", "#808080", "#000000"]),
        canvas_size=(width * factor, height * factor),
        fixed_canvas=True,
        elem_id="canvas",
    )
    strengths = [gradio.Slider(0, 2, step=0.1, label=f"Damage: {DAMAGE[kind]}") for kind in KINDS]
    repairs = gradio.Interface(
        _refusing(repair),
        [canvas, _slider("Applications of f", 1, 8), *strengths],
        [_shown("What f is given", "given"), _shown("Repaired", "repaired"), gradio.Markdown()],
        description=HELP,
        submit_btn="Repair",
        api_name="repair",
        flagging_mode="never",
    )
    samples = gradio.Interface(
        _refusing(sample),
        [_slider("Samples", 1, SAMPLES), _slider("Seed", 0, 9999), _slider("Applications of f", 1, 8)],
        _shown("Samples f(z)", "samples"),
        submit_btn="Sample",
        api_name="sample",
        flagging_mode="never",
    )
    with gradio.Blocks(title="naign demo", delete_cache=(600, 600)) as page:
        gradio.Markdown(about)
        gradio.TabbedInterface([repairs, samples], ["Repair", "Sample"])
    return page


def _slider(label: str, least: int, most: int) -> gradio.Slider:
    return gradio.Slider(least, most, step=1, label=label, precision=0)


def _shown(label: str, name: str) -> gradio.Image:
    """A picture whose pixels are shown as they are."""
    return gradio.Image(
        format="png",
        type="pil",
        label=label,
        buttons=["download"],
        height=260,
        elem_id=name,
        elem_classes="pixels",
    )


def serve(model: NAIGN, *, about: str, port: int) -> None:
    """Serve the page until Ctrl-C; port 0 is any free one. Raises InputError where it cannot listen."""
    page = build(model, about=about)
    os.environ["no_proxy"] = f"{HOST},{getproxies().get('no', '')}"  # gradio asks its own server
    try:
        page.launch(
            server_name=HOST,
            server_port=port or None,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
            css=STYLE,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
        )
        print(f"page: {page.local_url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except (OSError, gradio.exceptions.ServerFailedToStartError) as error:
        problem = f"cannot listen on --port {port} ({one_line(error, 100)})"
        raise InputError(f"{problem}: choose another, or --port 0 for any free one") from None
    finally:
        page.close(verbose=False)
