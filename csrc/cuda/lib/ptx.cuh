// The PTX instructions that kernels use, available from sm_80 on, and their equivalents on the
// host.
//
// Fragments are those of the PTX manual. With g = lane / 4 and t = lane % 4, and two 16-bit numbers
// in a register, the lower half holding the lower column (A) or row (B):
//   A (16 x 16), row major:   a[0] = A[g][2t, 2t+1]       a[1] = A[g+8][2t, 2t+1]
//                             a[2] = A[g][2t+8, 2t+9]     a[3] = A[g+8][2t+8, 2t+9]
//   B (16 x 8):               b[0] = B[2t, 2t+1][g]       b[1] = B[2t+8, 2t+9][g]
//   C, D (16 x 8), float32:   d[0], d[1] = D[g][2t, 2t+1] d[2], d[3] = D[g+8][2t, 2t+1]
// m16n8k8 has the first half of A's and B's: a[0], a[1] and b[0].
#pragma once

#include "cuda/lib/values.cuh"

namespace lumina_kernels::cuda {

#ifdef LUMINA_CUDA_HOST
namespace host {

struct Mma {
  const uint32_t *a, *b;
  float* d;
};

// D += A B for the 32 lanes, summed in float64 and rounded once.
template <int kK, float (*kToFloat)(uint16_t)>
void mma(void** lanes) {
  cuda_host::count_multiply_adds(16 * 8 * 16);  // with 8 rows of B it takes as long
  float A[16][kK], B[kK][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kK / 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        A[g + i % 2 * 8][2 * t + half + i / 2 * 8] =
            kToFloat(static_cast<uint16_t>(mine->a[i] >> 16 * half));
      }
    }
    for (int i = 0; i < kK / 8; ++i) {
      for (int half = 0; half < 2; ++half) {
        B[2 * t + half + i * 8][g] = kToFloat(static_cast<uint16_t>(mine->b[i] >> 16 * half));
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Mma*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = mine->d[i];
      for (int k = 0; k < kK; ++k) sum += static_cast<double>(A[row][k]) * B[k][column];
      mine->d[i] = static_cast<float>(sum);
    }
  }
}

struct Ldmatrix {
  const void* row;
  uint32_t out[4];
};

template <int kMatrices, bool kTranspose>
void ldmatrix(void** lanes) {
  for (int m = 0; m < kMatrices; ++m) {
    const void* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<Ldmatrix*>(lanes[8 * m + i])->row;
    cuda_host::count_bank_conflicts(rows, 8);
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const int own = lane / 4, others = lane % 4 * 2 + half;
        const int row = kTranspose ? others : own, column = kTranspose ? own : others;
        std::memcpy(&pair[half], static_cast<const char*>(rows[row]) + 2 * column, 2);
      }
      static_cast<Ldmatrix*>(lanes[lane])->out[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

// The lanes that provide a row read it; the pointers of the others are ignored.
template <int kMatrices, bool kTranspose, class T>
void load_matrices(uint32_t* out, Shared<T> row, cuda_host::Site site) {
  Ldmatrix mine{row.raw(), {}};
  if (cuda_host::lane() < 8 * kMatrices) {
    cuda_host::read_shared(row.raw(), 16, row.begin(), row.end(), 16);
  }
  cuda_host::collective(cuda_host::Kind::kLdmatrix, kAllLanes, &mine,
                        ldmatrix<kMatrices, kTranspose>, site);
  for (int m = 0; m < kMatrices; ++m) out[m] = mine.out[m];
}

}  // namespace host

#define LUMINA_ONLY_SITE cuda_host::Site site = CUDA_HOST_SITE
#define LUMINA_SITE , LUMINA_ONLY_SITE
#else
#define LUMINA_ONLY_SITE
#define LUMINA_SITE

template <class T>
__device__ __forceinline__ uint32_t shared_address(Shared<T> p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// d += a b on a tensor core, 16 x 8 from 16 x 16 and 16 x 8; all lanes of a warp take part.
__device__ __forceinline__ void mma_m16n8k16_half(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2] LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::Mma mine{a, b, d};
  cuda_host::collective(cuda_host::Kind::kMma, kAllLanes, &mine, host::mma<16, half_to_float>,
                        site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_m16n8k16_bfloat16(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2] LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::Mma mine{a, b, d};
  cuda_host::collective(cuda_host::Kind::kMma, kAllLanes, &mine, host::mma<16, bfloat16_to_float>,
                        site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same with 8 columns of A and 8 rows of B: the rest of a head_dim of 72.
__device__ __forceinline__ void mma_m16n8k8_half(float (&d)[4], const uint32_t (&a)[2],
                                                 const uint32_t (&b)[1] LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::Mma mine{a, b, d};
  cuda_host::collective(cuda_host::Kind::kMma, kAllLanes, &mine, host::mma<8, half_to_float>, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

__device__ __forceinline__ void mma_m16n8k8_bfloat16(float (&d)[4], const uint32_t (&a)[2],
                                                     const uint32_t (&b)[1] LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::Mma mine{a, b, d};
  cuda_host::collective(cuda_host::Kind::kMma, kAllLanes, &mine, host::mma<8, bfloat16_to_float>,
                        site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

// ldmatrix: 8 x 8 matrices of 16-bit numbers from shared memory. Lanes 8m to 8m+7 provide the rows
// of matrix m, of 16 bytes and aligned to them. Lane 4g+t gets M[g][2t, 2t+1] in out[m], or,
// transposed, M[2t, 2t+1][g].
template <class T>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], Shared<T> row LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::load_matrices<4, false>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

template <class T>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], Shared<T> row LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::load_matrices<4, true>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

template <class T>
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&out)[2], Shared<T> row LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::load_matrices<2, false>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

template <class T>
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&out)[2], Shared<T> row LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  host::load_matrices<2, true>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// cp.async: 16 bytes from global to shared memory, both aligned to 16. The first `valid` bytes are
// read, the others become 0. This thread sees them after waiting for their group, other threads
// after a barrier that follows the wait.
template <class T, class U>
__device__ __forceinline__ void copy_async_16(Shared<T> to, Global<U> from, int valid = 16) {
#ifdef LUMINA_CUDA_HOST
  if (valid > 0) {
    cuda_host::check_global(from.raw(), valid, from.begin(), from.end(), 16, false);
  }
  cuda_host::copy_async(to.raw(), to.begin(), to.end(), from.raw(), 16, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(valid)
               : "memory");
#endif
}

// Groups the copies that this thread has issued since the last group.
__device__ __forceinline__ void copy_async_commit() {
#ifdef LUMINA_CUDA_HOST
  cuda_host::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending latest groups of this thread are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef LUMINA_CUDA_HOST
  cuda_host::copy_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// threadIdx.x, the lane and blockIdx.x. Every call reads the special register again, so that values
// derived from it before a loop are not kept in registers for use after the loop.
__device__ __forceinline__ int thread_index() {
#ifdef LUMINA_CUDA_HOST
  return static_cast<int>(threadIdx.x);
#else
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
#endif
}

__device__ __forceinline__ int lane_index() { return thread_index() % 32; }

__device__ __forceinline__ int block_index() {
#ifdef LUMINA_CUDA_HOST
  return static_cast<int>(blockIdx.x);
#else
  int i;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
  return i;
#endif
}

// 2^x with an error of at most 2 units in the last place; 0 below -126.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef LUMINA_CUDA_HOST
  return x < -126.0f ? 0.0f : std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, to an ulp; 0 for an x of more than 2^126.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef LUMINA_CUDA_HOST
  return 1.0f / x;
#else
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#endif
}

}  // namespace lumina_kernels::cuda
