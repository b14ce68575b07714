// Generation with a KV cache over any runner: rows of different tenants in one batch, streamed token by token.
//
//     auto session = iapt::Session::open("BUNDLE");
//     session.stream({{"movie-sentiment", "A fine film."}}, [](const iapt::Token& token) { std::cout << token.text; });
#ifndef IAPT_SESSION_H_
#define IAPT_SESSION_H_

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "iapt/manifest.h"
#include "iapt/runner.h"
#include "iapt/sampling.h"
#include "iapt/text.h"

namespace iapt {

// What one row of a batch shall answer.
struct Request {
  std::string tenant;           // empty, or the backbone's name, asks the backbone alone
  std::string prompt;           // the instruction's text; or give `tokens`
  std::vector<int64_t> tokens;  // the instruction as token ids, instead of text
  int64_t max_new_tokens = 64;
  Sampling sampling;
  bool ignore_eos = false;  // go on to max_new_tokens whatever is generated (for measurements)
};

// One generated token of one row.
struct Token {
  size_t index = 0;  // number of the request among those that were given together
  int64_t step = 0;
  int64_t token = 0;
  std::string text;           // what this token adds; empty without a tokenizer, and while a character is incomplete
  std::string finish_reason;  // "eos" or "length" on the row's last token, else empty
};

struct SessionOptions {
  std::string target;  // empty takes the bundle's first
  RunnerOptions runner;
  bool verify = true;           // check every file's hash first
  std::filesystem::path trust;  // a public ed25519 key in PEM, whose private key must have signed; empty for anybody
  bool allow_unproven = false;  // open also a bundle whose comparison with PyTorch was not made, or failed
  // The cache that is written in place, or the one that each step concatenates (the portable graphs prefill and
  // decode); nothing takes the first where target and device have it.
  std::optional<bool> in_place;
};

class Stepper;

class Session {
 public:
  // Throws Error: the bundle is damaged, or this program or machine cannot run the target.
  static Session open(const std::filesystem::path& bundle, const SessionOptions& options = {});
  Session(Session&&) noexcept;
  ~Session();

  const BundleManifest& manifest() const { return *manifest_; }
  const TargetSpec& target() const { return *target_; }
  // Which form of ai.iapt::Rational runs.
  std::string rational() const;

  // Answers requests token by token, as many in a batch as the bundle takes; rows end on their own. All are checked
  // before the first one is read. Throws Error: an unknown tenant, an empty, too short or too long prompt, a token id
  // out of range, a request that can never fit into the cache, or a session that is answering already: it serves one
  // thread, and a callback may not ask it.
  void stream(const std::vector<Request>& requests, const std::function<void(const Token&)>& on_token);
  // The token ids of every row's answer, its end token included.
  std::vector<std::vector<int64_t>> generate(const std::vector<Request>& requests);

 private:
  struct Row;
  Session(const std::filesystem::path& bundle, BundleManifest manifest, const SessionOptions& options);
  Row make_row(size_t index, const Request& request);
  void check(const Row& row) const;
  int64_t entries_of(const Row& row) const;
  void run(Row* rows, size_t count, const std::function<void(const Token&)>& on_token);
  static int64_t next_token(Row& row, const std::vector<float>& logits);
  Token advance(Row& row, int64_t step, int64_t token);
  std::string new_text(Row& row, const std::vector<int64_t>& said, bool is_final);
  const TextCodec* codec();

  std::filesystem::path bundle_;                    // absolute, because the tokenizer is read when it is needed
  std::string tokenizer_;                           // what tells its file from another one
  std::unique_ptr<const BundleManifest> manifest_;  // on the heap, so that a session can move
  const TargetSpec* target_;                        // one of the manifest's
  std::unique_ptr<Stepper> stepper_;
  std::unique_ptr<TextCodec> codec_;
  std::string no_codec_;  // why there is none
  // Whether it is answering; on the heap like the manifest.
  std::unique_ptr<std::atomic<bool>> busy_ = std::make_unique<std::atomic<bool>>(false);
};

}  // namespace iapt

#endif  // IAPT_SESSION_H_
