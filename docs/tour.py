# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of NAIGN on the digits
#
# One network f generates and repairs images: f(z), z drawn from the prior, is a sample, and f(damaged image) is its
# repair. How much f changes an image is the image's energy. This notebook packs a data set, trains f on it, and shows
# samples, repairs and energies. It takes about a minute on two cores, needs no GPU, and writes `data/digits` and
# `runs/digits` into its folder.
#
# Open it in a clone: `pip install jupyterlab && jupyter lab docs/tour.ipynb`. The first cell installs NAIGN where the
# notebook's Python lacks it, which takes some minutes, since torch is large. Then choose *Run All Cells*.

# %%
import importlib
import subprocess
import sys
from pathlib import Path

try:
    import naign
except ModuleNotFoundError as error:
    if not Path("../pyproject.toml").exists():
        sys.exit(f"This kernel has no NAIGN ({error}): open docs/tour.ipynb in a clone.")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", ".."], check=True)
    importlib.invalidate_caches()

# %%
import torch

from naign import NAIGN
from naign.data.damage import KINDS, degrade
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.observe.pictures import grid, rows


def run(*options):
    """Run the `naign` program; its output appears below the cell."""
    subprocess.run([sys.executable, "-m", "naign.cli", *options], check=True)


IMAGES = 30_000  # to train on; configs/digits.yaml has 150_000, for better samples and repairs

# %% [markdown]
# ## Data
#
# Training reads shards: tar files with an index beside them. `naign pack` makes them from a known data set, in this
# case scikit-learn's 8x8 digits, or from a folder of pictures. `scaled` maps bytes to the network's range, [-1, 1].

# %%
run("pack", "digits", "--to", "data/digits")
images, labels = read_split("data/digits", "test")
images = scaled(images)
print(f"{len(images)} test images of shape {tuple(images.shape[1:])}")
rows([(str(digit), images[labels == digit][:10]) for digit in range(10)])

# %% [markdown]
# ## Model
#
# `naign train` trains in rounds. A round takes images, generates a pool of samples, matches each image to its nearest
# sample, and fits f. `--config` names a configuration of the package, or a file of yours; options override its
# settings. After an interruption, the same command resumes the run.

# %%
run("train", "--config", "digits", f"--train.images={IMAGES}")

# %% [markdown]
# A run is a folder, and its newest checkpoint is a model. Samples are f applied to latents. A seed always draws the
# same latents.

# %%
model = NAIGN.from_pretrained("runs/digits")
grid(model.sample(40, seed=0), columns=10)

# %% [markdown]
# ## Repair
#
# f is given the damaged image alone: not where the damage is, nor of what kind. The error is the mean absolute
# difference from the original over all test images. To repair lost rows of an 8x8 digit, f has to train for longer.

# %%
shown = [("test images", images[:10])]
for kind in KINDS:
    damaged = degrade(images, kind)
    repaired = model.project(damaged)
    before, after = ((value - images).abs().mean().item() for value in (damaged, repaired))
    print(f"{kind:12} error {before:.3f} damaged, {after:.3f} repaired")
    shown += [(kind, damaged[:10]), ("repaired", repaired[:10])]
rows(shown)

# %% [markdown]
# If you know what is missing, give a mask: f fills the hole and leaves all other pixels as they are. The hole starts as
# the mean of the known pixels. Models trained with `--objective.damage=holes` fill holes best.

# %%
hole = torch.zeros(8, 8, dtype=torch.bool)
hole[2:6, 2:6] = True
begun, filled = (model.project(images, mask=hole, times=times) for times in (0, 8))
before, after = ((value - images)[..., hole].abs().mean().item() for value in (begun, filled))
print(f"hole         error {before:.3f} mean of known pixels, {after:.3f} filled")
rows([("test images", images[:10]), ("hole", begun[:10]), ("filled", filled[:10])])

# %% [markdown]
# ## Energy
#
# The energy of x is the mean square of f(x) - x: low for images like the training data, high for others. The absolute
# difference of each pixel is a map of where an image is unlike the data. The largest difference of an image is white.

# %%
damaged = degrade(images, "salt_pepper")
for name, x in {"test images": images, "damaged": damaged, "black and white swapped": -images}.items():
    print(f"{name:24} energy {model.energy(x).mean().item():.3f}")

change = (model.project(damaged) - damaged).abs()
energy_map = change / change.amax((1, 2, 3), keepdim=True) * 2 - 1
changed = (damaged != images).float() * 2 - 1
rows([("damaged", damaged[:10]), ("energy map", energy_map[:10]), ("changed pixels", changed[:10])])

# %% [markdown]
# ## Next steps
#
# - `naign evaluate runs/digits` measures the run and writes `runs/digits/evaluation/report.html`.
# - `naign restore runs/digits PICTURES --to repaired/` repairs files, and `naign score` prints their energies.
# - `naign pack folder --root PICTURES --size 64 --to data/mine` packs your own pictures for a training.
