// JSON (RFC 8259) in and out. Input is hostile: repeated keys, deep nesting, NaN, broken UTF-8 and what would take much
// memory are refused.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

constexpr uint64_t kMostJson = 16 << 20;  // bytes of a text, and
constexpr size_t kMostValues = 1 << 20;   // values in it, each of a hundred bytes: more than any bundle has

class Json {
 public:
  enum class Kind { null, boolean, integer, real, string, list, object };

  Json() = default;
  Json(bool value) : kind_(Kind::boolean), integer_(value) {}
  Json(int value) : kind_(Kind::integer), integer_(value) {}
  Json(int64_t value) : kind_(Kind::integer), integer_(value) {}
  Json(double value) : kind_(Kind::real), real_(value) {}
  Json(const char* value) : kind_(Kind::string), text_(value) {}
  Json(std::string value) : kind_(Kind::string), text_(std::move(value)) {}
  static Json list() { return Json(Kind::list); }
  static Json object() { return Json(Kind::object); }

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::null; }
  const std::vector<Json>& items() const { return items_; }
  const std::vector<std::pair<std::string, Json>>& members() const { return members_; }
  void push(Json value) { items_.push_back(std::move(value)); }
  void set(std::string key, Json value) { members_.emplace_back(std::move(key), std::move(value)); }

  const Json* find(const std::string& key) const {
    for (const auto& [name, value] : members_)
      if (name == key) return &value;
    return nullptr;
  }

  // The readers below name `where` and the key in their errors.
  const Json& at(const std::string& key, const std::string& where) const {
    if (kind_ != Kind::object) throw BadInput(where + " is " + kind_name() + ", want an object");
    const Json* value = find(key);
    if (!value) throw BadInput(where + ": " + key + " is missing");
    return *value;
  }
  int64_t integer(const std::string& where) const {
    if (kind_ != Kind::integer) throw BadInput(where + " is " + kind_name() + ", want an integer");
    return integer_;
  }
  double number(const std::string& where) const {
    if (kind_ == Kind::integer) return static_cast<double>(integer_);
    if (kind_ != Kind::real) throw BadInput(where + " is " + kind_name() + ", want a number");
    return real_;
  }
  bool boolean(const std::string& where) const {
    if (kind_ != Kind::boolean) throw BadInput(where + " is " + kind_name() + ", want true or false");
    return integer_ != 0;
  }
  const std::string& string(const std::string& where) const {
    if (kind_ != Kind::string) throw BadInput(where + " is " + kind_name() + ", want a string");
    return text_;
  }
  const std::vector<Json>& list(const std::string& where) const {
    if (kind_ != Kind::list) throw BadInput(where + " is " + kind_name() + ", want a list");
    return items_;
  }

  const char* kind_name() const {
    static const char* names[] = {"null", "true or false", "an integer", "a number", "a string", "a list", "an object"};
    return names[static_cast<int>(kind_)];
  }

  std::string dump(bool lines = false) const {  // on one line, or one for each member
    std::string out;
    write(out, lines ? 0 : -1);
    return out;
  }

  static Json parse(const std::string& text, const std::string& where) { return Parser{text, where}.document(); }

 private:
  explicit Json(Kind kind) : kind_(kind) {}

  Kind kind_ = Kind::null;
  int64_t integer_ = 0;
  double real_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;

  static void quote(std::string& out, const std::string& text) {
    out += '"';
    for (unsigned char c : text) {
      if (c == '"' || c == '\\') {
        out += '\\';
        out += static_cast<char>(c);
      } else if (c < 0x20) {
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\u%04x", c);
        out += escape;
      } else {
        out += static_cast<char>(c);
      }
    }
    out += '"';
  }

  void write(std::string& out, int indent) const {
    const bool lines = indent >= 0;
    const std::string inner = lines ? "\n" + std::string(indent + 1, ' ') : "";
    const std::string end = lines ? "\n" + std::string(indent, ' ') : "", comma = lines ? "," : ", ";
    const int deeper = lines ? indent + 1 : -1;
    char number[40];
    switch (kind_) {
      case Kind::null: out += "null"; break;
      case Kind::boolean: out += integer_ ? "true" : "false"; break;
      case Kind::integer: out += std::to_string(integer_); break;
      case Kind::real:
        if (!std::isfinite(real_)) {
          out += "null";  // JSON has no NaN and no infinity
          break;
        }
        std::snprintf(number, sizeof number, "%.17g", real_);
        out += number;
        break;
      case Kind::string: quote(out, text_); break;
      case Kind::list: {
        out += '[';
        bool first = true;
        for (const Json& item : items_) {
          if (!first) out += ", ";
          first = false;
          item.write(out, deeper);
        }
        out += ']';
        break;
      }
      case Kind::object: {
        out += '{';
        bool first = true;
        for (const auto& [name, value] : members_) {
          out += first ? inner : comma + inner;
          first = false;
          quote(out, name);
          out += ": ";
          value.write(out, deeper);
        }
        out += first ? "}" : end + "}";
        break;
      }
    }
  }

  struct Parser {
    const std::string& text;
    const std::string& where;
    size_t at = 0, values = 0;

    [[noreturn]] void fail(const std::string& what) const {
      throw BadInput(where + ": is not JSON: " + what + " at byte " + std::to_string(at));
    }
    void space() {
      while (at < text.size() && (text[at] == ' ' || text[at] == '\n' || text[at] == '\t' || text[at] == '\r')) ++at;
    }
    char peek() const { return at < text.size() ? text[at] : '\0'; }
    bool take(char c) {
      if (at >= text.size() || text[at] != c) return false;
      ++at;
      return true;
    }
    void word(const char* letters) {
      for (const char* c = letters; *c; ++c)
        if (!take(*c)) fail("an unknown word");
    }

    Json document() {
      Json value = parse_value(0);
      space();
      if (at != text.size()) fail("something follows the value");
      return value;
    }

    Json parse_value(int depth) {
      if (depth > 64) fail("it is nested too deeply");
      if (++values > kMostValues) fail("it has more than " + std::to_string(kMostValues) + " values");
      space();
      switch (peek()) {
        case '{': return parse_object(depth);
        case '[': return parse_list(depth);
        case '"': return Json(parse_string());
        case 't': word("true"); return Json(true);
        case 'f': word("false"); return Json(false);
        case 'n': word("null"); return Json();
        default: return parse_number();
      }
    }

    Json parse_object(int depth) {
      Json out = Json::object();
      ++at;
      space();
      if (take('}')) return out;
      std::vector<std::string> seen;
      do {
        space();
        if (peek() != '"') fail("a key is missing");
        std::string key = parse_string();
        space();
        if (!take(':')) fail("a colon is missing");
        seen.push_back(key);
        out.set(std::move(key), parse_value(depth + 1));
        space();
      } while (take(','));
      if (!take('}')) fail("an object does not end");
      std::sort(seen.begin(), seen.end());
      if (std::adjacent_find(seen.begin(), seen.end()) != seen.end()) fail("an object repeats a key, before it ends");
      return out;
    }

    Json parse_list(int depth) {
      Json out = Json::list();
      ++at;
      space();
      if (take(']')) return out;
      do {
        out.push(parse_value(depth + 1));
        space();
      } while (take(','));
      if (!take(']')) fail("a list does not end");
      return out;
    }

    Json parse_number() {
      const size_t start = at;
      bool real = false;
      take('-');
      if (!take('0') && !digits()) fail("a value is missing");
      if (take('.')) {
        real = true;
        if (!digits()) fail("digits are missing");
      }
      if (take('e') || take('E')) {
        real = true;
        if (!take('+')) take('-');
        if (!digits()) fail("digits are missing");
      }
      const std::string number = text.substr(start, at - start);
      if (!real && number.size() <= 18) return Json(static_cast<int64_t>(std::strtoll(number.c_str(), nullptr, 10)));
      const double value = std::strtod(number.c_str(), nullptr);
      if (!std::isfinite(value)) fail("a number is too large");
      return Json(value);
    }
    bool digits() {
      const size_t start = at;
      while (peek() >= '0' && peek() <= '9') ++at;
      return at > start;
    }

    uint32_t hex4() {
      uint32_t value = 0;
      for (int i = 0; i < 4; ++i) {
        const char c = peek();
        const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) fail("four hex digits are missing");
        value = value * 16 + static_cast<uint32_t>(digit);
        ++at;
      }
      return value;
    }

    void append(std::string& out, uint32_t code) {
      if (code < 0x80) {
        out += static_cast<char>(code);
      } else if (code < 0x800) {
        out += static_cast<char>(0xC0 | code >> 6);
        out += static_cast<char>(0x80 | (code & 63));
      } else if (code < 0x10000) {
        out += static_cast<char>(0xE0 | code >> 12);
        out += static_cast<char>(0x80 | (code >> 6 & 63));
        out += static_cast<char>(0x80 | (code & 63));
      } else {
        out += static_cast<char>(0xF0 | code >> 18);
        out += static_cast<char>(0x80 | (code >> 12 & 63));
        out += static_cast<char>(0x80 | (code >> 6 & 63));
        out += static_cast<char>(0x80 | (code & 63));
      }
    }

    void utf8(std::string& out) {  // one character beyond ASCII
      const auto first = static_cast<unsigned char>(text[at]);
      const int more = first >= 0xC2 && first < 0xE0 ? 1 : first >= 0xE0 && first < 0xF0 ? 2 : first >= 0xF0 && first < 0xF5 ? 3 : 0;
      if (!more || at + more >= text.size()) fail("a string is not UTF-8");
      uint32_t code = first & (0x3F >> more);
      for (int i = 1; i <= more; ++i) {
        const auto next = static_cast<unsigned char>(text[at + i]);
        if ((next & 0xC0) != 0x80) fail("a string is not UTF-8");
        code = code << 6 | (next & 63);
      }
      if ((more == 2 && code < 0x800) || (more == 3 && code < 0x10000) || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000))
        fail("a string is not UTF-8");
      out.append(text, at, more + 1);
      at += more + 1;
    }

    std::string parse_string() {
      std::string out;
      ++at;
      while (true) {
        if (at >= text.size()) fail("a string does not end");
        const auto c = static_cast<unsigned char>(text[at]);
        if (c == '"') {
          ++at;
          return out;
        }
        if (c < 0x20) fail("a string holds a control character");
        if (c >= 0x80) {
          utf8(out);
        } else if (c != '\\') {
          out += static_cast<char>(c);
          ++at;
        } else {
          ++at;
          const char escape = peek();
          ++at;
          switch (escape) {
            case '"': case '\\': case '/': out += escape; break;
            case 'b': out += '\b'; break;
            case 'f': out += '\f'; break;
            case 'n': out += '\n'; break;
            case 'r': out += '\r'; break;
            case 't': out += '\t'; break;
            case 'u': {
              uint32_t code = hex4();
              if (code >= 0xD800 && code < 0xDC00) {
                if (!take('\\') || !take('u')) fail("half of a surrogate pair is missing");
                const uint32_t low = hex4();
                if (low < 0xDC00 || low >= 0xE000) fail("half of a surrogate pair is missing");
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
              } else if (code >= 0xDC00 && code < 0xE000) {
                fail("half of a surrogate pair is missing");
              }
              append(out, code);
              break;
            }
            default: fail("an unknown escape");
          }
        }
      }
    }
  };
};
