"""What a model costs: its parameters, the bytes of a checkpoint and FLOPs, held against the peaks of `gpus.py`. Imports no torch.

MFU counts model FLOPs only, never recomputation (PaLM, arXiv 2204.02311, appendix B): what training needs of the model as configured, so
patches that dropout hides and branches that stochastic depth drops are not counted, whether the hardware left them out or not.
"""

import math

from vitscale.config import EngineConfig, OptimizerConfig, ViTConfig, drop_path_rows
from vitscale.gpus import gpu_of


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
    block = 4 * D * D + 4 * D + mlp + 4 * D + 4 * (D // model.num_heads) * model.qk_norm
    pooling = (D + 4 * D * D + 4 * D + 2 * D + mlp) * (model.pool == "map")
    R = model.representation_size
    head = (R * D + R) + ((R or D) + 1) * model.num_classes
    return embed + position + model.depth * block + 2 * D + pooling + head


def checkpoint_bytes(model: ViTConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of a checkpoint's tensors: in fp32 each weight, its moments, and its average where one is kept."""
    return 4 * (parameters(model) * (1 + bool(optimizer.average_decay)) + moment_elements(model, optimizer))


def moment_elements(model: ViTConfig, optimizer: OptimizerConfig) -> int:
    """How many numbers an optimizer keeps of a model beside its weights."""
    muons = matrices(model) if optimizer.name == "muon" else 0
    return muons * len(optimizer.moments(muon=True)) + (parameters(model) - muons) * len(optimizer.moments())


def matrices(model: ViTConfig) -> int:
    """How many of the parameters lie in the matrices of blocks, which Muon updates."""
    return model.depth * (4 * model.width**2 + 2 * model.width * model.mlp_dim)


def forward_flops(model: ViTConfig) -> int:
    """FLOPs of one image's forward pass in evaluation, two for each multiply-add, matrix products only.

    The attention pool's query counts for each image, though a batch shares it.
    """
    return _ends_flops(model, model.num_tokens) + model.depth * sum(branch_flops(model, model.num_tokens))


def train_flops(model: ViTConfig) -> int:
    """FLOPs of one image's forward and backward pass in training, in expectation over what stochastic depth drops.

    Three forward passes by convention: each product's backward pass is two products, of the gradients of its inputs and its weights.
    The images want no gradient, so what is run is less by `embed_flops`.
    """
    kept = sum(1 - rate for rate in model.drop_path_rates)
    return round(3 * (_ends_flops(model, model.num_train_tokens) + kept * sum(branch_flops(model, model.num_train_tokens))))


def executed_flops(model: ViTConfig, engine: EngineConfig, micro_batch_size: int) -> float:
    """FLOPs an image that the device runs in training, in expectation: recomputation and branches computed in vain are counted.

    Under checkpoint_keeps=nothing a block's forward pass runs again, up to the last thing that its backward pass needs: fc2 itself
    only where dropout or stochastic depth stand behind it (a compiled block leaves it out then, too). Under products none of them does.
    """
    N = model.num_train_tokens
    attention, mlp = branch_flops(model, N)
    total: float = 3 * _ends_flops(model, N) - embed_flops(model)
    every = engine.checkpoint_every_n_blocks
    for index, rate in enumerate(model.drop_path_rates):
        block = 3 * (attention + mlp)
        if every and index % every == 0 and engine.checkpoint_keeps == "nothing":
            block += attention + (mlp if model.dropout or rate else mlp // 2)
        total += block * computed_share(rate, micro_batch_size)
    return total


def computed_share(rate: float, micro_batch_size: int) -> float:
    """The share of a micro-batch's samples that a block of this drop-path rate computes, in expectation."""
    B = micro_batch_size
    if drop_path_rows(rate, 0, B) == B:
        return 1.0
    log_choose = [math.lgamma(B + 1) - math.lgamma(k + 1) - math.lgamma(B - k + 1) for k in range(B + 1)]
    chances = [math.exp(log_choose[k] + k * math.log1p(-rate) + (B - k) * math.log(rate)) for k in range(B + 1)]
    rows = below = 0.0  # of the larger number of two branches' kept samples, each binomial
    for kept, chance in enumerate(chances):
        rows += ((below + chance) ** 2 - below**2) * drop_path_rows(rate, kept, B)
        below += chance
    return rows / B


def embed_flops(model: ViTConfig) -> int:
    """FLOPs of one image's patch embedding, of all its patches: patch dropout follows it."""
    return 2 * model.grid[0] * model.grid[1] * 3 * model.patch_size**2 * model.width


def branch_flops(model: ViTConfig, num_tokens: int) -> tuple[int, int]:
    """FLOPs of one image's forward pass through one block: of the attention branch and of the MLP's."""
    D, M, N = model.width, model.mlp_dim, num_tokens
    return 2 * (N * 4 * D * D + 2 * N * N * D), 2 * N * 2 * D * M


def _ends_flops(model: ViTConfig, num_tokens: int) -> int:
    """FLOPs of one image's forward pass outside the blocks."""
    D, M, N = model.width, model.mlp_dim, num_tokens
    pooling = 0
    if model.pool == "map":  # q of one token, k and v of all, the products with the one query, projection, MLP
        pooling = D * D + 2 * N * D * D + 2 * N * D + D * D + 2 * D * M
    head_input = model.representation_size or D
    head = head_input * model.num_classes + D * model.representation_size
    return embed_flops(model) + 2 * (pooling + head)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device could do at best, or None where it is not known."""
    found = gpu_of(device_name)
    return found.peak(precision) if found else None


def measured_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a large matrix product was measured to reach on a device, or None where that is not known."""
    found = gpu_of(device_name)
    return found.reached if found and precision == "bf16" else None
