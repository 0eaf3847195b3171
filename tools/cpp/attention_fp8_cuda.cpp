// The operator of attention_fp8.cpp on a GPU, through cuDNN's graph interface: a Hopper GPU or later.
//
// It needs the headers of cuDNN and of its C++ frontend to compile (the packages nvidia-cudnn-cu13 and
// nvidia-cudnn-frontend have them), and nothing but torch to link: cuDNN itself, which torch's CUDA builds bring, is
// loaded. Plans are made at the first call of a shape, so before a CUDA graph can be captured, and kept.

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>
#include <torch/library.h>
#include <torch/torch.h>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // through which the frontend finds cuDNN
}

namespace {

namespace fe = cudnn_frontend;

constexpr float kWeightFactor = 256.0F;  // as in attention.py

// The tensors of a plan. Factors in the order in which cuDNN takes them.
enum Id : int64_t { kQuery, kKey, kValue, kResult, kQueryScale, kKeyScale, kValueScale, kUnweigh, kWeigh, kInverse,
                    kWeightAmax, kResultAmax };

void require(fe::error_t status, const char* what) {
  TORCH_CHECK(status.is_good(), "cuDNN ", what, ": ", status.get_message());
}

void load_cudnn() {
  if (fe::cudnn_dlhandle == nullptr) fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_GLOBAL);
  TORCH_CHECK(fe::cudnn_dlhandle != nullptr, "attention in FP8 needs libcudnn.so.9, which cannot be loaded: ", dlerror());
}

// softmax(Q K^T / sqrt(D)) V of one shape on one device. Calls have to follow one another, as the steps of a loop do.
class Plan {
 public:
  explicit Plan(const at::Tensor& query) {
    const int64_t batch = query.size(0), tokens = query.size(1), heads = query.size(2), size = query.size(3);
    const std::vector<int64_t> dim = {batch, heads, tokens, size};
    const std::vector<int64_t> stride = {tokens * heads * size, size, heads * size, 1};
    TORCH_CHECK(fe::detail::create_handle(&handle_) == CUDNN_STATUS_SUCCESS, "cuDNN gives no handle");
    graph_.set_io_data_type(fe::DataType_t::FP8_E4M3)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const auto codes = [&](Id id) {
      return graph_.tensor(fe::graph::Tensor_attributes().set_uid(id).set_dim(dim).set_stride(stride).set_data_type(
          fe::DataType_t::FP8_E4M3));
    };
    const auto factor = [&](Id id) {
      return graph_.tensor(fe::graph::Tensor_attributes()
                               .set_uid(id)
                               .set_dim({1, 1, 1, 1})
                               .set_stride({1, 1, 1, 1})
                               .set_data_type(fe::DataType_t::FLOAT));
    };
    auto options = fe::graph::SDPA_fp8_attributes()
                       .set_name("attention")
                       .set_generate_stats(false)
                       .set_attn_scale(1.0F / std::sqrt(static_cast<float>(size)));
    auto [result, stats, weight_amax, result_amax] =
        graph_.sdpa_fp8(codes(kQuery), codes(kKey), codes(kValue), factor(kQueryScale), factor(kKeyScale),
                        factor(kValueScale), factor(kUnweigh), factor(kWeigh), factor(kInverse), options);
    result->set_output(true).set_uid(kResult).set_dim(dim).set_stride(stride).set_data_type(fe::DataType_t::FP8_E4M3);
    for (const auto& [amax, id] : {std::pair{weight_amax, kWeightAmax}, std::pair{result_amax, kResultAmax}})
      amax->set_output(true).set_uid(id).set_dim({1, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(
          fe::DataType_t::FLOAT);
    require(graph_.validate(), "refuses the attention");
    require(graph_.build_operation_graph(handle_), "cannot express the attention");
    require(graph_.create_execution_plans({fe::HeurMode_t::A}), "has no plan");
    require(graph_.check_support(), "does not support the attention on this GPU");
    require(graph_.build_plans(), "cannot build its plan");
    int64_t bytes = 0;
    require(graph_.get_workspace_size(bytes), "does not know its workspace");
    workspace_ = at::empty({std::max<int64_t>(bytes, 1)}, query.options().dtype(at::kByte));
    const auto single = query.options().dtype(at::kFloat);
    unused_ = at::zeros({2, 4}, single);  // cuDNN wants 16 bytes of alignment
    constants_ = at::stack({at::full({4}, 1.0 / kWeightFactor, single), at::full({4}, kWeightFactor, single)});
  }

  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& scales,
           const at::Tensor& result) {
    const auto row = [](const at::Tensor& rows, int64_t number) {
      return static_cast<void*>(rows.data_ptr<float>() + number * rows.stride(0));
    };
    std::unordered_map<int64_t, void*> bound = {
        {kQuery, query.data_ptr()},          {kKey, key.data_ptr()},
        {kValue, value.data_ptr()},          {kResult, result.data_ptr()},
        {kQueryScale, row(scales, 0)},       {kKeyScale, row(scales, 1)},
        {kValueScale, row(scales, 2)},       {kInverse, row(scales, 3)},
        {kUnweigh, row(constants_, 0)},      {kWeigh, row(constants_, 1)},
        {kWeightAmax, row(unused_, 0)},      {kResultAmax, row(unused_, 1)},
    };
    TORCH_CHECK(fe::detail::set_stream(handle_, c10::cuda::getCurrentCUDAStream().stream()) == CUDNN_STATUS_SUCCESS,
                "cuDNN refuses the stream");
    require(graph_.execute(handle_, bound, workspace_.data_ptr()), "cannot run the attention");
  }

 private:
  cudnnHandle_t handle_ = nullptr;  // never destroyed, as plans are kept until the process ends
  fe::graph::Graph graph_;
  at::Tensor workspace_, unused_, constants_;
};

at::Tensor attention_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& scales) {
  for (const at::Tensor& codes : {query, key, value})
    TORCH_CHECK(codes.scalar_type() == at::kFloat8_e4m3fn && codes.is_contiguous() && codes.dim() == 4 &&
                    codes.sizes() == query.sizes(),
                "expected queries, keys and values as contiguous float8_e4m3fn [B, S, H, D] of one shape, received ",
                codes.toString(), ' ', codes.sizes());
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int>;
  static std::mutex mutex;
  static auto& plans = *new std::map<Key, std::unique_ptr<Plan>>;  // outlives every package
  const c10::cuda::CUDAGuard guard(query.device());
  const at::Tensor result = at::empty_like(query);
  const std::lock_guard lock(mutex);
  auto& plan = plans[{query.size(0), query.size(1), query.size(2), query.size(3), query.get_device()}];
  if (plan == nullptr) {
    load_cudnn();
    plan = std::make_unique<Plan>(query);
  }
  plan->run(query, key, value, scales, result);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(tmpdiff, CUDA, library) { library.impl("attention_fp8_scaled", &attention_cuda); }
