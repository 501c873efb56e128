// The two ways to fail, each with an exit code of its own.
#pragma once

#include <stdexcept>

struct BadInput : std::runtime_error {  // a bundle or an argument that cannot be used: exit code 2
  using std::runtime_error::runtime_error;
};

struct Failed : std::runtime_error {  // the engine or the system failed: exit code 1
  using std::runtime_error::runtime_error;
};
