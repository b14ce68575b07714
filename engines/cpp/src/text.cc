#include "iapt/text.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <fstream>

#include "byte_level.h"
#include "json_fields.h"
#include "libraries.h"

// The part of ONNX Runtime GenAI's C interface that is used here, by its documented signatures; a result is null or
// holds an error's text.
extern "C" {
struct OgaResult;
struct OgaTokenizer;
struct OgaSequences;
}

namespace iapt {
namespace {

constexpr const char* kName = "libonnxruntime-genai.so";

// A folder in which the library finds what it looks for: the bundle's tokenizer, and a configuration of its own.
class TokenizerFolder {
 public:
  TokenizerFolder(const std::filesystem::path& bundle, const BundleManifest& manifest) {
    std::string pattern = (std::filesystem::temp_directory_path() / "iapt-tokenizer-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) throw Error("no temporary folder can be made at " + pattern);
    path_ = pattern;
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json",
                             "generation_config.json", "special_tokens_map.json"}) {
      const auto file = std::filesystem::absolute(bundle / name);
      if (std::filesystem::is_regular_file(file)) std::filesystem::create_symlink(file, path_ / name);
    }
    const auto& backbone = manifest.backbone;
    Json eos = backbone.eos_token_ids;
    Json config = {{"model",
                    {{"type", "llama"},  // which model it is does not matter to its tokenizer
                     {"vocab_size", backbone.vocab_size},
                     {"context_length", backbone.max_positions},
                     {"bos_token_id", eos.empty() ? Json(backbone.pad_token_id) : eos[0]},
                     {"eos_token_id", eos},
                     {"pad_token_id", backbone.pad_token_id},
                     {"decoder", {{"filename", "decode.onnx"}}}}},
                   {"search", Json::object()}};
    std::ofstream(path_ / "genai_config.json") << config.dump();
  }
  ~TokenizerFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TokenizerFolder(const TokenizerFolder&) = delete;
  TokenizerFolder& operator=(const TokenizerFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace

struct TextCodec::Library {
  using Options = OgaResult* (*)(OgaTokenizer*, const char* const*, const char* const*, size_t);

  const char* (*error_of)(const OgaResult*) = nullptr;
  void (*destroy_result)(OgaResult*) = nullptr;
  void (*destroy_string)(const char*) = nullptr;
  void (*destroy_tokenizer)(OgaTokenizer*) = nullptr;
  void (*destroy_sequences)(OgaSequences*) = nullptr;
  OgaResult* (*create_tokenizer)(const char*, OgaTokenizer**) = nullptr;
  OgaResult* (*create_sequences)(OgaSequences**) = nullptr;
  OgaResult* (*encode)(const OgaTokenizer*, const char*, OgaSequences*) = nullptr;
  OgaResult* (*decode)(const OgaTokenizer*, const int32_t*, size_t, const char**) = nullptr;
  OgaResult* (*apply_template)(const OgaTokenizer*, const char*, const char*, const char*, bool, const char**) = nullptr;
  Options update_options = nullptr;
  size_t (*sequence_count)(const OgaSequences*, size_t) = nullptr;
  const int32_t* (*sequence_data)(const OgaSequences*, size_t) = nullptr;

  OgaTokenizer* tokenizer = nullptr;
  bool has_template = false;
  std::optional<ByteLevelVocabulary> vocabulary;

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
    bind("OgaTokenizerDecode", decode);
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
  std::string taken(const char* text) const {
    std::string copy = text;
    destroy_string(text);
    return copy;
  }
};

TextCodec::TextCodec(const std::filesystem::path& bundle, const BundleManifest& manifest) {
  if (!std::filesystem::is_regular_file(bundle / "tokenizer.json")) {
    throw Error(bundle.string() + " holds no tokenizer.json: its backbone came without a fast tokenizer");
  }
  const auto path = find_library("IAPT_GENAI_LIBRARY", kName);
  library_ = std::make_unique<Library>(path.value_or(kName));
  const TokenizerFolder folder(bundle, manifest);
  library_->check(library_->create_tokenizer(folder.path().c_str(), &library_->tokenizer),
                  "the bundle's tokenizer cannot be read");
  library_->vocabulary = ByteLevelVocabulary::load(bundle / "tokenizer.json");
  std::ifstream config(bundle / "tokenizer_config.json");
  const Json settings = Json::parse(config, nullptr, /*allow_exceptions=*/false);
  library_->has_template = std::filesystem::is_regular_file(bundle / "chat_template.jinja") ||
                           (settings.is_object() && settings.contains("chat_template"));
}

TextCodec::~TextCodec() = default;
TextCodec::TextCodec(TextCodec&&) noexcept = default;
TextCodec& TextCodec::operator=(TextCodec&&) noexcept = default;

std::vector<int64_t> TextCodec::encode(const std::string& prompt, const std::string& prompt_format) const {
  if (prompt.find_first_not_of(" \t\r\n\f\v") == std::string::npos) {
    throw Error("the prompt is empty; expected an instruction of at least one word");
  }
  const bool chat = prompt_format == "chat";
  std::string text = prompt;
  if (chat) {
    if (!library_->has_template) {
      throw Error("the adapter expects chat prompts, but the bundle's tokenizer has no chat template");
    }
    const Json messages = Json::array({{{"role", "user"}, {"content", prompt}}});
    const char* rendered = nullptr;
    library_->check(library_->apply_template(library_->tokenizer, nullptr, messages.dump().c_str(), nullptr, true,
                                             &rendered),
                    "the bundle's chat template failed");
    text = library_->taken(rendered);
  }
  // a template writes its special tokens itself
  const char* const keys[] = {"add_special_tokens"};
  const char* const values[] = {chat ? "false" : "true"};
  library_->check(library_->update_options(library_->tokenizer, keys, values, 1), "the tokenizer");
  OgaSequences* raw = nullptr;
  library_->check(library_->create_sequences(&raw), "the tokenizer");
  const std::unique_ptr<OgaSequences, void (*)(OgaSequences*)> sequences(raw, library_->destroy_sequences);
  library_->check(library_->encode(library_->tokenizer, text.c_str(), raw), "the tokenizer");
  const int32_t* data = library_->sequence_data(raw, 0);
  return {data, data + library_->sequence_count(raw, 0)};
}

std::string TextCodec::decode(const std::vector<int64_t>& tokens) const {
  if (library_->vocabulary) return library_->vocabulary->decode(tokens);
  const std::vector<int32_t> narrow(tokens.begin(), tokens.end());
  const char* text = nullptr;
  library_->check(library_->decode(library_->tokenizer, narrow.data(), narrow.size(), &text), "the tokenizer");
  return library_->taken(text);
}

}  // namespace iapt
