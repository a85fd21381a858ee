"""Plans of the run's own programs, from shapes alone."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
import running
import scripted
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import gpu_case
from configs import dpo, models, sample, sft
from dpo_jax.core import hardware, settings, sharding
from dpo_jax.data import batch_shapes, loader, packing
from dpo_jax.model import flops, gpt_neox
from dpo_jax.plan import (
  compile_sampling,
  compile_training,
  lower_bound,
  mean_batch,
  plan,
  topology,
)
from dpo_jax.sampling import decode as decode_lib
from dpo_jax.sampling import jobs, sampler
from dpo_jax.training import config as config_lib
from dpo_jax.training import setup

# Big enough for the TPU's tiles, small enough to compile in seconds.
SMALL = gpt_neox.ModelConfig(
  vocab_size=512,
  width=128,
  layers=3,
  heads=4,
  mlp_width=256,
  rotary_fraction=0.25,
  rotary_base=10000.0,
  norm_eps=1e-5,
  max_positions=512,
  remat="none",
  lora=gpt_neox.LoraConfig(4, 8.0, 0.0, gpt_neox.TARGETS),
  logit_chunk=128,
)


def config(variant="pythia-410m-lora", make=dpo, **changes):
  c = make.get_config(variant)
  c.data.row_length, c.data.max_length, c.data.max_prompt_length = 512, 512, 256
  c.batch_size, c.microbatches = 32, 2
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return settings.build(config_lib.TrainSettings, c.to_dict())


class Traced:
  """A jitted step whose lowering gives the flops of its products instead."""

  def __init__(self, step):
    self.step = step

  def lower(self, *arguments):
    return operations.flops(self.step.trace(*arguments).jaxpr.jaxpr)


@pytest.fixture
def traced_flops(monkeypatch):
  """Compiles nothing; `compile_steps` gives the flops of all devices."""
  real = setup.jit_steps

  def training(*arguments):
    return [Traced(step) for step in real(*arguments)]

  def lowered(name, lower, resident):
    return lower()

  monkeypatch.setattr(setup, "jit_steps", training)
  monkeypatch.setattr(compile_training, "compile_one", lowered)
  return compile_training.compile_steps


@pytest.mark.parametrize("lora", [True, False])
def test_flops_of_a_step_by_hand(lora, traced_flops):
  """One row a device and micro-batch, whose 512 tokens all see each other."""
  shape = SMALL if lora else dataclasses.replace(SMALL, lora=None)
  run = config() if lora else config("pythia-14m")
  mesh = sharding.make_mesh(*((8, 1) if lora else (1, 8)), 1)
  (found,) = traced_flops(run, shape, mesh, 1, ("train",))
  width = mean_batch.batch_of(run, mesh, 1, 1).target.shape[-1]
  work = flops.Work(2 * 512, 2 * width, 2 * 512**2)
  wanted = flops.step(shape, work, reference=True)
  assert lower_bound.of_step(run, shape, mesh, 1).flops == wanted
  if not lora:
    # The backward pass computes the logits again.
    wanted += 2 * shape.width * shape.vocab_size * 2 * width
  assert found == 8 * wanted


def test_flops_of_a_step_in_blocks_by_hand(traced_flops):
  """Scores of the listed pairs of blocks alone, and no reference: it is kept.

  Nor a gradient of a frozen kernel, by `flops.step`.
  """
  run = config("pythia-14m-lora")
  assert run.precompute_reference
  shape = dataclasses.replace(SMALL, attention="blocks")
  mesh = sharding.make_mesh(8, 1, 1)
  (found,) = traced_flops(run, shape, mesh, 8, ("train",))
  batch = mean_batch.batch_of(run, mesh, 8, 1)
  pairs, width = batch.block_pairs.shape[2], batch.target.shape[2]
  assert batch.tokens.shape == (1, 8 * 8, 64)
  work = flops.Work(2 * 512, 2 * width, 2 * pairs * 64**2)
  wanted = flops.step(shape, work, reference=False)
  assert found == 8 * wanted
  # Of the scores, the bound has those of two tokens that see each other.
  bound = lower_bound.of_step(run, shape, mesh, 8)
  scores = run.batch_size / 8 * mean_batch.lengths(run).visible
  work = dataclasses.replace(work, visible=scores)
  assert bound.flops == flops.step(shape, work, reference=False) < wanted


def test_an_evaluation_is_planned_at_its_own_batch(traced_flops):
  """64 pairs on eight devices take four rows of 512, whatever training's do."""
  run = config(eval_batch_size=64)
  mesh = sharding.make_mesh(8, 1, 1)
  (found,) = traced_flops(run, SMALL, mesh, 1, ("eval",))
  width = mean_batch.batch_of(run, mesh, 4, 1).target.shape[-1]
  work = flops.Work(4 * 512, width, 4 * 512**2)
  wanted = sum(flops.forward(SMALL, work, adapters=x) for x in (True, False))
  assert found == 8 * wanted
  text = plan.describe_training(run, SMALL, mesh, [], 1)
  assert "evaluations of 64, at once: 4 row(s) a device" in text


