// The two ways to fail, each with an exit code of its own.
#pragma once

#include <stdexcept>
#include <string>

struct BadInput : std::runtime_error {  // a bundle or an argument that cannot be used: exit code 2
  using std::runtime_error::runtime_error;
};

struct Failed : std::runtime_error {  // the engine or the system failed: exit code 1
  using std::runtime_error::runtime_error;
};

// On one line and without control characters (C0, DEL, and C1 in UTF-8): no text of a bundle writes on a terminal.
inline std::string printable(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    const auto next = static_cast<unsigned char>(i + 1 < text.size() ? text[i + 1] : 0);
    const bool c1 = c == 0xC2 && next >= 0x80 && next < 0xA0;
    out += c == '\n' ? ' ' : c < 0x20 || c == 0x7F || c1 ? '?' : text[i];
    if (c1) ++i;
  }
  return out;
}
