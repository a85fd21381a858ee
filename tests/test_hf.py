"""Files of transformers and peft, read and written, against torch itself."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import tiny
import torch
import torch_weights
import transformers

from dpo_jax.core import sharding
from dpo_jax.data import tokenizer
from dpo_jax.io import safetensors as safetensors_lib
from dpo_jax.model import gpt_neox, hf, lora
from dpo_jax.training import config as config_lib

NUMERICS = {
  "dtype": "float32",
  "remat": "none",
  "lora": None,
  "param_dtype": "float32",
}
# peft asks transformers by a name that transformers 5 has deprecated.
PEFT_WARNS = pytest.mark.filterwarnings(
  "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
LORA = gpt_neox.LoraConfig(4, 12.0, 0.0, gpt_neox.TARGETS)


@pytest.fixture(scope="module")
def small():
  """A GPTNeoXForCausalLM, none of whose weights is near zero or one."""
  config = transformers.GPTNeoXConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    # Head dim 16, of which 4 are rotated.
    num_attention_heads=4,
    intermediate_size=192,
    max_position_embeddings=64,
    rope_parameters={
      "rope_type": "default",
      "rope_theta": 10000.0,
      "partial_rotary_factor": 0.25,
    },
  )
  network = transformers.GPTNeoXForCausalLM(config).eval()
  torch_weights.randomise(network, 0)
  return network


def save(network, directory, dtype=torch.float32, **options):
  """transformers' own files."""
  # The copy is saved, so that the model of the fixture stays float32.
  copy = transformers.GPTNeoXForCausalLM(network.config)
  copy.load_state_dict(network.state_dict())
  copy.to(dtype).save_pretrained(directory, **options)
  return pathlib.Path(directory)


def tokens_for(config, rows=3, length=17):
  rng = np.random.default_rng(7)
  return rng.integers(0, config.vocab_size, (rows, length))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, base, adapters, tokens):
  count = tokens.shape[1]
  positions = jnp.broadcast_to(jnp.arange(count)[None], tokens.shape)
  mask = jnp.broadcast_to(
    jnp.tri(count, dtype=bool), (len(tokens), count, count)
  )
  hidden, _ = gpt_neox.apply(config, base, adapters, tokens, positions, mask)
  return gpt_neox.unembed(base, hidden)


def torch_logits(network, tokens):
  with torch.no_grad():
    return network(torch.asarray(tokens)).logits.float().numpy()


def same_bytes(one, two):
  names = sorted(path.name for path in one.iterdir())
  assert names == sorted(path.name for path in two.iterdir())
  for name in names:
    if name != "README.md":
      assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture(scope="module")
def small_dir(small, tmp_path_factory):
  return save(small, tmp_path_factory.mktemp("small"))


@pytest.fixture
def small_copy(small_dir, tmp_path):
  """The files again, to be damaged."""
  for path in small_dir.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


@pytest.fixture(scope="module")
def loaded(small_dir):
  return hf.load(small_dir, **NUMERICS)


@pytest.fixture(scope="module")
def adapted(small_dir):
  """Our model with adapters whose B is not zero."""
  config, base = hf.load(small_dir, **{**NUMERICS, "lora": LORA})
  return config, base, tiny.adapters(config)


def test_logits_equal_those_of_transformers(small, loaded):
  config, base = loaded
  tokens = tokens_for(config)
  expected = torch_logits(small, tokens)
  assert 1 < expected.std() < 10
  # Float32 sums in another order: about 1e-7 of the largest terms a layer.
  np.testing.assert_allclose(
    forward(config, base, None, tokens), expected, rtol=0, atol=1e-4
  )


