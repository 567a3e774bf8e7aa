"""The configuration of a run: one frozen dataclass a part, made into command-line flags by tyro.

Imports no torch, numpy or pyarrow, so that `--help` and every check of a config answer at once. A part of the program receives its
own config and never the whole; `TrainConfig` is what RUN/config.json holds, and enough to repeat the run.

`check_config` is the one place where a config is judged, before any process starts: each message gives the value, the rule and a value
that would work.
"""

import dataclasses
import json
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from data_tools.config import BYTES, MAYBE_BYTES
from data_tools.errors import UserError

Decode = Literal["exact", "fast"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Keeps = Literal["everything", "products", "nothing"]  # of what a block computes, until the backward pass
Compilation = Literal["none", "blocks", "graphs"]
# By whose code position embeddings go to a new grid: bicubic with antialias, bicubic, bilinear, or bilinear with corners aligned.
PositionInterpolation = Literal["timm", "deit", "timm_npz", "paper"]
# How a file of weights names and lays out its tensors (`formats.py`); timm's names are ours
Format = Literal[
    "timm", "dinov2", "open_clip", "hf_vit", "hf_vit_mae", "hf_dinov2", "hf_siglip", "hf_clip",
    "big_vision", "big_vision_scan", "vision_transformer",
]  # fmt: skip
Library = Literal["timm", "hf", "npz", "safetensors"]  # that an export is for; the last is plain torch
# Whose evaluation preprocessing: what timm does, big_vision, or the paper's code.
EvalProtocol = Literal["timm", "big_vision", "paper"]
# What a checkpoint's features are judged by (`probes.py`), and what finds the linear head
ProbeProtocol = Literal["fewshot", "linear", "knn"]
Solver = Literal["ridge", "lbfgs", "sgd"]
SOLVER_SETTING: dict[Solver, str] = {"ridge": "lambda", "lbfgs": "L2 penalty", "sgd": "learning rate"}  # what each has a grid of
SHOTS = (1, 5, 10, 25)  # big_vision's, as is how often they are drawn
SEEDS = 3


class ConfigError(UserError):
    """A setting that cannot work; the message is one line for the user."""


# What reading JSON that a stranger may have written raises, `from_dict` included
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ConfigError)


def _parse_mapping(words: list[str]) -> dict[str, Any]:
    value = json.loads(words[0])
    if not isinstance(value, dict):
        raise ValueError(f"{words[0]} is not a JSON object")
    return value


