// The instructions that C++ has no names for: asynchronous copies and matrix products (sm_80 and newer). CopyAsync
// copies through registers on older ones.
#ifndef JAX_DWSCONV_CUDA_TENSOR_CORE_CUH_
#define JAX_DWSCONV_CUDA_TENSOR_CORE_CUH_

#include "cuda/dtypes.cuh"
#include "cuda/packed.cuh"

namespace dwsconv::cuda {

// 16 bytes from global to shared memory, or zeros; nothing where not `wanted`.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool valid, bool wanted) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2; }" ::"r"(shared),
               "l"(global), "r"(valid ? 16 : 0), "r"(static_cast<int>(wanted))
               : "memory");
}

// kBytes (4, 8 or 16), of which the first `count` come from global memory; zeros after them.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* shared, const void* global, int count = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // not through the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(count) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(count)
                 : "memory");
  }
#else
  using Copied = Words<kBytes / 4>;  // the callers that run here copy everything or nothing
  *static_cast<Copied*>(shared) = count == kBytes ? *static_cast<const Copied*>(global) : Copied{};
#endif
}

// 16 bytes of shared memory; undefined where not `wanted`.
__device__ __forceinline__ Words<4> LoadShared16(uint32_t shared, bool wanted) {
  Words<4> words;
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4]; }"
               : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
               : "r"(shared), "r"(static_cast<int>(wanted))
               : "memory");
  return words;
}

__device__ __forceinline__ void CommitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most kPending of the committed groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four matrices of eight rows of 16 bytes in shared memory: lane l gives row l % 8 of matrix l / 8, and gets of every
// matrix word l % 4 of row l / 4.
__device__ __forceinline__ void LoadMatrices(const void* row, uint32_t (&words)[4]) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// A float rounded to what the tensor cores take of it.
__device__ __forceinline__ uint32_t ToTF32(uint32_t word) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
  return rounded;
}

// The low or the high halves of two words.
__device__ __forceinline__ uint32_t PickHalves(uint32_t first, uint32_t second, bool high) {
  return __byte_perm(first, second, high ? 0x7632 : 0x5410);
}

#define DWSCONV_MMA(type)                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
      "{%10, %11, %12, %13};"                                \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])       \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
#define DWSCONV_HALF_MMA(type)                                    \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type       \
      ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])            \
      : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))

// d = a * b + c, sixteen rows, eight columns, 16 or 8 terms.
template <class T>
__device__ __forceinline__ void MultiplyWhole(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                              uint32_t b1, const float (&c)[4], float (&d)[4]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    DWSCONV_MMA("bf16");
  } else {
    DWSCONV_MMA("f16");
  }
}

template <class T>
__device__ __forceinline__ void MultiplyHalf(uint32_t a0, uint32_t a1, uint32_t b0, const float (&c)[4],
                                             float (&d)[4]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    DWSCONV_HALF_MMA("bf16");
  } else {
    DWSCONV_HALF_MMA("f16");
  }
}
#undef DWSCONV_MMA
#undef DWSCONV_HALF_MMA

// d += a * b, sixteen rows, eight columns, terms of 32 bytes.
template <class T>
__device__ __forceinline__ void MultiplyAdd(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4]) {
  if constexpr (sizeof(T) == 4) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    MultiplyWhole<T>(a[0], a[1], a[2], a[3], b[0], b[1], d, d);
  }
}

__device__ __forceinline__ void MultiplyAdd(const uint32_t (&a)[4], const uint32_t (&b)[2], int (&d)[4]) {  // of int8
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Word c becomes byte c of each of the four.
__device__ __forceinline__ void TransposeBytes(uint32_t (&words)[4]) {
  const uint32_t low01 = __byte_perm(words[0], words[1], 0x5140), high01 = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t low23 = __byte_perm(words[2], words[3], 0x5140), high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = PickHalves(low01, low23, false);
  words[1] = PickHalves(low01, low23, true);
  words[2] = PickHalves(high01, high23, false);
  words[3] = PickHalves(high01, high23, true);
}

// MultiplyWhole with 8 terms per pair of words.
template <class T, int kPairs>
__device__ __forceinline__ void Multiply(const uint32_t (&a)[kPairs][2], const uint32_t (&b)[kPairs],
                                         const float (&c)[4], float (&d)[4]) {
  static_assert(kPairs >= 1 && kPairs <= 3);
  if constexpr (kPairs == 1) {
    MultiplyHalf<T>(a[0][0], a[0][1], b[0], c, d);
  } else {
    MultiplyWhole<T>(a[0][0], a[0][1], a[1][0], a[1][1], b[0], b[1], c, d);
    if constexpr (kPairs == 3) MultiplyHalf<T>(a[2][0], a[2][1], b[2], d, d);
  }
}

// The same with c = 0.
template <class T, int kPairs>
__device__ __forceinline__ void MultiplyFirst(const uint32_t (&a)[kPairs][2], const uint32_t (&b)[kPairs],
                                              float (&d)[4]) {
  constexpr float kZero[4] = {};
  Multiply<T>(a, b, kZero, d);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TENSOR_CORE_CUH_