def test_bfloat16_shards_load_exactly(small, tmp_path):
  directory = save(small, tmp_path, torch.bfloat16, max_shard_size="100KB")
  assert len(list(directory.glob("*.safetensors"))) > 1
  _, base = hf.load(directory, **NUMERICS)
  state = small.state_dict()
  for layer in range(2):
    stored = state[f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight"]
    np.testing.assert_array_equal(
      base["blocks"]["dense_4h_to_h"]["kernel"][layer],
      stored.bfloat16().float().numpy().T,
    )
  assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {"float32"}


def test_rotary_keys_of_transformers_4_and_5_mean_the_same(small_copy):
  path = small_copy / "config.json"
  config = json.loads(path.read_text())
  new = hf.read_config(small_copy)
  assert (new.rotary_fraction, new.rotary_base) == (0.25, 10000.0)
  del config["rope_parameters"]
  path.write_text(
    json.dumps({**config, "rotary_pct": 0.5, "rotary_emb_base": 5})
  )
  old = hf.read_config(small_copy)
  assert dataclasses.replace(new, rotary_fraction=0.5, rotary_base=5.0) == old
  nested = {"partial_rotary_factor": 0.5, "rope_theta": 5}
  path.write_text(json.dumps({**config, "rope_parameters": nested}))
  assert hf.read_config(small_copy) == old


def test_mesh_gets_its_own_slices_and_every_value_is_read_once(
  small_dir, loaded, monkeypatch, tmp_path
):
  config, expected = loaded
  copies = []
  copyto = np.copyto

  def counting(out, *args, **kwargs):
    copies.append(out.size)
    return copyto(out, *args, **kwargs)

  monkeypatch.setattr(np, "copyto", counting)
  mesh = sharding.make_mesh(2, 2, 2)
  _, base = hf.load(small_dir, mesh=mesh, **NUMERICS)
  assert sum(copies) == lora.count(base)
  # The largest slice at a time: a layer of dense_h_to_4h or of the embedding,
  # over fsdp and tensor.
  assert max(copies) == 64 * 192 // 4
  kernel = base["blocks"]["query_key_value"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 32, 2, 3, 16)
  jax.tree.map(np.testing.assert_array_equal, base, expected)
  tokens = tokens_for(config, rows=4)
  with jax.set_mesh(mesh):
    logits = forward(config, base, None, tokens)
  # The sums are split over devices, so their order differs.
  np.testing.assert_allclose(
    logits, forward(config, expected, None, tokens), rtol=0, atol=1e-4
  )
  hf.export(tmp_path / "one", config, expected)
  hf.export(tmp_path / "mesh", config, base)
  same_bytes(tmp_path / "one", tmp_path / "mesh")


def test_export_is_loaded_by_transformers_with_its_tokenizer(
  small, loaded, shared, tmp_path
):
  config, base = loaded
  ours = tokenizer.load(shared / "tokenizer" / "pythia")
  with pytest.raises(ValueError, match=r"50277 tokens.*vocab_size=96"):
    hf.export(tmp_path / "model", config, base, ours)
  # The real vocabulary needs the rows; the other weights are those of `small`.
  config = dataclasses.replace(config, vocab_size=50304)
  base = {
    **base,
    "embed": {"kernel": jnp.resize(base["embed"]["kernel"], (50304, 64))},
    "unembed": {"kernel": jnp.resize(base["unembed"]["kernel"], (64, 50304))},
  }
  hf.export(tmp_path / "model", config, base, ours)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
  text = "\n\nHuman: Cr\u00e8me, 3 x?  \u2028\U0001f600\n\nAssistant: Yes."
  assert theirs(text)["input_ids"] == ours.encode(text)
  assert theirs.decode(ours.encode(text)) == text
  assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
  # transformers 4 has no class of the name that transformers 5 writes.
  saved = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
  assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
  network = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "model"
  )
  assert isinstance(network, transformers.GPTNeoXForCausalLM)
  assert network.dtype == torch.float32
  assert (network.config.bos_token_id, network.config.eos_token_id) == (0, 0)
  np.testing.assert_allclose(
    forward(config, base, None, tokens_for(config)),
    torch_logits(network, tokens_for(config)),
    rtol=0,
    atol=1e-4,
  )


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_export_load_export_is_bit_exact(small, tmp_path, param_dtype):
  numerics = {**NUMERICS, "param_dtype": param_dtype}
  source = save(small, tmp_path / "half", torch.float16)
  hf.export(tmp_path / "one", *hf.load(source, **numerics))
  hf.export(tmp_path / "two", *hf.load(tmp_path / "one", **numerics))
  same_bytes(tmp_path / "one", tmp_path / "two")
  network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
  dtype = getattr(torch, param_dtype)
  assert network.dtype == dtype
  for name, weight in network.state_dict().items():
    assert torch.equal(weight, small.state_dict()[name].half().to(dtype)), name


