#include "cuda/launch.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "cuda/ffi_problem.h"

namespace dwsconv::cuda {
namespace {

namespace ffi = xla::ffi;

std::atomic<int64_t> captured_calls{0};

std::mutex last_forced_mutex;
std::string last_forced_plan;

std::string Bytes(const PlanKey& key) {
  static_assert(sizeof(Problem) == 30 * sizeof(int64_t), "a new field belongs into the key");
  const Problem& p = key.problem;
  const int64_t numbers[] = {p.batch,
                             p.groups,
                             p.in_h,
                             p.in_w,
                             p.out_h,
                             p.out_w,
                             p.channels,
                             p.multiplier,
                             p.kernel_h,
                             p.kernel_w,
                             p.stride_h,
                             p.stride_w,
                             p.dilation_h,
                             p.dilation_w,
                             p.pad_top,
                             p.pad_left,
                             p.channels_last,
                             p.has_residual,
                             p.x.n,
                             p.x.h,
                             p.x.w,
                             p.x.c,
                             p.y.n,
                             p.y.h,
                             p.y.w,
                             p.y.c,
                             p.filter.n,
                             p.filter.h,
                             p.filter.w,
                             p.filter.c,
                             static_cast<int64_t>(p.x_dtype),
                             static_cast<int64_t>(p.filter_dtype),
                             static_cast<int64_t>(p.y_dtype),
                             key.ordinal,
                             key.alignment,
                             key.max_splits,
                             key.forward};
  std::string bytes(reinterpret_cast<const char*>(numbers), sizeof(numbers));
  return bytes.append(key.forced);
}

template <class Plan>
class Plans {
 public:
  template <class Make>
  ffi::ErrorOr<Plan> Find(const PlanKey& key, const Make& make) {
    constexpr std::size_t kMost = 1 << 14;
    std::string bytes = Bytes(key);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = plans_.find(bytes); found != plans_.end()) return Noted(key, found->second);
    }
    const auto device = DescribeDevice(key.ordinal);
    if (!device) return ffi::Unexpected<ffi::Error>(device.error());
    const Plan plan = make(*device);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) plans_.clear();
    plans_.emplace(std::move(bytes), plan);
    return Noted(key, plan);
  }

 private:
  static Plan Noted(const PlanKey& key, const Plan& plan) {
    if (!key.forced.empty()) NoteForcedPlan(plan.Text());
    return plan;
  }

  std::mutex mutex_;
  std::unordered_map<std::string, Plan> plans_;
};

}  // namespace

ffi::ErrorOr<PassPlan> FindPassPlan(const PlanKey& key) {
  static Plans<PassPlan>& plans = *new Plans<PassPlan>;  // never destroyed: a thread may still launch at exit
  return plans.Find(
      key, [&](const Device& device) { return PlanPass(key.problem, key.forward, device, key.alignment, key.forced); });
}

ffi::ErrorOr<GradFilterPlan> FindGradFilterPlan(const PlanKey& key) {
  static Plans<GradFilterPlan>& plans = *new Plans<GradFilterPlan>;
  return plans.Find(key, [&](const Device& device) {
    return PlanGradFilter(key.problem, device, key.alignment, key.max_splits, key.forced);
  });
}

ffi::ErrorOr<QuantizedPlan> FindQuantizedPlan(const PlanKey& key) {
  static Plans<QuantizedPlan>& plans = *new Plans<QuantizedPlan>;
  return plans.Find(
      key, [&](const Device& device) { return PlanQuantized(key.problem, device, key.alignment, key.forced); });
}

ffi::ErrorOr<Device> DescribeDevice(int ordinal) {
  Device device{};
  int major = 0, minor = 0;
  const std::pair<cudaDeviceAttr, int*> facts[] = {
      {cudaDevAttrMultiProcessorCount, &device.multiprocessors},
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device.shared_memory},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.most_shared_memory},
  };
  for (const auto& [attribute, value] : facts) {
    if (const cudaError_t status = cudaDeviceGetAttribute(value, attribute, ordinal); status != cudaSuccess) {
      return ffi::Unexpected<ffi::Error>(
          ffi::Error::Internal(std::string("jax_dwsconv: cannot describe the device: ") + cudaGetErrorString(status)));
    }
  }
  device.capability = std::min(10 * major + minor, CompiledCapability());
  return device;
}

ffi::Error PlanAndLaunch(const char* op, int ordinal, const ffi::Dictionary& attrs, const PassCall& call) {
  const int64_t alignment = Alignment(call.source, call.filter, call.result, call.epilogue.residual);
  const auto plan = FindPassPlan({call.problem, ordinal, alignment, 0, call.forward, ForcedTile(attrs)});
  if (!plan) return plan.error();
  return FinishLaunch(op, LaunchPass(call, *plan), call.stream);
}

ffi::Error FinishLaunch(const char* op, bool has_instance, cudaStream_t stream) {
  const std::string name = std::string("jax_dwsconv.") + op;
  if (!has_instance) return ffi::Error::InvalidArgument(name + ": no CUDA kernel for this combination of dtypes");
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) {
    return ffi::Error::Internal(name + ": " + cudaGetErrorString(status));
  }
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capture) == cudaSuccess && capture == cudaStreamCaptureStatusActive)
    ++captured_calls;
  return ffi::Error::Success();
}

int64_t CapturedCalls() { return captured_calls; }

void NoteForcedPlan(std::string planned) {
  const std::lock_guard<std::mutex> lock(last_forced_mutex);
  last_forced_plan = std::move(planned);
}

std::string LastForcedPlan() {
  const std::lock_guard<std::mutex> lock(last_forced_mutex);
  return last_forced_plan;
}

}  // namespace dwsconv::cuda
