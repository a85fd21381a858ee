"""Every variant of every config builds its settings, with the right numbers."""

import dataclasses
import importlib
import inspect
import math
import pathlib

import jax
import pytest
import tiny

from configs import models
from dpo_jax import replicate
from dpo_jax.core import settings, sharding
from dpo_jax.judging import runner
from dpo_jax.model import gpt_neox
from dpo_jax.sampling import jobs, sampler
from dpo_jax.training import config as config_lib

SIZES = tuple(models.PYTHIA)
RECIPES = tuple(
  f"pythia-{size}{end}" for size in SIZES for end in ("", "-lora")
)
# The settings that a config's values build, and its variants.
CONFIGS = {
  "demo": (replicate.ReplicateSettings, ("", "tiny")),
  "dpo": (config_lib.TrainSettings, RECIPES),
  "hh": (replicate.ReplicateSettings, (*RECIPES, "smoke")),
  "judge": (runner.JudgeSettings, ("oracle", "length", "openai", "local")),
  "sample": (
    jobs.SamplingSettings,
    ("paper", "dpo-replication", "best-of-n"),
  ),
  "sft": (config_lib.TrainSettings, RECIPES),
}
# Files that configs import.
PARTS = {"data", "common", "models"}


def get(name, *variant):
  return importlib.import_module(f"configs.{name}").get_config(*variant)


def build(name, *variant):
  return settings.build(CONFIGS[name][0], get(name, *variant).to_dict())