def test_export_replaces_an_export_and_nothing_else(tmp_path, loaded):
  config, base = loaded
  target = tmp_path / "model"
  hf.export(target, config, base)
  doubled = jax.tree.map(lambda x: 2 * x, base)
  hf.export(target, config, doubled)
  _, again = hf.load(target, **NUMERICS)
  jax.tree.map(np.testing.assert_array_equal, again, doubled)
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  (target / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"notes\.txt"):
    hf.export(target, config, base)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="no earlier export"):
    hf.export(tmp_path / "run", config, base)
  broken = {**base, "final_norm": {**base["final_norm"]}}
  broken["final_norm"]["bias"] = base["final_norm"]["bias"].at[3].set(jnp.nan)
  with pytest.raises(ValueError, match=r"final_layer_norm\.bias holds NaN"):
    hf.export(tmp_path / "broken", config, broken)
  assert not (tmp_path / "broken").exists()


# The last rename and sync make the new export the one of this name.
@pytest.mark.parametrize(
  ("module", "name", "call", "left"),
  [
    (safetensors_lib, "write", 1, "old"),
    (pathlib.Path, "rename", 2, "none"),
    (hf.atomic, "sync", 4, "new"),
  ],
)
def test_killed_export_never_looks_complete(
  loaded, tmp_path, module, name, call, left
):
  """Replacing an export stops at a step, and nothing is cleaned up."""
  config, base = loaded
  target = tmp_path / "model"
  trees = {"old": base, "new": jax.tree.map(lambda x: 2 * x, base)}
  hf.export(target, config, base)
  with pytest.MonkeyPatch.context() as patch:
    calls, original = [], getattr(module, name)

    def step(*arguments, **options):
      calls.append(arguments)
      if len(calls) == call:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        raise KeyboardInterrupt
      return original(*arguments, **options)

    patch.setattr(module, name, step)
    with pytest.raises(KeyboardInterrupt):
      hf.export(target, config, trees["new"])
  assert len(list(tmp_path.iterdir())) == 2
  assert target.exists() == (left != "none")
  if target.exists():
    _, found = hf.load(target, **NUMERICS)
    jax.tree.map(np.testing.assert_array_equal, found, trees[left])
  hf.export(target, config, base)
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


@PEFT_WARNS
def test_peft_loads_our_adapter(small_dir, adapted, tmp_path):
  config, base, adapters = adapted
  hf.export_adapter(tmp_path, config, adapters, str(small_dir), base)
  network = transformers.AutoModelForCausalLM.from_pretrained(small_dir)
  network = peft.PeftModel.from_pretrained(network, tmp_path).eval()
  tokens = tokens_for(config)
  expected = torch_logits(network, tokens)
  ours = forward(config, base, adapters, tokens)
  off = forward(config, base, None, tokens)
  assert np.abs(ours - off).max() > 1
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
  merged = lora.merge(config, base, adapters)
  np.testing.assert_allclose(
    forward(config, merged, None, tokens), expected, rtol=0, atol=1e-4
  )


