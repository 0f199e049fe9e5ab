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
# One network f both generates and repairs: f(noise) is a sample, f(damaged image) is its repair, and how far f moves an
# image is its energy. This notebook packs a data set, trains f on it, and looks at each of the three. It needs neither
# a GPU nor a network, and takes about a minute on two cores. It writes `data/digits` and `runs/digits` into the folder
# that it runs in.

# %%
import subprocess
import sys

import torch

try:
    from naign import NAIGN
    from pipeline.data.degrade import KINDS, degrade
    from pipeline.data.loader import read_split
    from pipeline.model.scale import scaled
    from pipeline.observe.pictures import grid, rows
except ModuleNotFoundError as error:
    sys.exit(f"This kernel has no NAIGN ({error}): run `%pip install -e .` in a checkout, then restart.")


def naign(*options):
    """Run the `naign` program; what it says appears below the cell."""
    subprocess.run([sys.executable, "-m", "pipeline.cli", *options], check=True)


IMAGES = 30_000  # to train on; the whole run of configs/digits.yaml takes 150_000, for better samples and repairs

# %% [markdown]
# ## Data
#
# Training reads shards: tar files with an index beside them. `naign pack` makes them from a known data set, here
# scikit-learn's 8x8 digits, or from a folder of pictures. `scaled` takes bytes to the range [-1, 1] of the network.

# %%
naign("pack", "digits", "--to", "data/digits")
images, labels = read_split("data/digits", "test")
images = scaled(images)
print(f"{len(images)} test images of shape {tuple(images.shape[1:])}")
rows([(str(digit), images[labels == digit][:10]) for digit in range(10)])

# %% [markdown]
# ## Model
#
# `naign train` trains in rounds: take images, generate a pool of samples, find each image's nearest sample exactly, and
# fit. `--config` names one of the configurations that come with the package, or a file of yours; every setting of it
# can be overridden. The same command goes on with a run that was interrupted.

# %%
naign("train", "--config", "digits", f"--train.images={IMAGES}")

# %% [markdown]
# A run is a folder. Its newest checkpoint is a model, and samples are f applied to latents; the seed names them.

# %%
model = NAIGN.from_pretrained("runs/digits")
grid(model.sample(40, seed=0), columns=10)

# %% [markdown]
# ## Repair
#
# f maps what is near the images onto them. Nothing tells it where the damage is, or of what kind. The error is the mean
# absolute difference from the original, over all test images; a lost row of an 8x8 digit takes a longer training.

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
# Where you know what is missing, give a mask: f fills the hole, and all else stays as it is. The hole begins as the
# mean of what is known. A model that is trained with `--objective.damage=holes` does this best.

# %%
hole = torch.zeros(8, 8, dtype=torch.bool)
hole[2:6, 2:6] = True
begun, filled = (model.project(images, mask=hole, times=times) for times in (0, 8))
before, after = ((value - images)[..., hole].abs().mean().item() for value in (begun, filled))
print(f"hole         error {before:.3f} mean of what is known, {after:.3f} filled")
rows([("test images", images[:10]), ("hole", begun[:10]), ("filled", filled[:10])])

# %% [markdown]
# ## Energy
#
# The energy of x is the mean square of f(x) - x: low for images like those trained on, high for others. Before that
# mean is taken, it is a map, which shows where an image is unlike the data. Drawn is its square root, the largest of an
# image white.

# %%
damaged = degrade(images, "salt_pepper")
for name, x in {"test images": images, "damaged": damaged, "black and white swapped": -images}.items():
    print(f"{name:24} energy {model.energy(x).mean().item():.3f}")

moved = (model.project(damaged) - damaged).abs()
energy_map = moved / moved.amax((1, 2, 3), keepdim=True) * 2 - 1
changed = (damaged != images).float() * 2 - 1
rows([("damaged", damaged[:10]), ("energy map", energy_map[:10]), ("changed pixels", changed[:10])])

# %% [markdown]
# ## From here
#
# - `naign evaluate runs/digits` measures the run and writes `runs/digits/evaluation/report.html`.
# - `naign restore runs/digits PICTURES --to repaired/` repairs files, `naign score` prints their energies.
# - `naign pack folder --root PICTURES --size 64 --to data/mine` packs your own pictures to train on.
