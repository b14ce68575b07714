#include "iapt/text.h"

#include <stdlib.h>

#include <fstream>
#include <map>
#include <optional>

#include "chat_template.h"
#include "decoder.h"
#include "genai.h"
#include "probes.h"
#include "tokenizer_parts.h"
#include "utf8.h"

namespace iapt {
namespace {

constexpr const char* kRemedy = "; give token ids (--tokens), or take Python's session";

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

Json read_json(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return parse_json(std::string(std::istreambuf_iterator<char>(stream), {}));
}

// What a template may call bos_token, eos_token, ... and a model's own, as transformers names them.
std::map<std::string, std::string> special_tokens(const Json& settings) {
  std::map<std::string, std::string> found;
  const auto take = [&](const std::string& name, const Json& value) {
    const Json text = value.is_object() ? value.value("content", Json()) : value;
    if (text.is_string()) found[name] = text.get<std::string>();
  };
  const std::string ending = "_token";
  for (const auto& [name, value] : settings.items()) {
    if (name.size() > ending.size() && name.compare(name.size() - ending.size(), ending.size(), ending) == 0) {
      take(name, value);
    }
  }
  for (const char* named : {"extra_special_tokens", "model_specific_special_tokens"}) {
    const auto own = settings.find(named);
    if (own == settings.end() || !own->is_object()) continue;
    for (const auto& [name, value] : own->items()) take(name, value);
  }
  return found;
}

std::optional<std::string> template_of(const std::filesystem::path& bundle, const Json& settings) {
  std::ifstream stream(bundle / "chat_template.jinja", std::ios::binary);
  if (stream) return std::string(std::istreambuf_iterator<char>(stream), {});
  const auto found = settings.find("chat_template");
  if (found == settings.end() || !found->is_string()) return std::nullopt;
  return found->get<std::string>();
}

template <typename T>
void compare(const std::string& what, const T& expected, const T& found) {
  if (expected == found) return;
  throw Error("this program reads the bundle's text in another way than training did: " + what + " should be " +
              shown(expected) + " and is " + shown(found) + kRemedy);
}

void refuse(const std::string& why) {
  if (!why.empty()) throw Error("the text cannot be read as training did: " + why + kRemedy);
}

}  // namespace

struct TextCodec::Parts {
  TokenizerParts tokenizer;
  Decoder decoder;
  GenaiTokenizer genai;
  std::optional<std::string> chat_template;
  std::map<std::string, std::string> special_tokens;
};

TextCodec::TextCodec(const std::filesystem::path& bundle, const BundleManifest& manifest) {
  if (!std::filesystem::is_regular_file(bundle / "tokenizer.json")) {
    throw Error(bundle.string() + " holds no tokenizer.json: its backbone came without a fast tokenizer");
  }
  const Json tokenizer = read_json(bundle / "tokenizer.json");
  Json settings = read_json(bundle / "tokenizer_config.json");
  if (!settings.is_object()) settings = Json::object();
  const TokenizerFolder folder(bundle, manifest);
  try {
    parts_.reset(new Parts{TokenizerParts(tokenizer), Decoder(tokenizer), GenaiTokenizer(folder.path()),
                           template_of(bundle, settings), iapt::special_tokens(settings)});
  } catch (const Json::exception& error) {
    throw Error((bundle / "tokenizer.json").string() + " is not valid: " + error.what());
  }
  check_probes(bundle);
}

TextCodec::~TextCodec() = default;
TextCodec::TextCodec(TextCodec&&) noexcept = default;
TextCodec& TextCodec::operator=(TextCodec&&) noexcept = default;

bool TextCodec::has_chat_template() const { return parts_->chat_template.has_value(); }

std::vector<int64_t> TextCodec::encode(const std::vector<Message>& messages, const std::string& prompt_format) const {
  if (messages.empty() || is_blank(messages.back().content)) {
    throw Error("the prompt is empty; expected an instruction of at least one word");
  }
  // a template writes its special tokens itself
  const bool chat = prompt_format == "chat";
  const std::string ending = prompt_format == "newline" ? "\n" : "";  // as Python's before_answer
  return ids_of(chat ? render(messages) : messages.back().content + ending, !chat);
}

std::string TextCodec::render(const std::vector<Message>& messages, const std::string& date) const {
  if (!parts_->chat_template) {
    throw Error("the adapter expects chat prompts, but the bundle's tokenizer has no chat template");
  }
  auto conversation = nlohmann::ordered_json::array();  // a template may write a message's keys in their order
  for (const auto& [role, content] : messages) {
    refuse(damage(content));  // the template would get a part of it
    conversation.push_back({{"role", role}, {"content", content}});
  }
  return parts_->genai.render(prepared_template(*parts_->chat_template, parts_->special_tokens, date),
                              conversation.dump());
}

std::string TextCodec::decode(const std::vector<int64_t>& tokens) const { return parts_->decoder.decode(tokens); }

std::vector<int64_t> TextCodec::ids_of(const std::string& text, bool add_special_tokens) const {
  refuse(parts_->tokenizer.refusal(text));
  std::vector<int64_t> ids;
  for (const auto& piece : parts_->tokenizer.pieces(text)) {
    const auto more = parts_->genai.encode(piece, add_special_tokens && ids.empty());
    ids.insert(ids.end(), more.begin(), more.end());
  }
  return ids;
}

// Compares with what transformers made of texts, conversations and ids when the bundle was built; leaves out texts that
// this program refuses alone.
void TextCodec::check_probes(const std::filesystem::path& bundle) const {
  const Probes probes = Probes::load(bundle);
  const auto check_ids = [&](const std::string& what, const std::string& text, const std::vector<int64_t>& expected,
                             bool add_special_tokens) {
    if (!parts_->tokenizer.refusal(text).empty()) return;
    compare("the ids of " + what, expected, ids_of(text, add_special_tokens));
  };
  for (const auto& probe : probes.texts) check_ids(shown(probe.text), probe.text, probe.ids, true);
  for (const auto& probe : probes.chats) {
    auto conversation = nlohmann::ordered_json::array();
    for (const auto& [role, content] : probe.messages) conversation.push_back({{"role", role}, {"content", content}});
    const std::string what = "the conversation " + conversation.dump();
    std::optional<std::string> rendered;
    try {
      rendered = render(probe.messages, probes.date);
    } catch (const Error&) {  // as the template may have done when the bundle was built
    }
    compare("the text of " + what, Json(probe.text ? Json(*probe.text) : Json()),
            Json(rendered ? Json(*rendered) : Json()));
    if (rendered) check_ids("the text of " + what, *rendered, probe.ids, false);
  }
  for (const auto& probe : probes.answers) {
    compare("the text of the ids " + shown(probe.ids), probe.text, decode(probe.ids));
  }
}

}  // namespace iapt
