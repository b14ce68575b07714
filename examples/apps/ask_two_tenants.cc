// Two tenants of one bundle answer in one batch: the C++ library, embedded.
//
//     cmake -S examples/apps -B build/apps -DCMAKE_PREFIX_PATH=$PWD/build/install && cmake --build build/apps
//     build/apps/ask_two_tenants BUNDLE TENANT PROMPT TENANT PROMPT
#include <iostream>
#include <string>
#include <vector>

#include "iapt/session.h"

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: ask_two_tenants BUNDLE TENANT PROMPT TENANT PROMPT\n";
    return 2;
  }
  try {
    auto session = iapt::Session::open(argv[1]);
    std::vector<iapt::Request> requests(2);
    for (size_t row = 0; row < requests.size(); ++row) {
      requests[row].tenant = argv[2 + 2 * row];
      requests[row].prompt = argv[3 + 2 * row];
      requests[row].max_new_tokens = 8;
    }
    std::vector<std::string> answers(requests.size());
    session.stream(requests, [&](const iapt::Token& token) {  // called as each token comes, rows in turn
      answers[token.index] += token.text;
    });
    for (size_t row = 0; row < requests.size(); ++row) {
      std::cout << requests[row].tenant << ": " << answers[row] << "\n";
    }
  } catch (const iapt::Error& error) {  // bad input or a damaged bundle; the text says what to try
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
