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
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from naign.data.damage import KINDS, degrade
from naign.data.scale import scaled
from naign.errors import InputError, one_line, require
from naign.evaluate.recorded import read_image
from naign.evaluate.report import DAMAGE
from naign.model.naign import FILLING, NAIGN
from naign.observe.pictures import grid, to_image

HOST = "127.0.0.1"
SIDE = 320  # pixels of the canvas' longer side, about
HOLE = "#ff00ff"  # of strokes over what is to be filled; their edges are blurred
NEAR = 64  # values of 255 from that colour
SAMPLES = 64  # at once at most
SEEDS = 9999
HELP = "Draw, upload or take a sample; damage it; press **Repair**. Magenta, in the palette, marks holes to be filled."
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

    def to_canvas(self, image: Tensor) -> Image.Image:
        """(C, H, W) in [-1, 1] as the canvas shows it: enlarged by a whole factor, which `from_canvas` undoes."""
        return to_image(image, least=self.factor * min(self.height, self.width))

    def from_canvas(self, picture: Image.Image) -> Tensor:
        """(1, C, H, W): the mean of the pixels that stand for one of the model's."""
        small = picture.resize((self.width, self.height), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.array(small.convert("RGB"))).permute(2, 0, 1)
        return scaled(pixels[None, : self.model.shape[0]])

    def hole(self, layers: list[Image.Image]) -> Tensor | None:
        """(H, W) bool, true in pixels of the model that a stroke in HOLE touches; None without such a stroke."""
        painted = torch.zeros(1, self.height, self.width)
        for layer in layers:
            distance = np.array(layer.convert("RGB"), dtype=int) - ImageColor.getrgb(HOLE)
            near = torch.from_numpy(np.abs(distance).max(2) < NEAR).float()
            painted += F.adaptive_max_pool2d(near[None], (self.height, self.width))
        if painted.any():
            return painted[0] > 0
        return None

    def clear(self) -> dict[str, Any]:
        return self._drawn(-torch.ones(1, *self.model.shape))

    def upload(self, file: str) -> dict[str, Any]:
        try:
            return self._drawn(read_image(Path(file).read_bytes(), self.model))
        except InputError as error:
            raise InputError(f"the file cannot be read as a picture: {error}") from None

    def example(self, seed: int) -> dict[str, Any]:
        return self._drawn(self.model.sample(1, seed=seed).cpu())

    def _drawn(self, image: Tensor) -> dict[str, Any]:
        return {"background": self.to_canvas(image[0]), "layers": [], "composite": None}

    def repair(self, canvas: dict[str, Any], times: int, seed: int, *strengths: float) -> tuple[Any, ...]:
        """What f is given, the map of what it changes, its answer, and the energies of both as text."""
        model = self.model
        picture = canvas["composite"] or canvas["background"]
        require((picture, "there is no picture: draw one, or upload one"))
        hole = self.hole(canvas["layers"])
        if hole is not None and times == 1:
            times = FILLING
        given = model.project(self.from_canvas(picture), mask=hole, times=0)  # blur would spread the hole's colour
        for kind, strength in zip(KINDS, strengths, strict=True):
            given = degrade(given, kind, seed=seed, strength=strength)
        given = model.project(given, mask=hole, times=0)
        answer = model.project(given, mask=hole, times=times)
        moved = (model.project(given) - given).abs().mean(1)
        darkness = (moved / moved.max().clamp(min=1e-12)).sqrt()
        text = (
            f"Energy, the mean of (f(x) − x)²: **{float(model.energy(given)):.4g}** of what f was given, "
            f"**{float(model.energy(answer)):.4g}** of its answer. Black in the map: |f(x) − x| = {moved.max():.3g}."
        )
        return to_image(given[0]), to_image(1 - 2 * darkness), to_image(answer[0]), text

    def sample(self, n: int, seed: int, times: int) -> Image.Image:
        return grid(self.model.sample(n, seed=seed, times=times).cpu(), columns=min(n, 8))


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
                    _slider("Applications of f", 1, FILLING),
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
                player.clear(),
                label="Draw",
                type="pil",
                image_mode="RGB",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gradio.Brush(
                    player.factor, colors=["#ffffff", "#808080", "#000000", HOLE], default_color="#ffffff"
                ),
                canvas_size=(player.width * player.factor, player.height * player.factor),
                fixed_canvas=True,
                elem_id="canvas",
            )
            with gradio.Row():
                clear = gradio.Button("Clear")
                upload = gradio.UploadButton("Upload")
                example = gradio.Button("A sample")
        with gradio.Column():
            strengths = [gradio.Slider(0, 2, step=0.1, label=f"Damage: {DAMAGE[kind]}") for kind in KINDS]
            seed = _slider("Seed of the damage, and of the sample", 0, SEEDS)
            times = _slider(f"Applications of f (with holes, 1 means {FILLING})", 1, FILLING)
            button = gradio.Button("Repair", variant="primary")
    with gradio.Row():
        pictures = [_shown("What f is given", "given"), _shown("|f(x) − x|", "map"), _shown("Repaired", "repaired")]
    text = gradio.Markdown()
    inputs = [canvas, times, seed, *strengths]
    # The progress of a refused upload would cover the canvas, so it is hidden.
    clear.click(_refusing(player.clear), None, canvas, api_name="clear", show_progress="hidden")
    upload.upload(_refusing(player.upload), upload, canvas, api_name="upload", show_progress="hidden")
    example.click(_refusing(player.example), seed, canvas, api_name="example", show_progress="hidden")
    button.click(_refusing(player.repair), inputs, [*pictures, text], api_name="repair")


def _slider(label: str, least: int, most: int, *, value: int | None = None) -> gradio.Slider:
    return gradio.Slider(least, most, value=value, step=1, label=label, precision=0)


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
