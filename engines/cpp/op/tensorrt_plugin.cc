// libiapt_trt_plugin.so: ai.iapt::Rational as a TensorRT plugin (IPluginV3), for plugin_registry.load_library(path).
// ONNX's parser looks plugins up by operator name, version 1 and the empty namespace; a plugin that is found goes
// before the model's function body.
#include <NvInferRuntime.h>

#include <array>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "rational_cuda.h"

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr const char* kName = "Rational";
constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "";
constexpr const char* kForm = "form";

nvinfer1::ILoggerFinder* logger_finder = nullptr;

void log_error(const std::string& text) noexcept {
  nvinfer1::ILogger* logger = logger_finder == nullptr ? nullptr : logger_finder->findLogger();
  if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, ("Rational: " + text).c_str());
}

std::vector<int64_t> shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

class RationalPlugin final : public IPluginV3,
                             public nvinfer1::IPluginV3OneCore,
                             public nvinfer1::IPluginV3OneBuild,
                             public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit RationalPlugin(char form) : form_(form) {
    field_ = PluginField(kForm, &form_, PluginFieldType::kCHAR, 1);
    fields_ = PluginFieldCollection{1, &field_};
  }

  // --- all phases

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new RationalPlugin(form_); }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // --- building

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t num_outputs, const DataType* inputs,
                             int32_t num_inputs) const noexcept override {
    if (num_inputs != 3 || num_outputs != 1) return -1;
    outputs[0] = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t num_inputs, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t num_outputs, nvinfer1::IExprBuilder&) noexcept override {
    if (num_inputs != 3 || num_outputs != 1) return -1;
    outputs[0] = inputs[0];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0) {
      return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
    }
    if (position == 3) return tensor.type == tensors[0].desc.type;
    return tensor.type == DataType::kFLOAT;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t num_inputs, const DynamicPluginTensorDesc*,
                          int32_t num_outputs) noexcept override {
    return num_inputs == 3 && num_outputs == 1 ? 0 : -1;
  }

  // --- running

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    try {
      const auto form = form_ == 'A' ? iapt::Form::kA : iapt::Form::kB;
      const std::string problem = iapt::make_layout(shape_of(inputs[0].dims), shape_of(inputs[1].dims),
                                                    shape_of(inputs[2].dims), form, &layout_);
      if (problem.empty()) return 0;
      log_error(problem);
    } catch (const std::exception& error) {
      log_error(error.what());
    }
    return -1;
  }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* in, void* const* out,
                  void*, cudaStream_t stream) noexcept override {
    switch (inputs[0].type) {
      case DataType::kFLOAT:
        return run<float>(in, out, stream);
      case DataType::kHALF:
        return run<iapt::Half>(in, out, stream);
      case DataType::kBF16:
        return run<iapt::BFloat16>(in, out, stream);
      default:
        return -1;
    }
  }

  IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_; }

 private:
  template <typename T>
  int32_t run(const void* const* in, void* const* out, cudaStream_t stream) const noexcept {
    const char* error = iapt::rational_cuda(layout_, static_cast<const T*>(in[0]), static_cast<const float*>(in[1]),
                                            static_cast<const float*>(in[2]), static_cast<T*>(out[0]), stream);
    if (error == nullptr) return 0;
    log_error(error);
    return -1;
  }

  char form_;
  PluginField field_{};
  PluginFieldCollection fields_{};
  iapt::RationalLayout layout_;  // of the shapes that onShapeChange saw last
};

class RationalCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  RationalCreator() {
    field_ = PluginField(kForm, nullptr, PluginFieldType::kCHAR, 1);
    fields_ = PluginFieldCollection{1, &field_};
  }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept override {
    char form = '\0';
    for (int32_t index = 0; fields != nullptr && index < fields->nbFields; ++index) {
      const PluginField& field = fields->fields[index];
      // other attributes, such as plugin_version, are the parser's own
      if (std::strcmp(field.name, kForm) != 0 || field.type != PluginFieldType::kCHAR) continue;
      const auto* text = static_cast<const char*>(field.data);
      if (text != nullptr && (field.length == 1 || (field.length == 2 && text[1] == '\0'))) form = text[0];
    }
    if (form != 'A' && form != 'B') {
      log_error("the attribute form is missing or wrong; expected A or B");
      return nullptr;
    }
    return new RationalPlugin(form);
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  PluginField field_{};
  PluginFieldCollection fields_{};
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  logger_finder = finder;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static RationalCreator creator;
  static const std::array<nvinfer1::IPluginCreatorInterface*, 1> creators{&creator};
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}
