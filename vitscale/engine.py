"""The seam to DeepSpeed: the only module that imports it.

An `Engine` runs forward, backward and the optimizer step of a plain model under ZeRO 0 to 3, and gives access to what a checkpoint holds:
for each parameter its fp32 weight, the optimizer's moments and the running average, whatever the stage and world size.

Where those live. DeepSpeed keeps fp32 weights in flat tensors, of which a rank has its partition (stage 0: the parameters themselves); the
optimizer's moments, and our average, are tensors of the same shape. `_fragment` says which stretch of a parameter lies where in a flat
tensor of this rank; everything that reads or writes state goes through it, so that no stage is a special case further up. Loading and
saving are local to a rank; reading a whole tensor is a collective.

Gradients are averaged over ranks and micro-batches and clipped: by DeepSpeed but for stage 1, where `Gradients` averages over ranks, and
stage 0, where the engine clips. Micro-batches add up in fp32; gradients are sent in the precision that they are computed in.

Stage 1 is `stage_1_and_2` in bf16 too, which is told that gradients accumulate in bf16. Told fp32 DeepSpeed would take `BF16_Optimizer`,
which keeps whole fp32 gradients even where a step has one micro-batch, and passes over all of them some ten times a step. `Gradients` does
what is then missing, sums in fp32, and lays gradients so that flattening them copies nothing. Stages 2 and 3 reduce in each micro-batch,
while backward goes on, and add what they have reduced in fp32 partitions.

Each waits for the device once a step, for the norm, to know whether to leave it out. What is not finite shows in it: nothing else is
searched.
"""

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes for a dozen kinds of device, and warns of each

import deepspeed
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.utils import logger as deepspeed_logger

from vitscale import compute
from vitscale.checkpoint import AVERAGE, WEIGHT
from vitscale.config import EngineConfig, OptimizerConfig, frozen
from vitscale.exchange import Exchange, cut
from vitscale.gradients import Gradients, flatten
from vitscale.model import ViT
from vitscale.muon import Muon, Updates, is_muons, num_parts
from vitscale.optim import build_optimizer
from vitscale.rendezvous import ARRIVAL, join
from vitscale.timing import Clock, Waited
from vitscale.traffic import Kind, ring_bytes
from vitscale.zero import bucket_elements, deepspeed_config


def _replace(of: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts a function of ours in the place of one of DeepSpeed's, which must be there: another name would keep its own."""
    if not hasattr(of, name):
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} has no {of}.{name}, which this version of vitscale replaces; 0.19.8 is known"
        )
    setattr(of, name, function)


# DeepSpeed takes norms of copies of gradients in float64; torch's `clip_grad_norm_` takes them in fp32, which errs by 1e-7
for _stage in (stage_1_and_2, stage3):
    _replace(_stage, "get_norm_dtype", lambda: torch.float32)

# DeepSpeed's collectives: their kind, and which of their arguments is all that they carry
_COLLECTIVES: dict[str, tuple[Kind, int, str]] = {
    "all_reduce": ("all-reduce", 0, "tensor"),
    "reduce": ("reduce-scatter", 0, "tensor"),
    "broadcast": ("all-gather", 0, "tensor"),
    "all_gather": ("all-gather", 0, "tensor_list"),
    "all_gather_into_tensor": ("all-gather", 0, "output_tensor"),
    "all_gather_coalesced": ("all-gather", 0, "output_tensors"),
    "reduce_scatter": ("reduce-scatter", 1, "input_list"),
    "reduce_scatter_tensor": ("reduce-scatter", 1, "input_tensor"),
    "all_to_all_single": ("all-to-all", 1, "input"),
}

# (name, kind, start, length) -> that stretch of the flattened tensor, fp32
Read = Callable[[str, str, int, int], Tensor]


class Fragment(NamedTuple):
    """A stretch of a parameter, as this rank holds it."""

    flat: Tensor  # the flat fp32 tensor it lies in
    flat_start: int
    length: int
    start: int  # first element of the flattened parameter