@PEFT_WARNS
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_pefts_adapter(small_dir, loaded, tmp_path, rslora):
  config, base = loaded
  network = transformers.AutoModelForCausalLM.from_pretrained(small_dir)
  network = peft.get_peft_model(
    network,
    peft.LoraConfig(
      r=3,
      lora_alpha=5,
      lora_dropout=0.1,
      target_modules=["dense", "query_key_value"],
      task_type="CAUSAL_LM",
      use_rslora=rslora,
    ),
  ).eval()
  torch_weights.randomise(network, 3, only="lora_")
  network.save_pretrained(tmp_path / "theirs")
  found, adapters = hf.load_adapter(tmp_path / "theirs", config)
  assert found.targets == ("query_key_value", "dense")
  # As a run with these settings trains it.
  scaling = "rslora" if rslora else "lora"
  trained = config_lib.LoraSettings(3, 5.0, 0.1, found.targets, scaling, "")
  assert trained.config() == found
  config = dataclasses.replace(config, lora=found)
  tokens = tokens_for(config)
  expected = torch_logits(network, tokens)
  np.testing.assert_allclose(
    forward(config, base, adapters, tokens), expected, rtol=0, atol=1e-4
  )
  merged = network.merge_and_unload()
  kernel = lora.merge(config, base, adapters)["blocks"]["dense"]["kernel"]
  np.testing.assert_allclose(
    kernel.reshape(2, 64, 64)[1],
    merged.gpt_neox.layers[1].attention.dense.weight.detach().numpy().T,
    rtol=0,
    atol=1e-5,
  )
  hf.export_adapter(tmp_path / "one", config, adapters, "base")
  hf.export_adapter(
    tmp_path / "two",
    config,
    hf.load_adapter(tmp_path / "one", config)[1],
    "base",
  )
  same_bytes(tmp_path / "one", tmp_path / "two")


def test_adapter_of_another_base_is_refused(small_dir, adapted, tmp_path):
  config, base, adapters = adapted
  hf.export_adapter(tmp_path, config, adapters, str(small_dir), base)
  found, again = hf.load_adapter(tmp_path, config, base)
  assert found == LORA
  jax.tree.map(np.testing.assert_array_equal, again, adapters)
  # The same model in bfloat16 and on a mesh is the same base.
  mesh = sharding.make_mesh(2, 2, 2)
  numerics = {**NUMERICS, "param_dtype": "bfloat16"}
  hf.load_adapter(
    tmp_path, config, hf.load(small_dir, mesh=mesh, **numerics)[1]
  )
  with pytest.raises(ValueError, match="other base weights"):
    hf.load_adapter(tmp_path, config, lora.merge(config, base, adapters))
  wider = dataclasses.replace(config, width=128, layers=3)
  name = "base_model.model.gpt_neox.layers.{}.attention.dense.lora_A.weight"
  shapes = f"{name.format(1)} has shape (4, 64), but its config says (4, 128)"
  with pytest.raises(ValueError, match=re.escape(shapes)) as error:
    hf.load_adapter(tmp_path, wider)
  assert f"{name.format(2)} is missing" in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"modules_to_save": ["embed_out"]}, "modules_to_save"),
    ({"rank_pattern": {"dense": 8}}, "rank_pattern"),
    ({"a_later_feature": 1}, "a_later_feature=1"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ({"target_modules": ["embed_out"]}, "embed_out"),
    ({"target_modules": "all-linear"}, "all-linear"),
    ({"r": 0}, "r=0"),
    ({"lora_alpha": None}, "lora_alpha=None"),
    ({"target_modules": ["dense"]}, "query_key_value.lora_A.weight is not a"),
  ],
)
def test_adapter_settings_that_we_do_not_compute_are_refused(
  adapted, tmp_path, changes, message
):
  config, _, adapters = adapted
  hf.export_adapter(tmp_path, config, adapters, "base")
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  with pytest.raises(ValueError, match=re.escape(message)):
    hf.load_adapter(tmp_path, config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"use_parallel_residual": False}, "use_parallel_residual=False"),
    ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"attention_bias": False}, "attention_bias=False"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    (
      {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
      "'yarn'",
    ),
    ({"rope_parameters": None}, "rotary_pct"),
    ({"rotary_pct": 1.0}, "found [1.0, 0.25]"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "64"}, "hidden_size='64'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000"),
    ({"num_attention_heads": 5}, "heads=5"),
    ({"layer_norm_eps": None}, "layer_norm_eps=None"),
    ({"layer_norm_eps": float("nan")}, "NaN is not a JSON number"),
  ],
)
def test_configs_that_we_do_not_compute_are_refused(
  small_copy, changes, message
):
  path = small_copy / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    hf.load(small_copy, **NUMERICS)
  assert str(small_copy) in str(error.value)


