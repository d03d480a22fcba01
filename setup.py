"""Packaging of mptrain. `make train` and `make test` install the pinned, leaner set of requirements.txt instead."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

setup(
    name="mptrain",
    version=re.search(r'__version__ = "(.+)"', (HERE / "mptrain" / "__init__.py").read_text())[1],
    description="Custom training loops in mixed precision on TensorFlow: fast and right",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["mptrain", "mptrain.*"]),
    package_data={
        "mptrain.data": ["mnist/*.gz"],
        "mptrain.numerics": ["*.html", "*.css", "*.js"],
        "mptrain.numerics.parity": ["*.html", "*.css", "*.js"],
        "mptrain.report": ["*.html", "*.css"],
        "mptrain.pages": ["*.html", "*.css", "*.js"],
        "mptrain.sweep": ["*.html", "*.css", "*.js"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        "absl-py",
        "jinja2",
        "keras>=3.12",
        "matplotlib",
        "ml-collections>=1.0",
        "numpy",
        "rich>=13",
        "tensorboard>=2.20,<2.21",
        "tensorflow>=2.20,<2.21",
        "tf-keras>=2.20,<2.21",
        "tf-models-official>=2.20,<2.21",  # for Orbit; the PyPI project "orbit" is another one
    ],
    extras_require={
        "gpu": ["tensorflow[and-cuda]>=2.20,<2.21"],
        "kubernetes": ["kubernetes"],  # for devices.cluster="kubernetes"
        "mlflow": ["alembic", "mlflow-skinny>=3", "sqlalchemy"],  # the others are for a store without a server
        "wandb": ["wandb>=0.20"],
        "optuna": ["optuna>=4"],  # for mptrain.sweep.optuna
        "onnx": ["onnx", "tf2onnx>=1.17"],  # for export.onnx
        "tfds": ["array-record", "tensorflow-datasets"],
        "test": ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "selenium"],
    },
)
