"""Faults of one line that the tests must catch."""

from __future__ import annotations

from mutation import (
    CPU,
    NOISE,
    OPS,
    OPTIM,
    UPDATE,
    Check,
    Mutation,
    cpu_far,
    cpu_near,
    cuda,
    far,
    near,
    triton,
)

# What survived before there were tests that leave the first tile, compare the bits of noise, and
# know streams and devices.
_ONCE_SURVIVED = (
    Mutation("csrc/cuda/launch.cuh", "config.stream = stream;", "", near("column_sq_norms")),
    Mutation(
        "csrc/cuda/taylor_moments.cu",
        "const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());",
        "",
        near("taylor_moments_"),
    ),
    Mutation(
        "csrc/cuda/masked_grad_norm.cu",
        "const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());",
        "",
        near("masked_grad_norm"),
    ),
    Mutation(
        "csrc/cuda/tiles.cuh", "[row(lane) * mask.stride]", "[row(lane)]", near("taylor_moments_")
    ),
    Mutation(
        "ssah_kernels/backends/triton/taylor_moments.py",
        "mask_ptr += first * mask_stride",
        "mask_ptr += first",
        triton("taylor_moments_"),
    ),
    Mutation("csrc/cuda/sums.cuh", "flushed ? slot : 0.0", "0.0", far("taylor_moments_")),
    Mutation(
        "csrc/cuda/masked_tiles.cuh",
        "start = block_row * kRowsPerWarp * row_step;",
        "start = 0;",
        far("masked_grad_norm"),
    ),
    Mutation(
        "csrc/cuda/masked_grad_norm.cu",
        "for (int64_t i = threadIdx.x; i < blocks; i += kThreads)",
        "if (const int64_t i = threadIdx.x; i < blocks)",
        far("masked_grad_norm"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_grad_norm.py",
        "for start in range(0, parts, BLOCK):",
        "for start in range(0, BLOCK, BLOCK):",
        triton("masked_grad_norm"),
    ),
    Mutation(
        "csrc/cuda/masked_rounding.cuh",
        "static_cast<uint32_t>(element >> 32)",
        "0u",
        Check("kernels/test_cuda_faults.py", NOISE),
    ),
    Mutation(
        "csrc/cpu/masked_update.h",
        "if ((unsigned long)n > to_wrap) n = (long)to_wrap;",
        "",
        Check(CPU, NOISE),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_rounding.py",
        "key_1 += word(element, 32)",
        "key_1 += 0",
        triton("masked_adamw_"),
    ),
    Mutation(
        "csrc/cpu/moments.h",
        "mean[begin + c], m2[begin + c]);\n      }",
        "mean[range.begin + c], m2[begin + c]);\n      }",
        cpu_far("channel_moments_"),
    ),
    Mutation(
        "csrc/cpu/channel_sums.h",
        "totals[s][begin + c] +=",
        "totals[s][range.begin + c] +=",
        cpu_far("taylor_moments_"),
    ),
    Mutation(
        "csrc/cpu/masked_update.h",
        "(signed_sums, t.signed_sum + block.column_begin,",
        "(signed_sums, t.signed_sum,",
        cpu_far("masked_sgd_"),
    ),
    Mutation(
        "csrc/cuda/masked_rounding.cuh",
        "if constexpr (kNoise && kIsBfloat16<T>)",
        "if constexpr (false)",
        near("masked_adamw_"),
    ),
    Mutation(
        "csrc/cuda/masked_host.cu",
        "part.first_element = begin;",
        "part.first_element = 0;",
        near("masked_adamw_"),
    ),
    Mutation(
        "csrc/cuda/taylor_moments.cu",
        "  for (Segment segment(plan); segment.any(); segment.next()) {\n    sums.clear();",
        "  sums.clear();\n  for (Segment segment(plan); segment.any(); segment.next()) {",
        far("taylor_moments_"),
    ),
)

_CUDA = (
    Mutation(
        "csrc/cuda/moments.cuh",
        "there = flushed == 0 ? here : slot_mean;",
        "there = here;",
        far("channel_moments_"),
    ),
    Mutation(
        "csrc/cuda/masked_update.cuh",
        "if (compensates) w[i] = compensated(at.p.at[k + i], at.c.at[k + i]);",
        "",
        near("masked_adamw_"),
    ),
    Mutation(
        "csrc/cuda/masked_importance.cuh",
        "parts[(target.n_parts + part) * units]",
        "parts[part * units]",
        near("masked_sgd_"),
    ),
    Mutation("csrc/cuda/gated_moments.cu", "if (counts) ", "", near("gated_moments")),
    Mutation(
        "csrc/cuda/masked_tiles.cuh",
        "if (selected < 0 || selected >= limit) __trap();",
        "",
        cuda("an_index_beyond"),
    ),
    Mutation(
        "csrc/cuda/gated_product.cu",
        "if (wanted != held) {",
        "if (held < 0) {",
        near("gated_product"),
    ),
    Mutation(
        "csrc/cuda/gated_product.cu",
        "if (wanted < 0 || wanted >= arms) __trap();",
        "",
        cuda("what_would_harm_memory_is_refused and gated_product"),
    ),
    Mutation("csrc/cuda/masked_sgd.cu", "1 - settings.dampening", "1", near("masked_sgd_")),
    Mutation(
        "csrc/cuda/tiles.cuh",
        "mask.data[row(lane) * mask.stride] != 0",
        "mask.data[row(lane) * mask.stride] == 1",
        cuda("every_byte"),
    ),
    Mutation(
        "csrc/cuda/moments.cuh",
        "(a - b) * (a - b) * (R(1) / kRows)",
        "(a - b) * (a - b) * (R(1) / 2)",
        near("channel_moments_"),
    ),
    Mutation("csrc/cuda/moments.cuh", "      m2[k] = 0;\n", "", far("channel_moments_")),
    Mutation(
        "csrc/cuda/moments.cuh",
        "delta * (delta * (before * weight));  //",
        "delta * delta * (before * weight);  //",
        cuda("large_mean_in_16_bits"),
    ),
    Mutation("csrc/cuda/types.cuh", ": word & 0xffff0000u", ": word", near("channel_moments_")),
    Mutation(
        "csrc/cuda/tiles.cuh",
        "waves <= kMostWaves",
        "waves <= 1",
        Check("kernels/test_cuda_faults.py", "chunks_fill"),
    ),
    Mutation(
        "csrc/cuda/activations.cuh",
        "return {value, exp_minus_z * value};",
        "return {value, R(1) - value};",
        cuda("ends_of_the_range and gated_moments_backward"),
    ),
    Mutation(
        "csrc/cuda/masked_rounding.cuh",
        "word < kLargestNaN ? word : kLargestNaN",
        "word",
        Check("kernels/test_cuda_faults.py", "noise_keeps"),
    ),
    Mutation(
        "csrc/cuda/masked_update.cuh",
        "row_noise.bits(k + i)",
        "row_noise.bits(k)",
        near("masked_adamw_"),
    ),
    Mutation(
        "csrc/cuda/masked_update.cuh",
        "load(rows[1], row + place.row_step)",
        "load(rows[1], row)",
        near("masked_sgd_"),
    ),
    Mutation(
        "csrc/cuda/masked_host.cu",
        "t.signed_sums == nullptr && t.compensation == nullptr",
        "t.signed_sums == nullptr",
        near("masked_adamw_"),
    ),
)

_CPU = (
    Mutation(
        "csrc/cpu/host.cpp",
        "(flags[positions[i]] != 0) == keep",
        "flags[positions[i]] == (keep ? 1 : 0)",
        Check(CPU, "every_byte"),
    ),
    Mutation(
        "csrc/cpu/masked_update_host.cpp",
        "t.unscale = unscale;",
        "t.unscale = 1;",
        cpu_near("masked_sgd_"),
    ),
    Mutation(
        "csrc/cpu/masked_update_host.cpp",
        "entries[i] > entries[i - 1]",
        "entries[i] >= entries[i - 1]",
        Check(UPDATE, "names_the_wrong_argument"),
    ),
    Mutation(
        "csrc/cpu/masked_adamw.cpp",
        "rate / (1 - std::pow(beta1, t))",
        "rate / (1 - std::pow(beta1, t + 1))",
        cpu_near("masked_adamw_"),
    ),
    Mutation(
        "csrc/cpu/bit_masked_adamw.h",
        "if (trained == 0) continue;",
        "if (trained <= 1) continue;",
        cpu_near("bit_masked_adamw_"),
    ),
    Mutation(
        "csrc/cpu/bit_masked_adamw.h",
        "(unsigned)element,",
        "(unsigned)k,",
        cpu_near("bit_masked_adamw_"),
    ),
    Mutation(
        "csrc/cpu/gated_moments.cpp",
        "rows.insert(rows.end(), masked.begin(), masked.end());",
        "rows.insert(rows.end(), masked.size(), 0);",
        cpu_near("gated_moments"),
    ),
    Mutation(
        "csrc/cpu/masked_sgd.cpp", "maximize ? -scale : scale", "scale", cpu_near("masked_sgd_")
    ),
    Mutation(
        "csrc/cpu/masked_rounding.h",
        "const vuint noise = noise_of<kWhich>(bits);",
        "const vuint noise = noise_of<0>(bits);",
        cpu_near("masked_adamw_"),
    ),
    Mutation(
        "csrc/cpu/masked_grad_norm.h",
        "total += low[i] + high[i];",
        "total += 2 * low[i];",
        cpu_near("masked_grad_norm"),
    ),
)

_TRITON = (
    Mutation(
        "ssah_kernels/backends/triton/moments.py",
        "hi = tl.where(n > 0, hi, centre)",
        "hi = centre",
        triton("channel_moments_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_rules.py",
        "to(X), step == 1",
        "to(X), step == 2",
        triton("masked_sgd_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_list.py",
        "parts = tiles[1] if units == 0 else tiles[0]",
        "parts = tiles[0]",
        triton("masked_sgd_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_update.py",
        "rounded(w, bits, 0, NOISE, P)",
        "rounded(w, bits, 1, NOISE, P)",
        triton("masked_adamw_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/device.py",
        "for start in range(0, chunks, CHUNKS):",
        "for start in range(0, CHUNKS, CHUNKS):",
        triton("taylor_moments_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/activations.py",
        "step = tl.where(z <= 0, 0.0, 1.0)",
        "step = tl.where(z <= -1, 0.0, 1.0)",
        triton("gated_moments_backward"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/bit_masked_adamw.py",
        "before_byte = tl.cumsum(of_byte, 0) - of_byte",
        "before_byte = tl.cumsum(of_byte, 0)",
        triton("bit_masked_adamw_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/bit_masked_adamw.py",
        "tl.minimum(first + STEPS, tl.cdiv(n, BLOCK))",
        "tl.minimum(first + 1, tl.cdiv(n, BLOCK))",
        triton("bit_masked_adamw_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_codes.py",
        "> (start & 0xFFFF), 1, 0)",
        ">= (start & 0xFFFF), 1, 0)",
        triton("masked_adamw_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_codes.py",
        "-tl.minimum(code, 127)",
        "-code",
        triton("masked_adamw_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/masked_rules.py",
        "g = g + momentum * b if",
        "g = g + b if",
        triton("masked_sgd_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/moments.py",
        "m2 + m2_b + delta * delta * (n * weight)",
        "m2 + m2_b",
        triton("channel_moments_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/moments.py",
        "m2 = tl.sum(m2 + n * (deviation * deviation), 0)",
        "m2 = tl.sum(m2, 0)",
        triton("channel_moments_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/moments.py",
        "mean_b - centre[None, :]",
        "mean_b - mean[None, :]",
        triton("channel_moments_"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/gated_product.py",
        "arm * factors_stride + cols",
        "0 * factors_stride + cols",
        triton("gated_product"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/gated_moments.py",
        "tl.where(valid, wide(h), 0) if HAS_MASK else wide(h)",
        "wide(h)",
        triton("gated_moments"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/gated_moments.py",
        "grad * wide(ups[i]) * slope",
        "grad * slope",
        triton("gated_moments_backward"),
    ),
    Mutation(
        "ssah_kernels/backends/triton/column_sq_norms.py",
        "tl.static_range(2, DEPTH + 1)",
        "tl.static_range(3, DEPTH + 1)",
        triton("column_sq_norms"),
    ),
)

_PYTHON = (
    Mutation(
        "ssah_kernels/checks/tensors.py",
        "if mask.shape != x.shape[:-1]:",
        "if mask.dim() != x.dim() - 1:",
        Check(OPS, "wrong_arguments"),
    ),
    Mutation(
        "ssah_kernels/checks/updates.py",
        "if 0 < len(given) < len(lists):",
        "if False:",
        Check(UPDATE, "names_the_wrong_argument"),
    ),
    Mutation(
        "ssah_kernels/fake.py",
        "weight.new_empty(weight.shape[1], dtype=torch.float64)",
        "weight.new_empty(weight.shape[0], dtype=torch.float64)",
        Check(OPS, "opcheck and column_sq_norms"),
    ),
    Mutation(
        "ssah_kernels/optim/calls.py",
        " + _SEED_STRIDE * self.number",
        "",
        Check(OPTIM, "share_noise"),
    ),
    Mutation("ssah_kernels/optim/base.py", ").clamp(max=1)", ")", Check(OPTIM, "max_norm")),
    Mutation("ssah_kernels/optim/base.py", ".hypot(norm)", "", Check(OPTIM, "max_norm")),
    Mutation(
        "ssah/units/ranking.py",
        "math.floor(share * n + 0.5)",
        "round(share * n)",
        Check("groups/test_groups.py", "half_a_unit"),
    ),
    Mutation(
        "ssah/units/ranking.py",
        "chosen[ties[: count - int(chosen.sum())]] = True",
        "chosen[ties[int(chosen.sum()) - count :]] = True",
        Check("groups/test_groups.py", "equals_loops or ties"),
    ),
    Mutation(
        "ssah/attribution/scores.py",
        "sums.m2 / (sums.count - 1)",
        "sums.m2 / sums.count",
        Check("attribution/test_attribution.py", "mean_and_variance"),
    ),
    Mutation(
        "ssah/interventions/columns.py",
        "weight.index_copy_(self.dim, self.index.to(weight.device), values)",
        "weight.index_copy_(self.dim, self.index.to(weight.device), values + 1e-8)",
        Check("interventions/test_ablation.py", "undone or special_values"),
    ),
    Mutation(
        "ssah/groups/transfers.py",
        "counts.double().view(side, side) / counts.sum()",
        "counts.double().view(side, side).T / counts.sum()",
        Check("groups/test_transfer.py", "not real"),
    ),
)

MUTATIONS = (*_ONCE_SURVIVED, *_CUDA, *_CPU, *_TRITON, *_PYTHON)
