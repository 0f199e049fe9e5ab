"""The page of `naign demo`, in Gradio. What it computes is in pipeline/evaluate/play.py.

The browser loads nothing from other hosts, and the server reads nothing that was not uploaded to it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import torch
from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from pipeline.data.degrade import KINDS
from pipeline.errors import InputError, one_line, require
from pipeline.evaluate import play
from pipeline.model.naign import NAIGN
from pipeline.model.scale import scaled
from pipeline.observe.pictures import grid, shades, to_image

SIDE = 320  # pixels of the canvas' longer side, about
LAYERS = 2  # of a drawing: the page sends one at most, and uses none
WAITING = 32  # requests at most
BODY = play.UPLOAD + 2**20  # bytes of a request
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'"
STYLE = ".pixels img {object-fit: contain !important; image-rendering: pixelated} .pixels .image-frame {width: 100%}"


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but that bad input and too little memory are told to the person in the browser."""

    @functools.wraps(function)
    def call(*inputs: Any, **named: Any) -> Any:
        try:
            return function(*inputs, **named)
        except InputError as error:
            message = str(error)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            message = "this machine has too little memory for that: ask for fewer or smaller images"
        raise gradio.Error(message, print_exception=False)

    return call


def _by_upload_alone(component: Any) -> None:
    """Files of the component come by upload alone. Gradio itself refuses paths, but would fetch addresses."""
    move = component.async_move_resource_to_block_cache

    async def moved(address: str | Path | None) -> str | None:
        if address is not None and "://" in str(address):
            raise gradio.Error("an address is no upload: save the picture and upload the file", print_exception=False)
        path: str | None = await move(address)
        return path

    component.async_move_resource_to_block_cache = moved


def _as_uploads(canvas: Any) -> None:
    """What is drawn is refused as uploads are, before it is decoded, and so are more layers than the page sends."""
    convert, preprocess = canvas.convert_and_format_image, canvas.preprocess

    @_told
    def checked(file: Any, flatten_on_white: bool = False) -> Any:
        if file is not None:
            play.check_picture(Path(file.path).read_bytes() if hasattr(file, "path") else bytes(file))
        with play.decoded():
            return convert(file, flatten_on_white)

    @_told
    def counted(payload: Any) -> Any:
        sent = canvas.blob_storage.get(payload.id) if payload is not None and payload.id is not None else payload
        layers = len((sent and sent.layers) or ())
        require((layers <= LAYERS, f"the drawing has {layers} layers: send at most {LAYERS}"))
        return preprocess(payload)

    canvas.convert_and_format_image, canvas.preprocess = checked, counted


class Player:
    """What the page's buttons do: pictures in, pictures and text out."""

    def __init__(self, model: NAIGN, training: Tensor | None) -> None:
        self.model, self.training = model, training
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

    def clear(self) -> dict[str, Any]:
        return self._drawn(-torch.ones(1, *self.model.shape))

    def upload(self, file: str | None) -> dict[str, Any]:
        if file is None:
            raise InputError("nothing was uploaded: choose a picture")
        return self._drawn(play.read_upload(Path(file).read_bytes(), self.model))

    def example(self, seed: int) -> dict[str, Any]:
        play.check(seed=seed)
        assert self.training is not None
        return self._drawn(scaled(self.training[seed % len(self.training)][None]))

    def _drawn(self, image: Tensor) -> dict[str, Any]:
        return {"background": self.to_canvas(image[0]), "layers": [], "composite": None}

    def repair(self, canvas: dict[str, Any] | None, times: int, seed: int, *strengths: float) -> tuple[Any, ...]:
        picture = canvas and (canvas["composite"] or canvas["background"])
        if not picture:
            raise InputError("there is no picture: draw one, or upload one")
        given = play.damage(self.from_canvas(picture), dict(zip(KINDS, strengths, strict=True)), seed=seed)
        found = play.repair(self.model, given, times=times)
        answer = found.answers[-1]
        applied = [
            (to_image(image[0]), f"{count}: {energy:.2g}")
            for count, (image, energy) in enumerate(zip(found.answers, found.energies[1:], strict=True), 1)
        ]
        near = []
        if self.training is not None:
            images, distances = play.nearest(self.training, answer)
            near = [(to_image(image), f"{one:.3g}") for image, one in zip(images, distances, strict=True)]
        text = f"Energy, the mean of (f(x) − x)²: **{found.energies[0]:.4g}** of what f was given, "
        text += f"**{found.energies[-1]:.4g}** of its answer. Darkest in the map: |f(x) − x| = {found.moved.max():.3g}."
        return to_image(given[0]), shades(found.moved), to_image(answer[0]), text, applied, near

    def sample(self, n: int, seed: int, times: int) -> Image.Image:
        made = play.sample(self.model, n=n, seed=seed, times=times)
        return grid(made, columns=min(n, 8))

    def between(self, first: int, last: int, steps: int, times: int) -> Image.Image:
        made = play.between(self.model, first, last, steps=steps, times=times)
        return grid(made, columns=min(steps, 8))


