"""The command that serves a page to play with a model: demo."""

import os
import signal
import tempfile

from pipeline.cli.model import Device, Run, find_device, open_model
from pipeline.errors import InputError, require


def demo(run: Run, /, *, port: int = 7860, device: Device = "auto") -> None:
    """Serve a page to play with a model of images: draw or upload, damage, repair; sample, interpolate.

    Args:
        port: Port of 127.0.0.1 to listen on; 0 for any free one. Other machines cannot reach it.
    """
    require((0 <= port < 2**16, f"--port is {port}: it must be 0 to {2**16 - 1}"))
    model = open_model(run, find_device(device))
    require((len(model.shape) == 3, f"the page is for images, the model in {run} takes points of {model.shape}"))
    about = f"**{run}**: f takes images of {' × '.join(map(str, model.shape))}."
    if getattr(model.network, "generates_only", False):
        about += " It carries latents to images: it was not trained to repair."
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with tempfile.TemporaryDirectory(prefix="naign-demo-") as place:
        os.environ |= {  # read when Gradio is imported: nothing is sent, and its files are gone in the end
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_TEMP_DIR": place,
        }
        try:
            from pipeline.cli.demo_page import Player, serve
        except ModuleNotFoundError as error:
            raise InputError(f"naign demo needs Gradio ({error}): in a checkout, pip install -e '.[demo]'") from None
        serve(Player(model), about=about, port=port)
