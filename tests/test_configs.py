"""Every variant of every config builds its settings, with the right numbers."""

import dataclasses
import importlib
import inspect
import math
import pathlib

import jax
import pytest
import tiny

from configs import common, models
from dpo_jax import replicate
from dpo_jax.core import settings, sharding
from dpo_jax.judging import runner
from dpo_jax.model import gpt_neox
from dpo_jax.sampling import jobs, sampler
from dpo_jax.training import config as config_lib
from dpo_jax.training import score

SIZES = tuple(models.PYTHIA)
RECIPES = tuple(
  f"pythia-{size}{end}" for size in SIZES for end in ("", "-lora")
)
# Config file: what its get_config is for, and its variants.
CONFIGS = {
  "demo": (replicate.ReplicateSettings, ("", "tiny")),
  "dpo": (config_lib.TrainSettings, RECIPES),
  "hh": (replicate.ReplicateSettings, (*RECIPES, "smoke")),
  "judge": (runner.JudgeSettings, ("oracle", "length", "openai", "local")),
  "sample": (jobs.SamplingSettings, ("paper", "seed", "best-of-n")),
  "sft": (config_lib.TrainSettings, RECIPES),
}
# Files that others are made from.
PARTS = {"data", "common", "models"}


def get(name, *variant):
  return importlib.import_module(f"configs.{name}").get_config(*variant)


def build(name, *variant):
  return settings.build(CONFIGS[name][0], get(name, *variant).to_dict())


