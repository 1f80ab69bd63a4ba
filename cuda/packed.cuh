// A few neighbouring elements as they are loaded and stored: whole machine words. Arrays of 16-bit types would cost a
// permutation per element whenever the compiler takes the words apart and puts them together again.
#ifndef JAX_DWSCONV_CUDA_PACKED_CUH_
#define JAX_DWSCONV_CUDA_PACKED_CUH_

#include "cuda/dtypes.cuh"

namespace dwsconv::cuda {

template <int kWords>
struct alignas(kWords < 4 ? 4 * kWords : 16) Words {
  uint32_t at[kWords];
};

__device__ __forceinline__ void UnpackPair(uint32_t word, BFloat16, float (&pair)[2]) {
  pair[0] = __uint_as_float(word << 16);
  pair[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ void UnpackPair(uint32_t word, Float16, float (&pair)[2]) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  pair[0] = both.x;
  pair[1] = both.y;
}

__device__ __forceinline__ uint32_t PackPair(float low, float high, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t PackPair(float low, float high, Float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// kCount elements of T; zero when value-initialised.
template <class T, int kCount>
struct Packed {
  static_assert(sizeof(T) == 2 && kCount % 2 == 0);
  Words<kCount / 2> words;

  __device__ __forceinline__ void Unpack(float (&values)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      float pair[2];
      UnpackPair(words.at[i], T{}, pair);
      values[2 * i] = pair[0];
      values[2 * i + 1] = pair[1];
    }
  }
  __device__ __forceinline__ void Pack(const float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words.at[i] = PackPair(values[2 * i], values[2 * i + 1], T{});
  }
};

template <int kCount>
struct Packed<float, kCount> {
  Words<kCount> words;

  __device__ __forceinline__ void Unpack(float (&values)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __uint_as_float(words.at[i]);
  }
  __device__ __forceinline__ void Pack(const float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words.at[i] = __float_as_uint(values[i]);
  }
};

template <class T>
struct PackedOne {
  uint16_t bits;

  __device__ __forceinline__ void Unpack(float (&values)[1]) const {
    values[0] = ToFloat(*reinterpret_cast<const T*>(&bits));
  }
  __device__ __forceinline__ void Pack(const float (&values)[1]) {
    const T value = FromFloat<T>(values[0]);
    bits = *reinterpret_cast<const uint16_t*>(&value);
  }
};

template <>
struct Packed<BFloat16, 1> : PackedOne<BFloat16> {};
template <>
struct Packed<Float16, 1> : PackedOne<Float16> {};

// With one instruction, which reading the words one by one would not be.
template <class X, int kVector>
__device__ __forceinline__ void LoadVector(const X* p, float (&values)[kVector]) {
  const Packed<X, kVector> in = *reinterpret_cast<const Packed<X, kVector>*>(p);
  in.Unpack(values);
}

template <class Y, int kVector>
__device__ __forceinline__ void StoreVector(Y* p, const float (&values)[kVector]) {
  Packed<Y, kVector> out;
  out.Pack(values);
  *reinterpret_cast<Packed<Y, kVector>*>(p) = out;
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_PACKED_CUH_
