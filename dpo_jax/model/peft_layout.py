"""What PEFT calls things: adapter_config.json and the names of adapters.

PEFT has dozens of settings that change what an adapter computes. Those that we
compute are read; of the rest only values that leave them off are accepted, so
that a setting of a later PEFT is refused too, not overlooked.
"""

import json
import math
import pathlib
from typing import Any

from dpo_jax.io import remote
from dpo_jax.model import hf_layout

# Settings that say nothing about what the adapters compute.
_IGNORED = frozenset(
  {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
  }
)
_READ = frozenset(
  {
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "target_modules",
    "use_rslora",
  }
)


def weights(targets: tuple[str, ...]) -> tuple[hf_layout.Weight, ...]:
  """The adapters on these targets: [R, I] and [O, R], where ours are [I, R]
  and [R, O] a layer."""
  return tuple(
    hf_layout.Weight(
      f"blocks/{target}/lora_{letter}",
      f"base_model.model.{hf_layout.LAYER}{hf_layout.MODULES[target]}"
      f".lora_{letter.upper()}.weight",
      ((1,), (0,)),
    )
    for target in targets
    for letter in "ab"
  )


def fields(config: dict[str, Any], origin: str) -> dict[str, Any]:
  """The fields of a LoraConfig that an adapter_config.json sets.

  Args:
    config: the parsed adapter_config.json.
    origin: its path, for messages.

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
    if value and key not in _IGNORED | _READ:
      raise ValueError(
        f"{origin}: {key}={value!r} is not supported; merge the adapter with"
        " peft (merge_and_unload) and load the merged model"
      )
  rank = _number(config, "r", origin)
  alpha = _number(config, "lora_alpha", origin)
  if type(rank) is not int or rank < 1:
    raise ValueError(f"{origin}: r={rank!r} must be a positive integer")
  if config.get("use_rslora"):
    # alpha / sqrt(rank), written as the alpha / rank that we apply.
    alpha = alpha * math.sqrt(rank)
  return {
    "rank": rank,
    "alpha": float(alpha),
    "dropout": float(_number(config, "lora_dropout", origin)),
    "targets": _targets(config.get("target_modules"), origin),
  }


def config_json(lora: Any, base_name: str) -> str:
  """The adapter_config.json of a LoraConfig on the model `base_name`.

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
  """The adapted kernels; PEFT writes them in any order."""
  if not isinstance(names, list) or not names:
    raise ValueError(
      f"{origin}: target_modules={names!r} must be a list of names"
    )
  found = {}
  for name in names:
    for target, module in hf_layout.MODULES.items():
      if name in (target, module):
        found[target] = name
        break
    else:
      raise ValueError(
        f"{origin}: target_modules names {name!r}; supported are"
        f" {list(hf_layout.MODULES)}"
      )
  return tuple(target for target in hf_layout.MODULES if target in found)


def _number(config: dict[str, Any], key: str, origin: str) -> int | float:
  value = config.get(key)
  if type(value) not in (int, float) or not math.isfinite(value):
    raise ValueError(f"{origin}: {key}={value!r} must be a number")
  return value
