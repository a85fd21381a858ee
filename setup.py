"""Metadata of the package; tool settings are in pyproject.toml."""

import pathlib

import setuptools

README = pathlib.Path(__file__).parent / "README.md"

TEST = [
  "hypothesis",
  # Notebooks are executed.
  "ipykernel",
  "jupytext",
  "nbclient",
  # The TPU compiler, which the planner's tests run without a TPU.
  "libtpu; platform_system == 'Linux' and platform_machine == 'x86_64'",
  "peft",
  "pytest",
  "pytest-xdist",
  "ruff",
  # Drives Chromium, which the browser tests need (Debian's chromium and
  # chromium-driver).
  "selenium",
  "tensorboard",
  "tensorboardX",
  # The CPU build that the parity tests were written against; no other module
  # imports torch.
  "torch==2.13.0",
  "wandb",
]

setuptools.setup(
  name="dpo-jax",
  version="0.1.0",
  description="Direct Preference Optimization in JAX, from pairs to win rates",
  long_description=README.read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="MIT",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["dpo_jax", "dpo_jax.*"]),
  package_data={
    "dpo_jax.figures": ["*.mplstyle"],
    "dpo_jax.page": ["*.html", "*.css", "*.js"],
  },
  install_requires=[
    "absl-py",
    "beautifulsoup4",
    "datasets",
    "flax>=0.12",
    "grain>=0.2.16",
    "jax>=0.10",
    "markdown-it-py>=3",
    "matplotlib",
    "ml-collections>=1.1",
    "numpy",
    "openai>=3",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "safetensors",
    "scipy",
    "tensorflow-datasets",
    "tokenizers",
    "tqdm",
    "transformers>=5",
  ],
  extras_require={
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "tb": ["tensorboardX"],
    "wandb": ["wandb"],
    "notebook": ["ipywidgets", "jupyter", "jupytext"],
    "test": TEST,
    "dev": [*TEST, "pre-commit", "pyright"],
  },
)
