"""How a model is computed: which kernel attends, that compiled blocks compute the same under every ZeRO stage, that float8 learns as well.

The compiler's own code is tested under ZeRO and over a resume; what it is given is tested with its `aot_eager` backend, which traces alike,
compiles nothing and draws the random numbers of plain torch.
"""

import gc
import itertools
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import with_engine
from tests.distributed import run_on_ranks
from tests.runs import STOP, check_alike
from tests.runs import losses as losses_in
from tests.vitscale.models import gradient_errors, random_images, random_vit, relative_error
from vitscale import checkpoint, compute
from vitscale.check import check_config, check_on_cpu
from vitscale.compute import (
    BACKENDS,
    FLOAT8_LAYERS,
    Compiling,
    attention_order,
    check_float8,
    compile_blocks,
    prepare,
    to_float8,
)
from vitscale.config import ConfigError, EngineConfig, MixConfig, OptimizerConfig, TrainConfig, ViTConfig, from_dict, to_dict
from vitscale.engine import Engine
from vitscale.heartbeat import COMPILING, EVALUATING
from vitscale.model import ViT, initialize
from vitscale.resolve import resolve
from vitscale.run import open_run
from vitscale.train import train
from vitscale.zero import BLOCKS_ARE_LEAVES, deepspeed_config

MODEL = ViTConfig(depth=3, width=32, mlp_dim=64, num_heads=4, patch_size=8, image_size=(16, 24), num_classes=5)
CPU = torch.device("cpu")
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@pytest.fixture(autouse=True)
def _compile_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another are slow at such sizes, and very slow on a busy machine
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "capability", "head_dim", "dtype", "biased", "order"),
    [
        ("auto", HOPPER, 80, torch.bfloat16, False, "cudnn flash efficient math"),
        ("auto", (10, 0), 64, torch.bfloat16, False, "cudnn flash efficient math"),
        ("auto", (12, 0), 64, torch.bfloat16, False, "flash cudnn efficient math"),
        ("auto", AMPERE, 80, torch.bfloat16, False, "flash cudnn efficient math"),
        ("auto", TURING, 80, torch.bfloat16, False, "efficient math"),
        ("auto", HOPPER, 80, torch.float32, False, "efficient math"),
        ("auto", HOPPER, 80, torch.bfloat16, True, "efficient math"),
        ("auto", HOPPER, 192, torch.bfloat16, False, "flash efficient math"),
        ("auto", HOPPER, 36, torch.bfloat16, False, "flash efficient math"),
        ("auto", HOPPER, 512, torch.bfloat16, False, "efficient math"),
        ("flash", HOPPER, 80, torch.bfloat16, False, "flash cudnn efficient math"),
        ("cudnn", AMPERE, 80, torch.float32, False, "cudnn efficient math"),
        ("math", HOPPER, 80, torch.bfloat16, False, "math"),
        ("auto", None, 80, torch.float32, True, "flash math"),
        ("math", None, 80, torch.float32, False, "math"),
    ],
)
def test_the_order_of_attention_backends(
    asked: str, capability: tuple[int, int] | None, head_dim: int, dtype: torch.dtype, biased: bool, order: str
) -> None:
    assert attention_order(asked, capability, head_dim, dtype, biased) == order.split()


def test_every_order_ends_with_what_can_compute_anything() -> None:
    dims, dtypes = (8, 36, 64, 80, 256, 320), (torch.float32, torch.bfloat16)
    for case in itertools.product(("auto", *BACKENDS), (None, TURING, AMPERE, HOPPER), dims, dtypes, (False, True)):
        order = attention_order(*case)
        assert order[-1] == "math"
        assert len(set(order)) == len(order)
        assert case[0] in ("auto", order[0])


