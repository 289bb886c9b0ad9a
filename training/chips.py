"""What accelerators can do: the limits that measured speed is a fraction of."""

from typing import NamedTuple


class Chip(NamedTuple):
  """One device, as JAX counts them; dense rates, without sparsity."""

  name: str
  flops: float  # of bfloat16 products with float32 sums, per second
  bandwidth: float  # of its memory, bytes per second
  memory: float  # bytes
  interconnect: float  # to devices like it, bytes per second each way, all links together


TPU_V4 = Chip("TPU v4", 275e12, 1200e9, 32 * 2**30, 300e9)
TPU_V5E = Chip("TPU v5e", 197e12, 819e9, 16e9, 200e9)
TPU_V5P = Chip("TPU v5p", 459e12, 2765e9, 95 * 2**30, 600e9)
TPU_V6E = Chip("TPU v6e", 918e12, 1638e9, 32e9, 400e9)
A100_40 = Chip("A100 SXM 40GB", 312e12, 1555e9, 40e9, 300e9)
A100_80 = Chip("A100 SXM 80GB", 312e12, 2039e9, 80e9, 300e9)
A100_PCIE = Chip("A100 PCIe 80GB", 312e12, 1935e9, 80e9, 300e9)
H100 = Chip("H100 SXM", 989e12, 3350e9, 80e9, 450e9)
H100_PCIE = Chip("H100 PCIe", 756e12, 2000e9, 80e9, 300e9)
H100_NVL = Chip("H100 NVL", 835e12, 3900e9, 94e9, 300e9)
H200 = Chip("H200 SXM", 989e12, 4800e9, 141e9, 450e9)
B200 = Chip("B200", 2250e12, 8000e9, 180e9, 900e9)
L4 = Chip("L4", 121e12, 300e9, 24e9, 32e9)

BY_NAME = {
  "v4": TPU_V4,
  "v5e": TPU_V5E,
  "v5p": TPU_V5P,
  "v6e": TPU_V6E,
  "a100": A100_80,
  "h100": H100,
  "h200": H200,
  "b200": B200,
  "l4": L4,
}
"""By the name that people call it."""

BY_KIND = {
  "TPU v4": TPU_V4,
  "TPU v5 lite": TPU_V5E,
  "TPU v5e": TPU_V5E,
  "TPU v5": TPU_V5P,
  "TPU v5p": TPU_V5P,
  "TPU v6 lite": TPU_V6E,
  "TPU v6e": TPU_V6E,
  "NVIDIA A100-SXM4-40GB": A100_40,
  "NVIDIA A100-SXM4-80GB": A100_80,
  "NVIDIA A100 80GB PCIe": A100_PCIE,
  "NVIDIA H100 80GB HBM3": H100,
  "NVIDIA H100 PCIe": H100_PCIE,
  "NVIDIA H100 NVL": H100_NVL,
  "NVIDIA H200": H200,
  "NVIDIA B200": B200,
  "NVIDIA L4": L4,
}
"""By `jax.Device.device_kind`.

TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, the links of v4 from Jouppi et al. 2023,
arXiv 2304.01433; the names are those in jax/_src/pallas/mosaic/tpu_info.py. GPUs: NVIDIA's data
sheets. Rates of both directions together, and those with sparsity, are halved here.
"""


def chip(device_kind: str) -> Chip | None:
  """The chip that JAX calls so, or None where its limits are not known (a CPU's are not).

  A chip that counts as two devices (TPU v2, v3, v7x) is not in the table, nor one that has no
  bfloat16 products.
  """
  return BY_KIND.get(device_kind)


def peak_flops(device_kind: str) -> float | None:
  """Of bfloat16, dense, per second; None where it is not known."""
  found = chip(device_kind)
  return None if found is None else found.flops
