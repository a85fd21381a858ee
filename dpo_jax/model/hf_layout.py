"""What Hugging Face calls things: the keys of config.json, names of weights.

Every weight of ours is a transpose of a stored one with some axes flattened
together; `Weight.axes` says which, and turns values either way. The fused
query_key_value rows are ordered (head, q/k/v, head dim), so that one rule
covers them too. A config that we do not compute exactly is refused.
"""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np

# Our names of the adapted kernels, and where they are in a stored layer.
MODULES = {
  "query_key_value": "attention.query_key_value",
  "dense": "attention.dense",
  "dense_h_to_4h": "mlp.dense_h_to_4h",
  "dense_4h_to_h": "mlp.dense_4h_to_h",
}

# Constants that older transformers stored among the weights.
BUFFERS = re.compile(
  r"(^|\.)(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$"
)


@dataclasses.dataclass(frozen=True)
class Weight:
  """One of our weights and its stored name.

  Attributes:
    path: the path in our tree, "blocks/dense/kernel".
    name: the stored name; stacked layers have "{}" where the layer stands.
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
    """The stored names of our weight of this shape, in order of layers."""
    if not self.stacked:
      return [self.name]
    return [self.name.format(layer) for layer in range(shape[0])]

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of each stored tensor of our weight of this shape."""
    shape = shape[1:] if self.stacked else shape
    return tuple(
      math.prod(shape[axis] for axis in group) for group in self.axes
    )

  def read(
    self, stored: Any, shape: tuple[int, ...], index: tuple[slice, ...]
  ) -> np.ndarray:
    """The part at `index` of one layer's weight of ours, as a view of what is
    read of the stored tensor: that part alone.

    Args:
      stored: an array, or a slice of the safetensors library.
      shape: of our (one layer's) weight.
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

  def stored(self, ours: np.ndarray) -> np.ndarray:
    """One of our weights (of one layer, if stacked) as it is stored."""
    order = [axis for group in self.axes for axis in group]
    shape = tuple(
      math.prod(ours.shape[axis] for axis in group) for group in self.axes
    )
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


# config.json keys whose value we need one way; absent means just that.
_ONLY = {
  "use_parallel_residual": True,
  "hidden_act": "gelu",
  "tie_word_embeddings": False,
  "attention_bias": True,
  "quantization_config": None,
}


def model_fields(config: dict[str, Any], origin: str) -> dict[str, Any]:
  """The fields of a ModelConfig that a config.json sets.

  Dropout in the base (hidden_dropout, attention_dropout) is not applied:
  preference training switches it off.

  Args:
    config: the parsed config.json.
    origin: its path, for messages.

  Raises:
    ValueError: a key is missing, or asks for what we do not compute.
  """
  kind = config.get("model_type")
  if kind != "gpt_neox":
    raise ValueError(
      f"{origin}: model_type={kind!r} is not supported; give a gpt_neox model,"
      " such as a Pythia"
    )
  for key, only in _ONLY.items():
    if (value := config.get(key, only)) != only:
      raise ValueError(
        f"{origin}: {key}={value!r} is not supported, only {only!r}; choose a"
        " model that was trained so, such as a Pythia"
      )
  fraction, base = _rotary(config, origin)
  return {
    "vocab_size": _size(config, "vocab_size", origin),
    "width": _size(config, "hidden_size", origin),
    "layers": _size(config, "num_hidden_layers", origin),
    "heads": _size(config, "num_attention_heads", origin),
    "mlp_width": _size(config, "intermediate_size", origin),
    "rotary_fraction": fraction,
    "rotary_base": base,
    "norm_eps": _positive(config, "layer_norm_eps", origin),
    "max_positions": _size(config, "max_position_embeddings", origin),
  }


def config_json(
  fields: Any, dtype: str, bos_id: int | None, eos_id: int | None
) -> str:
  """The config.json of a ModelConfig, in keys of transformers 4 and 5.

  Args:
    fields: the ModelConfig.
    dtype: what the weights are stored in, "float32" or "bfloat16".
    bos_id: the tokenizer's, or None.
    eos_id: the tokenizer's, or None.
  """
  config = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": fields.vocab_size,
    "hidden_size": fields.width,
    "num_hidden_layers": fields.layers,
    "num_attention_heads": fields.heads,
    "intermediate_size": fields.mlp_width,
    "max_position_embeddings": fields.max_positions,
    "layer_norm_eps": fields.norm_eps,
    "rotary_pct": fields.rotary_fraction,
    "rotary_emb_base": fields.rotary_base,
    "rope_parameters": {
      "rope_type": "default",
      "rope_theta": fields.rotary_base,
      "partial_rotary_factor": fields.rotary_fraction,
    },
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "attention_bias": True,
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
  """Fraction and base, from the keys of transformers 4, of 5, or of both."""
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


def _size(config: dict[str, Any], key: str, origin: str) -> int:
  value = config.get(key)
  if type(value) is not int or value < 1:
    raise ValueError(f"{origin}: {key}={value!r} must be a positive integer")
  return value


def _positive(config: dict[str, Any], key: str, origin: str) -> float:
  value = config.get(key)
  if type(value) not in (int, float) or not 0 < value < math.inf:
    raise ValueError(f"{origin}: {key}={value!r} must be a positive number")
  return float(value)
