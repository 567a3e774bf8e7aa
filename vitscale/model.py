"""The Vision Transformer (arXiv 2010.11929, section 3.1) and its initialisation.

Knows nothing of ranks, files or clusters. Parameters bear timm's names (timm/models/vision_transformer.py), so that an export is the same
tensors. What the field's other ViTs have (DINOv2's, MAE's, CLIP's) are options, so that their weights can be taken up.

What training leaves out of a sample, whole branches and patches, is `omissions.py`'s to draw.

Axes: B batch, C channels, H height (of images) or heads (of attention), W width of images, N tokens, D width, d width of a head, K classes,
R samples that a branch computes.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from vitscale.config import Keeps, PreprocessConfig, ViTConfig
from vitscale.omissions import FULL_PATH, draw_omissions

aten = torch.ops.aten
# What activation checkpointing keeps under `products`: the outputs of matrix products and of every fused attention; the backend that spells
# attention out is made of products. Under ZeRO-3 DeepSpeed has a linear layer of its own, which adds its bias to the product in place:
# computed again it would be added twice to what was kept, so that sum is kept, too, and torch is told that what is kept may change.
PRODUCTS = [
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default,
    aten.add_.Tensor,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
]  # fmt: skip


class ViT(nn.Module):
    """Images to logits.

    Args:
        config: sizes and options; with `num_classes` 0 there is no head, and what it would see comes out.
        keeps: of what a block computes, the first being 0, for the backward pass: activation checkpointing (`EngineConfig.keeps`).
        image_sizes: that it takes beside `config.image_size`, with its position embeddings resampled to their grids.
    """

    pos_embed_fixed: Tensor

    def __init__(
        self, config: ViTConfig, keeps: Callable[[int], Keeps] = lambda block: "everything", image_sizes: Iterable[tuple[int, int]] = ()
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, image_sizes)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width))
        grid_h, grid_w = config.grid
        if config.position == "learned_1d":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_positions, config.width))
        elif config.position == "learned_2d":
            self.pos_embed_rows = nn.Parameter(torch.zeros(grid_h, config.width // 2))
            self.pos_embed_columns = nn.Parameter(torch.zeros(grid_w, config.width // 2))
        elif config.position == "sincos":
            self.register_buffer("pos_embed_fixed", sincos_2d(config.grid, config.width), persistent=False)
        self.pos_drop = nn.Dropout(config.dropout)
        self.norm_pre = nn.LayerNorm(config.width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, keeps(index)) for index in range(config.depth))
        self.norm = nn.Identity() if config.pool_norm else nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        if config.pool == "map":
            self.attn_pool = AttentionPool(config)
        self.fc_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps) if config.pool_norm else nn.Identity()
        if config.representation_size:
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(config.width, config.representation_size))
            self.pre_logits.add_module("tanh", nn.Tanh())
        self.head = nn.Linear(config.representation_size or config.width, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Logits (B, K) of normalised images.

        Args:
            sample_keys_B: int64, on the CPU; what is left out of each sample in training is drawn from its key.
        """
        return self.head(self.pool(self.tokens(images_BCHW, sample_keys_B)))  # type: ignore[no-any-return]

    def tokens(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) after the final norm, those that patch dropout keeps; a class token and registers come first."""
        height, width = images_BCHW.shape[-2:]
        shown = replace(self.config, image_size=(height, width))
        kept_BN, paths = None, [FULL_PATH] * self.config.depth
        if self.training and (self.config.drop_path_rate or self.config.patch_dropout):
            if sample_keys_B is None:
                raise ValueError(
                    "drop_path_rate and patch_dropout above 0 need sample_keys_B in training, so that they are the same under every split "
                    "of a batch"
                )
            kept_BN, paths = draw_omissions(shown, sample_keys_B, images_BCHW.device)
        x_BND = self._with_positions(self.patch_embed(images_BCHW), shown.grid)
        if kept_BN is not None:
            x_BND = x_BND.flatten(0, 1).index_select(0, kept_BN.flatten()).view(*kept_BN.shape, -1)
        x_BND = self.norm_pre(x_BND)
        for block, path in zip(self.blocks, paths, strict=True):
            x_BND = block(x_BND, *path)
        return self.norm(x_BND)  # type: ignore[no-any-return]

    def pool(self, x_BND: Tensor) -> Tensor:
        """What the head sees (B, D): the class token, mean or attention pool, through the representation layer where there is one."""
        patches_BND = x_BND[:, self.config.num_prefix_tokens :]
        if self.config.pool == "map":
            x_BD: Tensor = self.attn_pool(patches_BND)
        else:
            x_BD = x_BND[:, 0] if self.config.pool == "cls" else patches_BND.mean(dim=1)
        x_BD = self.fc_norm(x_BD)
        if self.config.representation_size:
            x_BD = self.pre_logits(x_BD)
        return x_BD

    def _with_positions(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        position = self.config.position
        if position == "learned_2d":
            x_BND = x_BND + grid_2d(resampled(self.pos_embed_rows, 0, grid[0]), resampled(self.pos_embed_columns, 0, grid[1]))
        elif position == "sincos":
            x_BND = x_BND + on_grid(self.pos_embed_fixed, self.config.grid, grid).to(x_BND.dtype)  # DeepSpeed leaves buffers in fp32
        if position == "learned_1d" and not self.config.class_position:
            x_BND = x_BND + on_grid(self.pos_embed, self.config.grid, grid)
        if self.config.class_token:
            x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        if position == "learned_1d" and self.config.class_position:  # the paper's: the class token has a position too
            x_BND = x_BND + on_grid(self.pos_embed, self.config.grid, grid)
        if self.config.registers:
            classes = int(self.config.class_token)
            x_BND = torch.cat([x_BND[:, :classes], self.reg_token.expand(x_BND.shape[0], -1, -1), x_BND[:, classes:]], dim=1)
        return self.pos_drop(x_BND)  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Patches, flattened and projected: a convolution whose stride is its kernel."""

    def __init__(self, config: ViTConfig, image_sizes: Iterable[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.image_size, self.image_sizes = config.image_size, {config.image_size, *image_sizes}
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size, bias=not config.pre_norm)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Patch tokens (B, N, D), row by row."""
        if tuple(images_BCHW.shape[-2:]) not in self.image_sizes:
            raise ValueError(
                f"images of {tuple(images_BCHW.shape[-2:])} pixels do not fit this model's image_size {self.image_size}; "
                "fine-tuning changes a model's image size"
            )
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch that stochastic depth may drop for a sample.

    Activation checkpointing is inside, so that a compiled block holds it too: the compiler then sees what is to be recomputed.
    """

    def __init__(self, config: ViTConfig, keeps: Keeps = "everything") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config) if config.layer_scale else nn.Identity()
        self.keeps = keeps

    def forward(self, x_BND: Tensor, rows_2R: Tensor | None = None, scales_2R: Tensor | None = None) -> Tensor:
        """Tokens to tokens (B, N, D); a `Path` says of which samples attention and MLP are computed."""
        if self.keeps == "everything" or not torch.is_grad_enabled():
            return self._branches(x_BND, rows_2R, scales_2R)
        if self.keeps == "nothing":
            return checkpoint(self._branches, x_BND, rows_2R, scales_2R, use_reentrant=False)  # type: ignore[no-any-return]
        contexts = functools.partial(create_selective_checkpoint_contexts, PRODUCTS, allow_cache_entry_mutation=True)
        return checkpoint(self._branches, x_BND, rows_2R, scales_2R, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    def _branches(self, x_BND: Tensor, rows_2R: Tensor | None, scales_2R: Tensor | None) -> Tensor:
        for branch, (norm, layer, scale) in enumerate(((self.norm1, self.attn, self.ls1), (self.norm2, self.mlp, self.ls2))):
            rows_R = None if rows_2R is None else rows_2R[branch]
            y_RND = scale(layer(norm(x_BND if rows_R is None else x_BND.index_select(0, rows_R))))
            if scales_2R is not None:
                y_RND = y_RND * scales_2R[branch].to(y_RND.dtype)[:, None, None]
            x_BND = x_BND + y_RND if rows_R is None else x_BND.index_add(0, rows_R, y_RND)
        return x_BND


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernels; queries and keys of each head may be normalised (arXiv 2302.05442)."""

    rel_pos_index_NN: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = (nn.LayerNorm(config.width // config.num_heads, eps=config.layer_norm_eps) for _ in range(2))
        self.proj = nn.Linear(config.width, config.width)
        self.proj_drop = nn.Dropout(config.dropout)
        self.relative = config.position == "relative"
        if self.relative:
            index_NN, num_offsets = relative_offsets(config.grid, class_token=config.class_token)
            self.rel_pos_bias = nn.Parameter(torch.zeros(num_offsets, config.num_heads))
            self.register_buffer("rel_pos_index_NN", index_NN, persistent=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens to tokens (B, N, D)."""
        B, N, D = x_BND.shape
        q_BHNd, k_BHNd, v_BHNd = self.qkv(x_BND).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        bias_HNN = self.rel_pos_bias[self.rel_pos_index_NN].permute(2, 0, 1) if self.relative else None
        if self.qk_norm:
            q_BHNd, k_BHNd = self.q_norm(q_BHNd), self.k_norm(k_BHNd)
        x_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attn_mask=bias_HNN)
        return self.proj_drop(self.proj(x_BHNd.transpose(1, 2).reshape(B, N, D)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor of each feature."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.width,), config.layer_scale))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens to tokens (B, N, D)."""
        return x_BND * self.gamma


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU (openai/CLIP, model.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """Two halves of the features, the first of which gates the second (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2M) to (..., M)."""
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def activation(config: ViTConfig) -> nn.Module:
    """What stands between the linear layers of an MLP."""
    if config.mlp == "swiglu":
        return SwiGLU()
    if config.activation == "quick_gelu":
        return QuickGELU()
    return nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")


class Mlp(nn.Module):
    """Two linear layers with an activation between them and dropout after each."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim * (2 if config.mlp == "swiglu" else 1))
        self.act = activation(config)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens to tokens (B, N, D)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x_BND)))))  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """MAP head of the scaling study (arXiv 2106.04560; big_vision models/vit.py): a learned query attends over all patches, then an MLP.

    `qk_norm` does not reach it, as in timm, whose AttentionPoolLatent gets no such option from VisionTransformer.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(replace(config, mlp="plain"))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens (B, N, D) to one feature vector an image (B, D)."""
        B, N, D = x_BND.shape
        q_BH1d = self.q(self.latent).view(1, 1, self.num_heads, -1).transpose(1, 2).expand(B, -1, -1, -1)
        k_BHNd, v_BHNd = self.kv(x_BND).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x_B1D = self.proj(F.scaled_dot_product_attention(q_BH1d, k_BHNd, v_BHNd).transpose(1, 2).reshape(B, 1, D))
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]  # type: ignore[no-any-return]


def normalize(images_BHWC: Tensor, preprocess: PreprocessConfig) -> Tensor:
    """The model's input (B, C, H, W), fp32, from pixels in [0, 255]."""
    images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    images_BCHW.div_(255)  # in place: on a CPU four large arrays cost more than loading the images
    for images_BHW, mean, std in zip(images_BCHW.unbind(1), preprocess.mean, preprocess.std, strict=True):
        images_BHW.sub_(mean).div_(std)  # by numbers and not by tensors: to send those to a device waits for it
    return images_BCHW


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


def on_grid(embeddings_1ND: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Embeddings of one grid on another, row by row; what comes before them, as a class token's, stays as it is.

    They are resampled as timm resamples them for fine-tuning (bicubic with antialias; `finetune.METHODS`), but as a part of the forward
    pass: what is learned on the other grid is learned by the embeddings of the model's own.
    """
    if old == new:
        return embeddings_1ND
    prefix = embeddings_1ND.shape[1] - old[0] * old[1]
    grid_1hwD = embeddings_1ND[:, prefix:].view(1, *old, -1)
    return torch.cat([embeddings_1ND[:, :prefix], resampled(resampled(grid_1hwD, 1, new[0]), 2, new[1]).flatten(1, 2)], dim=1)


def resampled(x: Tensor, axis: int, size: int) -> Tensor:
    """A tensor with `size` places along an axis in place of those it has; bicubic with antialias, computed in fp32."""
    if x.shape[axis] == size:
        return x
    moved: Tensor = torch.tensordot(resampling(x.shape[axis], size, x.device), x.float(), dims=([1], [axis]))
    return moved.movedim(0, axis).to(x.dtype)


@functools.lru_cache
def resampling(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix (new, old), fp32, that resamples `old` places in a row to `new`: what torch makes of each unit vector."""
    # Not as columns of width 1, which torch 2.13 resamples wrongly on a CPU
    return F.interpolate(torch.eye(old)[None, None], size=(new, old), mode="bicubic", antialias=True)[0, 0].to(device)


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
    elif name == "reg_token":
        value.normal_(0, 1e-6, generator=generator)  # dinov2/models/vision_transformer.py
    elif name.endswith(".gamma"):
        value.fill_(config.layer_scale)
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
        elif config.mlp == "swiglu" and name.startswith("blocks.") and name.endswith(".fc1.weight"):  # and so are the gate and its values
            fan_out //= 2
        bound = math.sqrt(6 / (fan_in + fan_out))
        value.uniform_(-bound, bound, generator=generator)
    elif not name.endswith(".bias"):
        raise ValueError(f"no initialisation is written for the parameter {name}")
    parameter.copy_(value)


def lecun_normal_(value: Tensor, generator: torch.Generator) -> None:
    """Truncated normal of variance 1 / fan-in, as jax.nn.initializers.lecun_normal."""
    deviation = math.sqrt(1 / value[0].numel()) / 0.87962566103423978  # the truncation at two deviations takes that much off
    nn.init.trunc_normal_(value, 0.0, deviation, -2 * deviation, 2 * deviation, generator=generator)
