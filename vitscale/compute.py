"""How a model is computed on this rank's device: which kernel attends, what is compiled, which products are in float8.

Where it stands: `engine.py` asks `prepare` before DeepSpeed sees the model. Parameters, their names and their fp32 masters stay what they
are, so checkpoints know nothing of this; but for float8, nothing that is learned changes beyond rounding.

The compiled unit is a block's forward pass, without the hooks that ZeRO-3 puts around it. All blocks share one graph: what they differ in
comes as arguments (`omissions.Path`), or they would be compiled one by one.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitscale.check import check_on_cpu
from vitscale.config import ConfigError, EngineConfig, ViTConfig
from vitscale.model import ViT

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}  # fmt: skip
FLOAT8_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_FORMS = 32  # compiled forms of a block: its training forms by what is left out of a batch, evaluation, and each again at other sizes

Capability = tuple[int, int]  # of a CUDA device: (9, 0) is Hopper


def prepare(model: ViT, config: EngineConfig, device: torch.device, *, micro_batch_size: int, attention: ExitStack) -> str:
    """Sets how `model` is computed, in place; returns what was chosen, in words. Raises ConfigError where this device cannot.

    Args:
        attention: holds the order of attention's backends, which is the process's; closing it gives back the one from before.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if capability is None:
        check_on_cpu(config)
    elif config.float8:
        check_float8(capability)
    how = config.compilation(capability is not None)
    order = attention_order(config.attention, capability, model.config.width // model.config.num_heads, dtype, _is_biased(model.config))
    attention.enter_context(sdpa_kernel([BACKENDS[name] for name in order], set_priority=True))
    words = [f"attention by {_attention_used(config.attention, order, model.config, device, dtype, micro_batch_size)}"]
    if config.float8:
        words.append(f"{to_float8(model)} linear layers of the inner blocks in float8")
    if how != "none":
        compile_blocks(model, graphs=how == "graphs")
        words.append("blocks compiled" + (" into CUDA graphs" if how == "graphs" else ""))
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------------------------


def attention_order(asked: str, capability: Capability | None, head_dim: int, dtype: torch.dtype, biased: bool) -> list[str]:
    """The backends to try, the best first: the one asked for, and those for shapes that it has no kernel for.

    cuDNN is 1.7 to 2.3 times Flash at training shapes on Hopper, and no faster on Ampere, Ada and workstation Blackwell (transformers pull
    request 48163; docs/performance.md). On B200 it is taken for having kernels of that architecture. Neither computes in
    fp32, or the gradient of a bias, which relative positions need; torch's own Flash takes heads up to 256, cuDNN's up to 128, in eights.

    Args:
        capability: of the CUDA device; None on a CPU, where torch has its own Flash and looks at no order.
    """
    if capability is None:
        order = ["flash", "math"]
    else:
        order = ["cudnn", "flash", "efficient", "math"] if capability[0] in (9, 10) else ["flash", "cudnn", "efficient", "math"]
        refused = set()
        if dtype == torch.float32 or biased or capability < (8, 0):
            refused = {"cudnn", "flash"}
        elif head_dim % 8 or head_dim > 128:
            refused = {"cudnn"} if head_dim <= 256 else {"cudnn", "flash"}
        order = [name for name in order if name not in refused]
    if asked == "auto":
        return order
    return ["math"] if asked == "math" else [asked, *(name for name in order if name != asked)]


def _attention_used(
    asked: str, order: Sequence[str], model: ViTConfig, device: torch.device, dtype: torch.dtype, micro_batch_size: int
) -> str:
    """The backend that torch takes at the shape of this run's blocks, as torch itself decides at every call."""
    B, N, H, d = micro_batch_size, model.num_train_tokens, model.num_heads, model.width // model.num_heads
    q_BHNd, k_BHNd, v_BHNd = torch.empty(B, N, 3, H, d, device=device, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4)
    bias_HNN = torch.empty(H, N, N, device=device, dtype=dtype, requires_grad=True) if _is_biased(model) else None
    chosen = torch._fused_sdp_choice(q_BHNd, k_BHNd, v_BHNd, bias_HNN)
    used = next(name for name, backend in BACKENDS.items() if backend.value == chosen)
    if asked not in ("auto", used):
        shape = f"(B, H, N, d) = ({B}, {H}, {N}, {d}) in {str(dtype).removeprefix('torch.')} on {device.type}"
        raise ConfigError(
            f"attention={asked} cannot compute {shape}{' with a bias' if _is_biased(model) else ''}: "
            f"{_why_not(asked, q_BHNd, k_BHNd, v_BHNd, bias_HNN)}; attention={used} can, and auto finds it"
        )
    return used


def _why_not(asked: str, q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, bias_HNN: Tensor | None) -> str:
    """Torch's own reasons."""
    can_use = getattr(torch.backends.cuda, f"can_use_{asked}_attention", None)
    if not q_BHNd.is_cuda or can_use is None:
        return f"a CPU has no {asked} kernel for it"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        can_use(torch.backends.cuda.SDPAParams(q_BHNd, k_BHNd, v_BHNd, bias_HNN, 0.0, False, False), debug=True)  # type: ignore[call-arg]
    return " ".join(str(warning.message).partition(" (Triggered")[0] for warning in told) or "torch does not say why"


def _is_biased(model: ViTConfig) -> bool:
    return model.position == "relative"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------------------------


def compile_blocks(model: ViT, *, graphs: bool = False, backend: str = "inductor") -> None:
    """Compiles the forward pass of each block; as attributes of modules compiled functions stay out of names and checkpoints.

    Recorded into `graphs`, a block's outputs lie in memory that the next micro-batch writes again. Autograd takes a gradient
    that nobody else holds as a parameter's `.grad` without a copy, and that outlives the micro-batch where gradients accumulate, so each is
    copied out first: 4 bytes a parameter of traffic in bf16. Nothing else of a block outlives its micro-batch.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _FORMS)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, mode="reduce-overhead" if graphs else None, backend=backend)
        if graphs:
            for parameter in filter(lambda parameter: parameter.requires_grad, block.parameters()):
                parameter.register_hook(torch.clone)  # type: ignore[no-untyped-call]


class Compiling:
    """Watches this process's compilations, which come with the first step, the first evaluation and each new size of a batch.

    Args:
        begins: called where one begins: a step then takes as long as no other does.
    """

    def __init__(self, begins: Callable[[], None]) -> None:
        from torch._dynamo.callback import callback_handler  # seconds to import, for those who compile

        self._begins, self._since, self._seconds = begins, 0.0, 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def news(self) -> list[str]:
        """What was compiled since the last call, in words."""
        seconds, self._seconds = self._seconds, 0.0
        return [f"compiled blocks in {seconds:.0f} s"] if seconds else []

    def close(self) -> None:
        """Ends the watch."""
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, *_: Any) -> None:
        self._since = time.perf_counter()
        self._begins()

    def _end(self, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._since


# ---------------------------------------------------------------------------------------------------------------------------------------
# float8
# ---------------------------------------------------------------------------------------------------------------------------------------


def check_float8(capability: Capability) -> None:
    """Raises ConfigError where a GPU has no float8 products."""
    if capability < (8, 9):
        here = f"one of compute capability {capability[0]}.{capability[1]}"
        raise ConfigError(
            f"float8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and this is {here}; leave it out"
        )


def to_float8(model: ViT, *, emulate: bool = False) -> int:
    """Has the linear layers of all blocks but the first and the last multiply in float8; returns how many.

    torchao's tensor-wise dynamic scaling (arXiv 2209.05433; torchao/float8): inputs, weights and gradients of each product are scaled by
    their largest number and rounded. Weights stay the same parameters. The first and last block, which are the most sensitive, patch
    embedding, attention pool and head stay as they are.

    Args:
        emulate: round as float8 does, but multiply in the precision of the weights, which any device can.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ConfigError("float8 needs torchao; pip install 'vitscale[float8]'") from None
    inner = model.blocks[1:-1]
    for block in inner:
        convert_to_float8_training(
            block, config=Float8LinearConfig(emulate=emulate),
            module_filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and name in FLOAT8_LAYERS,
        )  # fmt: skip
    return len(inner) * len(FLOAT8_LAYERS)
