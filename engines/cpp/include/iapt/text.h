// Text to token ids and back, by ONNX Runtime GenAI's tokenizer: it reads the bundle's own tokenizer.json and chat
// template. The library is optional; without it, feed token ids.
#ifndef IAPT_TEXT_H_
#define IAPT_TEXT_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "iapt/manifest.h"

namespace iapt {

class TextCodec {
 public:
  // Throws Error: libonnxruntime-genai.so is not found, or it cannot read the bundle's tokenizer.
  TextCodec(const std::filesystem::path& bundle, const BundleManifest& manifest);
  ~TextCodec();
  TextCodec(TextCodec&&) noexcept;
  TextCodec& operator=(TextCodec&&) noexcept;

  // Token ids of an instruction; `chat` puts it as one user message into the chat template, `plain` takes it as it is.
  // Throws Error: the prompt is empty, or the bundle has no chat template.
  std::vector<int64_t> encode(const std::string& prompt, const std::string& prompt_format) const;
  // Text of token ids, special tokens left out.
  std::string decode(const std::vector<int64_t>& tokens) const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace iapt

#endif  // IAPT_TEXT_H_
