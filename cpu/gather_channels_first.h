// NCHW: lanes along W, or by way of NHWC.
#ifndef JAX_DWSCONV_CPU_GATHER_CHANNELS_FIRST_H_
#define JAX_DWSCONV_CPU_GATHER_CHANNELS_FIRST_H_

#include "cpu/gather_channels_last.h"
#include "cpu/staged_columns.h"
#include "cpu/transposed.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// kVectors vectors of results, kept in registers over all taps of one source plane.
template <class A, int kVectors>
DWSCONV_INLINE void StripTile(const Gather& g, const RowTaps<A, A>& taps, const StagedColumns& staged, int64_t phase,
                              int64_t q, A* sum) {
  constexpr int kVector = kLanes<A>;
  Vec<A> total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = Load<A>(sum + q + v * kVector);
  for (int64_t i = 0; i < taps.count(); ++i) {
    for (int64_t j = g.cols.begin(phase); j < g.cols.end(phase); ++j) {
      const A weight = taps.filter(i)[g.cols.tap(j) * g.filter_pitch];
      const A* from = taps.source(i) + staged.At(j) + q;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[v] += weight * Load<A>(from + v * kVector);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) Store<A>(sum + q + v * kVector, total[v]);
}

// A strip of result rows of one plane.
template <class A, class S, class R>
void GatherStrip(const Gather& g, const S* image, const A* filter, int64_t channel, int64_t first, int64_t last,
                 R* plane) {
  constexpr int64_t kVector = kLanes<A>;
  const int64_t phases = g.cols.phases(), padded = CeilDiv(g.cols.results(0), kVector) * kVector;
  Buffer<A> sums((last - first) * phases * padded);
  for (int64_t i = 0; i < (last - first) * phases * padded; ++i) sums.get()[i] = 0;

  int64_t low, high;
  g.rows.SourceRange(first, last, g.source_h, &low, &high);
  const bool reads = high > low && g.cols.taps() > 0;
  const StagedColumns staged(g.cols, padded);
  Buffer<A> rows(reads ? (high - low) * staged.row_size() : 0);
  for (int64_t f = channel * g.fold; reads && f < (channel + 1) * g.fold; ++f) {
    const S* source = image + f / g.spread * g.source.c;
    for (int64_t row = low; row < high; ++row) {
      staged.Fill(source + row * g.source.h, g.source_w, rows.get() + (row - low) * staged.row_size());
    }
    for (int64_t row = first; row < last; ++row) {
      const RowTaps<A, A> taps(g, row, 1, rows.get() - low * staged.row_size(), staged.row_size(), filter + f);
      for (int64_t phase = 0; phase < phases; ++phase) {
        A* sum = sums.get() + ((row - first) * phases + phase) * padded;
        int64_t q = 0;
        for (; q + 4 * kVector <= padded; q += 4 * kVector) StripTile<A, 4>(g, taps, staged, phase, q, sum);
        for (; q < padded; q += kVector) StripTile<A, 1>(g, taps, staged, phase, q, sum);
      }
    }
  }
  for (int64_t row = first; row < last; ++row) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      const A* sum = sums.get() + ((row - first) * phases + phase) * padded;
      R* to = plane + row * g.result.h + phase;
      if (g.epilogue) {
        StoreFinishedRow<A>(g, sum, g.cols.results(phase), channel, to);  // a convolution has one phase
        continue;
      }
      for (int64_t q = 0; q < g.cols.results(phase); ++q) StoreOne<A>(to + q * phases, sum[q]);
    }
  }
}

template <class A, class S, class R>
void GatherChannelsFirst(const Gather& g, const S* source, const A* filter, R* result, Parallel& parallel) {
  const int64_t per_group = g.images / g.groups, filter_size = g.kernel_h * g.kernel_w * g.filter_pitch;
  const int64_t strip = Min(g.result_h, Max(8, CeilDiv(kMacsPerTask * g.result_channels, g.macs_per_row())));
  const int64_t strips = CeilDiv(g.result_h, strip), strip_macs = strip * g.macs_per_row() / g.result_channels + 1;
  ParallelFor(parallel, g.images * g.result_channels * strips, CeilDiv(kMacsPerTask, strip_macs), [&](int64_t task) {
    const int64_t first = task % strips * strip, plane = task / strips;
    const int64_t channel = plane % g.result_channels, image = plane / g.result_channels;
    GatherStrip<A>(g, source + image * g.source.n, filter + image / per_group * filter_size, channel, first,
                   Min(g.result_h, first + strip), result + image * g.result.n + channel * g.result.c);
  });
}

// The same by way of NHWC; without a residual.
template <class A, class S, class R>
void GatherTransposed(const Gather& g, const S* source, const A* filter, R* result, Parallel& parallel) {
  const int64_t per_group = g.images / g.groups, filter_size = g.kernel_h * g.kernel_w * g.filter_pitch;
  const int64_t source_pixels = g.source_h * g.source_w, result_pixels = g.result_h * g.result_w;
  const ChannelBlocks<A> blocks(g.result_channels, Max(source_pixels, result_pixels));
  const int64_t macs = g.result_h * g.macs_per_row() / blocks.count + 1;
  ParallelFor(parallel, g.images * blocks.count, CeilDiv(kMacsPerTask, macs), [&](int64_t task) {
    const int64_t image = task / blocks.count, first = blocks.first(task % blocks.count);
    const int64_t channels = blocks.end(task % blocks.count) - first;
    Buffer<S> from(channels * source_pixels);
    Buffer<R> to(channels * result_pixels);
    Gather local = g;
    local.images = local.groups = 1;
    local.result_channels = channels;
    local.source = ChannelsLastStrides(g.source_h, g.source_w, channels);
    local.result = ChannelsLastStrides(g.result_h, g.result_w, channels);
    local.channels_last = true;
    Epilogue epilogue;
    if (g.epilogue) {
      epilogue = *g.epilogue;
      if (epilogue.scale) epilogue.scale = static_cast<const A*>(epilogue.scale) + first;
      if (epilogue.bias) epilogue.bias = static_cast<const A*>(epilogue.bias) + first;
      local.epilogue = &epilogue;
    }
    Serial serial;
    Transpose(source + image * g.source.n + first * g.source.c, channels, source_pixels, from.get());
    GatherChannelsLast<A>(local, from.get(), filter + image / per_group * filter_size + first, to.get(), serial);
    Transpose(to.get(), result_pixels, channels, result + image * g.result.n + first * g.result.c);
  });
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_GATHER_CHANNELS_FIRST_H_
