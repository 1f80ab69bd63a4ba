#include "cuda/epilogue.h"

#include <limits>

namespace dwsconv::cuda {

FusedEpilogue DescribeEpilogue(const Epilogue& epilogue) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  FusedEpilogue e{};
  e.present = !epilogue.empty();
  e.scale = static_cast<const float*>(epilogue.scale);
  e.bias = static_cast<const float*>(epilogue.bias);
  e.residual = epilogue.residual;
  e.kind = FusedEpilogue::Kind::kClamp;
  e.low = -kInfinity;
  e.high = kInfinity;
  switch (epilogue.activation) {
    case Activation::kNone: break;
    case Activation::kRelu: e.low = 0; break;
    case Activation::kRelu6:
      e.low = 0;
      e.high = 6;
      break;
    case Activation::kSilu:
      e.kind = FusedEpilogue::Kind::kSmooth;
      e.linear = 1;
      break;
    case Activation::kGelu:
      // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
      e.kind = FusedEpilogue::Kind::kSmooth;
      e.linear = 1.5957691216057308f;
      e.cubic = 0.07135481627260025f;
      break;
    case Activation::kHardSwish: e.kind = FusedEpilogue::Kind::kHardSwish; break;
  }
  return e;
}

}  // namespace dwsconv::cuda
