"""What goes into a wheel: naign/ and pipeline/, with configs/, launch/, k8s/ and models/ (see pipeline/__init__.py)."""

from setuptools import find_packages, setup

SHIPPED = {f"pipeline.{folder}": folder for folder in ("configs", "launch", "k8s", "models")}

setup(
    packages=[*find_packages(include=["naign", "pipeline", "pipeline.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "naign": ["py.typed"],
        "pipeline": ["py.typed"],
        "pipeline.evaluate": ["*.jinja"],
        "pipeline.model": ["encoder_weights/*.safetensors"],
        **{package: ["**/*"] for package in SHIPPED},
    },
    include_package_data=False,
)
