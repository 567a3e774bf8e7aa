"""The Vision Transformer (arXiv 2010.11929, section 3.1) and its initialisation.

Knows nothing of ranks, files or clusters. Parameters bear timm's names (timm/models/vision_transformer.py), so that an export is the same
tensors. The forms that the field's other ViTs have (LayerScale, registers, SwiGLU, QK norm) would be options of `Block` and `Attention`.

Axes: B batch, C channels, H height (of images) or heads (of attention), W width of images, N tokens, D width, d width of a head, K classes.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale.config import PreprocessConfig, ViTConfig


class ViT(nn.Module):
    """Images to logits.

    Args:
        config: sizes and options; with `num_classes` 0 there is no head, and what it would see comes out.
        checkpoint_every_n_blocks: activation checkpointing; 0 none, 1 every block, n every n-th block.
    """

    pos_embed_fixed: Tensor

    def __init__(self, config: ViTConfig, checkpoint_every_n_blocks: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every_n_blocks = checkpoint_every_n_blocks
        self.patch_embed = PatchEmbed(config)
        if config.pool == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        grid_h, grid_w = config.grid
        if config.position == "learned_1d":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.width))
        elif config.position == "learned_2d":
            self.pos_embed_rows = nn.Parameter(torch.zeros(grid_h, config.width // 2))
            self.pos_embed_columns = nn.Parameter(torch.zeros(grid_w, config.width // 2))
        elif config.position == "sincos":
            self.register_buffer("pos_embed_fixed", sincos_2d(config.grid, config.width), persistent=False)
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, drop_path_rate=config.drop_path_rate * index / max(1, config.depth - 1), index=index)
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        if config.pool == "map":
            self.attn_pool = AttentionPool(config)
        if config.representation_size:
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(config.width, config.representation_size))
            self.pre_logits.add_module("tanh", nn.Tanh())
        self.head = nn.Linear(config.representation_size or config.width, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Logits (B, K) of normalised images. `sample_keys_B` (int64) seeds stochastic depth, and is needed where that is on."""
        return self.head(self.pool(self.tokens(images_BCHW, sample_keys_B)))  # type: ignore[no-any-return]

    def tokens(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) after the final norm; a class token comes first."""
        x_BND = self._with_positions(self.patch_embed(images_BCHW))
        for index, block in enumerate(self.blocks):
            every = self.checkpoint_every_n_blocks
            if every and index % every == 0 and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, sample_keys_B, use_reentrant=False)
            else:
                x_BND = block(x_BND, sample_keys_B)
        return self.norm(x_BND)  # type: ignore[no-any-return]

    def pool(self, x_BND: Tensor) -> Tensor:
        """What the head sees (B, D): the class token, mean or attention pool, through the representation layer where there is one."""
        if self.config.pool == "map":
            x_BD: Tensor = self.attn_pool(x_BND)
        else:
            x_BD = x_BND[:, 0] if self.config.pool == "cls" else x_BND.mean(dim=1)
        if self.config.representation_size:
            x_BD = self.pre_logits(x_BD)
        return x_BD

    def _with_positions(self, x_BND: Tensor) -> Tensor:
        position = self.config.position
        if position == "learned_2d":
            x_BND = x_BND + grid_2d(self.pos_embed_rows, self.pos_embed_columns)
        elif position == "sincos":
            x_BND = x_BND + self.pos_embed_fixed
        if self.config.pool == "cls":
            x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        if position == "learned_1d":  # the paper's: the class token has a position too
            x_BND = x_BND + self.pos_embed
        return self.pos_drop(x_BND)  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Patches, flattened and projected: a convolution whose stride is its kernel."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Patch tokens (B, N, D), row by row."""
        if tuple(images_BCHW.shape[-2:]) != self.image_size:
            raise ValueError(
                f"images of {tuple(images_BCHW.shape[-2:])} pixels do not fit this model's image_size {self.image_size}; "
                "fine-tuning changes a model's image size"
            )
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch that stochastic depth may drop for a sample."""

    def __init__(self, config: ViTConfig, drop_path_rate: float, index: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.drop_path_rate = drop_path_rate
        self.index = index

    def forward(self, x_BND: Tensor, sample_keys_B: Tensor | None) -> Tensor:
        """Tokens to tokens (B, N, D)."""
        x_BND = x_BND + self._drop_path(self.attn(self.norm1(x_BND)), sample_keys_B, branch=0)
        return x_BND + self._drop_path(self.mlp(self.norm2(x_BND)), sample_keys_B, branch=1)

    def _drop_path(self, x_BND: Tensor, sample_keys_B: Tensor | None, branch: int) -> Tensor:
        if not self.training or self.drop_path_rate == 0:
            return x_BND
        if sample_keys_B is None:
            raise ValueError("drop_path_rate above 0 needs sample_keys_B in training, so that it is the same under every split of a batch")
        keep_B = keyed_uniform(sample_keys_B, 2 * self.index + branch) >= self.drop_path_rate
        return x_BND * (keep_B.to(x_BND.dtype) / (1 - self.drop_path_rate))[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernels."""

    rel_pos_index_NN: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.proj_drop = nn.Dropout(config.dropout)
        self.relative = config.position == "relative"
        if self.relative:
            index_NN, num_offsets = relative_offsets(config.grid, class_token=config.pool == "cls")
            self.rel_pos_bias = nn.Parameter(torch.zeros(num_offsets, config.num_heads))
            self.register_buffer("rel_pos_index_NN", index_NN, persistent=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens to tokens (B, N, D)."""
        B, N, D = x_BND.shape
        q_BHNd, k_BHNd, v_BHNd = self.qkv(x_BND).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        bias_HNN = self.rel_pos_bias[self.rel_pos_index_NN].permute(2, 0, 1) if self.relative else None
        x_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attn_mask=bias_HNN)
        return self.proj_drop(self.proj(x_BHNd.transpose(1, 2).reshape(B, N, D)))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with GELU between them and dropout after each."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.act = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.fc2 = nn.Linear(config.mlp_dim, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens to tokens (B, N, D)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x_BND)))))  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """MAP head of the scaling study (arXiv 2106.04560; big_vision models/vit.py): a learned query attends over all tokens, then an MLP."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens (B, N, D) to one feature vector an image (B, D)."""
        B, N, D = x_BND.shape
        q_BH1d = self.q(self.latent).view(1, 1, self.num_heads, -1).transpose(1, 2).expand(B, -1, -1, -1)
        k_BHNd, v_BHNd = self.kv(x_BND).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x_B1D = self.proj(F.scaled_dot_product_attention(q_BH1d, k_BHNd, v_BHNd).transpose(1, 2).reshape(B, 1, D))
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]  # type: ignore[no-any-return]


