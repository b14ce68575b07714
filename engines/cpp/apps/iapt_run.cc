// iapt_run BUNDLE --tenant NAME --prompt TEXT: what `iapt-export generate` does, without Python.
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <utility>

#include "iapt/session.h"

namespace {

constexpr const char* kHelp = R"(usage: iapt_run BUNDLE [--tenant NAME] (--prompt TEXT | --tokens IDS) ...

Answer a prompt with one tenant of a bundle; streams tokens.

  --tenant NAME        whose adapter answers, or the backbone's name; without, where there is no other, the backbone
  --prompt TEXT        once for each row of a batch
  --tokens IDS         instead of a prompt: token ids, separated by commas or spaces; prints token ids
  --target T           which of the bundle's targets runs (without: the first)
  --device DEVICE      cpu or cuda: where ONNX Runtime runs (default: cpu)
  --threads N          for ONNX Runtime (default: every processor)
  --max-new-tokens N   longest answer (default: 64)
  --temperature X      0 is greedy (default: 0)
  --top-p X            nucleus of the probabilities to sample from (default: 1)
  --seed N             seed of sampling (default: 0)
  --trust KEY.pem      public ed25519 key; the bundle must be signed with its private key (build --sign)
  --allow-unproven     open also a bundle whose comparison with PyTorch was not made, or failed
  --portable           run prefill.onnx and decode.onnx, also where the bundle has serve.onnx
  --json               print the result as JSON on stdout
  --verbose            say on stderr what runs
  --help

exit codes: 0 success · 1 bad input or damaged files · 2 wrong flags
)";

struct Arguments {
  std::string bundle;
  std::optional<std::string> tenant;
  std::vector<std::string> prompts, tokens;
  iapt::SessionOptions session;
  iapt::Sampling sampling;
  int64_t max_new_tokens = 64;
  bool json = false, verbose = false;
};

[[noreturn]] void wrong(const std::string& text) {
  std::cerr << "iapt_run: error: " << text << "; see iapt_run --help\n";
  std::exit(2);
}

template <typename T>
T number(const std::string& flag, const std::string& text) {
  std::istringstream stream(text);
  T value{};
  if ((text.rfind('-', 0) == 0 && std::is_unsigned_v<T>) || !(stream >> value) || !(stream >> std::ws).eof()) {
    wrong(flag + " " + text + " is no number of its kind");
  }
  return value;
}

// A flag of which the last would count in silence, although prompts may be given in pairs with it.
std::string once(const std::optional<std::string>& before, std::string value) {
  if (before) wrong("--tenant is given twice; all rows of a call are one tenant's");
  return value;
}

Arguments parse(int argc, char** argv) {
  Arguments found;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    std::optional<std::string> given;  // of --flag=value; a value of its own may begin with -- and hold a =
    const auto equals = word.rfind("--", 0) == 0 ? word.find('=') : std::string::npos;
    if (equals != std::string::npos) {
      given = word.substr(equals + 1);
      word.resize(equals);
    }
    if (word == "--drafts")
      wrong("--drafts is for iapt-export; this program takes a token a step, with the same answer");
    const auto value = [&]() -> std::string {
      if (given) return *std::exchange(given, std::nullopt);
      if (++i == argc) wrong(word + " needs a value");
      return argv[i];
    };
    if (word == "--help") {
      std::cout << kHelp;
      std::exit(0);
    }
    if (word == "--json") found.json = true;
    else if (word == "--verbose") found.verbose = true;
    else if (word == "--portable") found.session.in_place = false;
    else if (word == "--allow-unproven") found.session.allow_unproven = true;
    else if (word == "--trust") found.session.trust = value();
    else if (word == "--tenant") found.tenant = once(found.tenant, value());
    else if (word == "--prompt") found.prompts.push_back(value());
    else if (word == "--tokens") found.tokens.push_back(value());
    else if (word == "--target") found.session.target = value();
    else if (word == "--device") found.session.runner.device = value();
    else if (word == "--threads") found.session.runner.threads = number<int>(word, value());
    else if (word == "--max-new-tokens") found.max_new_tokens = number<int64_t>(word, value());
    else if (word == "--temperature") found.sampling.temperature = number<double>(word, value());
    else if (word == "--top-p") found.sampling.top_p = number<double>(word, value());
    else if (word == "--seed") found.sampling.seed = number<uint64_t>(word, value());
    else if (word.rfind("--", 0) == 0) wrong("unknown flag " + word);
    else if (found.bundle.empty()) found.bundle = word;
    else wrong("unexpected argument " + word);
    if (given) wrong(word + " takes no value");
  }
  if (found.bundle.empty()) wrong("BUNDLE is needed");
  if (found.prompts.empty() == found.tokens.empty()) wrong("either --prompt or --tokens is needed");
  return found;
}