def test_every_wrong_tensor_is_named(small_copy):
  path = small_copy / "model.safetensors"
  tensors = safetensors.torch.load_file(path)
  layer = "gpt_neox.layers.1."
  del tensors[f"{layer}attention.dense.bias"]
  tensors["lm_head.extra"] = torch.ones(2)
  tensors[f"{layer}mlp.dense_4h_to_h.weight"] = torch.ones(64, 256)
  tensors["embed_out.weight"] = torch.ones(96, 64, dtype=torch.int8)
  # Constants of older transformers are no mistake.
  tensors[f"{layer}attention.bias"] = torch.ones(1, 1, 8, 8).bool()
  tensors[f"{layer}attention.rotary_emb.inv_freq"] = torch.ones(2)
  safetensors.torch.save_file(tensors, path)
  with pytest.raises(ValueError, match="4 tensors") as error:
    hf.load(small_copy, **NUMERICS)
  text = str(error.value)
  assert f"{layer}attention.dense.bias is missing" in text
  assert "lm_head.extra is not a weight" in text
  assert "dense_4h_to_h.weight has shape (64, 256)" in text
  assert "embed_out.weight is I8" in text


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_values_that_are_not_finite_are_named(small_copy, mesh):
  path = small_copy / "model.safetensors"
  tensors = safetensors.torch.load_file(path)
  tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][191, 63] = torch.nan
  tensors["gpt_neox.final_layer_norm.bias"][0] = torch.inf
  safetensors.torch.save_file(tensors, path)
  mesh = mesh and sharding.make_mesh(*mesh)
  with pytest.raises(ValueError, match="2 tensors") as error:
    hf.load(small_copy, mesh=mesh, **NUMERICS)
  assert "layers.1.mlp.dense_h_to_4h.weight holds NaN" in str(error.value)
  assert "final_layer_norm.bias holds NaN or infinity" in str(error.value)


def header_with(**changes):
  """Rewrites the header's entry of one tensor."""

  def damage(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["embed_out.weight"] |= changes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]

  return damage


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: data[:-1],
    lambda data: b"",
    lambda data: (2**40).to_bytes(8, "little") + data[8:],
    header_with(shape=[2**62, 2**62]),
    header_with(data_offsets=[0, 2**50]),
  ],
)
def test_damaged_files_are_refused_without_allocating(small_copy, damage):
  path = small_copy / "model.safetensors"
  path.write_bytes(damage(path.read_bytes()))
  tracemalloc.start()
  with pytest.raises(ValueError, match=r"model\.safetensors is not a whole"):
    hf.load(small_copy, **NUMERICS)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20


def test_shards_and_index_must_agree(small, tmp_path):
  directory = save(small, tmp_path, max_shard_size="100KB")
  index = directory / "model.safetensors.index.json"
  good = json.loads(index.read_text())
  shards = sorted(set(good["weight_map"].values()))

  def refused(weight_map, message):
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
      hf.load(directory, **NUMERICS)

  names = good["weight_map"]
  refused({**names, "x": "../" + shards[0]}, "no file next to it")
  refused({**names, "x": "missing.safetensors"}, "which is missing")
  refused({**names, "x": shards[0]}, r"disagree about \['x'\]")
  first = {name for name, shard in names.items() if shard == shards[0]}
  assert len(first) > 1
  one = first.pop()
  refused({**names, one: shards[1]}, "disagree")
  refused({k: v for k, v in names.items() if k != one}, "disagree")
  refused({}, "no weight_map")


