"""What GPUs can do by their makers' data sheets, and what joins them: the one table of peaks, for MFU and for plans. Imports no torch.

Peaks are dense (half of what sheets print "with sparsity"), links count one direction (half of what sheets print). `network` is that of the
maker's own system of eight, for one GPU. What a large matrix product was measured to reach is below the peak on every GPU: `reached`.
"""

import re
from dataclasses import dataclass

from vitscale.config import ConfigError

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected ends in 54 days on 2,048 nodes of 8 H100
NODE_MTBF_HOURS = 54 * 24 * 2048 / 419


@dataclass(frozen=True)
class GPU:
    """One kind of GPU."""

    name: str
    """On the command line."""
    device: tuple[str, ...]
    """Words of the name that CUDA gives it."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second of its memory."""
    bf16: float
    """FLOP/s, dense; likewise the next two."""
    fp8: float | None
    fp32: float
    link: float
    """Bytes a second that it can send to GPUs of its node: NVLink, Infinity Fabric or, where there is none, PCIe."""
    network: float
    """Bytes a second that it can send to other nodes."""
    watts: float
    source: str
    reached: float | None = None
    """FLOP/s of an 8192-cubed product in bf16, where measured."""

    def peak(self, precision: str) -> float:
        """FLOP/s at most in `bf16`, `fp8` or `fp32`."""
        peak: float | None = getattr(self, precision)
        if peak is None:
            raise ConfigError(f"{self.name} computes nothing in {precision}; its peaks are for bf16 and fp32")
        return peak


@dataclass(frozen=True)
class Cluster:
    """What is to be booked, and what is known of it."""

    gpu: GPU
    nodes: int
    gpus_per_node: int
    price_per_gpu_hour: float = 0.0
    storage_bandwidth: float = 5e9
    """Bytes a second that checkpoints of all nodes together are written at."""
    node_mtbf_hours: float = NODE_MTBF_HOURS
    restart_seconds: float = 180.0
    """From a failure to the first step after it."""

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.nodes * self.gpus_per_node


def _gpu(
    name: str, device: str, gigabytes: float, bandwidth: float, bf16: float, fp8: float | None, fp32: float, link: float, network: float,
    watts: float, source: str, reached: float | None = None,
) -> GPU:  # fmt: skip
    """In GB, TB/s, TFLOP/s, GB/s both ways, Gbit/s and W, as data sheets have them."""
    return GPU(
        name, tuple(device.split()), gigabytes * 1e9, bandwidth * 1e12, bf16 * 1e12, fp8 and fp8 * 1e12, fp32 * 1e12, link / 2 * 1e9,
        network / 8 * 1e9, watts, source, reached and reached * 1e12,
    )  # fmt: skip


GPUS = (
    _gpu("gb200", "GB200", 186, 8.0, 2500, 5000, 80, 1800, 400, 1200, "NVIDIA GB200 NVL72 data sheet, a 72nd of it"),
    _gpu("b200", "B200", 180, 8.0, 2250, 4500, 80, 1800, 400, 1000, "NVIDIA Blackwell architecture technical brief; DGX B200 data sheet"),
    _gpu("h200", "H200", 141, 4.8, 989, 1979, 67, 900, 400, 700, "NVIDIA H200 data sheet (SXM); DGX H200 data sheet", reached=790),
    _gpu("h100-pcie", "H100 PCIe", 80, 2.0, 756, 1513, 51, 128, 200, 350, "NVIDIA H100 data sheet (PCIe, without NVLink bridges)"),
    _gpu("h100", "H100", 80, 3.35, 989, 1979, 67, 900, 400, 700, "NVIDIA H100 data sheet (SXM); DGX H100 data sheet"),
    _gpu("a100-40", "A100 40GB", 40, 1.555, 312, None, 19.5, 600, 200, 400, "NVIDIA A100 data sheet (SXM); DGX A100 data sheet"),
    _gpu("a100", "A100", 80, 2.039, 312, None, 19.5, 600, 200, 400, "NVIDIA A100 data sheet (SXM); DGX A100 data sheet"),
    _gpu("l40s", "L40S", 48, 0.864, 362, 733, 91.6, 64, 100, 350, "NVIDIA L40S data sheet; PCIe 4 x16, a network of 100 Gbit/s assumed"),
    _gpu("mi300x", "MI300X", 192, 5.3, 1307, 2615, 163.4, 896, 400, 750, "AMD Instinct MI300X data sheet"),
)


def gpu(name: str) -> GPU:
    """The GPU of a name as the command line has it. Raises ConfigError that lists the names there are."""
    found = next((one for one in GPUS if one.name == name.lower()), None)
    if found is None:
        raise ConfigError(f"gpu={name} is not known; there are {', '.join(sorted(one.name for one in GPUS))}")
    return found


def gpu_of(device_name: str) -> GPU | None:
    """The GPU that CUDA gives this name, as in "NVIDIA H100 80GB HBM3"; None where the table does not have it."""
    words = re.split(r"[\s-]+", device_name)
    if "NVL" in words:  # an H100 with other memory, peaks and links than the two of the table
        return None
    return next((one for one in GPUS if all(piece in words for piece in one.device)), None)
