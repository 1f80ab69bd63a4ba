#include "cuda/epilogue.h"

#include <limits>

namespace dwsconv::cuda {
namespace {

FusedEpilogue::Kind KindOf(Activation activation) {
  switch (activation) {
    case Activation::kNone: return FusedEpilogue::Kind::kNone;
    case Activation::kRelu:
    case Activation::kRelu6: return FusedEpilogue::Kind::kClamp;
    case Activation::kSilu: return FusedEpilogue::Kind::kSilu;
    case Activation::kGelu: return FusedEpilogue::Kind::kGelu;
    case Activation::kHardSwish: return FusedEpilogue::Kind::kHardSwish;
  }
  return FusedEpilogue::Kind::kNone;
}

}  // namespace

FusedEpilogue DescribeEpilogue(const Epilogue& epilogue) {
  FusedEpilogue e{};
  e.present = !epilogue.empty();
  e.follows = epilogue.residual != nullptr || epilogue.activation != Activation::kNone;
  e.kind = KindOf(epilogue.activation);
  e.low = 0;
  e.high = epilogue.activation == Activation::kRelu6 ? 6 : std::numeric_limits<float>::infinity();
  e.scale = static_cast<const float*>(epilogue.scale);
  e.bias = static_cast<const float*>(epilogue.bias);
  e.residual = epilogue.residual;
  return e;
}

}  // namespace dwsconv::cuda
