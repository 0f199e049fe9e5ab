"""What goes into a wheel: pipeline/, and as data in it configs/, launch/ and k8s/ (pipeline/__init__.py: shipped)."""

from setuptools import find_packages, setup

SHIPPED = {f"pipeline.{folder}": folder for folder in ("configs", "launch", "k8s")}

setup(
    packages=[*find_packages(include=["pipeline", "pipeline.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "pipeline.evaluate": ["*.jinja"],
        "pipeline.model": ["encoder_weights/*.safetensors"],
        **{package: ["**/*"] for package in SHIPPED},
    },
    include_package_data=False,
)