def attended_by(model: ViT) -> Counter:
    """The kernels that attend in a training step, backward and recomputation included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(random_images(MODEL, 4)).square().mean().backward()
    names = {"aten::_scaled_dot_product_flash_attention_for_cpu": "flash", "aten::_scaled_dot_product_attention_math": "math"}
    names |= {"aten::_scaled_dot_product_flash_attention_for_cpu_backward": "flash backward"}
    return Counter(names[event.name] for event in profile.events() if event.name in names)


def test_the_backend_that_is_told_is_the_one_that_attends() -> None:
    """In a checkpointed block too, in whose backward pass attention is computed again, and in one that is traced."""
    depth = MODEL.depth
    for asked, told, expected in (
        ("auto", "flash", {"flash": 2 * depth, "flash backward": depth}),
        ("flash", "flash", {"flash": 2 * depth, "flash backward": depth}),
        ("math", "math", {"math": 2 * depth}),
    ):
        for compiled in (False, True):
            torch._dynamo.reset()
            model = random_vit(MODEL, checkpoint_every_n_blocks=1).train()
            with ExitStack() as attention:
                config = EngineConfig(precision="fp32", attention=asked, compile="none")  # type: ignore[arg-type]
                assert prepare(model, config, CPU, micro_batch_size=4, attention=attention) == f"attention by {told}"
                if compiled:
                    compile_blocks(model, backend="aot_eager")
                    attended_by(model)  # to trace asks for kernels, too
                found = attended_by(model)
            if compiled and told == "math":  # which the compiler sees as products and a softmax
                assert not found
            else:
                assert found == expected
    assert torch.backends.cuda.flash_sdp_enabled(), "the process gets back what was set before"


def test_a_backend_that_cannot_attend_is_refused() -> None:
    biased = replace(MODEL, position="relative")
    for asked, model in (("cudnn", MODEL), ("efficient", MODEL), ("flash", biased)):
        used = "math" if model is biased else "flash"
        config = EngineConfig(precision="fp32", attention=asked)  # type: ignore[arg-type]
        message = rf"attention={asked} cannot .*\(4, 4, 7, 8\) in float32 on cpu.* no {asked} kernel for it; attention={used} can"
        with ExitStack() as attention, pytest.raises(ConfigError, match=message):
            prepare(ViT(model), config, CPU, micro_batch_size=4, attention=attention)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_what_compile_means_on_a_device() -> None:
    means = [EngineConfig(zero_stage=stage).compilation(on_gpu=True) for stage in (0, 1, 2, 3)]  # type: ignore[arg-type]
    assert means == ["blocks", "blocks", "blocks", "none"]
    assert EngineConfig().compilation(on_gpu=False) == "none"
    assert EngineConfig(compile="blocks", zero_stage=3).compilation(on_gpu=False) == "blocks"
    assert EngineConfig(compile="graphs").compilation(on_gpu=True) == "graphs"
    with pytest.raises(ConfigError, match="no GPU here; compile=blocks works"):
        check_on_cpu(EngineConfig(compile="graphs"))
    assert "leaf_module" not in deepspeed_config(EngineConfig(zero_stage=3), 0, 1, 1)["zero_optimization"]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (EngineConfig(compile="graphs", zero_stage=3), "addresses of weights, which stage 3 moves; zero_stage=1 works"),
        (EngineConfig(compile="graphs", checkpoint_every_n_blocks=2), "checkpoint_every_n_blocks=2.*0 works"),
        (EngineConfig(float8=True, precision="fp32"), "--engine.precision bf16"),
        (EngineConfig(float8=True, compile="none"), "--engine.compile blocks"),
    ],
)
def test_computations_that_cannot_be(config: TrainConfig, engine: EngineConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(replace(config, engine=engine), 1)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_all_blocks_share_one_graph_and_new_batches_need_no_other() -> None:
    model = random_vit(replace(MODEL, depth=12, dropout=0.1)).train()
    compile_blocks(model, backend="aot_eager")
    for seed in range(3):
        model(random_images(MODEL, 8, seed)).sum().backward()
    assert graphs() == 1
    model.eval()
    with torch.no_grad():
        for size in (8, 5, 3, 7, 8):  # the second size makes the batch a variable of a graph, once
            model(random_images(MODEL, size))
    assert graphs() == 3
    model.train()
    model(random_images(MODEL, 8)).sum().backward()
    assert graphs() == 3
    assert not counters["graph_break"]


def test_drop_path_makes_few_graphs_however_deep_the_model() -> None:
    """All samples, all with a factor each, and some of the samples: first as many as the first such block has, then any number."""
    config = replace(MODEL, depth=12, drop_path_rate=0.5)
    ours, theirs = random_vit(config).train(), random_vit(config).train()
    compile_blocks(ours, backend="aot_eager")
    for seed in range(6):
        images, keys = random_images(config, 16, seed), torch.arange(16) + 100 * seed
        torch.testing.assert_close(ours(images, keys), theirs(images, keys), rtol=1e-6, atol=1e-6)
    assert graphs() <= 4
    assert not counters["graph_break"]


@pytest.mark.parametrize("keeps", ["everything", "nothing", "products"])
def test_what_is_traced_computes_what_plain_torch_does(keeps: str) -> None:
    """With dropout, whose numbers are torch's own, and which a block that is computed again must draw again."""
    config = replace(MODEL, dropout=0.2, drop_path_rate=0.4, qk_norm=True)
    checkpointing: dict[str, Any] = {} if keeps == "everything" else {"checkpoint_every_n_blocks": 2, "checkpoint_keeps": keeps}
    models = [random_vit(config, **checkpointing).train() for _ in range(2)]
    names = list(models[0].state_dict())
    compile_blocks(models[0], backend="aot_eager")
    assert list(models[0].state_dict()) == names
    assert [name for name, _ in models[0].named_parameters()] == [name for name, _ in models[1].named_parameters()]
    logits = []
    for model in models:
        torch.manual_seed(0)
        logits.append(model(random_images(config, 8), torch.arange(8)))
        logits[-1].square().sum().backward()
    assert torch.equal(*logits)
    ours, theirs = ({name: p.grad for name, p in model.named_parameters()} for model in models)
    assert max(gradient_errors(ours, theirs).values()) < 1e-5  # type: ignore[arg-type]