def init_distributed(timeout: timedelta = timedelta(minutes=30), arrival: timedelta = ARRIVAL) -> None:
    """Meets the other ranks (`rendezvous.join`) and makes the process group; NCCL on GPUs, gloo elsewhere.

    Raises Ended where ranks do not come within `arrival`, or are not alike. `timeout` is that of a collective.
    """
    deepspeed_logger.setLevel("ERROR")
    # On a CPU DeepSpeed would compile an all-reduce for inference, into a folder that environments share; nothing here calls it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, and torch warns anew at every call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not dist.is_initialized():
        meeting = join(arrival)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(device())
        dist.init_process_group(backend, store=meeting.store, rank=meeting.rank, world_size=meeting.world_size, timeout=timeout)
        deepspeed.init_distributed(backend, timeout=timeout, verbose=False)  # takes the group that is there


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


class Engine:
    """A model in training.

    Args:
        model: in fp32 on the CPU, its weights as they should be at the start; how it is computed is set here (`compute.prepare`).
        optimizer: which optimizer, its clipping and the decay of the average.
        clock: is told of DeepSpeed's collectives, until the engine is closed.
    """

    def __init__(
        self, model: ViT, config: EngineConfig, optimizer: OptimizerConfig, *, micro_batch_size: int, grad_accum_steps: int,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.stage, self.average_decay, self.grad_clip = config.zero_stage, optimizer.average_decay, optimizer.grad_clip
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        muons = {name for name, p in self.parameters.items() if optimizer.name == "muon" and is_muons(name, p)}
        still = frozen(self.parameters, optimizer)
        self.moments = {name: () if name in still else optimizer.moments(muon=name in muons) for name in self.parameters}
        for name in still:
            self.parameters[name].requires_grad_(False)
        self.updates = 0  # made so far, those of the run's earlier starts included; steps left out do not count
        self._grad_norm = float("nan")
        exact = {name: p.detach().flatten() for name, p in self.parameters.items()}
        # What is frozen DeepSpeed only computes with; its fp32 weights, which checkpoints hold, stay on the host, a share on each rank
        self._frozen = {self.parameters[name]: _share_of(exact[name]) for name in still}
        self._attention, self._graphs = ExitStack(), config.compile == "graphs"
        self.computes = compute.prepare(model, config, device(), micro_batch_size=micro_batch_size, attention=self._attention)
        on_gpu = torch.cuda.is_available()
        settings = deepspeed_config(config, optimizer.grad_clip, micro_batch_size, grad_accum_steps, on_gpu=on_gpu)
        zero = settings["zero_optimization"]
        zero["reduce_bucket_size"] = bucket_elements(zero, sum(p.numel() for p in self.parameters.values()))
        torchs = build_optimizer(model.to(device()), optimizer)
        name_of = {parameter: name for name, parameter in self.parameters.items()}
        groups = [[name_of[parameter] for parameter in group["params"]] for group in torchs.param_groups]
        in_order = [self.parameters[name] for names in groups for name in names]
        # Before DeepSpeed has hooks of its own, which take gradients as ours leave them
        self._gradients = Gradients(in_order, self.dtype, dist.get_world_size()) if self.stage == 1 else None
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=torchs, config=settings)
        self._zero = self.deepspeed.optimizer  # ZeRO's wrapper; under stage 0 torch's optimizer itself
        self._optimizer: torch.optim.Optimizer = self._zero if self.stage == 0 else self._zero.optimizer
        if self.stage in (1, 2):
            self._adapt()
        # DeepSpeed made its fp32 weights from the model's bf16 copies; they should be what the model was given
        self._fill(WEIGHT, lambda name, _, start, length: exact[name][start : start + length])
        if isinstance(self._optimizer, Muon):
            self._optimizer.updates = self._exchange_matrices(groups)
        self._averages = [flat.detach().clone() for flat in self._flat_weights()] if self.average_decay else []
        self._average_of = {id(flat): average for flat, average in zip(self._flat_weights(), self._averages, strict=False)}
        self._untimed = _time_collectives(clock) if clock else lambda: None

    def _adapt(self) -> None:
        """What DeepSpeed's stages 1 and 2 would pass over once more, and need not."""
        if self.stage == 1:
            _replace(self._zero, "flatten", flatten)
        _replace(self._zero, "check_overflow", lambda **_: None)  # the norm tells, which it looks at as well
        if self.dtype == torch.float32:  # it would hold a rank's part of the weights twice, and copy it at each step
            for flat, parts in zip(self._flat_weights(), self._zero.parallel_partitioned_bit16_groups, strict=True):
                flat.data = parts[dist.get_rank()]
            self._zero._link_all_hp_params()  # lets go of where they were

    # -- training ---------------------------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.deepspeed.module  # type: ignore[no-any-return]

    def forward(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Logits of normalised fp32 images."""
        if self._graphs:  # what blocks gave out in the last micro-batch is no longer needed, and may be written over
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self.deepspeed(images_BCHW.to(self.dtype), sample_keys_B)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient; divides the loss by the number of micro-batches."""
        if self._gradients:
            first = self.deepspeed.micro_steps % self.deepspeed.gradient_accumulation_steps() == 0
            self._gradients.begin(first=first, last=self.deepspeed.is_gradient_accumulation_boundary())
        self.deepspeed.backward(loss)

    def step(self, learning_rate: float) -> bool:
        """Call after each micro-batch's backward: after the last of a step it updates the weights and the average.

        Returns False, on all ranks alike, where the update was left out because the gradient is not finite.
        """
        for group in self._zero.param_groups:  # under stage 3 these are the wrapper's own, and it copies them
            group["lr"] = learning_rate * group["lr_scale"]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        updates = self.deepspeed.is_gradient_accumulation_boundary()
        finite = True
        if updates and self.stage == 0:  # DeepSpeed would update with a gradient that is not finite, and keeps no norm
            self._grad_norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.grad_clip or float("inf")))
            if not (finite := math.isfinite(self._grad_norm)):
                for parameter in self.parameters.values():
                    parameter.grad = None  # a step without gradients changes nothing, moments and weight decay included
        self.deepspeed.step()
        if not updates:
            return True
        applied = finite and self.deepspeed.was_step_applied()
        if applied:
            self.updates += 1
            if self._averages:
                torch._foreach_lerp_(self._averages, self._flat_weights(), 1 - self.average_decay)
        return bool(applied)

    def set_batch(self, micro_batch_size: int, grad_accum_steps: int) -> None:
        """Steps have other micro-batches from now on. Call between steps."""
        self.deepspeed.set_train_micro_batch_size(micro_batch_size)
        self.deepspeed.set_train_batch_size(micro_batch_size * grad_accum_steps * dist.get_world_size())
        self.deepspeed.micro_steps = 0  # a step ends where the number of steps accumulated divides it

    def grad_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping."""
        return self._grad_norm if self.stage == 0 else float(self.deepspeed.get_global_grad_norm())

    def close(self) -> None:
        """Frees what DeepSpeed holds (hooks, buffers)."""
        self._untimed()
        self._attention.close()
        self.deepspeed.destroy()

    # -- state ------------------------------------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The kinds of tensors that a checkpoint of this engine holds, and the parameters that it holds one of each for."""
        everything = tuple(self.parameters)
        moments = dict.fromkeys(itertools.chain(*self.moments.values()))
        of_moments = {kind: tuple(name for name in everything if kind in self.moments[name]) for kind in moments}
        return {WEIGHT: everything} | of_moments | ({AVERAGE: everything} if self.average_decay else {})

    def gather(self, name: str, kind: str) -> Tensor:
        """A whole tensor in fp32 on this rank's device. A collective: every rank must ask for the same ones in the same order."""
        shape = self.shapes[name]
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=device())
        fragment = self._fragment(self.parameters[name])
        if fragment is not None:
            whole[fragment.start : fragment.start + fragment.length] = self._view(fragment, kind)
        if self.stage > 0:
            dist.all_reduce(whole)  # each element is on one rank, and zero on the others
        return whole.view(shape)

    def shares(self) -> dict[str, tuple[int, int]]:
        """The (start, length) of the stretch of each flattened parameter that this rank writes to a checkpoint.

        Stretches of consecutive ranks are adjacent and cover the parameter, at every stage; without ZeRO each parameter is cut evenly.
        """
        if self.stage == 0:
            return {name: _even_share(shape.numel()) for name, shape in self.shapes.items()}
        fragments = {name: self._fragment(parameter) for name, parameter in self.parameters.items()}
        return {name: (fragment.start, fragment.length) if fragment else (0, 0) for name, fragment in fragments.items()}

    def stretch(self, name: str, kind: str, start: int, length: int) -> Tensor:
        """A view of elements [start, start + length) of a flattened tensor, fp32, which this rank must hold."""
        fragment = self._fragment(self.parameters[name])
        assert fragment is not None
        return self._view(fragment, kind)[start - fragment.start :][:length]

    def load(self, read: Read, updates: int) -> None:
        """Sets fp32 weights, moments and averages to a checkpoint's; a rank reads only what it holds, and nothing is sent.

        The model's own copies of the weights must have been loaded before the engine was made.

        Args:
            updates: that were made before the checkpoint.
        """
        self.updates = updates
        fragments = {name: self._fragment(parameter) for name, parameter in self.parameters.items()}
        trained = {name: f for name, f in fragments.items() if f and self.parameters[name] not in self._frozen}
        for name, flat in {id(f.flat): (name, f.flat) for name, f in trained.items()}.values():
            state: dict[str, Tensor] = {moment: torch.zeros_like(flat) for moment in self.moments[name]}
            if "exp_avg" in state:  # AdamW's bias correction counts steps; fused, on the device
                state["step"] = torch.tensor(float(updates), device=flat.device)
            self._optimizer.state[flat] = state
        for kind in self.kinds:
            self._fill(kind, read)

    def bit_sum(self) -> int:
        """The sum of the bits of what this rank computes with, where all ranks should hold the same; 0 under stage 3, where none do.

        One flipped bit changes it. It reads every weight once and waits for the device.
        """
        if self.stage == 3:
            return 0
        ints = torch.int16 if self.dtype == torch.bfloat16 else torch.int32
        sums = [parameter.detach().view(-1).view(ints).sum(dtype=torch.int64) for parameter in self.parameters.values()]
        odd = torch.arange(1, 2 * len(sums), 2, device=device())  # so that two flips in two tensors do not cancel out
        return int((torch.stack(sums) * odd).sum())

    def _fill(self, kind: str, read: Read) -> None:
        for name in self.kinds[kind]:
            fragment = self._fragment(self.parameters[name])
            if fragment is not None:
                self._view(fragment, kind).copy_(read(name, kind, fragment.start, fragment.length))

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it the model is in evaluation mode, and computes with the average of its weights where one is kept. A collective.

        What is raised in it ends the engine's use: on one rank alone a collective would meet others' of another kind.
        """
        self.deepspeed.eval()
        self._exchange_averages()
        yield
        self._exchange_averages()
        self.deepspeed.train()

    def _exchange_averages(self) -> None:
        """Lets weights and averages, where they are kept, change places, and the model compute with what the weights are then."""
        for weight, average in zip(self._flat_weights(), self._averages, strict=False):
            kept = weight.detach().clone()
            weight.data.copy_(average)
            average.copy_(kept)
        if not self._averages or self.stage == 0:  # there the model's weights are the only copy
            return
        for name, parameter in self.parameters.items():
            if parameter in self._frozen:
                continue
            whole = self.gather(name, WEIGHT)
            if self.stage < 3:
                parameter.data.copy_(whole)
            else:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(whole)

    def _exchange_matrices(self, groups: list[list[str]]) -> Updates:
        """What brings together the matrices of Muon's groups, of which these are the names, as ranks hold them. A collective."""
        shares: list[dict[str, tuple[int, int]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, self.shares())
        of_flat: dict[int, list[str]] = {}  # by the place of the flat tensor that they lie in; without ZeRO, by that of the group
        for group, name in ((group, name) for group, names in enumerate(groups) for name in names):
            if "momentum_buffer" in self.moments[name]:
                place = self._zero.grad_position[self._zero.get_param_id(self.parameters[name])][0] if self.stage == 3 else group
                of_flat.setdefault(place, []).append(name)
        exchanges = {}
        for place, names in of_flat.items():
            matrices = []
            for index, name in enumerate(names):
                fragment, held = self._fragment(self.parameters[name]), [of_rank[name] for of_rank in shares]
                begin = fragment.flat_start - fragment.start if fragment else 0
                tensor, everywhere = (index, True) if self.stage == 0 else (0, False)
                matrices += cut(self.shapes[name], num_parts(name), held, everywhere=everywhere, tensor=tensor, begin=begin)
            first = self.parameters[names[0]] if self.stage == 0 else self._flat_weights()[place]
            exchanges[id(first)] = Exchange(matrices, dist.get_rank(), deepspeed.comm.all_to_all_single)
        return lambda weights, directions: exchanges[id(weights[0])](weights, directions)

    def _flat_weights(self) -> list[Tensor]:
        """The tensors that hold this rank's fp32 weights, which are also the keys of the optimizer's state."""
        if self.stage == 0:
            return [parameter for parameter in self.parameters.values() if parameter not in self._frozen]
        for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(self._zero, attribute):  # of stage 3, of stages 1 and 2
                return list(getattr(self._zero, attribute))
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} keeps fp32 weights where this version of vitscale does not look; 0.19.8 is known"
        )

    def _fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """The stretch of a parameter that this rank holds, or None where it holds nothing of it."""
        if self.stage == 0:
            return Fragment(parameter, 0, parameter.numel(), 0)
        if parameter in self._frozen:
            return self._frozen[parameter]
        if self.stage == 3:  # each parameter is cut evenly over the ranks, the last piece padded
            group, flat_start, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = dist.get_rank() * padded
            length = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
            return Fragment(self._flat_weights()[group], flat_start, length, start) if length > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat, model = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(self._flat_weights()[mapping.param_group_index], flat.start, flat.numel, model.start)

    def _view(self, fragment: Fragment, kind: str) -> Tensor:
        flat = fragment.flat
        if kind != WEIGHT:
            flat = self._average_of.get(id(flat), flat) if kind == AVERAGE else self._moment(flat, kind)  # what is frozen is its average
        return flat.detach().view(-1)[fragment.flat_start : fragment.flat_start + fragment.length]

    def _moment(self, flat: Tensor, kind: str) -> Tensor:
        """A moment of a flat tensor; before the first update, when the optimizer has none yet, zeros as it will begin with."""
        moment = self._optimizer.state.get(flat, {}).get(kind)
        return torch.zeros_like(flat) if moment is None else moment


