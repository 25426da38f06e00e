// Small kernels that keep or break one rule each; test_cuda_host.py says what comes of them.
#include <map>

#include "cuda/lib/ptx.cuh"

namespace lumina_kernels::cuda {
namespace {

float numbers[64];  // as global memory

Global<float> in_global() { return {numbers, numbers, numbers + 64}; }

void sum_over_the_block(bool with_barrier) {
  LUMINA_SHARED(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < 64; ++i) sum += values[i];
  in_global()[threadIdx.x] = sum;
}

void barrier_of_some() {
  if (threadIdx.x != 7) __syncthreads();
}

void barriers_at_two_lines() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void shuffle_of_some() {
  if (threadIdx.x == 40) return;
  warp_sum(1.0f);
}

void shuffle_from_outside() { __shfl_sync(0xFu << threadIdx.x / 4 % 8 * 4, 1.0f, 31); }

void shuffles() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float got[] = {__shfl_sync(kAllLanes, 1.0f * lane, 5), __shfl_xor_sync(kAllLanes, 1.0f * lane, 3),
                 __shfl_down_sync(kAllLanes, 1.0f * lane, 30),
                 __shfl_up_sync(kAllLanes, 1.0f * lane, 2, 8)};
  const float wanted[] = {5.0f, 1.0f * (lane ^ 3), 1.0f * (lane < 2 ? lane + 30 : lane),
                          1.0f * (lane % 8 < 2 ? lane : lane - 2)};
  for (int i = 0; i < 4; ++i) {
    if (got[i] != wanted[i]) cuda_host::fail("shuffle " + std::to_string(i) + " is wrong");
  }
  if (__ballot_sync(kAllLanes, lane % 2 == 0) != 0x55555555u || __any_sync(kAllLanes, lane < 0) ||
      !__all_sync(kAllLanes, lane >= 0)) {
    cuda_host::fail("a vote is wrong");
  }
}

void exchange_in_a_warp(bool with_barrier) {
  LUMINA_SHARED(float, values, 64);
  values[threadIdx.x] = 1.0f;
  warp_sum(1.0f);  // orders no memory
  if (with_barrier) __syncwarp();
  const float other = values[threadIdx.x ^ 1];
  in_global()[threadIdx.x] = other;
}

void write_after_read(bool with_barrier) {
  LUMINA_SHARED(float, value, 1);
  if (threadIdx.x == 0) value[0] = 1.0f;
  __syncthreads();
  const float seen = value[0];
  if (with_barrier) __syncthreads();
  if (threadIdx.x == 0) value[0] = seen + 1.0f;
}

void never_written() {
  LUMINA_SHARED(float, values, 65);
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  in_global()[threadIdx.x] = values[threadIdx.x + 1];
}

void beyond_shared() {
  LUMINA_DYNAMIC_SHARED(float, values);  // of 256 bytes
  values[threadIdx.x + 1] = 1.0f;
}

void misaligned_shared() {
  LUMINA_DYNAMIC_SHARED(float, values);
  if (threadIdx.x < 8) store_shared(values + (4 * threadIdx.x + 2), make_float4(1, 2, 3, 4));
}

void beyond_global() { in_global()[threadIdx.x + 1] = 1.0f; }
void before_global() { load_global<float>(in_global() - 1); }
void misaligned_global() { load_global<float4>(in_global() + 2); }

void copy(int waits, bool with_barrier, int valid) {
  LUMINA_DYNAMIC_SHARED(float, values);
  const unsigned i = threadIdx.x, bytes = static_cast<unsigned>(valid);
  if (i < 16) copy_async_16(values + 4 * i, in_global() + 4 * i, valid);
  copy_async_commit();
  if (waits == 0) copy_async_wait<0>();
  if (waits == 1) copy_async_wait<1>();
  if (with_barrier) __syncthreads();
  const float mine = values[i], wanted = i % 4 * 4 < bytes ? numbers[i] : 0.0f;
  if (mine != wanted) cuda_host::fail("a copy is wrong");
}

// D = A B with A (16, kK), B (8, kK) transposed, by ldmatrix and mma, against loops.
template <int kK>
void matrices() {
  LUMINA_SHARED(uint16_t, A, 16 * kK);
  LUMINA_SHARED(uint16_t, B, kK * 8);
  for (int i = threadIdx.x; i < 16 * kK; i += 32) A[i] = float_to_half((i * 7 % 13) - 6.0f);
  for (int i = threadIdx.x; i < kK * 8; i += 32) B[i] = float_to_half((i * 5 % 11) - 5.0f);
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[kK / 4], b[kK / 8];
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  if constexpr (kK == 16) {
    ldmatrix_x4(a, A + (lane % 16 * kK + lane / 16 * 8));
    ldmatrix_x2_trans(b, B + lane % 16 * 8);
    mma_m16n8k16_half(d, a, b);
  } else {
    ldmatrix_x2(a, A + lane % 16 * kK);
    for (int half = 0; half < 2; ++half) {
      const uint16_t bits = B[(lane % 4 * 2 + half) * 8 + lane / 4];
      b[0] = half == 0 ? bits : b[0] | static_cast<uint32_t>(bits) << 16;
    }
    mma_m16n8k8_half(d, a, b);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float wanted = 1.0f;
    for (int k = 0; k < kK; ++k) {
      wanted += half_to_float(A[row * kK + k]) * half_to_float(B[k * 8 + column]);
    }
    if (d[i] != wanted) cuda_host::fail("a product is wrong");
  }
}

void rounding() {
  const float values[] = {1.0f, 1.00048828125f, 1.00146484375f, 65520.0f, 3e-8f, -2.5f};
  const uint16_t half[] = {0x3C00, 0x3C00, 0x3C02, 0x7C00, 0x0001, 0xC100};
  const uint16_t bfloat16[] = {0x3F80, 0x3F80, 0x3F80, 0x4780, 0x3301, 0xC020};
  for (int i = 0; i < 6; ++i) {
    if (float_to_half(values[i]) != half[i] || float_to_bfloat16(values[i]) != bfloat16[i]) {
      cuda_host::fail("rounding " + std::to_string(i) + " is wrong");
    }
  }
  if (half_to_float(0x3C02) != 1.001953125f || bfloat16_to_float(0xC020) != -2.5f ||
      pack_half(1.0f, -2.5f) != 0xC1003C00u || pack_bfloat16(1.0f, -2.5f) != 0xC0203F80u) {
    cuda_host::fail("a conversion is wrong");
  }
}

struct Rule {
  void (*body)();
  unsigned threads = 64;
};

const std::map<std::string, Rule> rules{
    {"barrier", {[] { sum_over_the_block(true); }}},
    {"no barrier", {[] { sum_over_the_block(false); }}},
    {"barrier of some", {barrier_of_some}},
    {"barriers at two lines", {barriers_at_two_lines}},
    {"shuffle of some", {shuffle_of_some}},
    {"shuffle from outside", {shuffle_from_outside}},
    {"shuffles", {shuffles}},
    {"barrier of a warp", {[] { exchange_in_a_warp(true); }}},
    {"no barrier of a warp", {[] { exchange_in_a_warp(false); }}},
    {"write after read", {[] { write_after_read(true); }}},
    {"write after read, no barrier", {[] { write_after_read(false); }}},
    {"never written", {never_written}},
    {"beyond shared", {beyond_shared}},
    {"misaligned shared", {misaligned_shared}},
    {"beyond global", {beyond_global}},
    {"before global", {before_global}},
    {"misaligned global", {misaligned_global}},
    {"copy", {[] { copy(0, true, 16); }}},
    {"copy with zeros", {[] { copy(0, true, 8); }}},
    {"copy without a wait", {[] { copy(1, true, 16); }}},
    {"copy without a barrier", {[] { copy(0, false, 16); }}},
    {"too many threads", {[] {}, 1025}},
    {"m16n8k16", {matrices<16>, 32}},
    {"m16n8k8", {matrices<8>, 32}},
    {"rounding", {rounding, 1}},
};

}  // namespace
}  // namespace lumina_kernels::cuda

// "" or what was wrong.
extern "C" __attribute__((visibility("default"))) const char* cuda_host_try(const char* name) {
  static std::string outcome;
  using namespace lumina_kernels::cuda;
  for (int i = 0; i < 64; ++i) numbers[i] = 1.0f + i;
  auto rule = rules.at(name);
  outcome.clear();
  for (int again = 0; again < 2 && outcome.empty(); ++again) {  // forwards and backwards
    try {
      cuda_host::run(
          "rule", dim3(2), dim3(rule.threads), 256,
          [](void* context) { static_cast<Rule*>(context)->body(); }, &rule);
    } catch (const std::exception& error) {
      outcome = error.what();
    }
  }
  return outcome.c_str();
}
