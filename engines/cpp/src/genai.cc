#include "genai.h"

#include <dlfcn.h>

#include <type_traits>

#include "iapt/error.h"
#include "libraries.h"

// The part of the C interface that is used here, by its documented signatures; a result is null or holds an error's
// text.
extern "C" {
struct OgaResult;
struct OgaTokenizer;
struct OgaSequences;
}

namespace iapt {
namespace {

constexpr const char* kName = "libonnxruntime-genai.so";

}  // namespace

struct GenaiTokenizer::Library {
  using Options = OgaResult* (*)(OgaTokenizer*, const char* const*, const char* const*, size_t);

  const char* (*error_of)(const OgaResult*) = nullptr;
  void (*destroy_result)(OgaResult*) = nullptr;
  void (*destroy_string)(const char*) = nullptr;
  void (*destroy_tokenizer)(OgaTokenizer*) = nullptr;
  void (*destroy_sequences)(OgaSequences*) = nullptr;
  OgaResult* (*create_tokenizer)(const char*, OgaTokenizer**) = nullptr;
  OgaResult* (*create_sequences)(OgaSequences**) = nullptr;
  OgaResult* (*encode)(const OgaTokenizer*, const char*, OgaSequences*) = nullptr;
  OgaResult* (*apply_template)(const OgaTokenizer*, const char*, const char*, const char*, bool,
                               const char**) = nullptr;
  Options update_options = nullptr;
  size_t (*sequence_count)(const OgaSequences*, size_t) = nullptr;
  const int32_t* (*sequence_data)(const OgaSequences*, size_t) = nullptr;

  OgaTokenizer* tokenizer = nullptr;

  explicit Library(const std::filesystem::path& path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw Error(std::string(kName) + " does not load: " + dlerror());
    const auto bind = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
      if (function == nullptr) throw Error(path.string() + " has no " + name + "; version 0.18 or newer is needed");
    };
    bind("OgaResultGetError", error_of);
    bind("OgaDestroyResult", destroy_result);
    bind("OgaDestroyString", destroy_string);
    bind("OgaDestroyTokenizer", destroy_tokenizer);
    bind("OgaDestroySequences", destroy_sequences);
    bind("OgaCreateTokenizerFromPath", create_tokenizer);
    bind("OgaCreateSequences", create_sequences);
    bind("OgaTokenizerEncode", encode);
    bind("OgaTokenizerApplyChatTemplate", apply_template);
    bind("OgaUpdateTokenizerOptions", update_options);
    bind("OgaSequencesGetSequenceCount", sequence_count);
    bind("OgaSequencesGetSequenceData", sequence_data);
  }
  ~Library() {
    if (tokenizer != nullptr) destroy_tokenizer(tokenizer);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  void check(OgaResult* result, const char* what) const {
    if (result == nullptr) return;
    const std::string text = error_of(result);
    destroy_result(result);
    throw Error(std::string(what) + ": " + text);
  }
};

GenaiTokenizer::GenaiTokenizer(const std::filesystem::path& folder)
    : library_(std::make_unique<Library>(find_library("IAPT_GENAI_LIBRARY", kName).value_or(kName))) {
  library_->check(library_->create_tokenizer(folder.c_str(), &library_->tokenizer),
                  "the bundle's tokenizer cannot be read");
}

GenaiTokenizer::~GenaiTokenizer() = default;

std::vector<int64_t> GenaiTokenizer::encode(const std::string& text, bool add_special_tokens) const {
  const char* const keys[] = {"add_special_tokens"};
  const char* const values[] = {add_special_tokens ? "true" : "false"};
  library_->check(library_->update_options(library_->tokenizer, keys, values, 1), "the tokenizer");
  OgaSequences* raw = nullptr;
  library_->check(library_->create_sequences(&raw), "the tokenizer");
  const std::unique_ptr<OgaSequences, void (*)(OgaSequences*)> sequences(raw, library_->destroy_sequences);
  library_->check(library_->encode(library_->tokenizer, text.c_str(), raw), "the tokenizer");
  const int32_t* data = library_->sequence_data(raw, 0);
  return {data, data + library_->sequence_count(raw, 0)};
}

std::string GenaiTokenizer::render(const std::string& chat_template, const std::string& messages) const {
  const char* text = nullptr;
  // null for the tools would be an empty text, which is not none
  library_->check(
      library_->apply_template(library_->tokenizer, chat_template.c_str(), messages.c_str(), "null", true, &text),
      "the bundle's chat template failed");
  std::string copy = text;
  library_->destroy_string(text);
  return copy;
}

}  // namespace iapt