def compiling_as_if(monkeypatch, gibibytes):
  """Compiles nothing; devices have eight, programs need what a function says.

  Args:
    gibibytes: of a program's name, a mesh and rows.
  """

  def compiled(config, shape, mesh, rows, names):
    (name,) = names
    memory = compile_training.Memory(
      gibibytes(name, mesh, rows) * 2**30, 0, 0, 0, 0
    )
    return [compile_training.Compiled(name, memory)]

  chip = hardware.Chip(1e12, 1e12, 8 * 2**30, 1e9, 1e9)
  monkeypatch.setitem(hardware.CHIPS, "cpu", chip)
  monkeypatch.setattr(compile_training, "compile_steps", compiled)


def test_a_mesh_that_no_evaluation_fits_is_not_taken(monkeypatch, capsys):
  """As if evaluations needed nine gibibytes of eight until split by four."""

  def needs(name, mesh, rows):
    return 9 if name == "eval" and mesh.shape["fsdp"] < 4 else 4

  compiling_as_if(monkeypatch, needs)
  assert plan.plan_training(config(), SMALL, jax.devices(), 0)
  *before, last = capsys.readouterr().out.split("with --config.mesh.")
  assert "".join(before).count("eval: DOES NOT FIT (9.00 of 8.00 GiB") == 2
  assert "or a lower --config.eval_batch_size" in before[0]
  assert last.startswith("data=2 --config.mesh.fsdp=4")
  assert "DOES NOT FIT" not in last


@pytest.mark.parametrize(
  ("fit", "said"),
  [
    (2, "2 row(s) a device fit (9 items a micro-batch), 3 do not"),
    (3, "3 row(s) a device fit (13 items a micro-batch), 4 do not"),
    (5, "4 row(s) a device fit (18 items a micro-batch), 8 do not"),
    (9, "8 row(s) a device fit (37 items a micro-batch)\n"),
  ],
)
def test_the_most_rows_that_fit(fit, said, monkeypatch, capsys):
  """Six pairs take two rows of 1,024 in the mean, and three at most."""
  compiling_as_if(monkeypatch, lambda name, mesh, rows: 4 + 5 * (rows > fit))
  run = config(batch_size=24, microbatches=4, **{"data.row_length": 1024})
  run = dataclasses.replace(run, mesh=sharding.MeshSettings(1, 1, 1))
  assert plan.plan_training(run, SMALL, jax.devices()[:1], 8)
  text = capsys.readouterr().out
  assert "in 2 row(s) of 1024 tokens a device" in text
  assert "the widest batches of a run take about 3 row(s) a device" in text
  assert said in text
  assert ("THE WIDEST BATCHES DO NOT FIT" in text) == (fit == 2)


@pytest.mark.parametrize(
  ("layout", "items", "microbatches", "shards"),
  [
    ("shared", 16, 4, 1),
    ("packed", 64, 8, 1),
    ("shared", 64, 1, 8),
  ],
)
def test_the_widest_batches_are_those_of_real_lengths(
  layout, items, microbatches, shards
):
  table = gpu_case.pairs(1551, 512)
  how = packing.Packing(layout, 1024, shards, microbatches, False, 1)
  order = loader.Schedule((1551,), (1.0,), items, 0, 1)
  steps = map(order.items, range(order.steps))
  *_, largest = batch_shapes.choose(table, how, steps, 4).shapes
  run = config(**{"data.row_length": 1024, "data.layout": layout})
  part = items // microbatches
  found = mean_batch.widest_rows(run, part, shards)
  assert abs(found - largest.rows / shards) <= 1 + found // 16
  assert found > mean_batch.rows_of(run, part, shards) or shards > 1