def test_under_graphs_gradients_are_copied_out() -> None:
    """CUDA graphs themselves need a GPU; that no `.grad` is memory which a backward pass gave out is seen without."""
    given_out: list[int] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            gradient = gradient * 2
            given_out.append(gradient.data_ptr())
            return gradient

    for copied in (False, True):
        model = ViT(MODEL)
        compile_blocks(model, graphs=copied)
        weight = model.blocks[0].mlp.fc1.weight
        Twice.apply(weight).sum().backward()
        assert (weight.grad.data_ptr() != given_out[-1]) == copied  # type: ignore[union-attr]
        assert torch.equal(weight.grad, torch.full_like(weight, 2.0))  # type: ignore[arg-type]


SGD = OptimizerConfig("sgd", peak_lr=0.2, momentum=0.0, grad_clip=1.0)


def trained(engine_config: EngineConfig, steps: int = 4) -> tuple[list[float], Tensor]:
    """Losses of some steps of two micro-batches and an evaluation, and the way the weights went, which under SGD is that of gradients."""
    model = random_vit(MODEL).train()
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    engine = Engine(model, engine_config, SGD, micro_batch_size=4, grad_accum_steps=2)
    losses = []
    for micro in range(2 * steps):
        images, labels = random_images(MODEL, 4, 2 * micro + dist.get_rank()), torch.arange(4)
        loss = nn.functional.cross_entropy(engine.forward(images).float(), labels)
        engine.backward(loss)
        engine.step(SGD.peak_lr)
        losses.append(loss.item())
    with engine.evaluation(), torch.no_grad():
        losses.append(engine.forward(random_images(MODEL, 4, 99)).square().mean().item())
    moved = torch.cat([engine.gather(name, checkpoint.WEIGHT).flatten() for name in engine.shapes]) - start
    engine.close()
    return losses, moved


