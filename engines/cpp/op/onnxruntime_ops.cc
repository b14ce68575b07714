// libiapt_ops.so: ai.iapt::Rational as kernels of ONNX Runtime, for session options' register_custom_ops_library.
// A model's own function body of the same name then stays unused.
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include "rational_cpu.h"
#ifdef IAPT_WITH_CUDA
#include "rational_cuda.h"
#endif

namespace {

// Nothing newer than this release of ONNX Runtime is called, whatever headers compiled this file.
constexpr uint32_t kApiVersion = ORT_API_VERSION < 23 ? ORT_API_VERSION : 23;
constexpr const char* kDomain = "ai.iapt";
// Below this many elements the threads cost more than they save.
constexpr int64_t kElementsPerThread = 16384;

template <typename T>
constexpr ONNXTensorElementDataType onnx_type() {
  if (std::is_same_v<T, iapt::Half>) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (std::is_same_v<T, iapt::BFloat16>) return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

enum class Device { kCpu, kCuda };

template <typename T>
struct Work {
  const iapt::RationalLayout* layout;
  const T* x;
  const float* numerator;
  const float* denominator;
  T* y;
  int64_t count;

  // Part `index` of the tensor, for ONNX Runtime's thread pool.
  static void part(void* work, size_t index) {
    const auto& self = *static_cast<const Work*>(work);
    const int64_t begin = static_cast<int64_t>(index) * kElementsPerThread;
    const int64_t end = begin + kElementsPerThread < self.count ? begin + kElementsPerThread : self.count;
    iapt::rational_cpu(*self.layout, self.x, self.numerator, self.denominator, self.y, begin, end);
  }
};

template <typename T, Device device>
class RationalKernel {
 public:
  RationalKernel(const OrtApi&, const OrtKernelInfo* info) {
    const auto form = Ort::ConstKernelInfo(info).GetAttribute<std::string>("form");
    if (form != "A" && form != "B") {
      ORT_CXX_API_THROW("Rational: form is '" + form + "', expected A or B", ORT_INVALID_ARGUMENT);
    }
    form_ = form == "A" ? iapt::Form::kA : iapt::Form::kB;
  }

  void Compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    const auto x = context.GetInput(0), numerator = context.GetInput(1), denominator = context.GetInput(2);
    const auto shape = x.GetTensorTypeAndShapeInfo().GetShape();
    iapt::RationalLayout layout;
    const std::string problem = iapt::make_layout(shape, numerator.GetTensorTypeAndShapeInfo().GetShape(),
                                                  denominator.GetTensorTypeAndShapeInfo().GetShape(), form_, &layout);
    if (!problem.empty()) ORT_CXX_API_THROW("Rational: " + problem, ORT_INVALID_ARGUMENT);
    auto y = context.GetOutput(0, shape);
    Work<T> work{&layout,
                 static_cast<const T*>(x.GetTensorRawData()),
                 static_cast<const float*>(numerator.GetTensorRawData()),
                 static_cast<const float*>(denominator.GetTensorRawData()),
                 static_cast<T*>(y.GetTensorMutableRawData()),
                 layout.num_runs * layout.run};
    if (work.count > 0) run(context, work);
  }

 private:
  static void run(const Ort::KernelContext& context, Work<T>& work) {
#ifdef IAPT_WITH_CUDA
    if constexpr (device == Device::kCuda) {
      const char* error = iapt::rational_cuda(*work.layout, work.x, work.numerator, work.denominator, work.y,
                                              context.GetGPUComputeStream());
      if (error != nullptr) ORT_CXX_API_THROW(std::string("Rational: CUDA says: ") + error, ORT_FAIL);
      return;
    }
#endif
    const int64_t parts = (work.count + kElementsPerThread - 1) / kElementsPerThread;
    if (parts == 1) {
      Work<T>::part(&work, 0);
    } else {
      context.ParallelFor(Work<T>::part, static_cast<size_t>(parts), 0, &work);
    }
  }

  iapt::Form form_;
};

template <typename T, Device device>
struct RationalOp : Ort::CustomOpBase<RationalOp<T, device>, RationalKernel<T, device>> {
  RationalOp() { OrtCustomOp::version = kApiVersion; }

  void* CreateKernel(const OrtApi& api, const OrtKernelInfo* info) const {
    return new RationalKernel<T, device>(api, info);
  }
  const char* GetName() const { return "Rational"; }
  const char* GetExecutionProviderType() const {
    return device == Device::kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  }
  size_t GetInputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 0 ? onnx_type<T>() : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return onnx_type<T>(); }

  static OrtStatusPtr InferOutputShape(Ort::ShapeInferContext& context) {
    if (context.GetInputShape(0).empty()) return nullptr;  // a rank that is not known yet
    return context.SetOutputShape(0, context.GetInputShape(0), onnx_type<T>()).release();
  }
};

template <typename T>
void add(Ort::CustomOpDomain& domain) {
  static const RationalOp<T, Device::kCpu> cpu;
  domain.Add(&cpu);
#ifdef IAPT_WITH_CUDA
  static const RationalOp<T, Device::kCuda> cuda;
  domain.Add(&cuda);
#endif
}

}  // namespace

// Whether kernels for the CUDA provider are in here; without them a session on the GPU fares better with the body.
extern "C" __attribute__((visibility("default"))) int32_t iapt_ops_has_cuda() {
#ifdef IAPT_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, "libiapt_ops.so needs ONNX Runtime 1.23 or newer");
  }
  Ort::InitApi(api);
  try {
    // sessions keep pointers into the domain, so it lives as long as the process
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made(kDomain);
      add<float>(made);
      add<iapt::Half>(made);
      add<iapt::BFloat16>(made);
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
  return nullptr;
}