@pytest.mark.parametrize(
  ("variant", "sizes", "trees", "width"),
  [
    ("pythia-410m-lora", (8, 1, 1), 1, 2),
    ("pythia-410m-lora", (1, 4, 2), 1, 2),
    ("pythia-14m-lora", (1, 8, 1), 1, 4),
    ("pythia-14m", (1, 8, 1), 2, 2),
  ],
)
def test_weights_that_are_read_and_gathered(variant, sizes, trees, width):
  """A reference that is a second tree is read too; the embedding is not."""
  run = config(variant)
  shape = SMALL if run.lora.rank else dataclasses.replace(SMALL, lora=None)
  mesh = sharding.make_mesh(*sizes)
  found = lower_bound.of_step(run, shape, mesh, 1)
  kernels = 3 * (4 * 128**2 + 2 * 128 * 256) + 128 * 512
  wanted = trees * width * kernels / mesh.shape["tensor"]
  # Beside them biases and norms.
  assert wanted < found.read < 1.03 * wanted
  others = 1 - 1 / mesh.shape["fsdp"]
  assert found.gathered == pytest.approx(others * wanted, rel=0.02)


def test_the_bound_by_hand():
  chip = hardware.chip("TPU v5e")
  bound = lower_bound.Bound(
    microbatches=4,
    fill=0.5,
    flops=394e12,
    useful=98.5e12,
    read=819e9,
    gathered=100e9,
    dtype="bfloat16",
  )
  # Two seconds of products, four of reading, two of gathering; of the four the
  # useful products take half a second.
  assert bound.seconds(chip) == (2.0, 4.0, 2.0)
  assert bound.utilization(chip) == 0.125
  # A float32 product takes six of bfloat16.
  exact = dataclasses.replace(bound, dtype="float32")
  assert exact.seconds(chip)[0] == pytest.approx(12.0)
  assert exact.utilization(chip) == pytest.approx(3 / 12)


def test_rows_of_the_mean_items():
  run = config()
  # Sixteen pairs of 221 tokens with padding: 3,538 in rows of 512.
  assert mean_batch.rows_of(run, 16, 1) == math.ceil(3537.6 / 512) == 7
  assert mean_batch.rows_of(run, 16, 2) == 4
  assert mean_batch.rows_of(run, 16, 256) == 1


@pytest.mark.parametrize("size", ["70m", "12b"])
def test_the_shape_comes_from_the_name(size, monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)
  run = config(f"pythia-{size}-lora")
  found = compile_training.shape_of(run, "")
  layers, width, _, words = models.PYTHIA[size]
  assert (found.layers, found.width, found.vocab_size) == (layers, width, words)
  assert (found.dtype, found.remat) == (run.model.dtype, run.model.remat)
  assert found.lora == run.lora.config()
  assert compile_training.shape_of(run, "14m").layers == 6


def test_a_shape_that_nothing_names_is_refused():
  run = dataclasses.replace(config(), tokenizer="mine")
  with pytest.raises(ValueError, match="set --model=SIZE"):
    compile_training.shape_of(run, "")


@pytest.mark.parametrize("name", ["v3:2x2", "v5e:", "v5e:2,4"])
def test_topologies_that_do_not_exist_are_refused(name):
  with pytest.raises(ValueError, match="must be a kind of"):
    topology.devices(name)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'dpo-jax\[tpu\]'"):
    topology.devices("v5e:2x4")


def test_here_means_these_devices():
  assert topology.devices("") == jax.devices()


def sampling_config(**changes):
  c = sample.get_config("paper")
  c.dtype, c.max_new_tokens, c.max_prompt_tokens = "float32", 16, 24
  c.length_multiple, c.prefill_tokens, c.span = 16, 64, 0
  c.batch_size = 8
  c.update_from_flattened_dict(changes)
  return settings.build(jobs.SamplingSettings, c.to_dict())


class Watched:
  """A jitted function that notes what it is called and lowered with."""

  def __init__(self, jitted):
    self.jitted, self.ran, self.planned = jitted, [], []

  def __call__(self, *args):
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
      self.ran.append(self.described(args))
    return self.jitted(*args)

  def lower(self, *args):
    self.planned.append(self.described(args))
    return self.jitted.lower(*args)

  def described(self, args):
    return [
      (x.shape, x.dtype, x.sharding) if hasattr(x, "sharding") else x
      for x in jax.tree.leaves(args)
    ]


