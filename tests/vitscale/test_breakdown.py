"""The tables of a profile: names of real kernels, FLOPs of operators, and a trace as a GPU leaves it, made by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vitscale.breakdown import breakdown, format_breakdown, kind_of, operator_flops

NAMES = {
    "matrix products": (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::convolution_backward", "aten::mkldnn_convolution",
        "aten::_scaled_mm",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_segment_k_off_kernel__5x_cublas",
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nt_align8>(cutlass_80_tensorop_bf16_s16816gemm)",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, cutlass::gemm::collective>>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, false, false>",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_g1_tensor16x8x16_kernel",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false, false>",
        "triton_tem_fused_addmm_gelu_3", "triton_tem_fused_mm_3",
    ),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention", "aten::_efficient_attention_forward",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4, false, false, cutlass::bfloat16_t>, false, false, false>",
        "void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<96, 64, 128, 8, 2, 4, 4, true, cutlass::bfloat16_t>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32_64x64x128_1x4x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t, cutlass::arch::Sm80>)",
        "ScaledDotProductFlashAttentionForCpuBackward0",
    ),
    "norms": (
        "aten::native_layer_norm", "aten::native_layer_norm_backward", "triton_per_fused_add_native_layer_norm_4",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>(int, float, c10::BFloat16*)",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16, float, 64u, 1u>(long, long)",
        "void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<c10::BFloat16, float, false>(c10::BFloat16*)",
    ),
    "collectives": (
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL",
        "ncclKernel_AllGather_RING_LL_Sum_int8_t", "c10d::allreduce_", "gloo:all_reduce", "vitscale:communication",
    ),
    "optimizer": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::FusedOptimizerTensorList"
        "Metadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, (at::native::ADAM_MODE)1, false>>",
        "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float, float, int>, float, float>", "aten::_fused_adamw_",
        "aten::_foreach_lerp_",
    ),
    "copies": (
        "aten::copy_", "Memcpy DtoD (Device -> Device)", "Memset (Device)", "aten::zero_", "aten::cat", "triton_poi_fused__to_copy_2",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>(int)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 3, 64, 64, 16, 8>",
    ),
    "elementwise": (
        "aten::add", "aten::mul_", "aten::gelu_backward", "triton_poi_fused_add_gelu_7", "triton_red_fused_sum_1",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, at::native::GeluType)>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned>>",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>(float*, float const*, int, int, int)",
    ),
    "other": ("aten::empty", "aten::as_strided", "aten::view", "aten::transpose", "AddmmBackward0"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_names_of_operators_and_kernels_tell_their_kind(kind: str, name: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 4, 17, 16)])
def test_flops_of_an_operator_are_those_that_torch_counts(shape: tuple[int, int, int, int]) -> None:
    B, H, N, D = shape
    a, b, bias = torch.randn(N, D), torch.randn(D, H), torch.randn(H)
    q, k = torch.randn(shape), torch.randn(B, H, 2 * N, D)
    images, kernel = torch.randn(B, 3, 4 * D, 2 * D), torch.randn(H, 3, D, D)
    calls = {
        "aten::mm": (lambda: a @ b, [a, b]),
        "aten::addmm": (lambda: torch.addmm(bias, a, b), [bias, a, b]),
        "aten::bmm": (lambda: torch.bmm(q[0], q[0].mT), [q[0], q[0].mT]),
        "aten::convolution": (lambda: F.conv2d(images, kernel, stride=D), [images, kernel]),
    }
    for name, (call, inputs) in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        assert operator_flops(name, [list(t.shape) for t in inputs]) == counter.get_total_flops(), name
    forward = operator_flops("aten::_scaled_dot_product_cudnn_attention", [list(t.shape) for t in (q, k, k)])
    backward = operator_flops("aten::_scaled_dot_product_cudnn_attention_backward", [list(t.shape) for t in (q, q, k, k)])
    assert forward == sdpa_flop_count(q.shape, k.shape, k.shape)
    assert backward == 2 * forward
    assert operator_flops("aten::add", [[N, D], [N, D]]) == 0


MAIN, AUTOGRAD = 7, 8


def host(name: str, start: float, duration: float, tid: int = MAIN, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "tid": tid, "args": args}


def kernel(name: str, start: float, duration: float, by: int, stream: int = 13) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "tid": stream, "args": {"External id": by}}


def of_a_gpu() -> dict[str, Any]:
    """A step of 1,000 us: the host runs ahead in 400, autograd has a thread of its own, and an all-reduce is half hidden."""
    ranges = [
        host("ProfilerStep#20", 0, 1000, cat="user_annotation"),
        host("vitscale:forward", 10, 90, cat="user_annotation"),
        host("vitscale.module:blocks.mlp", 20, 60, cat="user_annotation"),
        host("vitscale:backward", 100, 200, cat="user_annotation"),
        host("vitscale:update", 300, 100, cat="user_annotation"),
    ]
    operators = [
        host("aten::addmm", 30, 10, **{"External id": 1, "Sequence number": 5, "Input Dims": [[64], [100, 32], [32, 64]]}),
        host("autograd::engine::evaluate_function: AddmmBackward0", 110, 50, AUTOGRAD, **{"External id": 2, "Sequence number": 5}),
        host("aten::mm", 120, 10, AUTOGRAD, **{"External id": 3, "Input Dims": [[100, 64], [64, 32]]}),
        host("nccl:all_reduce", 170, 10, AUTOGRAD, **{"External id": 4}),
        host("aten::_fused_adamw_", 310, 10, **{"External id": 5}),
        host("aten::_foreach_lerp_", 330, 10, **{"External id": 6}),
    ]
    kernels = [
        kernel("nvjet_hsh_256x128", 100, 200, 1),
        kernel("nvjet_hsh_128x128", 300, 300, 3),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 500, 200, 4, stream=20),  # 100 of its 200 while the product still runs
        kernel("void multi_tensor_apply_kernel<FusedAdamMathFunctor>", 750, 100, 5),
        kernel("void multi_tensor_apply_kernel<LerpFunctor>", 850, 50, 6),
        kernel("of the step before", -50, 20, 99),
    ]
    return {"traceEvents": [*ranges, *operators, *kernels, {"ph": "M", "name": "process_name"}]}


def test_a_trace_of_a_gpu_is_put_down_to_phases_kinds_and_modules() -> None:
    found = breakdown(of_a_gpu())
    assert (found["steps"], found["step_ms"], found["on"]) == (1, 1.0, "device")
    assert found["busy"] == pytest.approx(0.75)

    def ms(table: str) -> dict[str, float]:
        return {name: round(row["ms"], 6) for name, row in found[table].items()}

    assert ms("kinds") == {"matrix products": 0.5, "idle": 0.25, "optimizer": 0.15, "collectives": 0.1}
    assert ms("phases") == {"backward": 0.4, "idle": 0.25, "forward": 0.2, "update": 0.1, "average": 0.05}
    assert ms("modules") == {"blocks.mlp": 0.5, "idle": 0.25, "(update)": 0.1, "(backward)": 0.1, "(average)": 0.05}
    flops = 2 * 100 * 32 * 64
    assert found["kinds"]["matrix products"]["tflops"] == pytest.approx(2 * flops / 500e-6 / 1e12)
    assert found["phases"]["forward"]["tflops"] == pytest.approx(flops / 200e-6 / 1e12)
    for table in ("kinds", "phases", "modules"):
        assert sum(row["share"] for row in found[table].values()) == pytest.approx(1)
    text = format_breakdown(found | {"peak_bytes": 3 * 2**30, "tflops": 12.0}, "Steps 20 to 20, rank 0")
    assert "75.0% of them busy on the device, 12 TFLOP/s of the model; at most 3.00 GiB allocated" in text
    assert "| matrix products |     0.500 |  50.0% |" in text


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        breakdown({"traceEvents": []})