_PATHS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="DATASET...",
    instance_from_str=lambda words: words[0] if len(words) == 1 else tuple(words),
    is_instance=lambda value: isinstance(value, str | tuple),
    str_from_instance=lambda value: [value] if isinstance(value, str) else list(value),
)
_JSON = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=_parse_mapping,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer (arXiv 2010.11929, section 3.1)."""

    depth: int = 12
    """Transformer blocks."""
    width: int = 768
    """Features of a token (D)."""
    mlp_dim: int = 3072
    """Hidden features of the MLP."""
    num_heads: int = 12
    patch_size: int = 16
    """Pixels a side."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels; both multiples of the patch size."""
    num_classes: int = 0
    """Outputs of the head; 0 takes the dataset's number."""
    pool: Literal["cls", "mean", "map", "mean_with_cls"] = "cls"
    """What the head sees: a class token, the mean of the patch tokens, or attention pooling, the last two without a class token; or the
    mean of the patch tokens beside a class token, as MAE is fine-tuned."""
    position: Literal["learned_1d", "learned_2d", "relative", "sincos", "none"] = "learned_1d"
    """Position embeddings (the paper's appendix D.4 compares them)."""
    class_position: bool = True
    """Whether the class token has a learned_1d position, as in the paper; not in big_vision."""
    registers: int = 0
    """Tokens without a position behind the class token, which no head sees (arXiv 2309.16588)."""
    representation_size: int = 0
    """Width of the tanh layer before the head in pre-training; 0 leaves it out."""
    dropout: float = 0.0
    """After the position embeddings, both MLP layers and the attention output."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
    patch_dropout: float = 0.0
    """Share of a training image's patches that the model is not shown (arXiv 2208.07220); not with relative positions."""
    qk_norm: bool = False
    """LayerNorm over each head's queries and keys (arXiv 2302.05442)."""
    layer_scale: float = 0.0
    """What a learned factor of each feature of each branch starts from: LayerScale (arXiv 2103.17239); 0 has none."""
    mlp: Literal["plain", "swiglu"] = "plain"
    """Two linear layers, or a gated one and a linear one with mlp_dim features between (arXiv 2002.05202; DINOv2's giant)."""
    activation: Activation = "gelu"
    """erf GELU, the tanh form that Flax uses, or CLIP's x sigmoid(1.702 x); the gate of swiglu is always SiLU."""
    pre_norm: bool = False
    """LayerNorm before the first block, and patches without a bias: CLIP's."""
    pool_norm: bool = False
    """The last LayerNorm sees what was pooled, not the tokens: MAE's fine-tuning, timm's fc_norm."""
    layer_norm_eps: float = 1e-6
    head_bias: float = 0.0
    """What the head's biases start from: -10 for summed sigmoid over many classes."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens in a sequence, class token and registers among them."""
        return self.grid[0] * self.grid[1] + self.num_prefix_tokens

    @property
    def class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self.pool in ("cls", "mean_with_cls")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches: class token and registers."""
        return self.class_token + self.registers

    @property
    def num_positions(self) -> int:
        """Tokens that have a learned_1d position."""
        return self.grid[0] * self.grid[1] + (self.class_token and self.class_position)

    @property
    def num_train_tokens(self) -> int:
        """Those of a training image: patch dropout keeps a fixed number of patches, at least one, and what comes before them."""
        return max(1, int(self.grid[0] * self.grid[1] * (1 - self.patch_dropout))) + self.num_prefix_tokens

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Stochastic depth of each block."""
        return tuple(self.drop_path_rate * index / max(1, self.depth - 1) for index in range(self.depth))


@dataclass(frozen=True)
class ViewConfig:
    """What of an image the model sees."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Antialiased, as Pillow does it."""
    crop_scale: tuple[float, float] = (0.05, 1.0)
    """Share of the image's area in a random training crop; (1, 1) turns random crops off: the whole image, resized."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random training crop."""
    flip: float = 0.5
    """Chance of a mirrored training image."""
    randaugment_layers: int = 0
    """Operations of RandAugment on a training image after crop and flip (arXiv 1909.13719; big_vision's list); 0 turns it off."""
    randaugment_magnitude: float = 10.0
    """How strong they are: recipes of the field have 0 (not nothing) to 20."""
    eval_crop: float = 0.875
    """Side of the central evaluation crop over the side the image is resized to; 1 resizes the image to the model's size, squashed."""
    eval_protocol: EvalProtocol = "timm"
    """Whose evaluation, to the pixel: timm's as said above, big_vision's (area, no antialias, never squashed) or the paper's code
    (the whole image, bilinear without antialias); docs/stream.md, "Evaluation"."""