@pytest.mark.parametrize(
  "sizes", [(4, 1, 2), (1, 1, 2)], ids=["own prompts", "shared prompts"]
)
def test_the_sampler_is_planned_as_it_runs(tmp_path, monkeypatch, sizes):
  """The planner lowers just what `generate` calls, by shapes and shardings."""
  tok = scripted.small_tokenizer(tmp_path)
  config, base = scripted.noisy(tok.vocab_size + 16)
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
  how = sampling_config()
  seen = {
    n: Watched(getattr(decode_lib, n)) for n in ("prefill", "insert", "advance")
  }
  for name, watched in seen.items():
    monkeypatch.setattr(decode_lib, name, watched)
  base = jax.device_put(base, sharding.shardings(base, mesh))
  requests = compile_sampling.stand_ins(how, 8, -1)
  for _ in sampler.generate(
    config, base, None, tok, requests, how.engine(), mesh
  ):
    pass

  def lowered(name, lower, *unused):
    lower()

  monkeypatch.setattr(compile_training, "compile_one", lowered)
  monkeypatch.setattr(compile_sampling, "TOKENS", tok.vocab_size)
  compile_sampling.compile_programs(how, config, mesh, None)
  for name, watched in seen.items():
    (planned,) = watched.planned
    assert watched.ran
    for ran in watched.ran:
      for wanted, found in zip(ran, planned, strict=True):
        if not isinstance(wanted, tuple):
          assert wanted == found, name
          continue
        assert wanted[:2] == found[:2], name
        if jax.dtypes.issubdtype(wanted[1], jax.dtypes.prng_key):
          # XLA lays the rows' keys, eight bytes each, as it likes.
          continue
        assert found[2].is_equivalent_to(wanted[2], len(wanted[0])), (
          name,
          wanted,
          found,
        )


def test_bytes_of_decoding_by_hand():
  """On this machine's devices, without running: eight rows on each."""
  how = sampling_config(batch_size=64, max_new_tokens=40, dtype="bfloat16")
  mesh = sharding.make_mesh(8, 1, 1)
  found = compile_sampling.compile_programs(how, SMALL, mesh, None)
  layers, width, mlp, words, rank = 3, 128, 256, 512, 4
  kernels = layers * (4 * width**2 + 2 * width * mlp)
  adapters = layers * rank * (4 * width + 2 * width + 2 * (width + mlp))
  # A row's slots: 40 new tokens in sixteens. Three prompts a device, for half
  # as many rows again as it has, of five temperatures, 24 tokens in sixteens.
  together = found.shapes.program.shared
  assert found.shapes.program.slots == 48
  assert (together.prompts, together.rows, together.slots) == (24, 5, 32)
  # Two prompts of 32 places would be one for two devices: each reads one.
  batch = found.shapes.prefills[0]
  assert (batch.size, batch.padded) == (8, 32)
  # Weights at two bytes but for biases and norms; keys and values of all rows.
  assert found.weights == pytest.approx(
    2 * (kernels + adapters + 2 * width * words), rel=0.03
  )
  assert found.cache == 2 * 2 * layers * width * (8 * 48 + 3 * 32)
  text = plan.describe_sampling(found, mesh, "this")
  assert "8 rows a device of 48 slots and 3 prompts of 32, prefill" in text
  for name in ("prefill", "insert", "decode"):
    assert re.search(rf"^{name}: \d+\.\d\d GiB a device", text, re.M)


def test_the_command_plans_for_this_machine(tmp_path, capsys, monkeypatch):
  """From the config and the model's config.json; no weights are read."""
  files = running.make_files(tmp_path)
  for file in (files / "model").glob("*.safetensors"):
    file.unlink()
  programs, real = [], compile_training.compile_one

  def noted(*arguments):
    programs.append(real(*arguments))
    return programs[-1]

  monkeypatch.setattr(compile_training, "compile_one", noted)
  values = settings.to_dict(running.configs(files)())
  options = {"topology": "", "model": "", "search": 8, "sampling": ""}
  assert plan.main(values, tmp_path, **options) == 0
  train, evaluate = (one.memory for one in programs)
  # The state is donated: the new one takes its memory.
  assert train.donated > 0.9 * train.outputs
  assert evaluate.donated == 0
  assert train.total >= train.arguments + train.temporary
  text = capsys.readouterr().out
  assert "8 x cpu, mesh {'data': 8, 'fsdp': 1, 'tensor': 1}; batches" in text
  assert "no bound and no more rows: 'cpu' is not in" in text
  for name in ("train", "eval"):
    assert re.search(rf"^{name}: \d+\.\d\d GiB a device", text, re.M)
  with pytest.raises(ValueError, match="pass the model's 64 positions"):
    plan.plan_sampling(
      sampling_config(max_prompt_tokens=60),
      running.SHAPE,
      jax.devices(),
      "it",
    )


