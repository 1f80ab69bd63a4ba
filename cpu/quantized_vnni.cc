// The int8 convolution with VNNI; all else is as with AVX-512 (see dispatch.cc).
#include "cpu/kernels.h"
#include "cpu/quantized.h"

namespace dwsconv::cpu::DWSCONV_ISA {

extern const QuantizedKernel kQuantizedForward;
const QuantizedKernel kQuantizedForward = QuantizedForward;

}  // namespace dwsconv::cpu::DWSCONV_ISA