def normalize(images_BHWC: Tensor, preprocess: PreprocessConfig) -> Tensor:
    """The model's input (B, C, H, W), fp32, from pixels in [0, 255]."""
    mean_C11, std_C11 = (torch.tensor(v, device=images_BHWC.device)[:, None, None] for v in (preprocess.mean, preprocess.std))
    images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images_BCHW.div_(255).sub_(mean_C11).div_(std_C11)  # in place: on a CPU four large arrays cost more than loading the images


# ---------------------------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------------------------


def sincos_2d(grid: tuple[int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed embeddings (1, N, D) as big_vision's `posemb_sincos_2d`: sin and cos of x, then of y, a quarter of the width each."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    omega = temperature ** -(torch.arange(width // 4, dtype=torch.float64) / max(1, width // 4 - 1))
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()


def grid_2d(rows: Tensor, columns: Tensor) -> Tensor:
    """Embeddings (1, N, D) of a grid: those of its rows (h, D/2) and columns (w, D/2), concatenated (appendix D.4)."""
    h, w = rows.shape[0], columns.shape[0]
    return torch.cat([rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], dim=-1).flatten(0, 1)[None]


def relative_offsets(grid: tuple[int, int], class_token: bool) -> tuple[Tensor, int]:
    """For each pair of tokens (N, N) the row of the bias table that their offset has, and the number of rows.

    The table has a row for each offset (down, across) between patches, (2h-1)(2w-1) of them, and with a class token three more: from it, to
    it, and to itself (BEiT, arXiv 2106.08254). The paper's own form in appendix D.4 makes the bias depend on the query as well.
    """
    h, w = grid
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    index = (y[:, None] - y[None] + h - 1) * (2 * w - 1) + (x[:, None] - x[None] + w - 1)
    offsets = (2 * h - 1) * (2 * w - 1)
    if not class_token:
        return index, offsets
    index = F.pad(index, (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index, offsets + 3


# ---------------------------------------------------------------------------------------------------------------------------------------
# Initialisation: keyed by name, so the same under every ZeRO stage and world size
# ---------------------------------------------------------------------------------------------------------------------------------------


def parameter_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name, without making any."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in ViT(config).named_parameters()}


@torch.no_grad()
def initialize(model: ViT, seed: int) -> None:
    """The initialisation of google-research/vision_transformer (models_vit.py), each parameter drawn from its own generator."""
    for name, parameter in model.named_parameters():
        initialize_parameter(name, parameter, seed, model.config)


@torch.no_grad()
def initialize_parameter(name: str, parameter: Tensor, seed: int, config: ViTConfig) -> None:
    """Fills one parameter in place, by its name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    value = torch.zeros(parameter.shape)  # on the CPU, so that the numbers do not depend on the device
    if name in ("head.weight", "cls_token"):
        pass
    elif name == "head.bias":
        value.fill_(config.head_bias)
    elif name.startswith("pos_embed"):
        value.normal_(0, 0.02, generator=generator)
    elif name in ("patch_embed.proj.weight", "pre_logits.fc.weight"):
        lecun_normal_(value, generator)
    elif name.endswith("rel_pos_bias"):
        value.normal_(0, 0.02, generator=generator)
    elif name == "attn_pool.latent":  # Flax's Xavier of shape (1, 1, D) has fan-in 1 and fan-out D
        value.uniform_(-math.sqrt(6 / (1 + config.width)), math.sqrt(6 / (1 + config.width)), generator=generator)
    elif "norm" in name:
        value.fill_(1.0 if name.endswith("weight") else 0.0)
    elif name.endswith((".fc1.bias", ".fc2.bias")):
        value.normal_(0, 1e-6, generator=generator)
    elif name.endswith(".weight"):
        fan_out, fan_in = value.shape
        if name.endswith((".qkv.weight", ".kv.weight")):  # q, k and v are separate D x D kernels, though stored as one
            fan_out = fan_in
        bound = math.sqrt(6 / (fan_in + fan_out))
        value.uniform_(-bound, bound, generator=generator)
    elif not name.endswith(".bias"):
        raise ValueError(f"no initialisation is written for the parameter {name}")
    parameter.copy_(value)


def lecun_normal_(value: Tensor, generator: torch.Generator) -> None:
    """Truncated normal of variance 1 / fan-in, as jax.nn.initializers.lecun_normal."""
    deviation = math.sqrt(1 / value[0].numel()) / 0.87962566103423978  # the truncation at two deviations takes that much off
    nn.init.trunc_normal_(value, 0.0, deviation, -2 * deviation, 2 * deviation, generator=generator)


def keyed_uniform(keys_B: Tensor, draw: int) -> Tensor:
    """The draw-th number in [0, 1) of each key (int64), in float32: SplitMix64's finaliser in two's-complement arithmetic.

    Another sequence than `keyed.uniform` draws from the same key, so what the model draws never meets what the stream draws.
    """
    x = keys_B + _signed((draw + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift_right(x ^ _shift_right(x, 31), 40).float() * 2.0**-24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: torch's own fills with the sign


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