@dataclass(frozen=True)
class PreprocessConfig(ViewConfig):
    """What turns image bytes into the model's input; an export carries it."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of each channel of pixels in [0, 1]; 0.5 with a deviation of 0.5 is the paper's range [-1, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class StreamConfig:
    """How batches are drawn; the order of samples is docs/design.md's, "The clock and the order of samples"."""

    lanes: int = 0
    """Lanes of the order, fixed when a run starts; 0 chooses by the size of the dataset. Any number works; with multiples of
    twice the ranks that divide the global batch each rank reads its own windows alone."""
    window: int = 0
    """Samples shuffled together in a lane, fixed when a run starts; 0 chooses by the size of the dataset."""
    workers: int = 0
    """Workers a rank that decode; 0 takes the cores there are, at most 8."""
    processes: bool = False
    """Whether workers are processes; threads do as well up to some thousand images a second a rank, and start at once."""
    prefetch: int = 4
    """Micro-batches a rank that are prepared ahead."""
    reads: Literal["auto", "windows", "samples"] = "auto"
    """Whole windows of a lane in one read, or each sample by itself; auto takes windows where a rank has lanes and room for them."""
    buffer_bytes: Annotated[int, BYTES] = 2**30
    """Bytes of windows that a rank may hold: 500MB, 4GiB."""
    read_threads: int = 16
    """Reads of windows, or of samples in object storage, that a rank has under way at once."""
    read_timeout: float = 300.0
    """Seconds without a micro-batch after which a run ends, telling what it waits for."""
    decode: Decode = "exact"
    """How training images are decoded: exact gives Pillow's pixels; fast decodes a JPEG at 1/2, 1/4 or 1/8 where the crop has that many
    times the pixels that the model sees. Fixed when a run starts; evaluation is always exact."""
    max_unusable: int = 1000
    """Unusable samples that a run may replace, counted once each over all ranks and starts; more stop it."""
    max_unusable_per_shard: int = 100
    """The same of any one shard."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax cross-entropy, or sigmoid cross-entropy summed over the classes (several labels an image)."""
    label_smoothing: float = 0.0
    soft_targets: bool = False
    """Let the labels' scores weigh the targets; otherwise each label counts as 1."""


@dataclass(frozen=True)
class MixConfig:
    """Mixing of the training samples at positions 2j and 2j+1, images and targets (docs/stream.md, "Augmentation"); evaluation has none."""

    mixup_alpha: float = 0.0
    """mixup (arXiv 1710.09412) with lambda from Beta(alpha, alpha); 0 turns it off."""
    cutmix_alpha: float = 0.0
    """CutMix (arXiv 1905.04899), likewise."""
    prob: float = 1.0
    """Chance that a pair is mixed at all."""
    switch_prob: float = 0.5
    """Chance of CutMix for a mixed pair where both are on."""

    @property
    def is_on(self) -> bool:
        """Whether any pair is mixed."""
        return self.prob > 0 and max(self.mixup_alpha, self.cutmix_alpha) > 0

    @property
    def cutmix_share(self) -> float:
        """The share of CutMix among mixed pairs."""
        return self.switch_prob if self.mixup_alpha and self.cutmix_alpha else float(self.cutmix_alpha > 0)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; weight decay acts on kernels only, never on biases, norms, the class token or position embeddings."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """muon updates the matrices of blocks by Muon, scaled so that AdamW's learning rate and decay carry over, and all else by AdamW."""
    peak_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    eps: float = 1e-8
    """Of AdamW."""
    momentum: float = 0.9
    """Of SGD and of Muon, whose author takes 0.95."""
    weight_decay: float = 0.0
    """Times the learning rate of the step; decoupled under AdamW."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    average_decay: float = 0.0
    """Decay a step of an average of the weights (EMA, Polyak), which evaluation and export then use; 0 keeps none."""
    layer_decay: float = 1.0
    """A layer's learning rate is this times that of the layer above it: of fine-tuning, 0.65 to 0.85; 1 gives all the same (BEiT)."""
    freeze: Literal["nothing", "backbone"] = "nothing"
    """backbone: train the head, and a representation layer, alone; nothing else changes, and no backward pass goes through it."""
    freeze_blocks: int = 0
    """Leave the embeddings and so many of the first blocks as they are, likewise; 0 trains all."""

    def moments(self, *, muon: bool = False) -> tuple[str, ...]:
        """The tensors that the optimizer keeps for a parameter, which Muon updates or not, by their names in torch's state of it."""
        if self.name == "sgd" or muon:
            return ("momentum_buffer",) if self.momentum or muon else ()
        return "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class Phase:
    """A part of a run before its last one, with other settings than the run's own; what is None is as the run has it."""

    until: float
    """Where it ends, as a share of the run's samples."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; position embeddings are resampled to its grid."""
    global_batch_size: int | None = None
    micro_batch_size: int | None = None


