"""The page of `naign demo`, as its visitors meet it: over HTTP and, where Chromium is, in a browser."""

import math
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from naign.cli.model import demo
from naign.data.damage import KINDS, degrade
from naign.errors import InputError
from naign.evaluate.recorded import read_image
from naign.evaluate.refit import fit_mixture
from naign.model.naign import FILLING, NAIGN
from naign.model.networks import ConvConfig, PointConfig, build_network
from naign.model.scale import scaled
from naign.observe.pictures import grid, shades, to_image
from tests.conftest import environment

TINY = ConvConfig(width=8, depth=0, code=16)
FACTOR = 40  # pixels of the canvas for one of a digit


class Page(NamedTuple):
    url: str
    run: str
    model: NAIGN
    pid: int


@pytest.fixture(scope="module")
def page(digits, save_untrained, tmp_path_factory) -> Iterator[Page]:
    """The program on a free port. It ends on SIGTERM, and leaves nothing."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("demo")
    run = save_untrained(folder / "run", data=digits, shape=(1, 8, 8), config=TINY)
    command = [sys.executable, "-m", "naign.cli", "demo", run, "--port", "0"]
    env = environment(TMPDIR=str(folder), HF_HUB_OFFLINE="1", http_proxy="http://127.0.0.1:9")
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert program.stdout is not None
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
def client(page) -> Iterator[Any]:
    from gradio_client import Client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield Client(page.url, verbose=False)


def pixels(picture: str | bytes | Image.Image) -> np.ndarray:
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture).convert("RGB"))


def drawn(file: Path | str) -> dict[str, Any]:
    """What the canvas sends."""
    from gradio_client import handle_file

    return {"background": handle_file(file), "layers": [], "composite": handle_file(file), "id": None}


@pytest.fixture
def digit(tmp_path) -> tuple[Tensor, Path]:
    """An image (1, 1, 8, 8), and the file of what the canvas shows of it."""
    values = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    to_image(scaled(values)[0], least=8 * FACTOR).save(tmp_path / "digit.png")
    return scaled(values), tmp_path / "digit.png"


@pytest.mark.slow
def test_a_repair_is_the_models(page, client, digit) -> None:
    image, file = digit
    strengths = dict(zip(KINDS, (0.5, 0.0, 1.0, 2.0), strict=True))
    given, moved, repaired, text, applied = client.predict(drawn(file), 2, 3, *strengths.values(), api_name="/repair")
    damaged = image
    for kind, strength in strengths.items():
        damaged = degrade(damaged, kind, seed=3, strength=strength)
    assert np.array_equal(pixels(given), pixels(to_image(damaged[0])))
    assert np.array_equal(pixels(repaired), pixels(to_image(page.model.project(damaged, times=2)[0])))
    assert np.array_equal(pixels(moved), pixels(shades((page.model.project(damaged) - damaged).abs().mean(1)[0])))
    assert f"**{float(page.model.energy(damaged)):.4g}** of what f was given" in text
    for times, shown in enumerate(applied, 1):
        answer = page.model.project(damaged, times=times)
        assert np.array_equal(pixels(shown["image"]), pixels(to_image(answer[0])))
        assert shown["caption"] == f"{times}: {float(page.model.energy(answer)):.2g}"
    assert len(applied) == 2


def test_samples_are_the_models(page, client) -> None:
    for shown, made in (
        (client.predict(5, 9, 2, api_name="/sample"), page.model.sample(5, seed=9, times=2)),
        (client.predict(4, 5, 5, 1, api_name="/between"), page.model.project(page.model.between(4, 5, steps=5))),
    ):
        assert np.array_equal(pixels(shown), pixels(grid(made, columns=5).convert("RGB")))


def test_an_upload_or_a_sample_is_shown_on_the_canvas(page, client, digit) -> None:
    from gradio_client import handle_file

    shown = client.predict(handle_file(digit[1]), api_name="/upload")["background"]
    expected = to_image(read_image(digit[1].read_bytes(), page.model)[0], least=8 * FACTOR)
    assert np.array_equal(pixels(shown), pixels(expected))
    shown = client.predict(12, api_name="/example")["background"]
    assert np.array_equal(pixels(shown), pixels(to_image(page.model.sample(1, seed=12)[0], least=8 * FACTOR)))


def test_the_canvas_is_exact_for_colour_and_any_shape(client, save_untrained, tmp_path) -> None:
    from naign.cli.demo_page import Player

    for shape in ((3, 8, 24), (1, 40, 16), (3, 400, 8)):
        folder = save_untrained(tmp_path / str(shape), data=None, shape=shape, config=TINY)
        player = Player(NAIGN.from_pretrained(folder))
        image = scaled(torch.randint(0, 256, (1, *shape), dtype=torch.uint8))
        assert torch.equal(player.from_canvas(player.to_canvas(image[0])), image)
        canvas = {"composite": player.to_canvas(image[0]), "layers": []}
        given, _, repaired, _, _ = player.repair(canvas, 1, 0, 0, 0, 0, 0)
        assert given.size == repaired.size == (shape[2], shape[1])


def test_what_is_painted_over_is_filled(save_untrained, digit, tmp_path) -> None:
    pytest.importorskip("gradio")
    from naign.cli.demo_page import HOLE, Player

    player = Player(NAIGN.from_pretrained(save_untrained(tmp_path / "run", data=None, shape=(1, 8, 8), config=TINY)))
    canvas, layer = player.to_canvas(digit[0][0]).convert("RGB"), Image.new("RGB", (8 * FACTOR, 8 * FACTOR))
    for picture in (canvas, layer):  # it touches rows 2 to 5 and columns 3 to 4
        picture.paste(HOLE, (4 * FACTOR - 5, 3 * FACTOR - 5, 5 * FACTOR, 6 * FACTOR))
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:6, 3:5] = True
    network, applications = player.model.network, list[object]()
    counted = network.register_forward_hook(lambda *_: applications.append(None))
    given, moved, repaired, text, applied = player.repair({"composite": canvas, "layers": [layer]}, 3, 0, 0, 0, 0, 0)
    counted.remove()
    assert len(applications) == 4, "three, and one for the energy of the last"
    expected = [player.model.project(digit[0], mask=hole, times=times) for times in range(4)]
    assert [pixels(one[0]).tolist() for one in applied] == [pixels(to_image(one[0])).tolist() for one in expected[1:]]
    assert np.array_equal(pixels(given), pixels(to_image(expected[0][0]))) and repaired == applied[-1][0]
    energies = [float(player.model.energy(one)) for one in expected]
    assert [label for _, label in applied] == [f"{n}: {energies[n]:.2g}" for n in (1, 2, 3)]
    assert f"**{energies[0]:.4g}** of what f was given, **{energies[3]:.4g}** of its answer" in text
    assert np.array_equal(pixels(moved), pixels(shades((expected[1] - expected[0]).abs().mean(1)[0])))
    given, _, _, _, applied = player.repair({"composite": canvas, "layers": [layer]}, 1, 0, 2, 0, 0, 0)
    assert len(applied) == FILLING, "where no other number than 1 is chosen"
    blurred = degrade(expected[0], "blur", strength=2.0)
    assert np.array_equal(pixels(given), pixels(to_image(player.model.project(blurred, mask=hole, times=0)[0])))


def test_bad_input_is_answered_with_a_message(page, client, digit, tmp_path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    for name, content in {"text.png": b"hello", "cut.png": digit[1].read_bytes()[:90]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AppError, match="cannot be read as a picture"):
            client.predict(handle_file(tmp_path / name), api_name="/upload")
    for values in ((9, 0, 0), (0, 0, 0), (1, -1, 0), (1, 2**31, 0), (1, 0, 2.5), (1, 0, -0.1)):
        with pytest.raises(AppError, match="than m"):
            client.predict(drawn(digit[1]), *values, 0, 0, 0, api_name="/repair")
    for name, numbers in (("sample", (65, 0, 1)), ("between", (0, 1, 1, 1)), ("between", (0, 1, 17, 1))):
        with pytest.raises(AppError, match="than m"):
            client.predict(*numbers, api_name=f"/{name}")
    for name, values in (("between", (0, None, 2, 1)), ("repair", (None, 1, 0, 0, 0, 0, 0))):
        with pytest.raises(AppError, match="something is missing: draw or upload a picture, and fill in every field"):
            client.predict(*values, api_name=f"/{name}")
    test_samples_are_the_models(page, client)


def test_no_file_is_served_that_was_not_uploaded(page, digit) -> None:
    for path in (f"{page.run}/model.safetensors", str(digit[1]), "/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError, match="40[34]"):
            urllib.request.urlopen(f"{page.url}/gradio_api/file={path}", timeout=60)


def test_what_cannot_be_served_is_refused(page, save_untrained, tmp_path, monkeypatch) -> None:
    port = int(page.url.rpartition(":")[2])
    taken = rf"cannot listen on --port {port} .*: choose another, or --port 0"
    for options, said in (
        ({"port": port}, taken),
        ({"port": 2**16}, "--port is 65536: it must be 0 to 65535"),
    ):
        with pytest.raises(InputError, match=said):
            demo(page.run, **options)
    points = save_untrained(tmp_path / "points", data=None, shape=(2,), config=PointConfig(width=8))
    with pytest.raises(InputError, match="the page is for images"):
        demo(points, port=0)
    for name in ("gradio", "naign.cli.demo_page"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    with pytest.raises(InputError, match=r"needs Gradio .*: in a checkout, pip install -e '.\[demo\]'"):
        demo(page.run, port=0)


def test_it_listens_on_loopback_alone(page) -> None:
    listening = [one.laddr.ip for one in psutil.Process(page.pid).net_connections() if one.status == "LISTEN"]
    assert listening == ["127.0.0.1"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_draw_repair_and_a_bad_upload_in_a_browser(page, tmp_path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "text.png").write_text("hello")
    options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
    with playwright.sync_playwright() as driver, driver.chromium.launch(**options) as browser:
        tab, asked = browser.new_page(), set()
        tab.set_default_timeout(60_000)
        tab.on("request", lambda request: asked.add(re.sub("^(blob|data):.*", page.url, request.url)))
        tab.goto(page.url)
        box = tab.locator("#canvas canvas").first.bounding_box()
        tab.wait_for_timeout(1000)  # for the canvas, which shows nothing when it is ready
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        before = None
        for across in (0, 60):  # a stroke, and after the upload another
            tab.mouse.move(x + across, y - 60)
            tab.mouse.down()
            tab.mouse.move(x + across, y + 60, steps=5)
            tab.mouse.up()
            tab.get_by_role("button", name="Repair", exact=True).click()
            repaired = tab.locator(f"#repaired img:not([src='{before}'])")
            repaired.wait_for()
            shown = [shown_in(tab, name) for name in ("given", "repaired")]
            given = scaled(torch.from_numpy(shown[0][..., 0].copy())[None, None])
            assert math.isclose(float(given[0, 0, 0, 0]), -1) and float(given[0, 0, 4, 4 + across // 36]) > 0.5
            assert np.array_equal(shown[1], pixels(to_image(page.model.project(given)[0])))
            before = repaired.get_attribute("src")
            with tab.expect_file_chooser() as chooser:
                tab.get_by_role("button", name="Upload").click()
            chooser.value.set_files(tmp_path / "text.png")
            tab.get_by_text("the file cannot be read as a picture").first.wait_for()
        tab.locator("#canvas button[aria-label=Color]").click()
        tab.locator("#canvas button.color").last.click()  # magenta
        tab.keyboard.press("Escape")
        tab.mouse.click(x - 60, y - 60)
        tab.get_by_role("button", name="Repair", exact=True).click()
        tab.locator(f"#repaired img:not([src='{before}'])").wait_for()
        assert tab.locator("#repaired img").get_attribute("alt") == "Repaired"
        given, filled = (shown_in(tab, name).astype(int) for name in ("given", "repaired"))
        changed = np.abs(filled - given).max(2)
        assert 0 < np.count_nonzero(changed) < 16 and not changed[:, 4:].any()
        assert {url.split("/")[2] for url in asked} == {page.url.split("/")[2]}


def shown_in(tab: Any, name: str) -> np.ndarray:
    with urllib.request.urlopen(tab.locator(f"#{name} img").get_attribute("src")) as picture:
        return pixels(picture)


def test_samples_of_a_chosen_class() -> None:
    pytest.importorskip("gradio")
    from naign.cli.demo_page import Player, build

    network, header = build_network(TINY, (1, 8, 8)), {"shape": [1, 8, 8], "labels": ["cat", "dog"]}
    prior = {"name": "gmm", "components": 2, "classes": True}
    state = fit_mixture(torch.randn(300, 16, generator=torch.Generator().manual_seed(3)), 2)
    state |= {"owners": torch.tensor([0, 1]), "class_counts": torch.tensor([1, 1])}
    player = Player(NAIGN(network, header | {"prior": prior}, state))
    cats, dogs, any_class = (player.sample(8, 0, 1, label).tobytes() for label in ("cat", "dog", ""))
    assert len({cats, dogs, any_class}) == 3
    page = str(build(player, about="").get_config_file())
    assert "'Class'" in page and "('dog', 'dog')" in page
    player.model.prior.class_counts[1] = 0
    page = str(build(player, about="").get_config_file())
    assert "('cat', 'cat')" in page and "('dog', 'dog')" not in page, "it was not in training"
