"""Peak rates and memory of accelerators, from their data sheets.

One row for each `device_kind` of jax, for dense operations: MFU is a share of
these peaks, and a time computed from them is a lower bound.

References:
  TPU: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"
  (docs.cloud.google.com/tpu/docs), tables of key specifications. Interconnect
  is half of a chip's bidirectional ICI bandwidth; for v4, which has no such
  entry, the all-reduce bandwidth of a pod over 4,096 chips. Memory is what
  libtpu's compiler accepts, slightly below the page's number.
  GPU: NVIDIA's data sheets of A100, H100 and H200: Tensor Core rates without
  sparsity (half of those printed with it), FP32 rates, and half of NVLink's
  bidirectional bandwidth.
  jax.lax.Precision: a TPU multiplies float32 as six products of bfloat16.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one jax device.

  Attributes:
    bf16_flops: dense FLOP/s in bfloat16.
    float32_flops: dense FLOP/s in float32 without rounding of operands.
    hbm_bytes: memory.
    hbm_bandwidth: bytes/s of memory.
    link_bandwidth: bytes/s to other devices, over all links.
  """

  bf16_flops: float
  float32_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float


def _tpu(flops: float, memory: int, hbm: float, link: float) -> Chip:
  return Chip(flops, flops / 6, memory, hbm, link)


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
  """Peaks of a `jax.Device.device_kind`, or None if it is not listed."""
  return CHIPS.get(device_kind)


def mfu(
  flops: float, seconds: float, devices: int, peak: Chip | None
) -> float | None:
  """Model FLOPs utilization in bfloat16 terms, or None for an unknown peak.

  References:
    Chowdhery et al., PaLM, 2022 (arXiv 2204.02311), Appendix B.
  """
  return peak and flops / (seconds * devices * peak.bf16_flops)
