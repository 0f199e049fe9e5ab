"""What goes into a wheel: pipeline/naign, and inside it the folders that `naign.shipped` finds."""

import sys

from setuptools import find_packages, setup

# pipeline/ holds train.py, which the launcher starts; nothing named pipeline is installed at the top.
SHIPPED = {f"naign.{folder}": folder for folder in ("configs", "launch", "k8s", "models")}
INSIDE = {**SHIPPED, "naign.pipeline": "pipeline"}
if "editable_wheel" in sys.argv:
    # `pip install -e` leaves the folders where they are. Without them it writes a path; with them a finder, which comes
    # after any folder `naign` in the working directory, such as the clone.
    INSIDE = {}

setup(
    packages=[*find_packages("pipeline"), *INSIDE],
    package_dir={"": "pipeline", **INSIDE},
    package_data={
        "naign": ["py.typed"],
        "naign.evaluate": ["*.jinja"],
        "naign.model": ["encoder_weights/*.safetensors"],
        **{package: ["**/*"] for package in SHIPPED},
    },
    include_package_data=False,
)
