// Small kernels for Hopper that each keep or break one rule; test_cuda_hopper.py says with which
// outcome.
#include <functional>
#include <map>

#include "cuda/lib/ptx_hopper.cuh"

namespace lumina_kernels::cuda {
namespace {

constexpr int kRows = 128, kTiles = 3, kWidest = 128;
uint16_t numbers[kTiles * kRows * kWidest];  // as global memory

float number(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 13 - 6); }
float weight(int row, int k) { return static_cast<float>((row * 5 + k) % 7 - 3); }

TensorMap map_of(int columns, int rows, int bytes) {
  TensorMap map{numbers, numbers, numbers + kTiles * kRows * kWidest};
  const uint64_t sizes[] = {kWidest, kTiles * kRows, 1, 1};
  std::copy(sizes, sizes + 4, map.sizes);
  std::fill_n(map.steps, 3, 2 * kWidest);
  const uint32_t box[] = {static_cast<uint32_t>(columns), static_cast<uint32_t>(rows), 1, 1};
  std::copy(box, box + 4, map.box);
  map.swizzle = bytes;
  return map;
}

// What the kernel below does, rightly or not.
struct Plan {
  int bytes = 128;  // by which tiles are swizzled
  int more_bytes = 0, parity = 0, free_parity = 1, arrivals = 1, count = 4, shift = 0, stage = 0;
  int box_columns = 0;
  bool init_fence = true, init_barrier = true, fence = true, barrier = true, waits = true;
  bool wgmma_fence = true, commit = true, wgmma_wait = true, touches = false, other = false;
  bool overwrites = false, some = false;
};

void check(const float (&d)[16][4], int tile) {
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane_index() / 4;
  for (int i = 0; i < 64; ++i) {
    const int m = row + i % 4 / 2 * 8, n = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    float wanted = 0.0f;
    for (int k = 0; k < 16; ++k) wanted += weight(m, k) * number(tile * kRows + n, k);
    if (d[i / 4][i % 4] != wanted) cuda_host::fail("a product is wrong");
  }
}

// A thread copies tiles of 128 rows to one stage, a warp group multiplies 64 rows by each.
void ring(const Plan& plan) {
  LUMINA_SHARED(uint64_t, barriers, 2);
  LUMINA_DYNAMIC_SHARED(uint16_t, tiles);
  const Shared<uint64_t> full = barriers, free = barriers + 1;
  const Shared<uint16_t> stage = tiles + (64 * kWidest + plan.shift);
  const int columns = plan.bytes / 2, boxes = plan.bytes == 16 ? 2 : 1;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(free, plan.count);
    if (plan.init_fence) fence_proxy_async();
  }
  if (plan.init_barrier) __syncthreads();
  if (threadIdx.x >= 128) {
    for (int tile = 0; tile < kTiles && threadIdx.x == 128; ++tile) {
      mbarrier_wait(free, (tile & 1) ^ plan.free_parity);
      mbarrier_arrive_expect(full, boxes * columns * kRows * 2 + plan.more_bytes);
      for (int i = 0; i < boxes; ++i) {
        tensor_copy(stage + i * columns * kRows,
                    map_of(plan.box_columns > 0 ? plan.box_columns : columns, kRows, plan.bytes),
                    full, i * columns, tile * kRows, 0, 0);
      }
    }
    return;
  }
  const int row = static_cast<int>(threadIdx.x) / 2, half = static_cast<int>(threadIdx.x) % 2;
  for (int k = 8 * half; k < 8 * half + 8; ++k) {
    const int at =
        boxes == 2 ? k / 8 * 64 * 8 + row * 8 + k % 8 : swizzled(row * columns + k, plan.bytes);
    tiles[at] = float_to_half(weight(row, k));
  }
  if (plan.fence) fence_proxy_async();
  if (plan.barrier) named_barrier(1, 128);
  for (int tile = 0; tile < kTiles; ++tile) {
    if (plan.waits) mbarrier_wait(full, (tile & 1) ^ plan.parity);
    const int stride = 8 * plan.bytes;
    const uint64_t a = matrix_descriptor(tiles, plan.bytes, stride, 64 * 16);
    const uint64_t b = matrix_descriptor(stage + plan.stage, plan.bytes, stride, kRows * 16);
    float d[16][4];
    for (auto& four : d) std::fill_n(four, 4, 100.0f);
    if (plan.wgmma_fence) wgmma_fence();
    if (!plan.some || threadIdx.x < 96) {
      wgmma_keys<Dtype::kHalf>(d, a, plan.other && threadIdx.x < 32 ? a : b, false);
    }
    if (plan.commit) wgmma_commit();
    if (plan.touches) d[3][1] = 0.0f;
    if (plan.overwrites && threadIdx.x == 0) tiles[0] = 0;
    if (plan.wgmma_wait) wgmma_wait<0>();
    for (int i = 0; i < plan.arrivals && lane_index() == 0; ++i) mbarrier_arrive(free);
    if (plan.wgmma_wait && plan.commit && !plan.some) check(d, tile);
  }
}