def test_every_file_is_known():
  files = (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
  assert {file.stem for file in files} == set(CONFIGS) | PARTS


@pytest.mark.parametrize(
  ("name", "variant"),
  [(name, v) for name, (_, variants) in CONFIGS.items() for v in variants],
)
def test_a_variant_builds_its_settings(name, variant):
  built = build(name, variant)
  assert dataclasses.is_dataclass(built)
  # A float field that holds an int would refuse a fraction on the command line.
  stack = [(name, get(name, variant).to_dict(), settings.to_dict(built))]
  while stack:
    where, raw, typed = stack.pop()
    for key, value in typed.items():
      if isinstance(value, dict):
        stack.append((f"{where}.{key}", raw[key], value))
      else:
        assert type(raw[key]) is type(value), f"{where}.{key}"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_default_variant_is_one_of_them_and_others_are_refused(name):
  function = importlib.import_module(f"configs.{name}").get_config
  (parameter,) = inspect.signature(function).parameters.values()
  assert parameter.default in CONFIGS[name][1]
  build(name)
  for variant in ("nonsense", "pythia-3b", "pythia-2.8b-full"):
    with pytest.raises(ValueError, match=variant.removeprefix("pythia-")):
      get(name, variant)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_docstring_gives_command_device_hours_and_what_to_expect(name):
  text = importlib.import_module(f"configs.{name}").__doc__
  assert f"--config=configs/{name}.py" in text
  if name != "judge":
    for word in ("Made for:", "Expect:"):
      assert word in text.replace("Expect of", "Expect:")


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
  # Layers are stacked, so that no size is slower to build than another.
  count = sum(
    math.prod(leaf.shape)
    for name in ("blocks", "final_norm")
    for leaf in jax.tree.leaves(shapes[name])
  )
  if size in PARAMETERS:
    assert count == PARAMETERS[size]
  assert config.mlp_width == 4 * config.width
  # The rows that were padded for tensor parallelism hold the vocabulary.
  assert config.vocab_size >= 50277
  assert config.max_positions == 2048


def test_the_papers_recipe():
  sft, dpo = build("sft", "pythia-2.8b"), build("dpo", "pythia-2.8b")
  for run in (sft, dpo):
    assert run.lora.rank == 0
    assert run.optimizer.name == "rmsprop"
    assert run.optimizer.learning_rate == 5e-7
    assert run.optimizer.warmup_steps == 150
    assert run.optimizer.schedule == "constant"
    assert run.optimizer.clip_norm == 10
    # torch.optim.RMSprop's own alpha and eps.
    assert (run.optimizer.b2, run.optimizer.eps) == (0.99, 1e-8)
    assert (run.batch_size, run.epochs) == (64, 1)
    assert (run.data.max_length, run.data.max_prompt_length) == (512, 256)
    assert run.checkpoint_every * run.batch_size == pytest.approx(
      20000, rel=0.1
    )
  assert (sft.objective, dpo.objective) == ("sft", "dpo")
  assert dpo.loss.kind == "sigmoid"
  assert (dpo.loss.beta, dpo.loss.label_smoothing) == (0.1, 0)


def test_the_re_implemented_systems_recipe():
  sft, dpo = build("sft", "pythia-2.8b-lora"), build("dpo", "pythia-2.8b-lora")
  for run in (sft, dpo):
    assert run.lora == config_lib.LoraSettings(16, 32.0, 0.1, gpt_neox.TARGETS)
    assert run.optimizer.name == "adamw"
    assert run.optimizer.schedule == "cosine"
    assert run.optimizer.warmup_steps == 100
    assert run.optimizer.weight_decay == 0.01
    assert (run.optimizer.b1, run.optimizer.b2) == (0.9, 0.999)
    assert (run.data.max_length, run.data.max_prompt_length) == (512, 358)
    assert run.data.sources["hh"].subsets == ("harmless-base",)
    assert run.checkpoint_every == 100
    assert run.epochs == 1
  assert sft.optimizer.learning_rate == 2e-5
  assert dpo.optimizer.learning_rate == 1e-5
  assert dpo.loss.beta == 0.2
  assert (sft.batch_size, sft.microbatches) == (64, 8)
  assert (dpo.batch_size, dpo.microbatches) == (16, 4)
  sample = build("sample", "seed")
  assert (sample.top_k, sample.top_p, sample.max_new_tokens) == (50, 0.9, 256)
  assert sample.data.limit == 150


def test_rows_always_hold_a_pair():
  # Twice max_length holds a prompt once and two responses, whatever is cut.
  for name in ("sft", "dpo"):
    run = build(name, "pythia-2.8b")
    assert run.data.row_length >= 2 * run.data.max_length
  smoke = build("hh", "smoke").dpo.data
  assert smoke.row_length >= 2 * smoke.max_length


def test_the_common_fields_are_the_settings():
  built = settings.build(config_lib.TrainSettings, common.training().to_dict())
  assert built.mesh == sharding.MeshSettings(-1, 1, 1)


def test_tiles_of_a_vocabulary_that_a_mesh_splits_are_refused():
  c = get("dpo", "pythia-14m-lora")
  assert c.model.vocab_tile
  c.mesh.tensor = 2
  with pytest.raises(ValueError, match=r"vocab_tile=1048 with mesh\.tensor=2"):
    settings.build(config_lib.TrainSettings, c.to_dict())


def within(built):
  """A dataclass and all those that it holds."""
  yield built
  for field in dataclasses.fields(built):
    value = getattr(built, field.name)
    for held in value.values() if isinstance(value, dict) else [value]:
      if dataclasses.is_dataclass(held):
        yield from within(held)


def test_every_range_is_held_to_by_every_class_that_has_the_field():
  score_settings = score.parse(["--model=m", "--pairs=p", "--output=o"])
  request = sampler.Request((1,), 0, 0, 1.0, 0, 1.0, 8)
  parts = [
    *within(build("demo")),
    *within(build("judge", "openai")),
    *(build("sample").engine(), request, score_settings),
    *(tiny.CONFIG, gpt_neox.LoraConfig(1, 1.0, 0.0, gpt_neox.TARGETS)),
  ]
  unused = set(settings.RANGES)
  for part in parts:
    for field in dataclasses.fields(part):
      names = {field.name, f"{type(part).__name__}.{field.name}"}
      if found := names & settings.RANGES.keys():
        wrong = -1
        if isinstance(getattr(part, field.name), tuple):
          wrong = (wrong,)
        with pytest.raises(ValueError, match=f"{field.name}=-1 must "):
          dataclasses.replace(part, **{field.name: wrong})
        unused -= found
  assert not unused
