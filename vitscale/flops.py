"""What a model costs: its parameters, the bytes of a checkpoint, FLOPs, and the peaks of devices they are held against. Imports no torch.

MFU counts model FLOPs only, never recomputation (PaLM, arXiv 2204.02311, appendix B).
"""

from vitscale.config import OptimizerConfig, ViTConfig

# Dense peaks in TFLOP/s from NVIDIA's datasheets (H100 and H200 SXM, A100, B200), by a piece of the device's name.
PEAK_TFLOPS = {
    "H200": {"bf16": 989.0, "fp32": 67.0},
    "H100": {"bf16": 989.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "B200": {"bf16": 2250.0, "fp32": 80.0},
}


def parameters(model: ViTConfig) -> int:
    """How many numbers a model learns."""
    D, M = model.width, model.mlp_dim
    rows, columns = model.grid
    mlp = D * M + M + M * D + D
    position = {
        "learned_1d": model.num_tokens * D,
        "learned_2d": (rows + columns) * (D // 2),
        "relative": model.depth * ((2 * rows - 1) * (2 * columns - 1) + 3 * (model.pool == "cls")) * model.num_heads,
    }.get(model.position, 0)
    embed = 3 * model.patch_size**2 * D + D + D * (model.pool == "cls")
    block = 4 * D * D + 4 * D + mlp + 4 * D
    pooling = (D + 4 * D * D + 4 * D + 2 * D + mlp) * (model.pool == "map")
    R = model.representation_size
    head = (R * D + R) + ((R or D) + 1) * model.num_classes
    return embed + position + model.depth * block + 2 * D + pooling + head


def checkpoint_bytes(model: ViTConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of a checkpoint's tensors: in fp32 each weight, its moments, and its average where one is kept."""
    return 4 * parameters(model) * (1 + len(optimizer.moments) + bool(optimizer.average_decay))


def forward_flops(model: ViTConfig) -> int:
    """FLOPs of one image's forward pass, two for each multiply-add, matrix products only."""
    D, M, N = model.width, model.mlp_dim, model.num_tokens
    patches = model.grid[0] * model.grid[1]
    embed = patches * 3 * model.patch_size**2 * D
    block = N * (4 * D * D + 2 * D * M) + 2 * N * N * D
    pooling = 0
    if model.pool == "map":  # q of one token, k and v of all, the products with the one query, projection, MLP
        pooling = D * D + 2 * N * D * D + 2 * N * D + D * D + 2 * D * M
    head_input = model.representation_size or D
    head = head_input * model.num_classes + D * model.representation_size
    return 2 * (embed + model.depth * block + pooling + head)


def train_flops(model: ViTConfig) -> int:
    """FLOPs of one image's forward and backward pass."""
    return 3 * forward_flops(model)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device could do at best, or None where it is not known."""
    for name, peaks in PEAK_TFLOPS.items():
        if name in device_name:
            return peaks[precision] * 1e12
    return None
