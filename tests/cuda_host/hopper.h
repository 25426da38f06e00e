// What csrc/cuda/lib/ptx_hopper.cuh does on the host. Included by cuda_host.h alone.
//
// Copies and products are asynchronous here, too: a copy's bytes come when no thread can go on, and
// a product's registers are NaN until a wait for its group. Errors, besides those of cuda_host.h:
//   - a phase of an mbarrier, or a named barrier, that never ends: what is missing is said;
//   - shared memory that TMA fills or wgmma reads, touched by anybody who has not waited for it by
//     a chain of barriers, or, if threads wrote it, read without fence.proxy.async;
//   - a product without wgmma.fence, or whose registers change under it; one that not all warps of
//     the group start; tiles that do not begin where their swizzle does.
#pragma once

namespace cuda_host {

struct TensorMap {  // sizes, steps and box as cuTensorMapEncodeTiled takes them; 16-bit numbers
  const void *data = nullptr, *begin = nullptr, *end = nullptr;
  uint64_t sizes[4] = {}, steps[3] = {};
  uint32_t box[4] = {};
  int swizzle = 0;  // by how many bytes: 16 (not), 32, 64, 128
};

struct Wgmma {
  float* d;  // n / 2 registers
  int n;
  const uint32_t*
      a;  // 4 registers, with b's rows along those of its tile; or null, and both across
  uint64_t a_matrix, b_matrix;
  bool accumulate, half;
};

uint32_t shared_address(const void* at);  // of dynamic shared memory
void fence_proxy_async();
void mbarrier_init(void* at, int count);
void mbarrier_arrive(void* at, int bytes, Site site);
void mbarrier_wait(void* at, int parity, Site site);
void named_barrier(int id, int threads, bool waits, Site site);
void tensor_copy(void* to, const void* begin, const void* end, const TensorMap& map, void* barrier,
                 const int (&first)[4]);
void wgmma(const Wgmma& product, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);

}  // namespace cuda_host
