// Answers rows of several tenants in one batch, for tests; iapt_run gives all rows one tenant and one length.
//
//     answer_rows BUNDLE 0|1[n|m] TENANT MAX_NEW_TOKENS IDS [TENANT MAX_NEW_TOKENS IDS ...]
//
// 1 takes the cache in place, 0 the portable graphs; IDS are separated by spaces. Prints each row's token ids in a
// line. With n, a callback asks the session that it answers for, and what that says is printed as an error; with m, the
// bundle is renamed once it is open.
#include <filesystem>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "iapt/session.h"

int main(int argc, char** argv) {
  try {
    iapt::SessionOptions options;
    options.in_place = argv[2][0] == '1';
    auto session = iapt::Session::open(argv[1], options);
    if (argv[2][1] == 'm') std::filesystem::rename(argv[1], std::string(argv[1]) + "-moved");
    std::vector<iapt::Request> requests;
    for (int i = 3; i + 2 < argc; i += 3) {
      iapt::Request request;
      request.tenant = argv[i];
      request.max_new_tokens = std::stoll(argv[i + 1]);
      request.ignore_eos = true;
      std::istringstream ids(argv[i + 2]);
      for (int64_t id = 0; ids >> id;) request.tokens.push_back(id);
      requests.push_back(request);
    }
    std::vector<std::vector<int64_t>> answers(requests.size());
    session.stream(requests, [&](const iapt::Token& token) {
      answers[token.index].push_back(token.token);
      if (argv[2][1] != 'n') return;
      try {
        session.generate(requests);
      } catch (const iapt::Error& error) {
        std::cerr << error.what() << '\n';
      }
    });
    if (session.generate(requests) != answers) throw iapt::Error("it answers otherwise the second time");
    for (const auto& answer : answers) {
      for (const int64_t token : answer) std::cout << token << ' ';
      std::cout << '\n';
    }
  } catch (const iapt::Error& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