def compiled_and_not(payload: dict[str, Any]) -> dict[str, Any]:
    """By stage, compiled and not: how far losses are from those of plain fp32, relatively and at most, and the weights' way."""
    exact, exact_way = trained(EngineConfig(0, "fp32", compile="none"))
    found = {}
    for values in payload["engines"]:
        config: EngineConfig = from_dict(EngineConfig, values)
        both = [trained(replace(config, compile=how)) for how in ("blocks", "none")]  # type: ignore[arg-type]
        apart = [max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True)) for losses, _ in both]
        found[str(config.zero_stage)] = [apart, [relative_error(way, exact_way) for _, way in both]]
    return {"found": found, "graphs": graphs(), "breaks": len(counters["graph_break"])}


def test_compiled_blocks_under_every_stage(tmp_path: Path) -> None:
    """The compiler rounds less often than torch, and so must be at most about as far from fp32. In fp32: test_options.py."""
    engines = [EngineConfig(stage, "bf16") for stage in (1, 2, 3)]  # type: ignore[arg-type]
    result = run_on_ranks("tests.vitscale.test_compute:compiled_and_not", 2, {"engines": [to_dict(engine) for engine in engines]}, tmp_path)
    for stage, ((ours, plain), (our_way, plain_way)) in result["found"].items():
        assert plain > 1e-4, "bf16 must be seen to round"
        assert ours < 2 * plain, stage
        assert our_way < 1.5 * plain_way, stage
    assert result["graphs"] == 2 * 2  # to train and to evaluate; once for all stages but 3, whose weights are of another kind
    assert result["breaks"] == 0


def interrupted(payload: dict[str, Any]) -> dict[str, Any]:
    """A run that is compiled, whole, and one that is stopped and goes on; the phases it told, and Python's collections of garbage."""
    config: TrainConfig = from_dict(TrainConfig, payload["config"])
    phases: list[str] = []
    collected: list[int] = []
    gc.callbacks.append(lambda phase, info: collected.append(len(phases)) if phase == "start" else None)
    for name, stops in (("whole", [None]), ("stopped", [STOP, None]), ("plain", [None])):
        for stop_at in stops:
            out = f"{config.out}-{name}"
            to = replace(config if name != "plain" else with_engine(config, compile="none"), out=out)
            Path(out).mkdir(exist_ok=True)
            open_run(to, 1)
            train(to, stop_at=stop_at, beat=lambda step, samples_seen, phase: phases.append(phase))
            if name == "whole":
                whole, collections = list(phases), list(collected)
    return {"phases": whole, "collections": collections}


