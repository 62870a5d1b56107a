// Included by units that are compiled for one instruction set only.
#pragma once

#include <cstdint>

namespace {

// Calls body with the first row and the number of rows of each part of [begin, end), none larger
// than Most and all about as large: a part of few rows waits for its sums.
template <int Most, class Body>
static inline void over_rows(int64_t begin, int64_t end, const Body& body) {
  const int64_t count = end - begin, parts = (count + Most - 1) / Most;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = count * part / parts, last = count * (part + 1) / parts;
    body(begin + first, static_cast<int>(last - first));
  }
}

}  // namespace