// Rows of 16 keys along those of tiles of kN columns, each swizzled by `bytes`, as values are.
template <int kN>
void values(int bytes, bool changes) {
  LUMINA_SHARED(uint64_t, barrier, 1);
  LUMINA_DYNAMIC_SHARED(uint16_t, tile);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_proxy_async();
    mbarrier_arrive_expect(barrier, kN * 32);
    for (int column = 0; column < kN; column += bytes / 2) {
      tensor_copy(tile + column * 16, map_of(bytes / 2, 16, bytes), barrier, column, 16, 0, 0);
    }
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  const int lane = lane_index(), row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    const int k = lane % 4 * 2 + i / 2 * 8, m = row + i % 2 * 8;
    a[i] = pack_bfloat16(weight(m, k), weight(m, k + 1));
  }
  float d[kN / 8][4];
  for (auto& four : d) std::fill_n(four, 4, 1.0f);
  wgmma_fence();
  const int leading = bytes == 16 ? 8 * bytes : 16 * bytes,
            groups = bytes == 16 ? 16 * 16 : 8 * bytes;
  wgmma_values<Dtype::kBFloat16, kN, 0>(d, a, matrix_descriptor(tile, bytes, groups, leading));
  wgmma_commit();
  if (changes) a[1] = 0;
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    const int m = row + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float wanted = 1.0f;
    for (int k = 0; k < 16; ++k) wanted += weight(m, k) * number(16 + k, n);
    if (d[i / 4][i % 4] != wanted) cuda_host::fail("a product with values is wrong");
  }
}

// Zeros outside of the tensor, and their bytes count.
void copy_at_the_edge() {
  LUMINA_SHARED(uint64_t, barrier, 1);
  LUMINA_DYNAMIC_SHARED(uint16_t, tile);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_proxy_async();
    mbarrier_arrive_expect(barrier, 16 * 32);
    tensor_copy(tile, map_of(16, 16, 32), barrier, kWidest - 8, kTiles * kRows - 5, 0, 0);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = 0; i < 16 * 16; ++i) {
    const int row = i / 16, column = i % 16;
    const bool inside = row < 5 && column < 8;
    const float wanted = inside ? number(kTiles * kRows - 5 + row, kWidest - 8 + column) : 0.0f;
    const uint16_t found = tile[swizzled(i, 32)];
    if (half_to_float(found) != wanted) cuda_host::fail("a copy is wrong");
  }
}

// Two groups of 128 threads hand a number over by barrier 2.
void hand_over(int threads, int of_second, bool second_comes) {
  LUMINA_SHARED(float, value, 128);
  if (threadIdx.x < 128) {
    value[threadIdx.x] = 1.0f;
    named_barrier_arrive(2, threads);
  } else if (second_comes) {
    named_barrier(2, of_second);
    const float other = value[threadIdx.x - 128];
    if (other != 1.0f) cuda_host::fail("a number is wrong");
  }
}

