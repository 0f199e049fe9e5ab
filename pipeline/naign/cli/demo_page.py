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
from naign.errors import InputError, one_line, require
from naign.evaluate.recorded import read_image
from naign.evaluate.report import DAMAGE, learned_classes
from naign.model.holes import put_back
from naign.model.naign import FILLING, NAIGN
from naign.model.scale import scaled
from naign.observe.pictures import grid, shades, to_image

HOST = "127.0.0.1"
SIDE = 320  # pixels of the canvas' longer side, about
STRENGTH = 2.0  # of a damage at most
TIMES = FILLING  # applications of f at most
HOLE = "#ff00ff"  # of strokes over what is to be filled; their edges are blurred
NEAR = 64  # values of 255 from that colour
SAMPLES = 64  # at once at most
STEPS = 16  # images of an interpolation at most
SEEDS = 2**31
EXACT: dict[str, Any] = {"format": "png", "type": "pil", "elem_classes": "pixels"}  # shows pixels as they are
HELP = "Draw, upload or take a sample; damage it; press **Repair**. Magenta, in the palette, marks holes to be filled."
STYLE = "#canvas button[aria-label=Color] {background: #606060} "  # its icon has the brush's colour: white
STYLE += ".pixels .image-container, .pixels .grid-wrap {padding-top: 30px; box-sizing: border-box} "  # below labels
STYLE += ".pixels img {object-fit: contain !important; image-rendering: pixelated} .pixels .image-frame {width: 100%} "
STYLE += ".pixels .caption-label {max-width: 100%} input:focus-visible {outline: 2px solid var(--color-accent)} "
STYLE += "body:not(.dark) {--color-accent:#25e; --button-primary-background-fill:#25e; --body-text-color-subdued:#666}"


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with bad input and a lack of memory shown as messages in the browser."""

    @functools.wraps(function)
    def call(*inputs: Any) -> Any:
        try:
            require((None not in inputs, "something is missing: draw or upload a picture, and fill in every field"))
            return function(*inputs)
        except InputError as error:
            message = str(error)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            message = "this machine has too little memory for that: ask for fewer or smaller images"
        raise gradio.Error(message, print_exception=False)

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
        pixels = np.asarray(small.convert("L" if self.model.shape[0] == 1 else "RGB"))
        return scaled(torch.from_numpy(pixels.reshape(self.height, self.width, -1).transpose(2, 0, 1).copy())[None])

    def hole(self, layers: list[Image.Image]) -> Tensor | None:
        """(H, W) bool, true in pixels of the model that a stroke in HOLE touches; None without such a stroke."""
        colour = ImageColor.getrgb(HOLE)
        touched = [np.abs(np.asarray(layer.convert("RGB"), dtype=int) - colour).max(2) < NEAR for layer in layers]
        if not np.any(touched):
            return None
        painted = torch.from_numpy(np.any(touched, 0))[None].float()
        return F.adaptive_max_pool2d(painted, (self.height, self.width))[0] > 0

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
        picture = canvas["composite"] or canvas["background"]
        require((picture, "there is no picture: draw one, or upload one"))
        hole = self.hole(canvas["layers"])
        times = FILLING if hole is not None and times == 1 else times
        given = self.model.project(self.from_canvas(picture), mask=hole, times=0)  # blur would spread the hole's colour
        for kind, strength in zip(KINDS, strengths, strict=True):
            given = degrade(given, kind, seed=seed, strength=strength)
        chain, energies = [self.model.project(given, mask=hole, times=0)], list[float]()
        for _ in range(times + 1):
            made = self.model.project(chain[-1])
            energies.append(float((made - chain[-1]).square().mean()))
            chain.append(made if hole is None else put_back(chain[0], made, hole.expand_as(made)))
        moved = (chain[1] - chain[0]).abs().mean(1)[0]
        applied = [(to_image(chain[count][0]), f"{count}: {energies[count]:.2g}") for count in range(1, times + 1)]
        text = f"Energy, the mean of (f(x) − x)²: **{energies[0]:.4g}** of what f was given, "
        text += f"**{energies[-1]:.4g}** of its answer. Darkest in the map: |f(x) − x| = {moved.max():.3g}."
        return to_image(chain[0][0]), shades(moved), applied[-1][0], text, applied

    def sample(self, n: int, seed: int, times: int, label: str = "") -> Image.Image:
        return grid(self.model.sample(n, seed=seed, label=label or None, times=times).cpu(), columns=min(n, 8))

    def between(self, first: int, last: int, steps: int, times: int) -> Image.Image:
        latents = self.model.between(first, last, steps=steps)
        return grid(self.model.project(latents, times=times).cpu(), columns=min(steps, 8))


def build(player: Player, *, about: str) -> gradio.Blocks:
    """The page; `about` is Markdown at its top."""
    with gradio.Blocks(title="naign demo", delete_cache=(600, 600)) as page:
        gradio.Markdown(about)
        with gradio.Tab("Repair"):
            _build_repair(player)
        with gradio.Tab("Sample"):
            with gradio.Row():
                inputs: list[Any] = [_slider("Samples", 16, SAMPLES), _seed("Seed"), _times()]
                if names := learned_classes(player.model):
                    inputs.append(gradio.Dropdown([("any", ""), *names], value="", label="Class"))
                button = gradio.Button("Sample", variant="primary")
            button.click(_refusing(player.sample), inputs, _shown("Samples f(z)"), api_name="sample")
        with gradio.Tab("Interpolate"):
            with gradio.Row():
                ends = [_seed("Seed of the first latent"), _seed("Seed of the second latent", 1)]
                inputs = [*ends, _slider("Images", 8, STEPS, least=2), _times()]
                button = gradio.Button("Interpolate", variant="primary")
            button.click(_refusing(player.between), inputs, _shown("f on the way"), api_name="between")
    page.queue(api_open=False)
    return page


def _build_repair(player: Player) -> None:
    """The tab to draw on."""
    size, colour = (player.width * player.factor, player.height * player.factor), player.model.shape[0] == 3
    brush = gradio.Brush(
        default_size=max(player.factor, SIDE // 40),  # a radius
        colors=["#ffffff", "#808080", "#000000", HOLE],
        default_color="#ffffff",
        color_mode="defaults" if colour else "fixed",
    )
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
                brush=brush,
                canvas_size=size,
                fixed_canvas=True,
                elem_id="canvas",
            )
            with gradio.Row():
                clear = gradio.Button("Clear", size="md", min_width=80)
                upload = gradio.UploadButton("Upload", elem_id="upload", size="md", min_width=80)
                example = gradio.Button("A sample", size="md", min_width=80)
        with gradio.Column():
            strengths = [_slider(f"Damage: {DAMAGE[kind]}", 0, STRENGTH, least=0, step=0.1) for kind in KINDS]
            seed, times = _seed("Seed of the damage, and of the sample"), _times(f" (with holes, 1 means {FILLING})")
            button = gradio.Button("Repair", variant="primary")
    with gradio.Row():
        pictures = [_shown("What f is given", "given"), _shown("|f(x) − x|", "map"), _shown("Repaired", "repaired")]
    text = gradio.Markdown(elem_id="energies")
    label = "f applied 1, 2, ... times: energy"
    applied = gradio.Gallery(**EXACT, label=label, columns=TIMES, fit_columns=False, height=180, buttons=[])
    inputs, outputs = [canvas, times, seed, *strengths], [*pictures, text, applied]
    # The progress of a refused upload would cover the canvas, so it is hidden.
    clear.click(_refusing(player.clear), None, canvas, api_name="clear", show_progress="hidden")
    upload.upload(_refusing(player.upload), upload, canvas, api_name="upload", show_progress="hidden")
    button.click(_refusing(player.repair), inputs, outputs, api_name="repair")
    example.click(_refusing(player.example), seed, canvas, api_name="example", show_progress="hidden")


def _slider(label: str, value: float, most: float, *, least: float = 1, step: float = 1) -> gradio.Slider:
    return gradio.Slider(least, most, value=value, step=step, label=label, precision=0 if step == 1 else None)


def _times(more: str = "") -> gradio.Slider:
    return _slider(f"Applications of f{more}", 1, TIMES)


def _seed(label: str, value: int = 0) -> gradio.Number:
    return gradio.Number(value, label=label, precision=0, minimum=0, maximum=SEEDS - 1)


def _shown(label: str, name: str | None = None) -> gradio.Image:
    return gradio.Image(**EXACT, label=label, alt_text=label, buttons=["download"], elem_id=name, height=260)


def serve(player: Player, *, about: str, port: int) -> None:
    """Serve the page until Ctrl-C; port 0 is any free one. Raises InputError where it cannot listen."""
    page = build(player, about=about)
    os.environ["no_proxy"] = ",".join(filter(None, (HOST, getproxies().get("no"))))  # gradio asks its own server
    try:
        page.launch(
            server_name=HOST,
            server_port=port or None,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
            css=STYLE,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
        )
        print(f"page: {page.local_url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except (OSError, gradio.exceptions.ServerFailedToStartError) as error:
        remedy = "choose another, or --port 0 for any free one"
        raise InputError(f"cannot listen on --port {port} ({one_line(error).partition('. ')[0]}): {remedy}") from None
    finally:
        page.close(verbose=False)