def _parse_phases(words: list[str]) -> tuple[Phase, ...]:
    return tuple(_parse_phase(word) for word in words)


def _parse_phase(word: str) -> Phase:
    until, _, settings = word.partition(":")
    try:
        values: dict[str, Any] = {}
        for name, value in (setting.split("=") for setting in settings.replace("-", "_").split(",")):
            sides = tuple(map(int, value.split("x")))
            values[name] = (sides * 2)[:2] if name == "image_size" and len(sides) < 3 else int(value)
        return Phase(float(until), **values)
    except (ValueError, TypeError):
        raise ValueError(
            f"{word} is no phase; 0.5:image_size=126 is one, and so is 0.5:image_size=112x140,global_batch_size=2048,micro_batch_size=32"
        ) from None


def written(phase: Phase) -> str:
    """A phase as the command line has it."""
    sides = f"image_size={phase.image_size[0]}x{phase.image_size[1]}" if phase.image_size else ""
    batches = (f"{name}={value}" for name in ("global_batch_size", "micro_batch_size") if (value := getattr(phase, name)) is not None)
    return f"{phase.until:.9g}:{','.join(filter(None, (sides, *batches)))}"


_PHASES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="UNTIL:SETTING=VALUE,...",
    instance_from_str=_parse_phases,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [written(phase) for phase in value],
)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate, and the sizes of images and batches, over the run."""

    kind: Literal["linear", "cosine", "rsqrt", "constant"] = "cosine"
    """Linear and cosine run over samples, from the end of the warm-up; rsqrt over steps."""
    warmup_steps: int = 0
    """Linear rise from 0."""
    cooldown_steps: int = 0
    """Linear fall to 0 over the last steps, on top of the schedule."""
    end_lr: float = 0.0
    """What linear and cosine end at."""
    timescale: int = 10_000
    """Of rsqrt, in steps."""
    phases: Annotated[tuple[Phase, ...], _PHASES] = ()
    """Parts of the run before its last, as 0.5:image_size=126 0.8:image_size=160,global_batch_size=2048: each up to a share of the run's
    samples, with its own image_size, global_batch_size, micro_batch_size; then the run's own hold (docs/design.md, "The clock")."""


