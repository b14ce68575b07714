// Errors that a user can fix: the text says what was expected, what came, and what to try.
#ifndef IAPT_ERROR_H_
#define IAPT_ERROR_H_

#include <stdexcept>
#include <string>

namespace iapt {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace iapt

#endif  // IAPT_ERROR_H_
