// Vectors of the compiler's vector extension, and the conversions between storage dtypes and the accumulator dtype.
#ifndef JAX_DWSCONV_CPU_SIMD_H_
#define JAX_DWSCONV_CPU_SIMD_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if DWSCONV_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define DWSCONV_INLINE inline __attribute__((always_inline))

namespace dwsconv::cpu::DWSCONV_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Vectors of one register: kLanes<A> accumulators of type A.
template <class A>
constexpr int kLanes = DWSCONV_VECTOR_BYTES / sizeof(A);

template <class T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kCount)));
};
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

// Converts kLanes<float> elements at a time; the storage type T is what is in memory.
template <class A, class T>
struct Convert;

template <class A>
struct Convert<A, A> {
  using Raw = Vec<A>;
  static DWSCONV_INLINE Vec<A> FromRaw(Raw raw) { return raw; }
  static DWSCONV_INLINE Raw ToRaw(Vec<A> value) { return value; }
};

using F32 = Vec<float>;
using U32 = VectorOf<uint32_t, kLanes<float>>::type;
using I32 = VectorOf<int32_t, kLanes<float>>::type;
using U16 = VectorOf<uint16_t, kLanes<float>>::type;

template <>
struct Convert<float, BFloat16> {
  using Raw = U16;
  static DWSCONV_INLINE F32 FromRaw(U16 raw) { return (F32)(__builtin_convertvector(raw, U32) << 16); }
  static DWSCONV_INLINE U16 ToRaw(F32 value) {
    const U32 bits = (U32)value;
    const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const U32 quiet_nan = (bits >> 16) | 0x40;
    return __builtin_convertvector(value != value ? quiet_nan : rounded, U16);
  }
};

template <>
struct Convert<float, Float16> {
  using Raw = U16;
#if DWSCONV_VECTOR_BYTES == 64
  static DWSCONV_INLINE F32 FromRaw(U16 raw) { return (F32)_mm512_cvtph_ps((__m256i)raw); }
  static DWSCONV_INLINE U16 ToRaw(F32 value) { return (U16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT); }
#elif DWSCONV_VECTOR_BYTES == 32
  static DWSCONV_INLINE F32 FromRaw(U16 raw) { return (F32)_mm256_cvtph_ps((__m128i)raw); }
  static DWSCONV_INLINE U16 ToRaw(F32 value) { return (U16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#else
  // Integer arithmetic only for the subnormals: XLA's threads may flush them to zero.
  static DWSCONV_INLINE F32 FromRaw(U16 raw) {
    const U32 half = __builtin_convertvector(raw, U32);
    const U32 sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    const U32 normal = (magnitude << 13) + (112u << 23);
    const U32 non_finite = normal + (112u << 23);
    const U32 subnormal = (U32)(__builtin_convertvector((I32)magnitude, F32) * 0x1p-24f);
    const U32 finite = magnitude < 0x400 ? subnormal : normal;
    return (F32)((magnitude >= 0x7c00 ? non_finite : finite) | sign);
  }
  static DWSCONV_INLINE U16 ToRaw(F32 value) {
    const U32 bits = (U32)value, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const U32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const F32 magic = F32{} + 0x1.8p23f;  // adding it rounds to an integer in the low bits
    const U32 subnormal = (U32)((F32)magnitude * 0x1p24f + magic) & 0x7ff;
    const U32 finite = magnitude < 0x38800000 ? subnormal : normal;
    const U32 infinite = magnitude > 0x7f800000 ? U32{} + 0x7e00 : U32{} + 0x7c00;
    return __builtin_convertvector((magnitude >= 0x477ff000 ? infinite : finite) | sign, U16);
  }
#endif
};

// Whether the inside of an image, where no column is missing, has code of its own: it takes its time to compile.
template <class T>
constexpr bool kInsideApart = sizeof(T) == sizeof(float);

template <class A, class T>
DWSCONV_INLINE Vec<A> Load(const T* p) {
  typename Convert<A, T>::Raw raw;
  std::memcpy(&raw, p, sizeof(raw));
  return Convert<A, T>::FromRaw(raw);
}

template <class A, class T>
DWSCONV_INLINE void Store(T* p, Vec<A> value) {
  const auto raw = Convert<A, T>::ToRaw(value);
  std::memcpy(p, &raw, sizeof(raw));
}

// The first `count` lanes; the others read as zero and are not written.
template <class A, class T>
DWSCONV_INLINE Vec<A> LoadPart(const T* p, int64_t count) {
  T buffer[kLanes<A>] = {};
  for (int64_t lane = 0; lane < count; ++lane) buffer[lane] = p[lane];
  return Load<A>(buffer);
}

template <class A, class T>
DWSCONV_INLINE void StorePart(T* p, Vec<A> value, int64_t count) {
  T buffer[kLanes<A>];
  Store<A>(buffer, value);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = buffer[lane];
}

// One element at a time, for strided access.
template <class A, class T>
DWSCONV_INLINE A LoadOne(const T* p) {
  if constexpr (sizeof(A) == sizeof(T)) {
    return *p;
  } else {
    return LoadPart<A>(p, 1)[0];
  }
}

template <class A, class T>
DWSCONV_INLINE void StoreOne(T* p, A value) {
  if constexpr (sizeof(A) == sizeof(T)) {
    *p = value;
  } else {
    StorePart<A>(p, Vec<A>{} + value, 1);
  }
}

// Uninitialised storage that frees itself; std::vector would be instantiated once per instruction set.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) : data_(other.data_) { other.data_ = nullptr; }
  T* get() const { return data_; }

 private:
  T* data_;
};

constexpr int64_t kCachedBytes = 12 << 20;  // what is larger than this comes from memory

// The line of element base[offset], which need not exist.
template <bool kToWrite, class T>
DWSCONV_INLINE void Prefetch(const T* base, int64_t offset) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + offset * sizeof(T)), kToWrite,
                     2);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

DWSCONV_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
DWSCONV_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
DWSCONV_INLINE int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMacsPerTask = 1 << 17;  // below this a task costs less than handing it to another thread

// Runs body(i) for i in [0, count), `grain` consecutive values in one task.
template <class Body>
DWSCONV_INLINE void ParallelFor(Parallel& parallel, int64_t count, int64_t grain, const Body& body) {
  struct Context {
    const Body& body;
    int64_t count, grain;
  } context{body, count, grain};
  parallel.Run(
      CeilDiv(count, grain),
      [](void* opaque, int64_t task) {
        const Context& c = *static_cast<const Context*>(opaque);
        const int64_t end = Min((task + 1) * c.grain, c.count);
        for (int64_t i = task * c.grain; i < end; ++i) c.body(i);
      },
      &context);
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_SIMD_H_