@dataclass(frozen=True)
class EngineConfig:
    """How the work is laid over devices; but for the precision and float8, it changes nothing that is learned beyond rounding."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 partitions the optimizer, 2 gradients too, 3 weights too. 1 is enough up to 2 B parameters."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: weights and activations in bf16, fp32 masters and gradient accumulation."""
    checkpoint_every_n_blocks: int = 0
    """Activation checkpointing: 0 none, 1 every block, n every n-th block."""
    checkpoint_keeps: Literal["nothing", "products"] = "nothing"
    """What such a block keeps for the backward pass: nothing but its input, or the outputs of its matrix products and attention too, so
    that LayerNorm, GELU and dropout alone are computed again."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    """The kernel that attends; auto takes cuDNN's before Flash on Hopper and B200, and tells which it is."""
    compile: Literal["auto", "none", "blocks", "graphs"] = "auto"
    """blocks: torch.compile of each block. graphs: recorded into CUDA graphs too, for micro-batches so small that launches count. auto:
    blocks on a GPU under ZeRO 0 to 2 and with float8. What was compiled is kept in TORCHINDUCTOR_CACHE_DIR."""
    float8: bool = False
    """Multiply in float8 in the linear layers of the inner blocks; bf16 on compiled blocks, Ada, Hopper or later, and torchao needed."""
    deepspeed: Annotated[dict[str, Any], _JSON] = field(default_factory=dict)
    """Anything else that DeepSpeed's config takes, as JSON; merged over ours."""

    def keeps(self, block: int) -> Keeps:
        """What a block keeps for its backward pass, the first being 0: everything where it is not checkpointed."""
        every = self.checkpoint_every_n_blocks
        return self.checkpoint_keeps if every and block % every == 0 else "everything"

    def compilation(self, on_gpu: bool) -> Compilation:
        """What `compile` means on a device.

        A CPU gains little, and needs a C++ compiler for it. Under ZeRO-3 compiled blocks give the same losses, but have their weights
        gathered a block at a time, which nobody has timed: there they must be asked for, or float8, which is slower than bf16 without.
        """
        if self.compile == "auto":
            return "blocks" if on_gpu and (self.zero_stage < 3 or self.float8) else "none"
        return self.compile


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about steps that go wrong (docs/operations.md); all of it may change when a run is resumed."""

    max_nonfinite: int = 10
    """Steps in a row whose gradient may be not finite; each is left out by all ranks alike. One more and the run is rolled back."""
    spike_deviations: float = 10.0
    """A loss that lies so many robust deviations above the median of those before it is a spike; 0 looks for none."""
    spike_window: int = 128
    """Losses that the median and the deviation are taken over; nothing is judged before half as many are there."""
    spike_steps: int = 3
    """Spikes in a row that roll the run back to the newest checkpoint from before them; their steps are then skipped."""
    max_rollbacks: int = 3
    """Rollbacks in a run; after that spikes are told and trained through, and a gradient that stays not finite ends the run."""
    compare_every: int = 500
    """Steps between comparisons of what all ranks must hold alike; before every checkpoint in any case; 0 leaves it at that."""
    hang_seconds: float = 0.0
    """Seconds without progress after which a rank counts as hanging; 0 learns them: 20 times the slowest step of late, at least
    120, and a minute more than stream.read_timeout: six minutes by default. A start's first step has half an hour, and so has one
    that compiles."""
    max_restarts: int = 3
    """Starts in a row without progress, after which a run is not started again by itself."""


@dataclass(frozen=True)
class ProfileConfig:
    """Where the time of some steps goes: a trace for Perfetto and tables in RUN/profile (docs/operations.md)."""

    steps: int = 0
    """How many are profiled, once a start; 0 none."""
    first_step: int = 0
    """The first of them, by its number in the run; 0 takes the 20th of each start."""
    ranks: tuple[int, ...] = (0,)
    """That write what they saw."""


@dataclass(frozen=True)
class InitConfig:
    """Where the weights of a run come from that begins with another's: what was asked for, and what that was found to be."""

    checkpoint: str
    weights: Literal["average", "weight"]
    position_interpolation: PositionInterpolation
    folder: str = ""
    """The folder that `checkpoint` named when the run started: a run's newest one may be another by now. Empty: not looked for yet."""
    keep_head: bool = False
    """Whether head and representation layer are the checkpoint's, too."""


