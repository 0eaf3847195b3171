// The operator tmpdiff::attention_fp8_scaled for programs without Python: what it takes, and its form on a CPU.
//
// Packages of bundles that were built with --fp8-attention call it. Compiled into a program beside run_package.cpp it is
// there when the package asks for it; engines/backends/torch/attention.py is the same operator for Python, and says what
// it computes. For a GPU compile attention_fp8_cuda.cpp too. docs/torch.md has the commands.

#include <cmath>

#include <torch/library.h>
#include <torch/torch.h>

namespace {

constexpr double kWeightFactor = 256.0;  // as in attention.py
constexpr double kLimit = 448.0;         // the largest FP8 E4M3 number

// query, key, value: codes [B, S, H, D]; scales: float32 [4, 4]. The codes of the result, [B, S, H, D].
at::Tensor attention_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const at::Tensor& scales) {
  const auto wide = [](const at::Tensor& codes) { return codes.transpose(1, 2).to(at::kFloat); };
  const at::Tensor scale = scales[0][0] * scales[1][0] * std::pow(static_cast<double>(query.size(3)), -0.5);
  const at::Tensor logits = at::matmul(wide(query), wide(key).transpose(2, 3)) * scale;
  const at::Tensor weights = (logits - logits.amax(3, true)).exp();
  const at::Tensor seen = (weights * kWeightFactor).to(at::kFloat8_e4m3fn).to(at::kFloat) / kWeightFactor;
  const at::Tensor result = at::matmul(seen, wide(value)) / weights.sum(3, true);
  return result.clamp(-kLimit, kLimit).to(at::kFloat8_e4m3fn).transpose(1, 2).contiguous();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tmpdiff, library) {
  library.def("attention_fp8_scaled(Tensor query, Tensor key, Tensor value, Tensor scales) -> Tensor");
}

TORCH_LIBRARY_IMPL(tmpdiff, CPU, library) { library.impl("attention_fp8_scaled", &attention_cpu); }