def test_a_compiled_run_goes_on_as_if_never_stopped(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    config = with_engine(config, zero_stage=1, compile="blocks")
    config = replace(config, model=replace(config.model, drop_path_rate=0.1, num_classes=0), eval_data=str(dataset / "val"), eval_every=10)
    config = resolve(replace(config, micro_batch_size=12, steps=12), 1)
    told = run_on_ranks("tests.vitscale.test_compute:interrupted", 1, {"config": to_dict(config)}, tmp_path)
    whole, stopped, plain = (Path(f"{config.out}-{name}") for name in ("whole", "stopped", "plain"))
    check_alike(whole, stopped)
    np.testing.assert_allclose(
        list(losses_in(whole).values()), list(losses_in(plain).values()), rtol=1e-4
    )  # AdamW's first steps are all signs
    newest, _ = checkpoint.newest_durable(whole)
    assert newest
    names = {tensor.name for tensor in checkpoint.describe(newest).tensors}
    assert names == {name for name, _ in ViT(config.model).named_parameters()}
    log = (tmp_path / "rank-0.log").read_text()
    assert "attention by flash, blocks compiled\n" in log
    assert "compiled blocks in " in log
    phases = told["phases"]
    assert COMPILING in phases[:4], "the first step compiles"
    assert 0 < sum(at > 0 for at in told["collections"]) < config.steps + 10, "Python collects garbage at logged steps alone"
    assert phases[phases.index(EVALUATING) - 1 : phases.index(EVALUATING) + 2].count(COMPILING) == 1, "and so does the first evaluation"


def test_a_compilation_is_watched_whenever_it_comes() -> None:
    begun: list[int] = []
    model = random_vit(MODEL)
    compile_blocks(model, backend="aot_eager")
    watch = Compiling(lambda: begun.append(graphs()))
    with torch.no_grad():
        model(random_images(MODEL, 4))
        assert len(begun) == 1
        assert watch.news()[0].startswith("compiled blocks in ")
        model(random_images(MODEL, 4))
        assert (len(begun), watch.news()) == (1, [])
        model(random_images(MODEL, 3))
        assert len(begun) == 2
        assert watch.news()
        watch.close()
        model.train()(random_images(MODEL, 3))
    assert graphs() == 3
    assert (len(begun), watch.news()) == (2, []), "nobody watches any more"


# ---------------------------------------------------------------------------------------------------------------------------------------
# float8
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_float8_needs_a_gpu_that_has_it() -> None:
    check_float8(HOPPER)
    with pytest.raises(ConfigError, match=r"capability 8\.0"):
        check_float8(AMPERE)
    with pytest.raises(ConfigError, match="this is a CPU"):
        check_on_cpu(EngineConfig(float8=True))
    for stage in (1, 2, 3):
        assert EngineConfig(stage, float8=True).compilation(on_gpu=True) == "blocks", "without, it is slower than bf16"


FLOAT8_MODEL = replace(MODEL, depth=4, width=64, mlp_dim=128, image_size=(8, 32), num_classes=8)


def stripes(step: int) -> tuple[Tensor, Tensor]:
    """Noisy images whose stripes tell their class."""
    generator = torch.Generator().manual_seed(step)
    labels_B = torch.randint(8, (32,), generator=generator)
    waves_BW = torch.sin((labels_B + 1)[:, None] * torch.arange(32) / 5)
    return waves_BW[:, None, None] + torch.randn(32, 3, 8, 32, generator=generator), labels_B


def losses_in_bf16(*, float8: bool, steps: int = 200) -> list[float]:
    model = ViT(FLOAT8_MODEL)
    initialize(model, 0)
    if float8:
        assert to_float8(model.train(), emulate=True) == 2 * 4
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for step in range(steps):
        images_BCHW, labels_B = stripes(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images_BCHW).float(), labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_float8_learns_as_well_as_bf16() -> None:
    """Rounded as float8 is, multiplied as a CPU can: the losses of steps differ, what is reached does not."""
    bf16, float8 = losses_in_bf16(float8=False), losses_in_bf16(float8=True)
    largest, reached = max(abs(a - b) for a, b in zip(bf16, float8, strict=True)), (np.mean(float8[-50:]), np.mean(bf16[-50:]))
    print(f"float8 reaches {reached[0]:.4f}, bf16 {reached[1]:.4f}; at most {largest:.4f} apart in a step")
    assert bf16[0] > 2
    assert reached[1] < 0.2, "the model must learn, or the same losses would say little"
    assert 0 < largest < 0.1
    assert abs(reached[0] / reached[1] - 1) < 0.05


def in_float8(payload: dict[str, Any]) -> list[Any]:
    """Losses under each stage in bf16 and in float8, with the names that parameters have and which layers were converted."""
    found = []
    for stage, float8, compiled in payload["cases"]:
        model = random_vit(replace(MODEL, depth=4)).train()
        if float8:
            to_float8(model, emulate=True)
        if compiled:
            compile_blocks(model, backend="aot_eager")
        settings = {"zero_optimization": {"leaf_module": BLOCKS_ARE_LEAVES}} if stage == 3 else {}
        engine = Engine(model, EngineConfig(stage, "bf16", compile="none", deepspeed=settings), SGD, micro_batch_size=4, grad_accum_steps=1)
        losses = []
        for step in range(4):
            loss = nn.functional.cross_entropy(engine.forward(random_images(MODEL, 4, step)).float(), torch.arange(4))
            engine.backward(loss)
            engine.step(0.1)
            losses.append(loss.item())
        converted = [name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"]
        dtypes = {str(engine.gather(name, checkpoint.WEIGHT).dtype) for name in engine.shapes}
        found.append([losses, list(engine.shapes), converted, sorted(dtypes)])
        engine.close()
    return found


def test_float8_under_every_stage_keeps_names_and_masters(tmp_path: Path) -> None:
    cases = [(1, False, False), *((stage, True, compiled) for stage in (1, 2, 3) for compiled in (False, True))]
    plain, *others = run_on_ranks("tests.vitscale.test_compute:in_float8", 1, {"cases": cases}, tmp_path)
    inner = {f"blocks.{i}.{layer}" for i in (1, 2) for layer in FLOAT8_LAYERS}
    for (stage, _, compiled), (losses, names, converted, dtypes) in zip(cases[1:], others, strict=True):
        assert set(converted) == inner
        assert names == plain[1]
        assert dtypes == ["torch.float32"]
        assert losses != plain[0], "float8 rounds"
        np.testing.assert_allclose(losses, plain[0], rtol=0.05, err_msg=f"stage {stage}, compiled {compiled}")


# ---------------------------------------------------------------------------------------------------------------------------------------
# The host does not wait for the device
# ---------------------------------------------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Where numbers are read off tensors, for each of which a host waits for its device: the innermost frames of ours and of all others.

    Those of torch's optimizers are left out, whose count of steps lies on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
            files = [Path(frame.filename) for frame in traceback.extract_stack()]
            if not any("optim" in file.parts and "torch" in file.parts for file in files):
                self.ours.append(next(file.name for file in reversed(files) if file.parent == Path(compute.__file__).parent))
        return function(*args, **kwargs or {})


def reads_by_stage(payload: dict[str, Any]) -> dict[str, list[int]]:
    """Host reads of each micro-batch of a step."""
    found = {}
    for stage, precision in payload["engines"]:
        model = random_vit(replace(MODEL, drop_path_rate=0.4)).train()
        engine = Engine(model, EngineConfig(stage, precision), SGD, micro_batch_size=4, grad_accum_steps=2)
        for _ in range(2):
            counts = []
            for micro in range(2):
                with HostReads() as reads:
                    engine.backward(engine.forward(random_images(MODEL, 4), torch.arange(4) + micro).square().mean())
                    engine.step(0.1)
                counts.append(len(reads.ours))
        found[f"{stage} {precision}"] = counts
        engine.close()
    return found


def test_a_step_reads_the_device_for_its_gradients_norm_alone(tmp_path: Path) -> None:
    """Once, ours without ZeRO and DeepSpeed's under stage 3, to leave a step out. DeepSpeed's others find the device idle:

    once for each of the two groups to clip it (stages 1 and 2).
    """
    expected = {"0 fp32": 1, "1 fp32": 3, "1 bf16": 3, "2 fp32": 3, "2 bf16": 3, "3 fp32": 1, "3 bf16": 1}
    payload = {"engines": [(int(name[0]), name[2:]) for name in expected]}
    found = run_on_ranks("tests.vitscale.test_compute:reads_by_stage", 1, payload, tmp_path)
    assert found == {name: [0, count] for name, count in expected.items()}


def reads_of_a_run(payload: dict[str, Any]) -> list[list[str]]:
    """Where the loop reads numbers off tensors, by step."""
    config: TrainConfig = from_dict(TrainConfig, payload["config"])
    Path(config.out).mkdir(exist_ok=True)
    open_run(config, 1)
    steps: list[int] = []
    with HostReads() as reads:
        train(config, beat=lambda step, samples_seen, phase: steps.append(len(reads.ours)))
    return [reads.ours[a:b] for a, b in itertools.pairwise(steps)]


def test_between_logged_steps_the_loop_reads_nothing_but_the_norm(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, log_every=1000, steps=8, mix=MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0))
    config = resolve(with_engine(replace(config, model=replace(config.model, patch_dropout=0.3)), zero_stage=3), 1)
    by_step = run_on_ranks("tests.vitscale.test_compute:reads_of_a_run", 1, {"config": to_dict(config)}, tmp_path)
    assert by_step[1:7] == [["engine.py"]] * 6
