// Entry points of the MoE: what is supported, and which way a batch goes.
#include "moe.cuh"

namespace dsv4 {
namespace {

bool is_supported(const Dsv4MoeArgs& a) {
  constexpr int kMaxTokens = 1 << 20;
  return a.num_tokens >= 0 && a.num_tokens <= kMaxTokens && a.top_k >= 1 && a.top_k <= kMaxTopK &&
         a.num_experts >= 1 && a.num_experts <= kMaxExperts && a.hidden_size > 0 &&
         a.hidden_size % kGroupSize == 0 && a.inter_size > 0 && a.inter_size % kGroupSize == 0 &&
         // a k16 step's stride times the steps of a group, in an int
         (int64_t)a.hidden_size / kBlockRows * kTileBytes * kSteps <= INT32_MAX &&
         (int64_t)2 * a.inter_size / kBlockRows * kTileBytes * kSteps <= INT32_MAX;
}

}  // namespace
}  // namespace dsv4

extern "C" size_t dsv4_moe_workspace_bytes(int32_t num_tokens, int32_t top_k, int32_t num_experts,
                                           int32_t hidden_size, int32_t inter_size) {
  Dsv4MoeArgs args = {};
  args.num_tokens = num_tokens;
  args.top_k = top_k;
  args.num_experts = num_experts;
  args.hidden_size = hidden_size;
  args.inter_size = inter_size;
  if (!dsv4::is_supported(args)) return 0;
  dsv4::Moe moe = dsv4::make_moe(args);
  size_t grouped = num_tokens > dsv4::kDecodeTokens ? dsv4::grouped_workspace_bytes(moe) : 0;
  if (moe.num_tokens > dsv4::kDecodeTokens) moe.num_tokens = dsv4::kDecodeTokens;
  size_t decode = dsv4::decode_workspace_bytes(moe);
  return grouped > decode ? grouped : decode;
}

extern "C" int dsv4_moe(const Dsv4MoeArgs* args, void* stream) {
  if (!dsv4::is_supported(*args)) return cudaErrorInvalidValue;
  if (args->num_tokens == 0) return cudaSuccess;
  dsv4::Moe moe = dsv4::make_moe(*args);
  auto run = args->num_tokens <= dsv4::kDecodeTokens ? dsv4::run_decode : dsv4::run_grouped;
  return run(moe, args->workspace, (cudaStream_t)stream);
}

extern "C" const char* dsv4_error_string(int error) {
  return cudaGetErrorString((cudaError_t)error);
}
