#include "cuda/dtypes.cuh"
#include "cuda/slide.cuh"

namespace dwsconv::cuda {
namespace {

// The axis of the height, else that of the width.
SlideAxis AxisOf(const Problem& p, bool forward, bool height) {
  const auto choose = [&](int64_t h, int64_t w) { return height ? h : w; };
  const int64_t in = choose(p.in_h, p.in_w), out = choose(p.out_h, p.out_w);
  const int64_t in_step = choose(p.x.h, p.x.w), out_step = choose(p.y.h, p.y.w);
  SlideAxis a;
  a.source = static_cast<int>(forward ? in : out);
  a.result = static_cast<int>(forward ? out : in);
  a.source_step = forward ? in_step : out_step;
  a.result_step = forward ? out_step : in_step;
  a.filter_step = choose(p.filter.h, p.filter.w);
  a.kernel = static_cast<int>(choose(p.kernel_h, p.kernel_w));
  a.stride = static_cast<int>(choose(p.stride_h, p.stride_w));
  a.dilation = static_cast<int>(choose(p.dilation_h, p.dilation_w));
  a.pad = static_cast<int>(choose(p.pad_top, p.pad_left));
  return a;
}

Slide Describe(const PassCall& call, const SlideTile& tile) {
  const Problem& p = call.problem;
  const bool forward = call.forward;
  Slide m{};
  m.slide = AxisOf(p, forward, tile.along_height);
  m.fixed = AxisOf(p, forward, !tile.along_height);
  m.channels_last = p.channels_last;
  m.gradient = !forward;
  m.multiplier = static_cast<int>(p.multiplier);
  m.images = p.batch;
  m.source_n = forward ? p.x.n : p.y.n;
  m.source_c = forward ? p.x.c : p.y.c;
  m.result_n = forward ? p.y.n : p.x.n;
  m.result_c = forward ? p.y.c : p.x.c;
  m.filter_n = p.filter.n;
  m.filter_c = p.filter.c;
  m.images_per_group = p.groups == 1 ? 0 : p.images_per_group();
  m.epilogue = DescribeEpilogue(call.epilogue);
  m.phases = static_cast<int>(SlidePhases(m.slide.stride, m.slide.dilation, m.slide.result, forward));
  const int64_t of_phase = CeilDiv(m.slide.result, m.phases);
  const auto vectors = static_cast<uint32_t>((forward ? p.out_channels() : p.channels) / tile.vector);
  const auto positions = static_cast<uint32_t>(m.fixed.result);
  m.fast = Divisor(p.channels_last ? vectors : positions);
  m.slow = Divisor(p.channels_last ? positions : vectors);
  m.tiles = Divisor(static_cast<uint32_t>(CeilDiv(of_phase, SlideTile::kResults)));
  m.threads = vectors * positions * m.tiles.value * m.phases;
  return m;
}

template <class S, class F, class R, int kVector>
void Launch(const PassCall& call, const SlideTile& tile) {
  constexpr int64_t kMostImages = 65535;
  const Slide m = Describe(call, tile);
  const dim3 blocks((m.threads + kSlideThreads - 1) / kSlideThreads,
                    static_cast<unsigned>(m.images < kMostImages ? m.images : kMostImages));
  SlideKernel<S, F, R, kVector, SlideTile::kResults><<<blocks, kSlideThreads, 0, call.stream>>>(
      m, static_cast<const S*>(call.source), static_cast<const F*>(call.filter), static_cast<R*>(call.result));
}

template <class S, class F, class R>
bool LaunchFor(const PassCall& call, const SlideTile& tile) {
  switch (tile.vector) {
    case 1: Launch<S, F, R, 1>(call, tile); return true;
    case 2: Launch<S, F, R, 2>(call, tile); return true;
    case 4: Launch<S, F, R, 4>(call, tile); return true;
    default: return false;
  }
}

}  // namespace

bool LaunchSlide(const PassCall& call, const SlideTile& tile) {
  bool launched = false;
  WithDtypes(call.problem, [&](auto x, auto f, auto y) {
    using X = typename decltype(x)::type;
    using F = typename decltype(f)::type;
    using Y = typename decltype(y)::type;
    launched = call.forward ? LaunchFor<X, F, Y>(call, tile) : LaunchFor<Y, F, X>(call, tile);
  });
  return launched;
}

}  // namespace dwsconv::cuda
