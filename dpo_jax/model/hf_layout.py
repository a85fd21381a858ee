"""Layout of Hugging Face files: config.json, names of weights, PEFT adapters.

Every weight of ours is a transpose of a stored one with some axes flattened
together, as `Weight.axes` says. The fused query_key_value rows are ordered
(head, q/k/v, head dim), so that one rule covers them too. Configs that we do
not compute exactly are refused, and so is any PEFT setting that is set and
unknown here, a later PEFT's too.
"""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from dpo_jax.io import remote

# The adapted kernels, and their modules in a stored layer.
MODULES = {
  "query_key_value": "attention.query_key_value",
  "dense": "attention.dense",
  "dense_h_to_4h": "mlp.dense_h_to_4h",
  "dense_4h_to_h": "mlp.dense_4h_to_h",
}

# Constants that older transformers stored with the weights.
BUFFERS = re.compile(
  r"(^|\.)(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$"
)


@dataclasses.dataclass(frozen=True)
class Weight:
  """One of our weights and its stored name.

  Attributes:
    path: the path in our tree, "blocks/dense/kernel".
    name: the stored name; "{}" is the number of the layer, for stacked weights.
    axes: for each stored axis, the axes of our (one layer's) weight that are
      flattened into it.
  """

  path: str
  name: str
  axes: tuple[tuple[int, ...], ...]

  @property
  def stacked(self) -> bool:
    return "{}" in self.name

  def names(self, shape: tuple[int, ...]) -> list[str]:
    """Stored names of our weight of this shape, in order of layers."""
    if not self.stacked:
      return [self.name]
    return [self.name.format(layer) for layer in range(shape[0])]

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each stored tensor of our weight of this shape."""
    shape = shape[1:] if self.stacked else shape
    return tuple(
      math.prod(shape[axis] for axis in group) for group in self.axes
    )

  def read(
    self, stored: Any, shape: tuple[int, ...], index: tuple[slice, ...]
  ) -> np.ndarray:
    """The part at `index` of our (one layer's) weight; no more is read.

    Args:
      stored: an array, or a slice of the safetensors library.
      shape: of our weight.
      index: a range of each of our axes. Of axes that are flattened together
        only the first may be a part.
    """
    ranges, split = [], []
    for first, *others in self.axes:
      start, stop, _ = index[first].indices(shape[first])
      sizes = [shape[axis] for axis in others]
      each = math.prod(sizes)
      ranges.append(slice(start * each, stop * each))
      split += [stop - start, *sizes]
    order = [axis for group in self.axes for axis in group]
    return stored[tuple(ranges)].reshape(split).transpose(np.argsort(order))

  def stored(self, ours: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Our (one layer's) weight in its stored shape."""
    order = [axis for group in self.axes for axis in group]
    return ours.transpose(order).reshape(shape)


LAYER = "gpt_neox.layers.{}."
WEIGHTS = (
  Weight("embed/kernel", "gpt_neox.embed_in.weight", ((0,), (1,))),
  Weight("unembed/kernel", "embed_out.weight", ((1,), (0,))),
  Weight("final_norm/scale", "gpt_neox.final_layer_norm.weight", ((0,),)),
  Weight("final_norm/bias", "gpt_neox.final_layer_norm.bias", ((0,),)),
  *(
    Weight(f"blocks/{ours}/{leaf}", f"{LAYER}{theirs}.{stored}", ((0,),))
    for ours, theirs in (
      ("attention_norm", "input_layernorm"),
      ("mlp_norm", "post_attention_layernorm"),
    )
    for leaf, stored in (("scale", "weight"), ("bias", "bias"))
  ),
  *(
    Weight(f"blocks/{target}/{leaf}", f"{LAYER}{MODULES[target]}.{kind}", axes)
    for target, leaf, kind, axes in (
      ("query_key_value", "kernel", "weight", ((1, 2, 3), (0,))),
      ("query_key_value", "bias", "bias", ((0, 1, 2),)),
      ("dense", "kernel", "weight", ((2,), (0, 1))),
      ("dense", "bias", "bias", ((0,),)),
      ("dense_h_to_4h", "kernel", "weight", ((1,), (0,))),
      ("dense_h_to_4h", "bias", "bias", ((0,),)),
      ("dense_4h_to_h", "kernel", "weight", ((1,), (0,))),
      ("dense_4h_to_h", "bias", "bias", ((0,),)),
    )
  ),
)


def adapter_weights(targets: tuple[str, ...]) -> tuple[Weight, ...]:
  """Adapters on these targets, stored as [R, I] and [O, R]."""
  return tuple(
    Weight(
      f"blocks/{target}/lora_{letter}",
      f"base_model.model.{LAYER}{MODULES[target]}.lora_{letter.upper()}.weight",
      ((1,), (0,)),
    )
    for target in targets
    for letter in "ab"
  )


# ModelConfig's sizes, and their keys in config.json.
_SIZES = {
  "vocab_size": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "mlp_width": "intermediate_size",
  "max_positions": "max_position_embeddings",
}
# config.json keys with the one value that we compute, also if absent.
_ONLY = {
  "hidden_act": "gelu",
  "use_parallel_residual": True,
  "tie_word_embeddings": False,
  "attention_bias": True,
}


def model_fields(config: dict[str, Any], origin: str) -> dict[str, Any]:
  """Fields of a ModelConfig from a config.json.

  Dropout of the base (hidden_dropout, attention_dropout) is not applied:
  preference training switches it off. `origin` is the file's path.

  Raises:
    ValueError: a key is missing, or asks for what we do not compute.
  """
  kind = config.get("model_type")
  if kind != "gpt_neox":
    raise ValueError(
      f"{origin}: model_type={kind!r} is not supported; give a gpt_neox model,"
      " such as a Pythia"
    )
  for key, only in {**_ONLY, "quantization_config": None}.items():
    if (value := config.get(key, only)) != only:
      raise ValueError(
        f"{origin}: {key}={value!r} is not supported, only {only!r}; choose a"
        " model that was trained so, such as a Pythia"
      )
  fraction, base = _rotary(config, origin)
  return {
    **{ours: _size(config, key, origin) for ours, key in _SIZES.items()},
    "rotary_fraction": fraction,
    "rotary_base": base,
    "norm_eps": _positive(config, "layer_norm_eps", origin),
  }


def config_json(
  fields: Any, dtype: str, bos_id: int | None, eos_id: int | None
) -> str:
  """config.json of a ModelConfig, with the keys of transformers 4 and 5."""
  config = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    **{key: getattr(fields, ours) for ours, key in _SIZES.items()},
    "layer_norm_eps": fields.norm_eps,
    "rotary_pct": fields.rotary_fraction,
    "rotary_emb_base": fields.rotary_base,
    "rope_parameters": {
      "rope_type": "default",
      "rope_theta": fields.rotary_base,
      "partial_rotary_factor": fields.rotary_fraction,
    },
    **_ONLY,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": bos_id,
    "eos_token_id": eos_id,
    "torch_dtype": dtype,
    "dtype": dtype,
  }
  return json.dumps(config, indent=2) + "\n"


