"""What accelerators can do at best, as their makers publish it.

One row for each `device_kind` of jax. Rates are peaks of dense operations: a
share of them is a measure (MFU), a time computed with them a lower bound.

References:
  TPU: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"
  (docs.cloud.google.com/tpu/docs), tables of key specifications. Interconnect
  is half of their bidirectional ICI bandwidth of a chip; v4's, for which none
  is given, is its pod's all-reduce bandwidth over 4,096 chips. Memory is what
  libtpu's compiler accepts, a little less than the page's number.
  GPU: NVIDIA's data sheets of A100, H100 and H200: Tensor Core rates without
  sparsity, which are half of those printed with it, FP32's rates, and half of
  NVLink's bandwidth of both directions.
  jax.lax.Precision: a TPU multiplies float32 by six products of bfloat16.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The peaks of one device as jax counts devices."""

  # Dense multiplications and additions a second; of float32, of operands that
  # are not rounded.
  bf16_flops: float
  float32_flops: float
  hbm_bytes: int
  # Bytes a second to compute, and to the other devices of the slice or node
  # over all links together.
  hbm_bandwidth: float
  link_bandwidth: float


def _tpu(flops: float, memory: int, read: float, sent: float) -> Chip:
  # Six products of bfloat16 make one of float32.
  return Chip(flops, flops / 6, memory, read, sent)


_V5E = _tpu(197e12, int(15.75 * GIB), 8.19e11, 200e9)
_V5P = _tpu(459e12, int(95.73 * GIB), 2.765e12, 300e9)
_V6E = _tpu(918e12, int(31.24 * GIB), 1.638e12, 400e9)

CHIPS = {
  "TPU v4": _tpu(275e12, int(30.75 * GIB), 1.2e12, 268e9),
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 19.5e12, 40 * GIB, 1.555e12, 300e9),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 19.5e12, 80 * GIB, 2.039e12, 300e9),
  "NVIDIA A100 80GB PCIe": Chip(312e12, 19.5e12, 80 * GIB, 1.935e12, 300e9),
  "NVIDIA H100 80GB HBM3": Chip(989.4e12, 66.9e12, 80 * GIB, 3.35e12, 450e9),
  "NVIDIA H100 PCIe": Chip(756e12, 51.2e12, 80 * GIB, 2.0e12, 300e9),
  "NVIDIA H200": Chip(989.4e12, 66.9e12, 141 * 10**9, 4.8e12, 450e9),
}


def chip(device_kind: str) -> Chip | None:
  """The row of a `jax.Device.device_kind`; None for a device not listed."""
  return CHIPS.get(device_kind)


def mfu(
  flops: float, seconds: float, devices: int, peak: Chip | None
) -> float | None:
  """Model flops utilization: the share of the peak rate that was useful.

  None where the devices' peak is not known.

  References:
    Chowdhery et al., PaLM, 2022 (arXiv 2204.02311), Appendix B.
  """
  if peak is None:
    return None
  return flops / (seconds * devices * peak.bf16_flops)
