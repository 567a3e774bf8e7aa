"""The table of GPUs."""

from vitscale.flops import measured_flops, peak_flops
from vitscale.gpus import GPUS, gpu_of


def test_gpus_by_the_names_that_cuda_gives() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200", "NVIDIA GB200": "gb200",
        "NVIDIA B200": "b200", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L40S": "l40s", "AMD Instinct MI300X": "mi300x",
    }  # fmt: skip
    assert {name: found.name for name in names if (found := gpu_of(name))} == names
    assert gpu_of("NVIDIA GH200 480GB") is gpu_of("NVIDIA H100 NVL") is None
    assert {one.name for one in GPUS} == set(names.values())
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert measured_flops("NVIDIA H200", "bf16") == 790e12
    assert measured_flops("NVIDIA H200", "fp32") is peak_flops("cpu", "bf16") is None