def _rotary(config: dict[str, Any], origin: str) -> tuple[float, float]:
  """Rotary fraction and base, from keys of transformers 4, 5 or both."""
  nested = config.get("rope_parameters") or {}
  scaling = config.get("rope_scaling") or {}
  for rope in (nested, scaling):
    if not isinstance(rope, dict):
      raise ValueError(f"{origin}: {rope!r} is not a dict of rotary settings")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
      raise ValueError(
        f"{origin}: rotary embeddings scaled by {kind!r} are not supported;"
        " choose a model with rope_type 'default'"
      )
  values = []
  for flat, key in (
    ("rotary_pct", "partial_rotary_factor"),
    ("rotary_emb_base", "rope_theta"),
  ):
    found = [
      _positive(source, name, origin)
      for source, name in ((config, flat), (nested, key), (config, key))
      if source.get(name) is not None
    ]
    if len(set(found)) != 1:
      raise ValueError(
        f"{origin}: {flat} or rope_parameters.{key} must be given, and be the"
        f" same where both are; found {found}"
      )
    values.append(found[0])
  return values[0], values[1]


# PEFT settings that do not change what adapters compute, or are read below.
_KNOWN = {
  "auto_mapping",
  "base_model_name_or_path",
  "inference_mode",
  "megatron_core",
  "peft_version",
  "qalora_group_size",
  "revision",
  "task_type",
  "bias",
  "init_lora_weights",
  "lora_alpha",
  "lora_dropout",
  "peft_type",
  "r",
  "target_modules",
  "use_rslora",
}


