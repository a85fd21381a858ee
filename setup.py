"""Metadata of the package; tool settings are in pyproject.toml."""

import pathlib

import setuptools
from setuptools.command import build_py

README = pathlib.Path(__file__).parent / "README.md"

SCRIPTS = ("judge.py", "sample.py", "train.py")
TEST = [
  "gcsfs",
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
  # Builds the wheel.
  "setuptools>=77",
  "tensorboard",
  "tensorboardX",
  # The CPU build that the parity tests were written against; no other module
  # imports torch.
  "torch==2.13.0",
  "wandb",
]


class BuildPy(build_py.build_py):
  """Also puts configs/ and the scripts into the wheel, in dpo_jax/shipped/."""

  def run(self):
    super().run()
    if self.editable_mode:
      return
    here = pathlib.Path(__file__).parent
    shipped = pathlib.Path(self.build_lib, "dpo_jax", "shipped")
    for file in (*here.glob("configs/*.py"), *map(here.joinpath, SCRIPTS)):
      target = shipped / file.relative_to(here)
      target.parent.mkdir(parents=True, exist_ok=True)
      self.copy_file(str(file), str(target))


setuptools.setup(
  name="dpo-jax",
  version="0.1.0",
  description="Direct Preference Optimization in JAX, from pairs to win rates",
  long_description=README.read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="MIT",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["dpo_jax", "dpo_jax.*"]),
  cmdclass={"build_py": BuildPy},
  entry_points={"console_scripts": ["dpo-jax = dpo_jax.__main__:main"]},
  package_data={
    "dpo_jax.hub": ["*.md"],
    "dpo_jax.judging": ["templates/*.txt"],
    "dpo_jax.report.figures": ["*.mplstyle"],
    "dpo_jax.report.page": ["*.html", "*.css", "*.js"],
  },
  # The oldest versions that tests/test_floors.py runs the pipeline with.
  install_requires=[
    "absl-py>=2.1",
    "beautifulsoup4>=4.12",
    "datasets>=4.0",
    "flax>=0.12.7",
    "fsspec>=2024.6",
    "grain>=0.2.16",
    "huggingface_hub>=1.3",
    "jax>=0.10",
    # Of huggingface_hub's model cards, which does not install it.
    "jinja2>=3.1",
    "markdown-it-py>=3",
    "matplotlib>=3.10.7",
    "ml-collections>=1.1",
    "numpy>=2.1",
    "openai>=3",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "safetensors>=0.8",
    "scipy>=1.14.1",
    "tensorflow-datasets>=4.9.8",
    "tokenizers>=0.22.1",
    "tqdm>=4.66.3",
    "transformers>=5",
  ],
  extras_require={
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "gcs": ["gcsfs"],
    "tpu": ["jax[tpu]"],
    "tb": ["tensorboardX"],
    "wandb": ["wandb"],
    "notebook": ["ipywidgets", "jupyter", "jupytext"],
    "test": TEST,
    "dev": [*TEST, "pre-commit", "pyright"],
  },
)
