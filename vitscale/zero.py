"""What DeepSpeed is told: the one place for its settings, which the engine hands over and plans read. Imports neither it nor torch.

One of them needs the model, too: `bucket_elements`.
"""

from typing import Any

from vitscale.config import EngineConfig

# Has stage 3 gather a block's weights at once, around what is compiled: its hooks at each layer would break the graph there
BLOCKS_ARE_LEAVES = {"classes": ["vitscale.model.Block"], "names": [], "name_suffixes": []}


def deepspeed_config(
    config: EngineConfig, grad_clip: float, micro_batch_size: int, grad_accum_steps: int, *, on_gpu: bool = False
) -> dict[str, Any]:
    """DeepSpeed's config from ours; `config.deepspeed` is merged over it, mapping by mapping."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    # DeepSpeed's 5e8 elements hold most of a ViT-H: a reduction would begin when backward is all but over, and take 1 or 2 GB. Megatron-LM
    # takes 4e7 (core/distributed, bucket_size)
    zero["reduce_bucket_size"] = 50_000_000
    # Reduces gradients where they lie: under stage 1 where `Gradients` has laid them. Stage 3 would keep a whole bucket allocated for
    # copying them together, and its reduce-scatter then copies them together in another order all the same
    if config.zero_stage in (1, 3):
        zero["contiguous_gradients"] = False
    if config.zero_stage == 2:
        # All-reduces the bucket in place. With it, DeepSpeed flattens the bucket once more and all-reduces that: no byte less is sent
        zero["reduce_scatter"] = False
        zero["overlap_comm"] = on_gpu  # reduces on a stream of its own while backward goes on; a CPU has no streams
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": grad_clip if config.zero_stage else 0.0,  # without ZeRO the engine clips, to know the norm
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's SGD is not on DeepSpeed's list; tests hold it to plain torch
        "steps_per_print": 2**31,
    }
    if config.zero_stage == 1:
        ours["gradient_allreduce_op"] = "sum"  # `Gradients` divides what it lays
    if config.zero_stage == 3 and config.compilation(on_gpu) == "blocks":
        ours["zero_optimization"]["leaf_module"] = BLOCKS_ARE_LEAVES
    if config.precision == "bf16":
        ours |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16" if config.zero_stage == 1 else "fp32"}}
    return _merge(ours, config.deepspeed)


def bucket_elements(zero: dict[str, Any], parameters: int) -> int:
    """Of gradients that are reduced at once: stage 2 allocates all of a bucket, and no more than the model can be in it."""
    return min(int(zero["reduce_bucket_size"]), parameters)


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in theirs.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged
