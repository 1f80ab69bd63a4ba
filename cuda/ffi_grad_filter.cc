#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;
using Workspace = ffi::Buffer<ffi::F32, 2>;

// The workspace is a second result of shape (most splits, elements of the filter): memory from XLA's scratch allocator
// would be freed before a recorded graph is replayed.
static ffi::Error GradFilterImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer x,
                                 ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> filter,
                                 ffi::Result<Workspace> workspace) {
  const auto problem = DecodeProblem("grad_filter", attrs, x, *filter, g);
  if (!problem) return problem.error();
  if (filter->element_count() == 0) return ffi::Error::Success();
  const int64_t max_splits = workspace->dimensions()[0];
  if (max_splits < 1 || workspace->dimensions()[1] != problem->filter_elements()) {
    return ffi::Error::InvalidArgument(
        "jax_dwsconv.grad_filter: the workspace must have at least one row of the filter's size");
  }
  const int64_t alignment = Alignment(x.untyped_data(), g.untyped_data());
  const auto plan = FindGradFilterPlan({*problem, ordinal, alignment, max_splits, false, ForcedTile(attrs)});
  if (!plan) return plan.error();
  const bool has_instance = LaunchGradFilter(*problem, *plan, x.untyped_data(), g.untyped_data(),
                                             filter->untyped_data(), workspace->typed_data(), stream);
  return FinishLaunch("grad_filter", has_instance, stream);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(GradFilter, GradFilterImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<Workspace>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dwsconv::cuda