@dataclass(frozen=True)
class RunConfig:
    """What pre-training and fine-tuning set alike."""

    recipe: Annotated[str, tyro.conf.Suppress] = ""
    """The name that `recipes.recipe` found it by."""
    data: Annotated[str | tuple[str, ...], _PATHS] = ""
    """Dataset directory of the training split, or its URL (s3://bucket/data/train); or those of several to mix."""
    data_weights: tuple[float, ...] = ()
    """Of each dataset of several: how many samples of a step are its own, as a share of the sum; empty: as many as it has samples."""
    eval_data: str = ""
    """Directory or URL of the held-out split; empty takes the sibling `val` of the (first) training split; `none` evaluates nothing."""
    holdout: float = 0.0
    """Share of the training split, 0.01 say, that the run never trains on and evaluates on in place of `eval_data`; chosen by the images'
    bytes, so that it is the same for every run and seed (docs/finetuning.md)."""
    stage: str = ""
    """Folder on each machine's own disk that the datasets' indices are copied to and mapped from; empty maps them where they are, and of
    a URL copies them to $VITSCALE_CACHE or ~/.cache/vitscale."""
    cache: str = ""
    """Folder on each machine's own disk for what was read of tars that lie far away; all ranks and runs may share it. Empty: none."""
    cache_bytes: Annotated[int | None, MAYBE_BYTES] = None
    """The most that all runs together may keep there: 200GB, 2TB."""
    out: str = ""
    """Run directory; empty takes runs/RECIPE."""
    seed: int = 0
    epochs: float = 0.0
    """Length of the run in passes over the data; give this or steps."""
    steps: int = 0
    """Length of the run in optimizer steps; give this or epochs."""
    global_batch_size: int = 4096
    """Images an optimizer step."""
    micro_batch_size: int = 64
    """Images a rank handles at once; gradient accumulation follows from it and the number of ranks."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 5000
    """Steps between evaluations on the held-out split; 0 evaluates at the end only."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is written at the end in any case."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Keep the checkpoints of every so many steps for good, beside the newest; 0 keeps none for good."""
    keep_best: bool = True
    """Keep the checkpoint that was best on the held-out split, too."""
    checkpoint_bytes: Annotated[int | None, MAYBE_BYTES] = None
    """The most that the run's checkpoints may take together: 500GB, 2TB; the oldest give way. None: no bound."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The directories in `data`."""
        return (self.data,) if isinstance(self.data, str) else self.data


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A run: what a pre-training recipe returns, what fine-tuning resolves to, and what RUN/config.json holds."""

    model: ViTConfig = field(default_factory=ViTConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    init: Annotated[InitConfig | None, tyro.conf.Suppress] = None
    """Weights to start from; set by `finetune`, and by `--init` of `pretrain`."""


@dataclass(frozen=True)
class NewModelConfig:
    """What fine-tuning sets of a model; depth, width, pooling and the rest are the checkpoint's."""

    image_size: tuple[int, int] = (384, 384)
    """Height and width in pixels; both multiples of the checkpoint's patch size."""
    dropout: float = 0.0
    """After the position embeddings, both MLP layers and the attention output."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
    patch_dropout: float = 0.0
    """Share of a training image's patches that the model is not shown."""
    head_bias: float = 0.0
    """What the new head's biases start from."""


# What a run that begins from a checkpoint has of it; all else of a model is the run's own
BODY = tuple(
    of.name
    for of in dataclasses.fields(ViTConfig)
    if of.name not in ("num_classes", "representation_size", *(new.name for new in dataclasses.fields(NewModelConfig)))
)


@dataclass(frozen=True)
class SweepConfig:
    """What `--sweep` does where nothing else is said: a recipe's own, and no setting of a run."""

    peak_lrs: tuple[float, ...] = ()
    """The rates that are tried."""
    holdout: float = 0.02
    """The share of the training split that they are compared on: of 50,000 images 1,000, whose top-1 is known to a percent or so."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """What a fine-tuning recipe returns; `resolve.resolve` makes a TrainConfig of it with what the checkpoint says."""

    init: str = ""
    """The checkpoint to start from: a run (its newest durable one), RUN@STEP, RUN@best, a step's folder or an exported folder."""
    init_weights: Literal["average", "weight"] = "average"
    """The average of the weights where the checkpoint holds one, or the raw weights."""
    position_interpolation: PositionInterpolation = "timm"
    """How position embeddings go to the new grid: bicubic with antialias, bicubic, bilinear, or bilinear with corners aligned."""
    model: NewModelConfig = field(default_factory=NewModelConfig)
    preprocess: ViewConfig = field(default_factory=ViewConfig)
    sweep: Annotated[SweepConfig, tyro.conf.Suppress] = field(default_factory=SweepConfig)


@dataclass(frozen=True)
class ImportConfig:
    """What a user says of a file of weights where it does not say it itself, or says something else."""

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the images that the position embeddings are for."""
    layer_norm_eps: float | None = None
    activation: Activation | None = None
    """erf GELU, Flax's tanh form of it, or OpenAI's approximation."""
    pool: Literal["cls", "mean", "map", "mean_with_cls"] | None = None
    """What the head sees."""
    position: Literal["sincos", "none"] | None = None
    """Position embeddings, where no tensor of the file shows them: big_vision's `sincos2d` is computed."""
    prefix: str | None = None
    """What stands before the names of the model's tensors, where a file holds several models."""
    headless: bool = False
    """Leave the head out."""
    mean: tuple[float, float, float] | None = None
    """Of each channel of pixels in [0, 1], as of `pretrain`."""
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """As of `pretrain`."""
    eval_crop: float | None = None
    """As of `pretrain`."""


