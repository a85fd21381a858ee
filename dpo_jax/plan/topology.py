"""Devices to compile for: local ones, or a description of a TPU slice.

libtpu compiles for a described slice on any Linux machine, without a TPU.
"""

import importlib.util
import os
import re

import jax

# Without these libtpu would look for a metadata server, or for a process that
# holds the chips; a TPU host sets its own.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "none",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
_KINDS = ("v4", "v5e", "v5p", "v6e")


def devices(name: str) -> list[jax.Device]:
  """The devices of a slice such as "v5e:2x4"; "" for the local ones.

  Raises:
    ValueError: no such slice exists, or libtpu is not installed.
  """
  if not name:
    return jax.devices()
  kind, _, sizes = name.partition(":")
  if kind not in _KINDS or not re.fullmatch(r"\d+(x\d+)+", sizes):
    raise ValueError(
      f"topology={name!r} must be a kind of {_KINDS} and its chips along each"
      " axis, such as v5e:2x4 or v5p:2x2x1"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"topology={name!r} needs the TPU compiler, which comes with libtpu, on"
      " Linux: pip install 'dpo-jax[tpu]'"
    )
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  # A v4 chip's two cores are one device, as they are on Cloud TPU.
  extra = {"chip_config_name": "megacore"} if kind == "v4" else {}
  try:
    found = topologies.get_topology_desc(name, platform="tpu", **extra)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    text = str(error).splitlines()[0]
    raise ValueError(f"topology={name!r} is none of libtpu's: {text}") from None
  return list(found.devices)