std::vector<int64_t> token_ids(const std::string& text) {
  std::vector<int64_t> ids;
  std::string word;
  std::istringstream stream(text);
  for (char& letter : word = text) letter = letter == ',' ? ' ' : letter;
  stream.str(word);
  while (stream >> word) ids.push_back(number<int64_t>("--tokens", word));
  if (ids.empty()) wrong("--tokens has no token id");
  return ids;
}

std::vector<iapt::Request> requests_of(const Arguments& arguments) {
  std::vector<iapt::Request> requests;
  const auto add = [&](const std::string& prompt, std::vector<int64_t> tokens) {
    requests.push_back(
        {arguments.tenant.value_or(""), prompt, std::move(tokens), arguments.max_new_tokens, arguments.sampling});
  };
  for (const auto& prompt : arguments.prompts) add(prompt, {});
  for (const auto& tokens : arguments.tokens) add("", token_ids(tokens));
  return requests;
}

std::string joined(const std::vector<int64_t>& ids) {
  std::string text;
  for (const int64_t id : ids) text += (text.empty() ? "" : ",") + std::to_string(id);
  return text;
}

void run(const Arguments& arguments) {
  auto session = iapt::Session::open(arguments.bundle, arguments.session);
  if (arguments.verbose) {
    std::cerr << "target " << session.target().name << ":" << session.target().dtype << ", ai.iapt::Rational as "
              << session.rational() << "\n";
  }
  if (const auto& tenants = session.manifest().tenants; !arguments.tenant && !tenants.empty()) {
    std::string names;
    for (const auto& tenant : tenants) names += (names.empty() ? "" : ", ") + tenant.name;
    throw iapt::Error("--tenant is missing: whose adapter answers; this bundle has " + names);
  }
  const auto requests = requests_of(arguments);
  const bool speaks = !arguments.prompts.empty();
  std::vector<std::string> texts(requests.size()), reasons(requests.size());
  std::vector<std::vector<int64_t>> ids(requests.size());
  const bool streams = requests.size() == 1 && !arguments.json && speaks;
  session.stream(requests, [&](const iapt::Token& token) {
    texts[token.index] += token.text;
    ids[token.index].push_back(token.token);
    reasons[token.index] = token.finish_reason;
    if (streams) std::cout << token.text << std::flush;
  });
  if (arguments.json) {
    auto found = nlohmann::ordered_json::array();
    for (size_t row = 0; row < requests.size(); ++row) {
      found.push_back({{"prompt", requests[row].prompt},
                       {"text", texts[row]},
                       {"tokens", ids[row]},
                       {"finish_reason", reasons[row]}});
    }
    std::cout << found.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << "\n";
  } else if (streams) {
    std::cout << "\n";
  } else {
    for (size_t row = 0; row < requests.size(); ++row) {
      std::cout << (row > 0 ? "\n---\n" : "") << (speaks ? texts[row] : joined(ids[row]));
    }
    std::cout << "\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments = parse(argc, argv);
  int code = 0;
  try {
    run(arguments);
  } catch (const std::exception& error) {
    std::cerr << "iapt_run: error: " << error.what() << "\n";
    code = 1;
  }
  std::cout.flush();
  return code;
}