# ---------------------------------------------------------------------------------------------------------------------------------------
# Decisions that follow from a config
# ---------------------------------------------------------------------------------------------------------------------------------------


Config = TypeVar("Config", bound=RunConfig)


def settle_length(config: Config, given: set[str]) -> Config:
    """A recipe sets epochs or steps; a user who gives only the other one means that one."""
    if given == {"epochs"}:
        return dataclasses.replace(config, steps=0)
    if given == {"steps"}:
        return dataclasses.replace(config, epochs=0.0)
    return config


_AFTER_BLOCKS = ("norm.", "fc_norm.", "attn_pool.", "pre_logits.", "head.")
HEAD = ("pre_logits.", "head.")


def frozen(parameters: Iterable[str], config: OptimizerConfig) -> frozenset[str]:
    """The names of the parameters that are not trained."""
    still = {name: config.freeze == "backbone" and not name.startswith(HEAD) for name in parameters}
    if config.freeze_blocks:
        still |= {name: still[name] or layer <= config.freeze_blocks for name, layer in layers_of(still).items()}
    return frozenset(name for name, is_still in still.items() if is_still)


def layers_of(parameters: Iterable[str]) -> dict[str, int]:
    """The layer of each parameter: embeddings 0, blocks from 1 on, what follows the last (BEiT, get_num_layer_for_vit)."""
    block = {name: int(name.split(".")[1]) + 1 for name in parameters if name.startswith("blocks.")}
    last = max(block.values(), default=0) + 1
    return {name: block.get(name, last if name.startswith(_AFTER_BLOCKS) else 0) for name in parameters}


DROP_PATH_SUBSET_ABOVE = 0.1  # up to here leaving samples out gains nothing (a CPU, 32 images: 1.02 x at 0.1, 1.13 x at 0.15, 2 x at 0.6)