def lora_fields(config: dict[str, Any], origin: str) -> dict[str, Any]:
  """Fields of a LoraConfig from an adapter_config.json; `origin` is its path.

  Raises:
    ValueError: a setting is missing, or asks for what we do not compute.
  """
  for key, only in (("peft_type", "LORA"), ("bias", "none")):
    if config.get(key) != only:
      raise ValueError(
        f"{origin}: {key}={config.get(key)!r} is not supported, only {only!r}"
      )
  start = config.get("init_lora_weights", True)
  if start not in (True, False, "gaussian"):
    raise ValueError(
      f"{origin}: init_lora_weights={start!r} may have changed the base's own"
      " weights; merge the adapter with peft and load the merged model"
    )
  for key, value in config.items():
    if value and key not in _KNOWN:
      raise ValueError(
        f"{origin}: {key}={value!r} is not supported; merge the adapter with"
        " peft (merge_and_unload) and load the merged model"
      )
  rank = _size(config, "r", origin)
  alpha = _number(config, "lora_alpha", origin)
  if config.get("use_rslora"):
    # alpha / sqrt(rank), as the alpha / rank that we compute.
    alpha *= math.sqrt(rank)
  return {
    "rank": rank,
    "alpha": alpha,
    "dropout": _number(config, "lora_dropout", origin),
    "targets": _targets(config.get("target_modules"), origin),
  }


def adapter_config_json(lora: Any, base_name: str) -> str:
  """adapter_config.json of a LoraConfig on the model `base_name`.

  A name user/name@revision becomes PEFT's two fields.
  """
  repo, revision = base_name, None
  if not pathlib.Path(base_name).exists() and "@" in base_name:
    repo, revision = remote.split(base_name)
  alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": repo,
    "revision": revision,
    "r": lora.rank,
    "lora_alpha": alpha,
    "lora_dropout": lora.dropout,
    "target_modules": list(lora.targets),
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
  }
  return json.dumps(config, indent=2) + "\n"


def _targets(names: Any, origin: str) -> tuple[str, ...]:
  """Adapted kernels in our order; PEFT writes them in any."""
  if not isinstance(names, list) or not names:
    raise ValueError(
      f"{origin}: target_modules={names!r} must be a list of names"
    )
  known = MODULES.keys() | set(MODULES.values())
  for name in names:
    if not isinstance(name, str) or name not in known:
      raise ValueError(
        f"{origin}: target_modules names {name!r}; supported are"
        f" {list(MODULES)}"
      )
  return tuple(
    target
    for target, module in MODULES.items()
    if {target, module} & set(names)
  )


def _size(config: dict[str, Any], key: str, origin: str) -> int:
  value = config.get(key)
  if type(value) is not int or value < 1:
    raise ValueError(f"{origin}: {key}={value!r} must be a positive integer")
  return value


def _number(config: dict[str, Any], key: str, origin: str) -> float:
  value = config.get(key)
  if type(value) not in (int, float) or not math.isfinite(value):
    raise ValueError(f"{origin}: {key}={value!r} must be a number")
  return float(value)


def _positive(config: dict[str, Any], key: str, origin: str) -> float:
  value = _number(config, key, origin)
  if value <= 0:
    raise ValueError(f"{origin}: {key}={value!r} must be a positive number")
  return value
