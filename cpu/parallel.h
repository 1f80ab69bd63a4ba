// How a kernel hands out its tasks. Kernels are compiled once per instruction set and must not instantiate templates of
// the standard library (the linker may keep any one of the copies), hence a plain virtual function and a function
// pointer.
#ifndef JAX_DWSCONV_CPU_PARALLEL_H_
#define JAX_DWSCONV_CPU_PARALLEL_H_

#include <cstdint>

namespace dwsconv::cpu {

class Parallel {
 public:
  // Calls task(context, i) once for every i in [0, count), in any order and on any thread, and returns when all are
  // done.
  virtual void Run(int64_t count, void (*task)(void* context, int64_t i), void* context) = 0;

 protected:
  ~Parallel() = default;
};

}  // namespace dwsconv::cpu

#endif  // JAX_DWSCONV_CPU_PARALLEL_H_
