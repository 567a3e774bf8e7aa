"""What can be said of a config without data or devices: settings that cannot work, each with what would.

Where it stands: `resolve.py` asks before a run starts, when nothing has been written yet.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from vitscale.config import ConfigError, EngineConfig, Phase, TrainConfig, ViTConfig, flatten, grad_accum_steps
from vitscale.timeline import parts_of

_LARGEST = 2**24  # of a model's sizes
_DEEPEST = 1024  # blocks
# Of DeepSpeed's settings those that the engine and plans reckon with, and the least that each may be
COUNTS = {
    "reduce_bucket_size": 1, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
}  # fmt: skip
# What DeepSpeed's config may not be given through `engine.deepspeed`, and what to do instead.
DEEPSPEED_OURS = {
    "zero_optimization.stage": "use --engine.zero-stage",
    "zero_optimization.offload_optimizer": "the optimizer's state stays on the devices",
    "zero_optimization.offload_param": "the weights stay on the devices",
    "zero_optimization.round_robin_gradients": "partitions lie in the order of parameters",
    "zero_optimization.compute_grad_norm": "the norm tells whether a step is left out",
    "train_batch_size": "use --global-batch-size",
    "train_micro_batch_size_per_gpu": "use --micro-batch-size",
    "gradient_accumulation_steps": "it follows from --global-batch-size and --micro-batch-size",
    "gradient_clipping": "use --optimizer.grad-clip",
    "gradient_allreduce_op": "gradients are averaged over ranks",
    "bf16": "use --engine.precision",
    "bfloat16": "use --engine.precision",
    "fp16": "use --engine.precision",
    "amp": "use --engine.precision",
    "torch_autocast": "use --engine.precision",
    "data_types": "use --engine.precision",
    "optimizer": "use --optimizer.name",
    "scheduler": "use --schedule.kind",
}


def check_config(config: TrainConfig, world_size: int) -> None:
    """Everything that can be said of a config without data or devices. Raises ConfigError."""
    check_model(config.model)
    _check_ranges(config)
    _check_holdout(config)
    if (config.epochs > 0) == (config.steps > 0):
        raise ConfigError(f"epochs={config.epochs:g} and steps={config.steps}: set exactly one above 0")
    _check_batch(config.global_batch_size, config.micro_batch_size, world_size, config.mix.is_on)
    _check_phases(config, world_size)
    check_engine(config.engine)
    zero = config.engine.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError("engine.deepspeed sets zero_optimization to something else than a mapping; use --engine.zero-stage")
    for name, least in COUNTS.items():
        for spelled in (name, name.removeprefix("stage3_")):  # DeepSpeed takes both
            value = zero.get(spelled, least)
            if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 or value < least:
                told = f"engine.deepspeed sets zero_optimization.{spelled}={value}"
                raise ConfigError(f"{told}, no whole number of at least {least}; 50000000 works")
    for name in flatten(config.engine.deepspeed):
        for ours, instead in DEEPSPEED_OURS.items():
            if f"{name}.".startswith(f"{ours}."):
                raise ConfigError(f"engine.deepspeed sets {name}, which vitscale sets itself; {instead}")
    _check_freeze(config)
    if config.optimizer.name == "muon" and config.model.mlp == "swiglu":
        raise ConfigError("optimizer.name=muon takes each weight for one matrix, and mlp=swiglu has two in one; adamw works")
    if config.objective.kind == "softmax" and config.model.head_bias:
        raise ConfigError(f"head_bias={config.model.head_bias:g} does nothing under softmax; set it to 0 or use --objective.kind sigmoid")


def check_schedule(config: TrainConfig, steps: int) -> None:
    """Warm-up and cool-down fit the run. Raises ConfigError."""
    if config.schedule.warmup_steps >= steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} leaves nothing of the run's {steps} steps; "
            f"--schedule.warmup-steps {steps // 10} works"
        )
    warmup, cooldown = config.schedule.warmup_steps, config.schedule.cooldown_steps
    if warmup + cooldown > steps:
        raise ConfigError(
            f"schedule.warmup_steps={warmup} and schedule.cooldown_steps={cooldown} take more than the run's {steps} steps; "
            f"--schedule.cooldown-steps {steps - warmup} works"
        )


def check_classes(config: TrainConfig, of_dataset: int) -> int:
    """The classes of a model that is trained on datasets of so many: the same, set or left open. Raises ConfigError."""
    classes = config.model.num_classes or of_dataset
    if classes != of_dataset:
        raise ConfigError(
            f"model.num_classes={classes} but {config.datasets[0]} has {of_dataset} classes; --model.num-classes {of_dataset} fits it"
        )
    return classes


def check_engine(engine: EngineConfig) -> None:
    """What cannot be computed anywhere; what a device cannot `compute.prepare` says itself. Raises ConfigError."""
    if engine.precision == "bf16" and engine.zero_stage == 0:
        raise ConfigError("precision=bf16 with zero_stage=0 has no fp32 sums of gradients; --engine.zero-stage 1 has")
    if engine.checkpoint_keeps != "nothing" and not engine.checkpoint_every_n_blocks:
        raise ConfigError(
            f"checkpoint_keeps={engine.checkpoint_keeps} does nothing with checkpoint_every_n_blocks=0; 1 checkpoints every block"
        )
    if engine.compile == "graphs" and engine.zero_stage == 3:
        raise ConfigError(
            "compile=graphs with zero_stage=3: a graph holds the addresses of weights, which stage 3 moves; zero_stage=1 works"
        )
    if engine.compile == "graphs" and engine.checkpoint_every_n_blocks:
        raise ConfigError(
            f"compile=graphs with checkpoint_every_n_blocks={engine.checkpoint_every_n_blocks}: micro-batches that gain by graphs need no "
            "checkpointing; 0 works, and so does compile=blocks"
        )
    if engine.float8 and engine.precision != "bf16":
        raise ConfigError(f"float8 with precision={engine.precision}: what is not in float8 is in bf16; --engine.precision bf16")
    if engine.float8 and engine.compile == "none":
        raise ConfigError("float8 with compile=none is several times slower than bf16; --engine.compile blocks")


def check_on_cpu(engine: EngineConfig) -> None:
    """What a machine without a GPU cannot compute. Raises ConfigError."""
    if engine.compile == "graphs":
        raise ConfigError("compile=graphs records CUDA graphs, and there is no GPU here; compile=blocks works on a CPU")
    if engine.float8:
        raise ConfigError("float8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and this is a CPU; leave it out")


def check_model(model: ViTConfig) -> None:
    """What a ViT needs to exist at all. Raises ConfigError."""
    for name in ("depth", "width", "mlp_dim", "num_heads", "patch_size"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name)} must be at least 1")
    if model.width % model.num_heads:
        fitting = [h for h in range(1, model.width + 1) if model.width % h == 0]
        nearest = min(fitting, key=lambda h: (abs(h - model.num_heads), h))
        raise ConfigError(f"model.width={model.width} is not a multiple of num_heads={model.num_heads}; num_heads={nearest} works")
    for side in model.image_size:
        if side < model.patch_size or side % model.patch_size:
            nearest = max(1, round(side / model.patch_size)) * model.patch_size
            raise ConfigError(
                f"model.image_size={model.image_size[0]}x{model.image_size[1]}: {side} is not a multiple of "
                f"patch_size={model.patch_size}; {nearest} is"
            )
    if model.position in ("learned_2d", "sincos") and model.width % 4:
        raise ConfigError(f"model.width={model.width} must be a multiple of 4 for position={model.position}; {-(-model.width // 4) * 4} is")
    for name in ("dropout", "drop_path_rate", "patch_dropout"):
        if not 0 <= getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name):g} must lie in [0, 1)")
    if model.patch_dropout and model.position == "relative":
        raise ConfigError(
            f"model.patch_dropout={model.patch_dropout:g} leaves each image patches of its own, for which position=relative would need a "
            "bias table an image; learned_1d, learned_2d, sincos and none work"
        )
    if model.registers and model.position == "relative":
        raise ConfigError(
            f"model.registers={model.registers} have no place in the bias table of position=relative; learned_1d, learned_2d, sincos and "
            "none work"
        )
    if model.mlp == "swiglu" and model.activation != "gelu":
        raise ConfigError(f"model.activation={model.activation} means nothing under mlp=swiglu, whose gate is SiLU; leave it out")
    if not (math.isfinite(model.layer_scale) and model.layer_scale >= 0):
        raise ConfigError(f"model.layer_scale={model.layer_scale:g} must be at least 0; 0 has none, 1e-5 is DINOv2's")
    for name in ("num_classes", "representation_size", "registers"):
        if getattr(model, name) < 0:
            raise ConfigError(f"model.{name}={getattr(model, name)} must be at least 0")


def check_bounds(model: ViTConfig) -> None:
    """Raises ValueError on a model, read from a file, that nobody could build, before anybody tries."""
    if model.depth > _DEEPEST:
        raise ValueError(f"model.depth is {model.depth}, and no model has more than {_DEEPEST} blocks")
    if not 0 < model.layer_norm_eps < 1:
        raise ValueError(f"model.layer_norm_eps is {model.layer_norm_eps}, and must lie in (0, 1)")
    for name, value in flatten(dataclasses.asdict(model)).items():
        if any(isinstance(number, int) and number > _LARGEST for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"model.{name} is {value!r:.50}, and nothing in a model is above {_LARGEST}")


def _check_freeze(config: TrainConfig) -> None:
    """Something is left to train, and to be updated as asked. Raises ConfigError."""
    optimizer, depth = config.optimizer, config.model.depth
    if optimizer.freeze_blocks > depth:
        raise ConfigError(f"optimizer.freeze_blocks={optimizer.freeze_blocks} of the model's {depth} blocks; {depth} freezes all of them")
    if optimizer.name == "muon" and (optimizer.freeze == "backbone" or optimizer.freeze_blocks == depth):
        raise ConfigError("optimizer.name=muon updates the blocks' matrices, and all of them are frozen; adamw and sgd update the head")
    if optimizer.freeze == "backbone" and not config.init:
        raise ConfigError("optimizer.freeze=backbone would train a head on a random backbone; --init CHECKPOINT gives it one")


def _check_holdout(config: TrainConfig) -> None:
    """A part of one dataset can be held out, in place of another. Raises ConfigError."""
    if config.holdout and len(config.datasets) > 1:
        raise ConfigError(
            f"holdout={config.holdout:g} holds out a part of one dataset, and --data names {len(config.datasets)}; --eval-data works"
        )
    if config.holdout and config.eval_data not in ("", "none", *config.datasets):
        raise ConfigError(
            f"holdout={config.holdout:g} evaluates on a part of the training split, and eval_data={config.eval_data} on something else; "
            "leave one out"
        )


def _check_batch(global_batch_size: int, micro_batch_size: int, world_size: int, mixes: bool) -> None:
    """A step's images divide into micro-batches, which have pairs where they are mixed. Raises ConfigError."""
    grad_accum_steps(global_batch_size, micro_batch_size, world_size)
    if mixes and micro_batch_size % 2:
        unit = 2 * world_size
        even = [m for m in range(2, micro_batch_size + 2, 2) if global_batch_size % (m * world_size) == 0]
        works = f"micro_batch_size={even[-1]}" if even else f"global_batch_size={-(-global_batch_size // unit) * unit} with 2"
        raise ConfigError(f"micro_batch_size={micro_batch_size} must be even for mixup and CutMix, which mix pairs in it; {works} works")


