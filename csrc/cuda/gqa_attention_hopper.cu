// CUDA launcher of gqa_attention's forward for Hopper.
//
// setup.py builds this file for sm_90a alone, whose instructions it needs, and defines
// LUMINA_HOPPER if there is such a GPU among those to build for; else it holds no kernel.
#include <cstdlib>
#include <cstring>

#include "cuda/gqa_attention_hopper.h"

#if defined(LUMINA_HOPPER) || defined(LUMINA_CUDA_HOST)
#include "cuda/gqa_attention_hopper.cuh"
#include "cuda/lib/launch.h"

namespace lumina_kernels::cuda {
namespace {

// No GPU has run this kernel yet, so nobody knows whether it is faster than the other one: it has
// to be asked for.
bool is_asked_for() {
  const char* asked = std::getenv("LUMINA_KERNELS_HOPPER");
  return asked != nullptr && std::strcmp(asked, "1") == 0;
}

#ifdef LUMINA_CUDA_HOST

bool is_hopper(const Tensor&) { return true; }

void encode(TensorMap& map, const AttentionHeads<uint16_t>& x, const uint64_t (&sizes)[4],
            const uint64_t (&steps)[3], const uint32_t (&box)[4], int bytes) {
  map = {x.data.raw(), x.data.begin(), x.data.end()};
  std::copy(sizes, sizes + 4, map.sizes);
  std::copy(steps, steps + 3, map.steps);
  std::copy(box, box + 4, map.box);
  map.swizzle = bytes;
}

#else

bool is_hopper(const Tensor& like) {
  int major = 0, minor = 0;
  const int device = like.get_device_index();
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  return major == 9 && minor == 0;
}

// Looked up at run time: the library loads where there is no driver.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const char* name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result),
             name);
#else
  check_cuda(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
  STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, "the driver has no ", name);
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

void encode(TensorMap& map, const AttentionHeads<uint16_t>& x, const uint64_t (&sizes)[4],
            const uint64_t (&steps)[3], const uint32_t (&box)[4], int bytes) {
  static const auto encoder = tensor_map_encoder();
  const cuuint64_t size[] = {sizes[0], sizes[1], sizes[2], sizes[3]};
  const cuuint64_t step[] = {steps[0], steps[1], steps[2]};
  const cuuint32_t ones[] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                   : CU_TENSOR_MAP_SWIZZLE_NONE;
  // A copy moves bits: the type of 16 bits does not matter.
  const CUresult result =
      encoder(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<uint16_t*>(x.data), size, step,
              box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int{result});
}

#endif

// Boxes of kKeys keys, of 64 columns and of `tail`. An axis that is broadcast has size 1.
template <int kKeys>
void maps_of(HopperMaps& maps, const AttentionHeads<uint16_t>& x, int K, int count, int64_t G,
             int64_t B, int tail) {
  const auto bytes = [](int64_t step) { return step == 0 ? 16 : 2 * static_cast<uint64_t>(step); };
  maps.step_g = x.step_h != 0, maps.step_b = x.step_b != 0;
  const uint64_t sizes[] = {static_cast<uint64_t>(K), static_cast<uint64_t>(count),
                            static_cast<uint64_t>(maps.step_g ? G : 1),
                            static_cast<uint64_t>(maps.step_b ? B : 1)};
  const uint64_t steps[] = {bytes(x.step_l), bytes(x.step_h), bytes(x.step_b)};
  encode(maps.main, x, sizes, steps, {64, kKeys, 1, 1}, 128);
  if (tail > 0) {
    encode(maps.tail, x, sizes, steps, {static_cast<uint32_t>(tail), kKeys, 1, 1}, 2 * tail);
  }
}

template <int kHeadDim, Dtype kDtype>
void launch(const Tensor& q, const AttentionFwdParams<uint16_t>& p) {
  using Tile = HopperTile<kHeadDim>;
  HopperAttentionFwdParams params{};
  params.p = p;
  params.p.row_blocks = static_cast<int>(ceil_div(p.rows, Tile::kRows));
  const int64_t B = q.size(0);
  for (int i = 0; i < (p.text ? 2 : 1); ++i) {
    const auto& [k, v] = std::tie(p.keys[i].k, p.keys[i].v);
    maps_of<Tile::kKeys>(params.keys[i], k, p.K, p.keys[i].count, p.G, B, Tile::kKeyTail);
    maps_of<Tile::kKeys>(params.values[i], v, p.K, p.keys[i].count, p.G, B, Tile::kTail);
  }
  const LaunchConfig config = gqa_attention_hopper_config<kHeadDim>(B * p.G, p.rows);
  LUMINA_LAUNCH(q, config, (gqa_attention_hopper_fwd_kernel<kHeadDim, kDtype>), params);
}

template <int kHeadDim>
void launch(const Tensor& q, const AttentionFwdParams<uint16_t>& p, Dtype dtype) {
  if (dtype == Dtype::kHalf) {
    launch<kHeadDim, Dtype::kHalf>(q, p);
  } else {
    launch<kHeadDim, Dtype::kBFloat16>(q, p);
  }
}

// What TMA can address: `vectors` says that heads begin at multiples of 16 bytes. Neither it nor
// this kernel knows broadcast keys, or a negative scale, for which the queries would change.
bool takes(const AttentionKeys<uint16_t>& keys) {
  constexpr int64_t kMostStep = int64_t{1} << 38;
  bool fits = keys.vectors && keys.count > 0 && !(keys.split.inner < 0.0f);
  for (const AttentionHeads<uint16_t>* x : {&keys.k, &keys.v}) {
    fits &= keys.count == 1 || x->step_l != 0;
    for (int64_t step : {x->step_b, x->step_l, x->step_h}) fits &= step >= 0 && step < kMostStep;
  }
  return fits;
}

}  // namespace

bool gqa_attention_hopper_fwd(const Tensor& q, const AttentionFwdParams<uint16_t>& p, Dtype dtype) {
  if (!is_asked_for() || !takes(p.keys[0]) || (p.text && !takes(p.keys[1]))) return false;
  if (!is_hopper(q)) return false;
  switch (p.K) {
    case 64:
      launch<64>(q, p, dtype);
      return true;
    case 72:
      launch<72>(q, p, dtype);
      return true;
    case 96:
      launch<96>(q, p, dtype);
      return true;
    case 120:  // padded by TMA
    case 128:
      launch<128>(q, p, dtype);
      return true;
    default:
      return false;
  }
}

}  // namespace lumina_kernels::cuda

#else

namespace lumina_kernels::cuda {

bool gqa_attention_hopper_fwd(const Tensor&, const AttentionFwdParams<uint16_t>&, Dtype) {
  return false;
}

}  // namespace lumina_kernels::cuda

#endif
