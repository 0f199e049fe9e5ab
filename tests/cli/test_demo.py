"""The page of `naign demo`, as its visitors meet it: over HTTP and, where Chromium is, in a browser."""

import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from naign.cli.model import demo
from naign.data.damage import KINDS, degrade
from naign.data.scale import scaled
from naign.errors import InputError
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, PointConfig
from naign.observe.pictures import grid, to_image
from tests.conftest import environment

TINY = ConvConfig(width=8, depth=0, code=16)
FACTOR = 40  # pixels of the canvas for one of a digit


class Page(NamedTuple):
    url: str
    run: str
    model: NAIGN
    pid: int


@pytest.fixture(scope="module")
def page(digits, save_untrained, tmp_path_factory):
    """The program on a free port. It ends on SIGTERM, and leaves nothing."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("demo")
    run = save_untrained(folder / "run", data=digits, shape=(1, 8, 8), config=TINY)
    command = [sys.executable, "-m", "naign.cli", "demo", run, "--port", "0"]
    env = environment(TMPDIR=str(folder), HF_HUB_OFFLINE="1", http_proxy="http://127.0.0.1:9")
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        line = program.stdout.readline()
        found = re.fullmatch(r"page: (http://127\.0\.0\.1:\d+)/ \(Ctrl-C ends it\)\n", line)
        assert found, line + (folder / "log").read_text()
        yield Page(found[1], run, NAIGN.from_pretrained(run), program.pid)
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 143
        assert not [path for path in folder.iterdir() if "demo" in path.name or "gradio" in path.name]
    finally:
        program.kill()
        program.wait()


@pytest.fixture(scope="module")
def client(page):
    from gradio_client import Client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield Client(page.url, verbose=False)


def pixels(picture):
    if not isinstance(picture, Image.Image):
        picture = Image.open(picture).convert("RGB")
    return np.asarray(picture)


def assert_shows(picture, image):
    """The picture shows an image (C, H, W) as it is."""
    assert np.array_equal(pixels(picture), pixels(to_image(image)))


def drawn(file):
    """What the canvas sends."""
    from gradio_client import handle_file

    picture = handle_file(file)
    return {"background": picture, "layers": [], "composite": picture, "id": None}


@pytest.fixture
def digit(tmp_path):
    """An image (1, 1, 8, 8), and the file of what the canvas shows of it."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (1, 1, 8, 8), generator=generator)
    image = scaled(values.to(torch.uint8))
    to_image(image[0], least=8 * FACTOR).save(tmp_path / "digit.png")
    return image, tmp_path / "digit.png"


def test_a_repair_is_the_models(page, client, digit):
    image, file = digit
    strengths = (0.5, 0.0, 1.0, 2.0)
    given, repaired, text = client.predict(drawn(file), 2, *strengths, api_name="/repair")
    damaged = image
    for kind, strength in zip(KINDS, strengths, strict=True):
        damaged = degrade(damaged, kind, strength=strength)
    answer = page.model.project(damaged, times=2)
    assert_shows(given, damaged[0])
    assert_shows(repaired, answer[0])
    energies = [f"{float(page.model.energy(x)):.4g}" for x in (damaged, answer)]
    assert re.findall(r"\*\*(.*?)\*\*", text) == energies


def test_samples_are_the_models(page, client):
    shown = client.predict(5, 9, 2, api_name="/sample")
    expected = grid(page.model.sample(5, seed=9, times=2), columns=5)
    assert np.array_equal(pixels(shown), pixels(expected.convert("RGB")))


def test_bad_input_is_answered_with_a_message(page, client, digit):
    from gradio_client.exceptions import AppError

    for values in ((9, 0), (1, 2.5)):
        with pytest.raises(AppError, match="than m"):
            client.predict(
                drawn(digit[1]),
                *values,
                0,
                0,
                0,
                api_name="/repair",
            )
    with pytest.raises(AppError, match="than m"):
        client.predict(65, 0, 1, api_name="/sample")
    with pytest.raises(AppError, match="something is missing: draw or upload a picture, and fill in every field"):
        client.predict(
            None,
            1,
            0,
            0,
            0,
            0,
            api_name="/repair",
        )
    test_samples_are_the_models(page, client)


def test_no_file_is_served_that_was_not_uploaded(page, digit):
    for path in (f"{page.run}/model.safetensors", digit[1], "/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError, match="40[34]"):
            urllib.request.urlopen(f"{page.url}/gradio_api/file={path}", timeout=60)


def test_what_cannot_be_served_is_refused(page, save_untrained, tmp_path, monkeypatch):
    port = int(page.url.rpartition(":")[2])
    with pytest.raises(InputError, match=rf"cannot listen on --port {port} .*: choose another, or --port 0"):
        demo(page.run, port=port)
    with pytest.raises(InputError, match="--port is 65536: it must be 0 to 65535"):
        demo(page.run, port=2**16)
    config = PointConfig(width=8)
    points = save_untrained(tmp_path / "points", data=None, shape=(2,), config=config)
    with pytest.raises(InputError, match="the page is for images"):
        demo(points, port=0)
    for name in ("gradio", "naign.cli.demo_page"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    with pytest.raises(InputError, match=r"needs Gradio .*: in a checkout, pip install -e '.\[demo\]'"):
        demo(page.run, port=0)


def test_it_listens_on_loopback_alone(page):
    found = psutil.Process(page.pid).net_connections()
    assert [one.laddr.ip for one in found if one.status == "LISTEN"] == ["127.0.0.1"]


def shown_in(tab, name):
    with urllib.request.urlopen(tab.locator(f"#{name} img").get_attribute("src")) as picture:
        return pixels(picture)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_draw_and_repair_in_a_browser(page):
    playwright = pytest.importorskip("playwright.sync_api")
    options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
    with playwright.sync_playwright() as driver, driver.chromium.launch(**options) as browser:
        tab = browser.new_page()
        tab.set_default_timeout(60_000)
        asked = set()
        tab.on("request", lambda request: asked.add(request.url))
        tab.goto(page.url)
        box = tab.locator("#canvas canvas").first.bounding_box()
        tab.wait_for_timeout(1000)  # for the canvas, which shows nothing when it is ready
        x = box["x"] + box["width"] / 2
        y = box["y"] + box["height"] / 2
        tab.mouse.move(x, y - 60)
        tab.mouse.down()
        tab.mouse.move(x, y + 60, steps=5)
        tab.mouse.up()
        tab.get_by_role("button", name="Repair", exact=True).click()
        tab.locator("#repaired img").wait_for()
        grey = shown_in(tab, "given")[..., 0]
        given = scaled(torch.from_numpy(grey.copy())[None, None])
        assert given[0, 0, 0, 0] == -1
        assert given[0, 0, 4, 4] > 0.5
        expected = to_image(page.model.project(given)[0])
        assert np.array_equal(shown_in(tab, "repaired"), pixels(expected))
        for url in asked:
            assert url.startswith((page.url, "blob:", "data:"))
