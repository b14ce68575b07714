#include "iapt/session.h"

#include <algorithm>
#include <limits>
#include <string_view>

#include "stepper.h"

namespace iapt {
namespace {

constexpr std::string_view kHalfCharacter = "\xef\xbf\xbd";  // what bytes that are no character yet decode to

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// A UTF-8 text without its first characters, as many as another text has.
std::string behind(const std::string& text, const std::string& other) {
  const auto begins = [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; };
  auto left = std::count_if(other.begin(), other.end(), begins);
  const auto found = std::find_if(text.begin(), text.end(), [&](char byte) { return begins(byte) && left-- == 0; });
  return {found, text.end()};
}

// Size and time of a file, or nothing where there is none.
std::string stamp_of(const std::filesystem::path& path) {
  std::error_code missing;
  const auto size = std::filesystem::file_size(path, missing);
  if (missing) return "";
  const auto time = std::filesystem::last_write_time(path, missing).time_since_epoch().count();
  return missing ? "" : std::to_string(size) + " " + std::to_string(time);
}

// Holds a session while it answers: rows of two calls would share one cache.
class Answering {
 public:
  explicit Answering(std::atomic<bool>& busy) : busy_(busy) {
    if (busy_.exchange(true)) throw Error("this session is answering already; open another one to answer beside it");
  }
  ~Answering() { busy_ = false; }
  Answering(const Answering&) = delete;
  Answering& operator=(const Answering&) = delete;