def test_every_file_is_known():
  files = (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
  assert {file.stem for file in files} == {*CONFIGS, *PARTS}


def kinds(values):
  """The type of every field."""
  if isinstance(values, dict):
    return {key: kinds(value) for key, value in values.items()}
  return type(values)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_builds_its_settings(name):
  for variant in CONFIGS[name][1]:
    # A float field that holds an int would refuse a fraction as a flag.
    built = settings.to_dict(build(name, variant))
    assert kinds(get(name, variant).to_dict()) == kinds(built), variant


@pytest.mark.parametrize("name", CONFIGS)
def test_variants_and_docstring(name):
  function = importlib.import_module(f"configs.{name}").get_config
  (parameter,) = inspect.signature(function).parameters.values()
  assert parameter.default in CONFIGS[name][1]
  for variant in ("nonsense", "pythia-3b", "pythia-2.8b-full"):
    with pytest.raises(ValueError, match=variant.removeprefix("pythia-")):
      get(name, variant)
  text = importlib.import_module(f"configs.{name}").__doc__
  assert f"--config=configs/{name}.py" in text
  for word in ("Made for:", "Expect") if name != "judge" else ():
    assert word in text


# Non-embedding parameters: Biderman et al., 2023 (arXiv 2304.01373), Table 1.
PARAMETERS = {
  "70m": 18_915_328,
  "160m": 85_056_000,
  "410m": 302_311_424,
  "1b": 805_736_448,
  "1.4b": 1_208_602_624,
  "2.8b": 2_517_652_480,
  "6.9b": 6_444_163_072,
  "12b": 11_327_027_200,
}


@pytest.mark.parametrize("size", SIZES)
def test_pythias(size):
  config = gpt_neox.ModelConfig(**models.pythia(size).to_dict())
  shapes = jax.eval_shape(lambda: gpt_neox.init(config, jax.random.key(0)))
  count = sum(
    math.prod(leaf.shape)
    for name in ("blocks", "final_norm")
    for leaf in jax.tree.leaves(shapes[name])
  )
  assert count == PARAMETERS.get(size, count)
  assert config.mlp_width == 4 * config.width
  # Padded for tensor parallelism: at least the vocabulary.
  assert config.vocab_size >= 50277
  assert config.max_positions == 2048


# Of SFT and DPO; RMSprop's b2 and eps are torch's own alpha and eps.
PAPER = {
  "lora.rank": 0,
  "optimizer.name": "rmsprop",
  "optimizer.learning_rate": 5e-7,
  "optimizer.warmup_steps": 150,
  "optimizer.schedule": "constant",
  "optimizer.clip_norm": 10,
  "optimizer.b2": 0.99,
  "optimizer.eps": 1e-8,
  "batch_size": 64,
  "epochs": 1,
  "data.max_length": 512,
  "data.max_prompt_length": 256,
}
DPO_REPLICATION = {
  "lora.rank": 16,
  "lora.alpha": 32.0,
  "lora.targets": gpt_neox.TARGETS,
  "optimizer.name": "adamw",
  "optimizer.schedule": "cosine",
  "optimizer.warmup_steps": 100,
  "optimizer.weight_decay": 0.01,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "data.max_length": 512,
  "data.max_prompt_length": 358,
  "data.sources.hh.subsets": ("harmless-base",),
  "checkpoint_every": 100,
  "epochs": 1,
}


@pytest.mark.parametrize(
  ("name", "variant", "wanted"),
  [
    # About 20,000 pairs between two checkpoints.
    (
      "sft",
      "pythia-2.8b",
      PAPER | {"objective": "sft", "checkpoint_every": 300},
    ),
    (
      "dpo",
      "pythia-2.8b",
      PAPER
      | {"objective": "dpo", "loss.kind": "sigmoid", "loss.beta": 0.1}
      | {"loss.label_smoothing": 0, "checkpoint_every": 300},
    ),
    (
      "sft",
      "pythia-2.8b-lora",
      DPO_REPLICATION
      | {"optimizer.learning_rate": 2e-5, "batch_size": 64, "microbatches": 8}
      | {"lora.dropout": 0.1},
    ),
    (
      "dpo",
      "pythia-2.8b-lora",
      DPO_REPLICATION
      | {"optimizer.learning_rate": 1e-5, "batch_size": 16, "microbatches": 4}
      | {"loss.beta": 0.2, "lora.dropout": 0.0},
    ),
    (
      "sample",
      "dpo-replication",
      {"top_k": 50, "top_p": 0.9, "max_new_tokens": 256, "data.limit": 150},
    ),
  ],
)
def test_a_recipe_is_the_published_one(name, variant, wanted):
  values = settings.to_dict(build(name, variant))
  for path, value in wanted.items():
    found = values
    for key in path.split("."):
      found = found[key]
    assert found == value, path


def test_rows_always_hold_a_pair():
  # Twice max_length holds a prompt once and two responses, whatever is cut.
  runs = (
    build("sft", "pythia-2.8b"),
    build("dpo", "pythia-2.8b"),
    build("hh", "smoke").dpo,
  )
  for run in runs:
    assert run.data.row_length >= 2 * run.data.max_length


def test_tiles_of_a_vocabulary_that_a_mesh_splits_are_refused():
  c = get("dpo", "pythia-14m-lora")
  c.mesh.tensor = 2
  built = settings.build(config_lib.TrainSettings, c.to_dict())
  # On one device that is what to say first.
  with pytest.raises(ValueError, match="'tensor': 2} needs 2 devices, but"):
    sharding.make_mesh(
      **dataclasses.asdict(built.mesh), devices=jax.devices()[:1]
    )
  with pytest.raises(ValueError, match=r"vocab_tile=1048 with mesh\.tensor=2"):
    built.computing(gpt_neox.ModelConfig(**models.pythia("14m").to_dict()))


def within(built):
  """A dataclass and all those that it holds."""
  yield built
  for field in dataclasses.fields(built):
    value = getattr(built, field.name)
    for held in value.values() if isinstance(value, dict) else [value]:
      if dataclasses.is_dataclass(held):
        yield from within(held)


def test_every_class_checks_the_ranges_of_its_fields():
  parts = [
    *within(build("demo")),
    *within(build("judge", "openai")),
    build("sample").engine(),
    sampler.Request((1,), 0, 0, 1.0, 0, 1.0, 8),
    *(tiny.CONFIG, gpt_neox.LoraConfig(1, 1.0, 0.0, gpt_neox.TARGETS)),
  ]
  unused = set(settings.RANGES)
  for part in parts:
    for field in dataclasses.fields(part):
      names = {field.name, f"{type(part).__name__}.{field.name}"}
      if found := names & settings.RANGES.keys():
        # Below every range.
        wrong = -2
        if isinstance(getattr(part, field.name), tuple):
          wrong = (wrong,)
        with pytest.raises(ValueError, match=f"{field.name}=-2 must "):
          dataclasses.replace(part, **{field.name: wrong})
        unused -= found
  assert unused == {"int", "float"}