def test_a_mesh_that_splits_the_weights_is_tried_after_the_configs():
  wanted = sharding.MeshSettings(-1, 1, 1)
  found = plan.meshes(wanted, "fsdp", jax.devices())
  sizes = [tuple(mesh.shape.values()) for mesh in found]
  assert sizes == [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)]
  found = plan.meshes(sharding.MeshSettings(1, -1, 2), "tensor", jax.devices())
  sizes = [tuple(mesh.shape.values()) for mesh in found]
  assert sizes == [(1, 4, 2)]


def test_a_sampler_that_does_not_fit_is_refused(monkeypatch, capsys):
  """As if weights took four of eight GiB, and decoding six more."""

  def compiled(name, lower, resident):
    temporary = 6 * 2**30 if name == "decode" else 0
    memory = compile_training.Memory(4 * 2**30, 0, 0, temporary, 0)
    return compile_training.Compiled(name, memory)

  chip = hardware.Chip(1e12, 1e12, 8 * 2**30, 1e12, 1e12)
  monkeypatch.setitem(hardware.CHIPS, "cpu", chip)
  monkeypatch.setattr(compile_training, "compile_one", compiled)
  devices = jax.devices()[:1]
  how = dataclasses.replace(
    sampling_config(), mesh=sharding.MeshSettings(1, 1, 1)
  )
  assert not plan.plan_sampling(how, SMALL, devices, "it")
  text = capsys.readouterr().out
  assert "decode: DOES NOT FIT (10.00 of 8.00 GiB a device). Try a" in text
  assert text.count("DOES NOT FIT") == 1


# --- absent TPU slices


@pytest.mark.parametrize(
  ("name", "count"),
  [("v5e:16x16", 256), ("v6e:2x4", 8), ("v4:4x4x16", 256), ("v5p:2x2x1", 4)],
)
def test_slices_of_libtpu(name, count):
  found = topology.devices(name)
  assert len(found) == count
  peaks = hardware.chip(f"TPU {name.split(':')[0]}")
  assert hardware.chip(found[0].device_kind) is peaks


@pytest.mark.parametrize(
  "variant",
  ["pythia-410m-lora", pytest.param("pythia-14m", marks=pytest.mark.slow)],
)
def test_what_a_step_for_a_slice_gathers(variant, monkeypatch):
  """Weights as two bytes each, the unembedding once a step."""
  run = config(variant, microbatches=1)
  lora = gpt_neox.LoraConfig(4, 8.0, 0.0, ("dense",)) if run.lora.rank else None
  shape = dataclasses.replace(SMALL, dtype="bfloat16", lora=lora)
  mesh = sharding.make_mesh(1, -1, 1, devices=topology.devices("v5e:2x4"))

  def compiled(name, lower, resident):
    return operations.collectives(lower().compile().as_text())

  monkeypatch.setattr(compile_training, "compile_one", compiled)
  (found,) = compile_training.compile_steps(run, shape, mesh, 1, ("train",))
  # Float32 kernels are cast where they lie.
  kernels = {128 * 384, 128 * 128, 128 * 256, 128 * 512}
  sent = [
    one
    for one in found
    if one.kind == "all-gather" and math.prod(one.shape) in kernels
  ]
  assert len(sent) >= 4
  assert {one.dtype for one in sent} == {"bf16"}
  # The unembedding once for a tree of weights, not for each chunk of tokens.
  width = mean_batch.batch_of(run, mesh, 1, 1).target.shape[-1]
  assert width > 2 * shape.logit_chunk
  words = [one for one in sent if one.shape == (128, 512)]
  assert not any(one.looped for one in words)
  assert 1 <= len(words) <= (1 if shape.lora else 2)