def check_phase_ends(phases: Sequence[Phase]) -> None:
    """Each ends after the one before it, and before the run does, and has batches. Raises ConfigError."""
    before = 0.0
    for number, phase in enumerate(phases, start=1):
        named = f"schedule.phases: the {number}. of {len(phases)}, up to {phase.until:g} of the samples"
        for size in ("global_batch_size", "micro_batch_size"):
            if (value := getattr(phase, size)) is not None and value < 1:
                raise ConfigError(f"{named}, has {size}={value}, which must be at least 1")
        if not before < phase.until < 1:
            raise ConfigError(f"{named}, must end between {before:g}, where it begins, and 1; {(before + 1) / 2:g} works")
        before = phase.until


def _check_phases(config: TrainConfig, world_size: int) -> None:
    """Each phase is a part of the run that could be one by itself. Raises ConfigError."""
    check_phase_ends(config.schedule.phases)
    parts = parts_of(config)
    for number, (phase, part) in enumerate(zip(config.schedule.phases, parts, strict=False), start=1):
        named = f"schedule.phases: the {number}. of {len(config.schedule.phases)}, up to {phase.until:g} of the samples"
        if min(part.global_batch_size, part.micro_batch_size) < 1:
            raise ConfigError(
                f"{named}: global_batch_size={part.global_batch_size} and micro_batch_size={part.micro_batch_size} must be at least 1"
            )
        if part[1:] == parts[number][1:]:
            raise ConfigError(f"{named}, has the settings of what comes after it; leave it out")
        if part.image_size != config.model.image_size and config.model.position == "relative":
            raise ConfigError(f"{named}: image_size cannot change under position=relative; learned_1d, learned_2d, sincos and none can")
        try:
            check_model(dataclasses.replace(config.model, image_size=part.image_size))
            _check_batch(part.global_batch_size, part.micro_batch_size, world_size, config.mix.is_on)
        except ConfigError as error:
            raise ConfigError(f"{named}: {error}") from None