 private:
  std::atomic<bool>& busy_;
};

}  // namespace

struct Session::Row {
  size_t index;  // the request's number
  const Request* request;
  std::vector<int64_t> prompt;
  Random random;
  std::vector<int64_t> tokens;
  std::string text;
  bool done = false;
};

Session::Session(const std::filesystem::path& bundle, BundleManifest manifest, const SessionOptions& options)
    : bundle_(std::filesystem::absolute(bundle)),
      tokenizer_(stamp_of(bundle_ / "tokenizer.json")),
      manifest_(std::make_unique<const BundleManifest>(std::move(manifest))),
      target_(&manifest_->target(options.target)),
      stepper_(open_stepper(bundle_, *manifest_, *target_, options.runner, options.in_place)) {}

Session::Session(Session&&) noexcept = default;
Session::~Session() = default;

Session Session::open(const std::filesystem::path& bundle, const SessionOptions& options) {
  auto manifest = BundleManifest::load(bundle);
  if (!options.trust.empty() && !options.verify) {
    throw Error("a signature says nothing of files that are not checked; leave verify = false out");
  }
  if (!options.trust.empty()) check_signature(bundle, options.trust);
  if (options.verify) verify_files(bundle, manifest);
  if (manifest.verdict != "pass" && !options.allow_unproven) {
    throw Error(bundle.string() + " is not proven to answer as PyTorch does: its verdict is '" + manifest.verdict +
                "', expected 'pass'; build it again, or allow it (allow_unproven, --allow-unproven)");
  }
  return Session(bundle, std::move(manifest), options);
}

std::string Session::rational() const { return stepper_->rational(); }

void Session::stream(const std::vector<Request>& requests, const std::function<void(const Token&)>& on_token) {
  const Answering answering(*busy_);
  std::vector<Row> rows;
  for (size_t index = 0; index < requests.size(); ++index) {
    rows.push_back(make_row(index, requests[index]));
    check(rows.back());
  }
  const auto most = static_cast<size_t>(manifest_->ranges.batch.max);
  for (size_t first = 0; first < rows.size(); first += most) {
    run(rows.data() + first, std::min(most, rows.size() - first), on_token);
  }
}

// One batch, until its last row has ended.
void Session::run(Row* rows, size_t count, const std::function<void(const Token&)>& on_token) {
  Instructions instructions;
  int64_t capacity = 0;
  for (size_t row = 0; row < count; ++row) {
    instructions.push_back({rows[row].request->tenant, rows[row].prompt});
    capacity = std::max(capacity, entries_of(rows[row]));
  }
  Tensor logits = stepper_->read(instructions, capacity);
  for (int64_t step = 0;; ++step) {
    std::vector<int64_t> chosen(count, manifest_->backbone.pad_token_id);
    bool all_done = true;
    for (size_t row = 0; row < count; ++row) {
      if (rows[row].done) continue;
      chosen[row] = next_token(rows[row], logits.row_as_float(row));
      on_token(advance(rows[row], step, chosen[row]));
      if (rows[row].done) stepper_->leave(row);
      all_done = all_done && rows[row].done;
    }
    if (all_done) return;
    logits = stepper_->step(chosen);
  }
}

std::vector<std::vector<int64_t>> Session::generate(const std::vector<Request>& requests) {
  std::vector<std::vector<int64_t>> answers(requests.size());
  stream(requests, [&](const Token& token) { answers[token.index].push_back(token.token); });
  return answers;
}

Session::Row Session::make_row(size_t index, const Request& request) {
  const TenantSpec& tenant = manifest_->tenant(request.tenant);
  request.sampling.check();
  std::vector<int64_t> prompt = request.tokens;
  if (prompt.empty()) {
    const TextCodec* text = codec();
    if (text == nullptr)
      throw Error("a prompt is text, but " + no_codec_ +
                  (no_codec_.find("--tokens") == std::string::npos ? "; give token ids (--tokens)" : ""));
    std::vector<Message> messages;  // the system prompt that the tenant was trained with, and the request
    const std::string base_format = text->has_chat_template() ? "chat" : "plain";
    const std::string& format = tenant.prompt_format.empty() ? base_format : tenant.prompt_format;
    const bool has_system = format == "chat" && tenant.system_prompt && !tenant.system_prompt->empty();
    if (has_system) messages.push_back({"system", *tenant.system_prompt});
    messages.push_back({"user", request.prompt});
    prompt = text->encode(messages, format);
  }
  const auto where = "request " + std::to_string(index) + ": ";
  for (const int64_t token : prompt) {
    if (token < 0 || token >= manifest_->backbone.vocab_size) {
      throw Error(where + "token id " + std::to_string(token) + " is out of range; the vocabulary has " +
                  std::to_string(manifest_->backbone.vocab_size) + " entries");
    }
  }
  if (request.max_new_tokens < 1) {
    throw Error(where + "max_new_tokens is " + std::to_string(request.max_new_tokens) +
                ", expected at least 1, a whole number");
  }
  return Row{index, &request, std::move(prompt), Random(request.sampling.seed), {}, "", false};
}

void Session::check(const Row& row) const {
  const auto where = "request " + std::to_string(row.index);
  const Range& sequence = manifest_->ranges.sequence;
  const auto length = static_cast<int64_t>(row.prompt.size());
  const std::string has = where + ": the prompt has " + std::to_string(length) + " tokens; this bundle takes at ";
  if (length > sequence.max) {
    throw Error(has + "most " + std::to_string(sequence.max) + " (shorten it, or build with a larger --sequence)");
  }
  if (length < sequence.min) {
    throw Error(has + "least " + std::to_string(sequence.min) + " (build with a smaller --sequence)");
  }
  const int64_t needed = entries_of(row), capacity = manifest_->ranges.past.max;
  if (needed > capacity) {
    throw Error(where + " needs " + std::to_string(needed) + " cache entries (" +
                std::to_string(manifest_->prompt_length(row.request->tenant)) + " prompt, " + std::to_string(length) +
                " instruction, the rest new tokens); this bundle has " + std::to_string(capacity) +
                " (lower --max-new-tokens, or build with a larger --past)");
  }
}

int64_t Session::next_token(Row& row, const std::vector<float>& logits) {
  try {
    return choose(logits, row.request->sampling, row.random);
  } catch (const Error& error) {
    throw Error("request " + std::to_string(row.index) + " of tenant " + row.request->tenant +
                " failed: " + error.what());
  }
}

// Cache entries of a row: its tenant's prompts, the instruction, and all generated tokens but the last.
int64_t Session::entries_of(const Row& row) const {
  const int64_t read = manifest_->prompt_length(row.request->tenant) + static_cast<int64_t>(row.prompt.size());
  const int64_t most = std::numeric_limits<int64_t>::max() - read;  // an answer's length may be any number
  return read + std::min(row.request->max_new_tokens - 1, most);
}

Token Session::advance(Row& row, int64_t step, int64_t token) {
  row.tokens.push_back(token);
  const auto& ends = manifest_->backbone.eos_token_ids;
  std::string reason;
  if (!row.request->ignore_eos && std::find(ends.begin(), ends.end(), token) != ends.end()) {
    reason = "eos";
  } else if (static_cast<int64_t>(row.tokens.size()) == row.request->max_new_tokens) {
    reason = "length";
  }
  row.done = !reason.empty();
  std::vector<int64_t> said = row.tokens;
  if (reason == "eos") said.pop_back();  // whose text, where it is no special token, is no part of the answer
  return Token{row.index, step, token, new_text(row, said, row.done), reason};
}

// What the latest token adds; a character whose bytes are not all there yet waits for the next token.
std::string Session::new_text(Row& row, const std::vector<int64_t>& said, bool is_final) {
  const TextCodec* text = codec();
  if (text == nullptr) return "";
  std::string whole = text->decode(said);
  const bool is_half = ends_with(whole, kHalfCharacter);
  std::string added;
  if (whole.compare(0, row.text.size(), row.text) == 0) {
    if (is_half && !is_final) return "";
    added = whole.substr(row.text.size());
  } else {  // a run of bytes that was a character, and with half of another behind it is none
    while (ends_with(whole, kHalfCharacter)) whole.resize(whole.size() - kHalfCharacter.size());
    added = behind(whole, row.text);
  }
  row.text += added;
  return added;
}

const TextCodec* Session::codec() {
  if (!codec_ && no_codec_.empty()) {
    if (stamp_of(bundle_ / "tokenizer.json") != tokenizer_) {
      throw Error(bundle_.string() + " was changed after it was opened (tokenizer.json, at least); open it again");
    }
    try {
      codec_ = std::make_unique<TextCodec>(bundle_, *manifest_);
    } catch (const Error& error) {
      no_codec_ = error.what();
    }
  }
  return codec_.get();
}

}  // namespace iapt
