"""What goes into a wheel: pipeline/naign, and inside it the folders that `naign.shipped` finds."""

from setuptools import find_packages, setup

# pipeline/ holds train.py, which the launcher starts; nothing named pipeline is installed at the top.
SHIPPED = {f"naign.{folder}": folder for folder in ("configs", "launch", "k8s", "models")}
SCRIPTS = {"naign.pipeline": "pipeline"}

setup(
    packages=[*find_packages("pipeline"), *SHIPPED, *SCRIPTS],
    package_dir={"": "pipeline", **SHIPPED, **SCRIPTS},
    package_data={
        "naign": ["py.typed"],
        "naign.evaluate": ["*.jinja"],
        "naign.model": ["encoder_weights/*.safetensors"],
        **{package: ["**/*"] for package in SHIPPED},
    },
    include_package_data=False,
)