def _even_share(length: int) -> tuple[int, int]:
    """The (start, length) of this rank's stretch of something that is cut evenly."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start = rank * length // ranks
    return start, (rank + 1) * length // ranks - start


def _share_of(weight: Tensor) -> Fragment:
    """This rank's stretch of a flattened weight, and nothing kept of the rest."""
    start, length = _even_share(weight.numel())
    return Fragment(weight[start : start + length].clone(), 0, length, start)


def _time_collectives(clock: Clock) -> Callable[[], None]:
    """Tells a clock of the collectives that DeepSpeed makes, and of its waiting for its side streams; returns what ends that."""
    backend = deepspeed.comm.comm.cdb

    def timed(name: str, collective: Callable[..., Any], kind: Kind, place: int, argument: str) -> Callable[..., Any]:
        each = ring_bytes(kind, 1, dist.get_world_size())  # of a byte; DeepSpeed's groups are all of the world here

        def call(*args: Any, **options: Any) -> Any:
            carried = options[argument] if argument in options else args[place]
            size = sum(tensor.nbytes for tensor in (carried if isinstance(carried, list | tuple) else (carried,)))
            clock.count(name, size * each)
            with clock.communicating():
                work = collective(*args, **options)
            return Waited(work, clock.communicating) if work is not None else None

        return torch.compiler.disable(call)  # type: ignore[no-untyped-call, no-any-return]

    def waits(wait: Callable[..., Any], *, by_stream: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not clock.computes(args[0] if by_stream else None):
                return wait(*args)
            with clock.communicating():
                return wait(*args)

        return call

    ours: list[tuple[Any, str, Callable[..., Any]]] = [
        (backend, name, timed(name, getattr(backend, name), *carries)) for name, carries in _COLLECTIVES.items()
    ]
    if torch.cuda.is_available():  # where the stream that computes waits for another, and where the host does, and it for the host
        stream, accelerator = torch.cuda.Stream, deepspeed.accelerator.get_accelerator()
        ours.append((stream, "wait_stream", waits(stream.wait_stream, by_stream=True)))
        ours += [(of, "synchronize", waits(of.synchronize, by_stream=False)) for of in (stream, accelerator)]
    theirs = [(of, name, getattr(of, name)) for of, name, _ in ours]

    def put(functions: list[tuple[Any, str, Callable[..., Any]]]) -> None:
        for of, name, function in functions:
            setattr(of, name, function)

    put(ours)
    return lambda: put(theirs)