def test_decoding_with_an_int8_cache_for_a_slice():
  """Half the bytes and a scale a head; unpacked one layer at a time."""
  mesh = sharding.make_mesh(1, 1, 1, devices=topology.devices("v5e:1x1"))
  how = sampling_config(
    batch_size=64, dtype="bfloat16", cache="int8", max_new_tokens=488
  )
  deep = dataclasses.replace(SMALL, layers=12)
  found = compile_sampling.compile_programs(how, deep, mesh, None)
  *_, decode = found.programs
  assert not decode.refusal
  # Keys and values: 12 layers, 64 rows of 496 slots and 13 prompts of 32, 4
  # heads of 32 dimensions.
  assert found.cache == 2 * 12 * (64 * 496 + 13 * 32) * 4 * (32 + 4)
  assert decode.memory.temporary < found.cache / 2


def test_a_program_for_a_slice_stays_out_of_the_cache(tmp_path):
  mesh = sharding.make_mesh(1, 8, 1, devices=topology.devices("v5e:2x4"))
  there = jax.sharding.NamedSharding(mesh, jax.P())
  x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=there)
  before = jax.config.jax_compilation_cache_dir
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  try:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    jax.jit(lambda x: x + 1).lower(np.float32(1)).compile()
    kept = set(tmp_path.iterdir())
    assert kept
    with compile_training.uncached(mesh):
      jax.jit(lambda x: x + 2).lower(x).compile()
    assert set(tmp_path.iterdir()) == kept
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()


def test_what_does_not_fit_is_said():
  run = config("pythia-14m")
  mesh = sharding.make_mesh(1, 1, 1, devices=topology.devices("v5e:1x1"))
  # Weights, moment and reference, each 8 GiB of words and 0.05 of blocks:
  # nothing needs to be compiled.
  wide = dataclasses.replace(SMALL, vocab_size=2**20, width=1024, lora=None)
  (found,) = compile_training.compile_steps(run, wide, mesh, 1, ("train",))
  assert found.memory is None
  text = plan.describe_training(run, wide, mesh, [found], 1)
  assert (
    "train: DOES NOT FIT (state and reference alone take 24.16 of 15.75 GiB"
    in text
  )
  # Two of 6 GiB, but gradients and copies are more than the rest.
  run = dataclasses.replace(run, precompute_reference=True)
  wide = dataclasses.replace(wide, vocab_size=3 * 2**18)
  (found,) = compile_training.compile_steps(run, wide, mesh, 1, ("train",))
  assert found.memory is None
  text = plan.describe_training(run, wide, mesh, [found], 1)
  assert "train: DOES NOT FIT" in text
  assert "15.75G" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x4", "v5e:4x4"])
def test_the_real_sampler_is_planned(name, monkeypatch, request):
  """2.8B in bfloat16, whole weights on each chip, eight rows a chip."""
  monkeypatch.chdir(request.config.rootpath)
  devices = topology.devices(name)
  mesh = sharding.make_mesh(-1, 1, 1, devices=devices)
  c = sample.get_config("paper")
  c.batch_size = 8 * mesh.size
  how = settings.build(jobs.SamplingSettings, c.to_dict())
  shape = compile_training.shape_named("2.8b")
  hbm = hardware.chip("TPU v5e").hbm_bytes
  found = compile_sampling.compile_programs(how, shape, mesh, hbm)
  for one in found.programs:
    assert not one.refusal
    assert one.memory.total < hbm
  # Keys and values of 32 layers, 256 slots of eight rows and three prompts,
  # 2,560 dimensions, two bytes each.
  assert found.cache == (8 + 3) * 2 * 2 * 32 * 256 * 2560


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x4", "v5e:4x4"])
@pytest.mark.parametrize("variant", ["pythia-2.8b-lora", "pythia-2.8b"])
@pytest.mark.parametrize("make", [dpo, sft])
def test_the_real_sizes_fit(name, variant, make, monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)
  c = make.get_config(variant)
  c.mesh.data, c.mesh.fsdp = 1, -1
  run = settings.build(config_lib.TrainSettings, c.to_dict())
  shape = compile_training.shape_of(run, "")
  mesh = sharding.make_mesh(1, -1, 1, devices=topology.devices(name))
  found = compile_training.compile_steps(run, shape, mesh, 1)
  for one in found:
    assert not one.refusal
    assert one.memory.total < hardware.chip("TPU v5e").hbm_bytes
