"""The command that serves a page to play with a model: demo."""

import os
import signal
import tempfile
import threading
from typing import TYPE_CHECKING

from pipeline.cli.model import Device, Run, find_device, open_model
from pipeline.errors import InputError, Unavailable, require

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.model.naign import NAIGN


def demo(run: Run, /, *, port: int = 7860, data: str | None = None, device: Device = "auto") -> None:
    """Serve a page to play with a model of images: draw or upload, damage, repair; sample, interpolate.

    Args:
        port: Port of 127.0.0.1 to listen on; 0 for any free one. Other machines cannot reach it.
        data: Packed data set in which nearest training images are searched; default: the one it was trained on.
    """
    require((0 <= port < 2**16, f"--port is {port}: it must be 0 to {2**16 - 1}"))
    model = open_model(run, find_device(device))
    require((len(model.shape) == 3, f"the page is for images, the model in {run} takes points of {model.shape}"))
    training, about = _introduce(model, run, data)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with tempfile.TemporaryDirectory(prefix="naign-demo-") as place:
        os.environ |= {  # read when Gradio is imported: nothing is sent, and its files are gone in the end
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_TEMP_DIR": place,
        }
        try:
            from pipeline.cli.demo_page import Player, serving
        except ModuleNotFoundError as error:
            raise InputError(f"naign demo needs Gradio ({error}): in a checkout, pip install -e '.[demo]'") from None
        with serving(Player(model, training), about=about, port=port) as page:
            print(f"page: {page.local_url} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()


def _introduce(model: "NAIGN", run: str, data: str | None) -> "tuple[Tensor | None, str]":
    """The training images to search, None where they cannot be read, and the text at the top of the page."""
    from pipeline.evaluate.demo import training_images

    about = f"**{run}**: f takes images of {' × '.join(map(str, model.shape))}."
    if getattr(model.network, "generates_only", False):
        about += " It carries latents to images: it was not trained to repair."
    try:
        training = training_images(model, run, data)
    except (InputError, Unavailable) as error:
        if data is not None:
            raise
        return None, f"{about} There are no training images to show: {error}."
    return training, f"{about} Nearest images are searched among {len(training):,} of its training images."