def _check_ranges(config: TrainConfig) -> None:
    least = {
        "global_batch_size": 1, "micro_batch_size": 1, "log_every": 1, "eval_every": 0, "checkpoint_every": 1, "keep_checkpoints": 0,
        "keep_every": 0, "guard.max_nonfinite": 0,
        "guard.spike_deviations": 0, "guard.spike_window": 8, "guard.spike_steps": 1, "guard.max_rollbacks": 0, "guard.compare_every": 0,
        "guard.hang_seconds": 0, "guard.max_restarts": 0, "profile.steps": 0, "profile.first_step": 0,
        "epochs": 0, "steps": 0, "seed": 0, "stream.lanes": 0, "stream.window": 0, "stream.workers": 0, "stream.prefetch": 1,
        "stream.buffer_bytes": 0, "stream.read_threads": 1, "stream.read_timeout": 1, "stream.max_unusable": 0,
        "stream.max_unusable_per_shard": 0, "optimizer.peak_lr": 0, "optimizer.freeze_blocks": 0,
        "optimizer.weight_decay": 0, "optimizer.grad_clip": 0, "schedule.warmup_steps": 0,
        "schedule.cooldown_steps": 0, "schedule.end_lr": 0, "schedule.timescale": 1, "engine.checkpoint_every_n_blocks": 0,
        "mix.mixup_alpha": 0, "mix.cutmix_alpha": 0, "preprocess.randaugment_layers": 0,
    }  # fmt: skip
    for name, low in least.items():
        value = _lookup(config, name)
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"{name}={value:g} must be a number of at least {low}")
    if config.data_weights and len(config.data_weights) != len(config.datasets):
        raise ConfigError(
            f"data_weights={_listed(config.data_weights)} for {len(config.datasets)} datasets; "
            "give each one weight, or none to take each by its samples"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in config.data_weights):
        raise ConfigError(f"data_weights={_listed(config.data_weights)} must all be above 0; leave out a dataset that is not wanted")
    if config.profile.first_step == 1:
        raise ConfigError("profile.first_step=1 has no step before it to warm up; 2 has")
    if config.seed >= 2**63:
        raise ConfigError(f"seed={config.seed} must be below 2**63")
    for name in ("optimizer.eps", "model.layer_norm_eps"):
        if not 0 < _lookup(config, name) < 1:
            raise ConfigError(f"{name}={_lookup(config, name):g} must lie in (0, 1)")
    if not 0 < config.optimizer.layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay={config.optimizer.layer_decay:g} must lie in (0, 1]; 1 is none")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas={config.optimizer.betas} must both lie in [0, 1), as 0.9 0.999 do")
    for name, high in (("preprocess.flip", 1), ("mix.prob", 1), ("mix.switch_prob", 1), ("preprocess.randaugment_magnitude", 30)):
        if not 0 <= _lookup(config, name) <= high:
            raise ConfigError(f"{name}={_lookup(config, name):g} must lie in [0, {high}]")
    for name in ("holdout", "objective.label_smoothing", "optimizer.average_decay", "optimizer.momentum"):
        if not 0 <= _lookup(config, name) < 1:
            raise ConfigError(f"{name}={_lookup(config, name):g} must lie in [0, 1)")
    for name, most in (("crop_scale", 1.0), ("crop_ratio", 1000.0)):
        low_end, high_end = getattr(config.preprocess, name)
        if not 0 < low_end <= high_end <= most:
            rule = "0 < low <= high <= 1, as 0.05 1.0 does" if name == "crop_scale" else "0 < low <= high <= 1000, as 0.75 1.3333 does"
            raise ConfigError(f"preprocess.{name}=({low_end:g}, {high_end:g}) must satisfy {rule}")
    if problem := crop_problem(config.preprocess.eval_crop, "preprocess.eval_crop"):
        raise ConfigError(problem)
    for name in ("lanes", "window"):
        if getattr(config.stream, name) > 2**40:
            raise ConfigError(f"stream.{name}={getattr(config.stream, name)} must be at most 2**40")
    if config.preprocess.eval_protocol == "paper" and config.preprocess.eval_crop != 1:
        raise ConfigError(
            f"preprocess.eval_crop={config.preprocess.eval_crop:g} means nothing under eval_protocol=paper, which shows the whole image; "
            "--preprocess.eval-crop 1 says so"
        )
    if min(config.preprocess.std) <= 0:
        raise ConfigError(f"preprocess.std={config.preprocess.std} must be above 0")


def crop_problem(crop: float, name: str) -> str:
    """Why an `eval_crop`, given by this name, cannot be; empty where it can."""
    return "" if 0.1 <= crop <= 1 else f"{name}={crop:g} must lie in [0.1, 1]; 0.875 is usual, 1 is the whole image"


def _listed(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _lookup(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config
