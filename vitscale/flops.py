"""What a model costs: its parameters, the bytes of a checkpoint and FLOPs, held against the peaks of `gpus.py`. Imports no torch.

MFU counts model FLOPs only, never recomputation (PaLM, arXiv 2204.02311, appendix B): what training needs of the model as configured, so
patches that dropout hides and branches that stochastic depth drops are not counted, whether the hardware left them out or not.
"""

import functools
import math
from collections.abc import Mapping

from vitscale.config import OptimizerConfig, ViTConfig, drop_path_rows, frozen
from vitscale.gpus import gpu_of

# Of `muon.py`, which imports torch
NEWTON_SCHULZ_STEPS = 5
ORTHOGONALIZED = 1 << 26  # elements at once, at most, but for one matrix that has more


@functools.lru_cache(maxsize=256)
def tensor_sizes(model: ViTConfig) -> Mapping[str, int]:
    """The elements of each parameter by its name, in the order of the model (`model.parameter_shapes`, which imports torch)."""
    D, M, R, K = model.width, model.mlp_dim, model.representation_size, model.num_classes
    rows, columns = model.grid

    def linear(name: str, inputs: int, outputs: int) -> dict[str, int]:
        return {f"{name}.weight": inputs * outputs, f"{name}.bias": outputs}

    def norm(name: str, features: int = D) -> dict[str, int]:
        return {f"{name}.weight": features, f"{name}.bias": features}

    def mlp(name: str, gates: int = 1) -> dict[str, int]:
        return linear(f"{name}.fc1", D, gates * M) | linear(f"{name}.fc2", M, D)

    sizes = {"cls_token": D} if model.class_token else {}
    if model.registers:
        sizes["reg_token"] = model.registers * D
    if model.position == "learned_1d":
        sizes["pos_embed"] = model.num_positions * D
    elif model.position == "learned_2d":
        sizes |= {"pos_embed_rows": rows * (D // 2), "pos_embed_columns": columns * (D // 2)}
    sizes |= linear("patch_embed.proj", 3 * model.patch_size**2, D)
    if model.pre_norm:
        del sizes["patch_embed.proj.bias"]
        sizes |= norm("norm_pre")
    for at in (f"blocks.{index}" for index in range(model.depth)):
        sizes |= norm(f"{at}.norm1")
        if model.position == "relative":
            sizes[f"{at}.attn.rel_pos_bias"] = ((2 * rows - 1) * (2 * columns - 1) + 3 * model.class_token) * model.num_heads
        sizes |= linear(f"{at}.attn.qkv", D, 3 * D)
        if model.qk_norm:
            sizes |= norm(f"{at}.attn.q_norm", D // model.num_heads) | norm(f"{at}.attn.k_norm", D // model.num_heads)
        sizes |= linear(f"{at}.attn.proj", D, D)
        if model.layer_scale:
            sizes[f"{at}.ls1.gamma"] = D
        sizes |= norm(f"{at}.norm2") | mlp(f"{at}.mlp", gates=mlp_matrices(model) - 1)
        if model.layer_scale:
            sizes[f"{at}.ls2.gamma"] = D
    if not model.pool_norm:
        sizes |= norm("norm")
    if model.pool == "map":
        sizes |= {"attn_pool.latent": D} | linear("attn_pool.q", D, D) | linear("attn_pool.kv", D, 2 * D)
        sizes |= linear("attn_pool.proj", D, D) | norm("attn_pool.norm") | mlp("attn_pool.mlp")
    if model.pool_norm:
        sizes |= norm("fc_norm")
    if R:
        sizes |= linear("pre_logits.fc", D, R)
    if K:
        sizes |= linear("head", R or D, K)
    return sizes


def is_kernel(name: str) -> bool:
    """Whether a parameter is a linear layer's matrix or the patch convolution (`optim.split_by_decay`)."""
    return name.endswith(".weight") and "norm" not in name


def elements(model: ViTConfig, *begins: str) -> int:
    """Of the parameters whose names begin so."""
    return sum(size for name, size in tensor_sizes(model).items() if name.startswith(begins))


def parameters(model: ViTConfig) -> int:
    """How many numbers a model learns."""
    return sum(tensor_sizes(model).values())


def checkpoint_bytes(model: ViTConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of a checkpoint's tensors: in fp32 each weight, its moments, and its average where one is kept."""
    return 4 * (parameters(model) * (1 + bool(optimizer.average_decay)) + moment_elements(model, optimizer))


@functools.lru_cache(maxsize=256)  # a plan asks for each of thousands of layouts
def moment_elements(model: ViTConfig, optimizer: OptimizerConfig) -> int:
    """How many numbers an optimizer keeps of a model beside its weights: none of what is frozen."""
    sizes = tensor_sizes(model)
    still = frozen(sizes, optimizer)
    trained = {name: size for name, size in sizes.items() if name not in still}
    muons = sum(size for name, size in trained.items() if _is_matrix(name)) if optimizer.name == "muon" else 0
    return muons * len(optimizer.moments(muon=True)) + (sum(trained.values()) - muons) * len(optimizer.moments())


def matrices(model: ViTConfig) -> int:
    """How many of the parameters lie in the matrices of blocks, which Muon updates."""
    return sum(size for name, size in tensor_sizes(model).items() if _is_matrix(name))


def _is_matrix(name: str) -> bool:
    return name.startswith("blocks.") and is_kernel(name)


def forward_flops(model: ViTConfig) -> int:
    """FLOPs of one image's forward pass in evaluation, two for each multiply-add, matrix products only.

    The attention pool's query counts for each image, though a batch shares it.
    """
    return ends_flops(model, model.num_tokens) + model.depth * sum(branch_flops(model, model.num_tokens))


def train_flops(model: ViTConfig, optimizer: OptimizerConfig | None = None) -> int:
    """FLOPs of one image's forward and backward pass in training, in expectation over what stochastic depth drops.

    Three forward passes by convention: each product's backward pass is two products, of the gradients of its inputs and its weights.
    What the first layer is given wants no gradient, so what is run is less by `embed_flops`. What is frozen has the forward pass alone.

    Args:
        optimizer: says what is frozen; None: nothing is.
    """
    N, alone = model.num_train_tokens, optimizer is not None and optimizer.freeze == "backbone"
    still = model.depth if alone else optimizer.freeze_blocks if optimizer else 0
    passes = sum((1 if block < still else 3) * (1 - rate) for block, rate in enumerate(model.drop_path_rates))
    embed, head = embed_flops(model), head_flops(model)
    pooling = ends_flops(model, N) - embed - head
    return round((1 if still else 3) * embed + passes * sum(branch_flops(model, N)) + (1 if alone else 3) * pooling + 3 * head)


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
    return 2 * (N * 4 * D * D + 2 * N * N * D), 2 * N * mlp_matrices(model) * D * M


def mlp_matrices(model: ViTConfig) -> int:
    """Matrices of D x M in an MLP: SwiGLU's first layer has two."""
    return 3 if model.mlp == "swiglu" else 2


def ends_flops(model: ViTConfig, num_tokens: int) -> int:
    """FLOPs of one image's forward pass outside the blocks."""
    D, M, N = model.width, model.mlp_dim, num_tokens
    pooling = 0
    if model.pool == "map":  # q of one token, k and v of all, the products with the one query, projection, MLP
        N -= model.num_prefix_tokens
        pooling = D * D + 2 * N * D * D + 2 * N * D + D * D + 2 * D * M
    return embed_flops(model) + 2 * pooling + head_flops(model)


def head_flops(model: ViTConfig) -> int:
    """FLOPs of one image's forward pass through the representation layer and the head."""
    return 2 * ((model.representation_size or model.width) * model.num_classes + model.width * model.representation_size)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device could do at best, or None where it is not known."""
    found = gpu_of(device_name)
    return found.peak(precision) if found else None


def measured_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a large matrix product was measured to reach on a device, or None where that is not known."""
    found = gpu_of(device_name)
    return found.reached if found and precision == "bf16" else None