def drop_path_rows(rate: float, kept: int, batch: int) -> int:
    """Of how many samples of a micro-batch a block's branches are computed that drop at `rate` and keep `kept` of them at most.

    Dropped ones fill up the number to a multiple of an eighth, so that a compiled block sees eight shapes at most.
    """
    granule = -(-batch // 8)
    return batch if rate <= DROP_PATH_SUBSET_ABOVE else min(batch, -(-max(1, kept) // granule) * granule)


def grad_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches a rank an optimizer step. Raises ConfigError where the numbers do not divide."""
    unit = micro_batch_size * world_size
    if global_batch_size % unit:
        nearest = max(1, round(global_batch_size / unit)) * unit
        fitting = max((m for m in range(1, micro_batch_size + 1) if global_batch_size % (m * world_size) == 0), default=0)
        other = f", and so does micro_batch_size={fitting}" if fitting else ""
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size x world_size = "
            f"{micro_batch_size} x {world_size} = {unit}; global_batch_size={nearest} works{other}"
        )
    return global_batch_size // unit


def fine_tuned_model(base: ViTConfig, new: NewModelConfig, num_classes: int) -> ViTConfig:
    """The model that fine-tuning makes of a checkpoint's: its body at a new image size, a new head, no representation layer."""
    return dataclasses.replace(base, num_classes=num_classes, representation_size=0, **dataclasses.asdict(new))


def fine_tuning_run(asked: FinetuneConfig, base: ViTConfig, trained_with: PreprocessConfig, folder: str, num_classes: int) -> TrainConfig:
    """The run that fine-tuning makes of a checkpoint in `folder`, of a model and its preprocessing."""
    shared = {f.name: getattr(asked, f.name) for f in dataclasses.fields(RunConfig)}
    preprocess = PreprocessConfig(**dataclasses.asdict(asked.preprocess), mean=trained_with.mean, std=trained_with.std)
    init = InitConfig(asked.init, asked.init_weights, asked.position_interpolation, folder)
    return TrainConfig(**shared, model=fine_tuned_model(base, asked.model, num_classes), preprocess=preprocess, init=init)


def continued_run(
    asked: TrainConfig, base: ViTConfig, trained_with: PreprocessConfig, folder: str, num_classes: int, *, keep_head: bool
) -> TrainConfig:
    """The run that pre-training makes of a checkpoint in `folder`: its body, at the image size and with all else that was asked for.

    Where the head is kept the representation layer is, too; where it is new that is as asked.
    """
    assert asked.init is not None
    new = NewModelConfig(**{f.name: getattr(asked.model, f.name) for f in dataclasses.fields(NewModelConfig)})
    before_head = (base if keep_head else asked.model).representation_size
    return dataclasses.replace(
        asked,
        model=dataclasses.replace(fine_tuned_model(base, new, num_classes), representation_size=before_head),
        preprocess=dataclasses.replace(asked.preprocess, mean=trained_with.mean, std=trained_with.std),
        init=dataclasses.replace(asked.init, folder=folder, keep_head=keep_head),
    )


# What a run may change when it is resumed: where things lie and how the work is laid out, never what is learned.
MAY_CHANGE = (
    "data", "eval_data", "stage", "cache", "cache_bytes", "out", "micro_batch_size", "log_every", "eval_every", "checkpoint_every",
    "keep_checkpoints", "keep_every", "keep_best", "checkpoint_bytes", "guard", "profile",
    "stream.workers", "stream.processes", "stream.prefetch", "stream.reads", "stream.buffer_bytes",
    "stream.read_threads", "stream.read_timeout", "stream.max_unusable", "stream.max_unusable_per_shard", "engine.zero_stage",
    "engine.checkpoint_every_n_blocks", "engine.checkpoint_keeps", "engine.attention", "engine.compile",
    "engine.deepspeed.zero_optimization", "init.folder", "schedule.phases.*.micro_batch_size",
)  # fmt: skip


def changes(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    """The settings that differ, as {name: "old -> new"}."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    names = sorted(before.keys() | after.keys())
    return {name: f"{before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)}


def may_change(name: str) -> bool:
    """Whether a setting may be another when a run is resumed."""
    return any(fnmatchcase(f"{name}.", f"{allowed}.*") for allowed in MAY_CHANGE)


# ---------------------------------------------------------------------------------------------------------------------------------------
# To and from JSON
# ---------------------------------------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A config as what its JSON holds (tuples as lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """The dataclass `cls` from what `to_dict` gave; a field that is not there has its default. Raises ConfigError on unknown fields."""
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"{where} has unknown fields {', '.join(unknown)}; {cls.__name__} knows {', '.join(sorted(known))}")
    try:
        return cls(**{name: _from_plain(hints[name], value, f"{where}.{name}") for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    """A value of the type that a hint says; a file may have been written by anybody. Raises ConfigError."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        kinds = [arg for arg in get_args(hint) if arg is not type(None)]
        hint = next((kind for kind in kinds if (get_origin(kind) is tuple) == isinstance(value, list)), kinds[0])
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        each, *others = get_args(hint)
        if others == [...] or len(others) + 1 == len(value):
            hints = [each] * len(value) if others == [...] else [each, *others]
            return tuple(_from_plain(of, item, where) for of, item in zip(hints, value, strict=True))
    if isinstance(hint, type) and issubclass(hint, Enum) and value in tuple(hint):
        return hint(value)
    if hint is Any or (get_origin(hint) is Literal and value in get_args(hint)):
        return value
    accepted: Any = {int: int, float: (int, float), str: str, bool: bool, dict: dict}.get(get_origin(hint) or hint, ())
    odd = isinstance(value, bool) != (hint is bool) or (isinstance(value, float) and not math.isfinite(value))
    if odd or not isinstance(value, accepted):
        raise ConfigError(f"{where}={value!r:.100} is not {getattr(hint, '__name__', hint)}")
    return value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's settings by their dotted names; those of a list of phases by their places in it."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