def build(player: Player, *, about: str) -> gradio.Blocks:
    """The page; `about` is Markdown at its top. One request at a time computes."""
    shared = {"concurrency_id": "model", "concurrency_limit": 1}
    with gradio.Blocks(title="naign demo", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.Markdown(about)
        with gradio.Tab("Repair"):
            _repairing(player, shared)
        with gradio.Tab("Sample"):
            with gradio.Row():
                n, seed, times = _slider("Samples", 16, play.SAMPLES), _seed("Seed"), _times()
                button = gradio.Button("Sample", variant="primary")
            button.click(_told(player.sample), [n, seed, times], _shown("Samples f(z)"), api_name="sample", **shared)
        with gradio.Tab("Between two samples"):
            with gradio.Row():
                ends = [_seed("Seed of the first latent"), _seed("Seed of the second latent", 1)]
                inputs = [*ends, _slider("Images", 8, play.STEPS, least=2), _times()]
                button = gradio.Button("Interpolate", variant="primary")
            button.click(_told(player.between), inputs, _shown("f on the way"), api_name="between", **shared)
    page.queue(api_open=False, max_size=WAITING, default_concurrency_limit=1)
    return page


def _repairing(player: Player, shared: dict[str, Any]) -> None:
    """The first tab."""
    size, colour = (player.width * player.factor, player.height * player.factor), player.model.shape[0] == 3
    brush = gradio.Brush(
        default_size=max(player.factor, SIDE // 40),  # a radius
        colors=["#ffffff", "#808080", "#000000"],
        default_color="#ffffff",
        color_mode="defaults" if colour else "fixed",
    )
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
                clear = gradio.Button("Clear", size="md")
                upload = gradio.UploadButton("Upload a picture", elem_id="upload", size="md")
                example = gradio.Button("A training image", size="md", visible=player.training is not None)
        with gradio.Column():
            strengths = [_slider(kind.replace("_", " and "), 0, play.STRENGTH, least=0, step=0.1) for kind in KINDS]
            seed, times = _seed("Seed of the damage, number of the training image"), _times()
            button = gradio.Button("Repair", variant="primary")
    with gradio.Row():
        pictures = [_shown("What f is given", "given"), _shown("|f(x) − x|", "map"), _shown("Repaired", "repaired")]
    _by_upload_alone(upload)
    _by_upload_alone(canvas)
    _as_uploads(canvas)
    text = gradio.Markdown(elem_id="energies")
    rows = [_gallery("f applied 1, 2, ... times: energy", play.TIMES)]
    rows.append(_gallery("Training images nearest to the repaired one: L2 distance", play.NEAREST))
    rows[1].visible = player.training is not None
    inputs, outputs = [canvas, times, seed, *strengths], [*pictures, text, *rows]
    quiet = {"show_progress": "hidden"} | shared  # else a refused upload would cover the canvas
    clear.click(_told(player.clear), None, canvas, api_name="clear", **quiet)
    upload.upload(_told(player.upload), upload, canvas, api_name="upload", **quiet)
    button.click(_told(player.repair), inputs, outputs, api_name="repair", **shared)
    if player.training is not None:
        example.click(_told(player.example), seed, canvas, api_name="example", **quiet)


def _slider(label: str, value: float, most: float, *, least: float = 1, step: float = 1) -> gradio.Slider:
    precision = {"precision": 0} if step == 1 else {}
    return gradio.Slider(least, most, value=value, step=step, label=label, **precision)


def _times() -> gradio.Slider:
    return _slider("Times that f is applied", 1, play.TIMES)


def _seed(label: str, value: int = 0) -> gradio.Number:
    return gradio.Number(value, label=label, precision=0, minimum=0, maximum=play.SEEDS - 1)


def _shown(label: str, name: str | None = None) -> gradio.Image:
    return gradio.Image(
        type="pil", format="png", label=label, buttons=["download"], elem_id=name, elem_classes="pixels", height=260
    )


def _gallery(label: str, columns: int) -> gradio.Gallery:
    return gradio.Gallery(
        format="png",
        label=label,
        columns=columns,
        fit_columns=False,
        height=220,
        object_fit="contain",
        buttons=[],
        elem_classes="pixels",
    )


class _Guard:
    """Refuses requests with more than BODY bytes, and tells the browser to load nothing from other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        left = BODY

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > BODY:
            refused = PlainTextResponse(f"a request has at most {BODY:,} bytes", status_code=413)
            await refused(scope, receive, send)
        else:
            await self.app(scope, counted, marked)


@contextmanager
def serving(player: Player, *, about: str, host: str, port: int, share: bool) -> Iterator[gradio.Blocks]:
    """Serve the page until the context ends."""
    page = build(player, about=about)
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=share,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
            css=STYLE,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=play.UPLOAD,
            app_kwargs={"middleware": [Middleware(_Guard)]},
            prevent_thread_lock=True,
            quiet=True,
        )
        yield page
    except (OSError, gradio.exceptions.ServerFailedToStartError) as error:
        raise InputError(f"the page cannot be served on --host {host} --port {port}: {one_line(error)}") from None
    finally:
        page.close(verbose=False)