void too_many_arrivals() {
  LUMINA_SHARED(uint64_t, barrier, 1);
  if (threadIdx.x != 0) return;
  mbarrier_init(barrier, 2);
  mbarrier_arrive_expect(barrier, 16);
  mbarrier_arrive(barrier);
  mbarrier_arrive(barrier);
}

void no_mbarrier() {
  LUMINA_SHARED(uint64_t, barrier, 1);
  mbarrier_arrive(barrier);
}

using Rule = std::function<void()>;
Rule of(const Plan& plan) {
  return [plan] { ring(plan); };
}

const std::map<std::string, Rule> rules{
    {"ring", of({})},
    {"ring, 64 bytes", of({.bytes = 64})},
    {"ring, 32 bytes", of({.bytes = 32})},
    {"ring, no swizzle", of({.bytes = 16})},
    {"values of 128", [] { values<128>(128, false); }},
    {"values of 64", [] { values<64>(128, false); }},
    {"values of 64 in two", [] { values<64>(64, false); }},
    {"values of 32", [] { values<32>(64, false); }},
    {"values of 32 in two", [] { values<32>(32, false); }},
    {"values of 64 in pieces", [] { values<64>(16, false); }},
    {"values of 8", [] { values<8>(16, false); }},
    {"copy at the edge", copy_at_the_edge},
    {"hand over", [] { hand_over(256, 256, true); }},
    {"no arrival", of({.arrivals = 0})},
    {"two arrivals", of({.arrivals = 2})},
    {"too many arrivals", too_many_arrivals},
    {"no mbarrier", no_mbarrier},
    {"wrong parity", of({.parity = 1})},
    {"wrong parity of the producer", of({.free_parity = 0})},
    {"too many bytes expected", of({.more_bytes = 16})},
    {"too few bytes expected", of({.more_bytes = -16})},
    {"no wait for a copy", of({.waits = false})},
    {"copy over what is read", of({.count = 3})},
    {"no fence after init", of({.init_fence = false})},
    {"no barrier after init", of({.init_barrier = false})},
    {"no fence after writes", of({.fence = false})},
    {"no barrier after writes", of({.barrier = false})},
    {"no wgmma fence", of({.wgmma_fence = false})},
    {"no commit", of({.commit = false})},
    {"no wgmma wait", of({.wgmma_wait = false})},
    {"sums touched", of({.touches = true})},
    {"factors touched", [] { values<64>(128, true); }},
    {"matrix overwritten", of({.overwrites = true})},
    {"product of some warps", of({.some = true})},
    {"another matrix in a warp", of({.other = true})},
    {"misplaced tile", of({.shift = 64})},
    {"misplaced matrix", of({.stage = 64})},
    {"rows longer than the swizzle", of({.bytes = 64, .box_columns = 64})},
    {"hand over to nobody", [] { hand_over(256, 256, false); }},
    {"hand over with another count", [] { hand_over(256, 128, true); }},
    {"hand over to some", [] { hand_over(224, 224, true); }},
};

}  // namespace
}  // namespace lumina_kernels::cuda

// The error that a rule raises, or "".
extern "C" __attribute__((visibility("default"))) const char* cuda_host_try(const char* name) {
  static std::string outcome;
  using namespace lumina_kernels::cuda;
  Rule rule = rules.at(name);
  const std::string named(name);
  const bool bfloat16 = named.starts_with("values") || named == "factors touched";
  for (int i = 0; i < kTiles * kRows * kWidest; ++i) {
    const float value = number(i / kWidest, i % kWidest);
    numbers[i] = bfloat16 ? float_to_bfloat16(value) : float_to_half(value);
  }
  outcome.clear();
  for (int again = 0; again < 2 && outcome.empty(); ++again) {  // forwards and backwards
    try {
      cuda_host::run(
          "rule", dim3(2), dim3(256), 64 << 10,
          [](void* context) { (*static_cast<Rule*>(context))(); }, &rule);
    } catch (const std::exception& error) {
      outcome = error.what();
    }
  }
  return outcome.c_str();
}
