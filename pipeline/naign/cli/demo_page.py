"""The page of `naign demo`, in Gradio."""

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import gradio
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from naign.data.damage import KINDS, degrade
from naign.data.scale import scaled
from naign.errors import InputError, one_line, require
from naign.evaluate.recorded import read_image
from naign.evaluate.report import DAMAGE
from naign.model.naign import NAIGN
from naign.observe.pictures import grid, to_image

HOST = "127.0.0.1"
SIDE = 320  # pixels of the canvas' longer side, about
SAMPLES = 64  # at once at most
SEEDS = 9999
TIMES = 8
HELP = "Draw or upload an image, damage it, and press **Repair**."
STYLE = """
#canvas button[aria-label=Color] {background: #606060}  /* its icon has the brush's colour: white */
.pixels img {object-fit: contain !important; image-rendering: pixelated}
input:focus-visible {outline: 2px solid var(--color-accent)}
"""


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


class Player:
    """What the page's buttons do: pictures in, pictures and text out."""

    def __init__(self, model: NAIGN) -> None:
        self.model = model
        _, self.height, self.width = model.shape
        self.factor = max(1, SIDE // max(self.height, self.width))

    def canvas(self, image: Tensor) -> dict[str, Any]:
        """(C, H, W) in [-1, 1] as the canvas shows it: enlarged by a whole factor, which `from_canvas` undoes."""
        picture = to_image(image, least=self.factor * min(self.height, self.width))
        return {"background": picture, "layers": [], "composite": None}

    def from_canvas(self, picture: Image.Image) -> Tensor:
        """(1, C, H, W): the mean of the pixels that stand for one of the model's."""
        small = picture.resize((self.width, self.height), Image.Resampling.BOX)
        values = np.array(small.convert("RGB"))
        pixels = torch.from_numpy(values).permute(2, 0, 1)
        return scaled(pixels[None, : self.model.shape[0]])

    def upload(self, file: str) -> dict[str, Any]:
        try:
            image = read_image(Path(file).read_bytes(), self.model)
        except InputError as error:
            raise InputError(f"the file cannot be read as a picture: {error}") from None
        return self.canvas(image[0])

    def repair(
        self,
        canvas: dict[str, Any],
        times: int,
        seed: int,
        *strengths: float,
    ) -> tuple[Any, ...]:
        """What f is given, the map of what it changes, its answer, and the energies of both as text."""
        model = self.model
        picture = canvas["composite"] or canvas["background"]
        require((picture, "there is no picture: draw one, or upload one"))
        given = self.from_canvas(picture)
        for kind, strength in zip(KINDS, strengths, strict=True):
            given = degrade(given, kind, seed=seed, strength=strength)
        answer = model.project(given, times=times)
        moved = (model.project(given) - given).abs().mean(1)
        darkness = (moved / moved.max().clamp(min=1e-12)).sqrt()
        text = (
            f"Energy, the mean of (f(x) − x)²: **{float(model.energy(given)):.4g}** of what f was given, "
            f"**{float(model.energy(answer)):.4g}** of its answer. Black in the map: |f(x) − x| = {moved.max():.3g}."
        )
        pictures = [to_image(image) for image in (given[0], 1 - 2 * darkness, answer[0])]
        return *pictures, text

    def sample(self, n: int, seed: int, times: int) -> Image.Image:
        samples = self.model.sample(n, seed=seed, times=times)
        return grid(samples.cpu(), columns=min(n, 8))


def build(player: Player, *, about: str) -> gradio.Blocks:
    """The page; `about` is Markdown at its top."""
    with gradio.Blocks(title="naign demo", delete_cache=(600, 600)) as page:
        gradio.Markdown(about)
        with gradio.Tab("Repair"):
            _build_repair(player)
        with gradio.Tab("Sample"):
            gradio.Interface(
                _refusing(player.sample),
                [
                    _slider("Samples", 1, SAMPLES, value=16),
                    _slider("Seed", 0, SEEDS),
                    _slider("Applications of f", 1, TIMES),
                ],
                _shown("Samples f(z)", "samples"),
                api_name="sample",
                flagging_mode="never",
            )
    return page


def _build_repair(player: Player) -> None:
    """The tab to draw on."""
    gradio.Markdown(HELP)
    with gradio.Row():
        with gradio.Column():
            canvas = gradio.ImageEditor(
                player.canvas(-torch.ones(player.model.shape)),
                label="Draw",
                type="pil",
                image_mode="RGB",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gradio.Brush(
                    player.factor,
                    colors=["#ffffff", "#808080", "#000000"],
                    default_color="#ffffff",
                ),
                canvas_size=(player.width * player.factor, player.height * player.factor),
                fixed_canvas=True,
                elem_id="canvas",
            )
            upload = gradio.UploadButton("Upload")
        with gradio.Column():
            strengths = []
            for kind in KINDS:
                label = f"Damage: {DAMAGE[kind]}"
                strengths.append(gradio.Slider(0, 2, step=0.1, label=label))
            seed = _slider("Seed of the damage", 0, SEEDS)
            times = _slider("Applications of f", 1, TIMES)
            button = gradio.Button("Repair", variant="primary")
    with gradio.Row():
        given = _shown("What f is given", "given")
        changes = _shown("|f(x) − x|", "map")
        repaired = _shown("Repaired", "repaired")
    text = gradio.Markdown()
    upload.upload(
        _refusing(player.upload),
        upload,
        canvas,
        api_name="upload",
        show_progress="hidden",  # that of a refused upload would cover the canvas
    )
    button.click(
        _refusing(player.repair),
        [canvas, times, seed, *strengths],
        [given, changes, repaired, text],
        api_name="repair",
    )


def _slider(label: str, least: int, most: int, *, value: int | None = None) -> gradio.Slider:
    return gradio.Slider(
        least,
        most,
        value=value,
        step=1,
        label=label,
        precision=0,
    )


def _shown(label: str, name: str) -> gradio.Image:
    """A picture whose pixels are shown as they are."""
    return gradio.Image(
        format="png",
        type="pil",
        label=label,
        alt_text=label,
        buttons=["download"],
        height=260,
        elem_id=name,
        elem_classes="pixels",
    )


def serve(player: Player, *, about: str, port: int) -> None:
    """Serve the page until Ctrl-C; port 0 is any free one. Raises InputError where it cannot listen."""
    page = build(player, about=about)
    os.environ["no_proxy"] = f"{HOST},{getproxies().get('no', '')}"  # gradio asks its own server
    try:
        page.launch(
            server_name=HOST,
            server_port=port or None,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
            css=STYLE,
            ssr_mode=False,
            mcp_server=False,
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