def test_pickled_weights_are_refused_with_the_way_out(small_copy):
  (small_copy / "model.safetensors").unlink()
  (small_copy / "pytorch_model.bin").write_bytes(b"never opened")
  with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save_pretrained"):
    hf.load(small_copy, **NUMERICS)


def test_the_new_name_of_the_unembedding_is_known(small, tmp_path, loaded):
  directory = save(small, tmp_path, save_original_format=False)
  names = safetensors_lib.find(directory, "model")
  assert "lm_head.weight" in names
  _, base = hf.load(directory, **NUMERICS)
  jax.tree.map(np.testing.assert_array_equal, base, loaded[1])


def test_a_missing_model_is_refused(tmp_path):
  with pytest.raises(ValueError, match="neither a directory nor a hub id"):
    hf.load(tmp_path / "nothing", **NUMERICS)
  # Offline, as all tests are: the hub cannot be asked.
  with pytest.raises(
    ValueError, match=r"'some/model' was not fetched .* no local directory"
  ):
    hf.load("some/model", **NUMERICS)
  with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
    hf.load(tmp_path, **NUMERICS)


def test_what_is_written_is_read_by_the_library(tmp_path):
  path = tmp_path / "x.safetensors"
  transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
  arrays = {
    "a": transposed,
    "b": np.ones((2, 0), np.float16),
    "c": np.asarray([1, 256], jnp.bfloat16),
    "d": np.asarray(7, np.int64),
  }
  safetensors_lib.write(path, arrays, arrays.values(), {"made": "here"})
  again = safetensors.torch.load_file(path)
  assert {name: tensor.tolist() for name, tensor in again.items()} == {
    name: array.tolist() for name, array in arrays.items()
  }
  found, metadata = safetensors_lib.read(path)
  assert metadata == {"format": "pt", "made": "here"}
  assert {name: array.dtype for name, array in found.items()} == {
    name: array.dtype for name, array in arrays.items()
  }
  with pytest.raises(ValueError, match="a is float32"):
    safetensors_lib.write(path, {"a": arrays["b"]}, [transposed])


# --- hashes of weights


def test_the_content_hash_is_of_sums_of_mixed_words():
  base = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) - 2.5}
  base["b"] = jnp.array([1.0, -3.0], jnp.bfloat16)
  digest = hashlib.sha256()
  for leaf, width in ((base["a"], np.uint32), (base["b"], np.uint16)):
    words = np.asarray(leaf).reshape(-1).view(width).tolist()
    digest.update(f"{leaf.dtype} {leaf.shape}".encode())
    for odd in (0x9E3779B1, 0x85EBCA77):
      total = 0
      for place, word in enumerate(words):
        word = (word + place * odd) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
          word = (word ^ word >> shift) * factor % 2**32
        total += word
      digest.update((total % 2**32).to_bytes(4, "little"))
  assert hf.content_hash(base) == digest.hexdigest()[:16]


def test_the_content_hash_needs_room_for_a_copy_of_one_weight():
  weight = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
  program = jax.jit(hf._mixed_sum).lower(weight, jnp.uint32(1)).compile()
  used = program.memory_analysis().temp_size_in_bytes
  assert used < 1.2 * 4 * weight.size


def test_the_content_hash_does_not_depend_on_the_mesh():
  base = tiny.weights(tiny.CONFIG)
  mesh = sharding.make_mesh(2, 2, 2)
  split = jax.device_put(base, sharding.shardings(base, mesh))
  assert hf.content_hash(split) == hf.content_hash(base)
