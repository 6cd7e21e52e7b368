// `map`: writes an (n, c, s) array element by element. It goes through the blocks of an array from the last to the first
// (walk.h says why), and through each block upwards, for prefetchers of processors do badly downwards.
//
// It takes an operation that is a template over the vector type, with
//     channel<V>(c)     the constants of channel c, in every lane            (s > 1: a row has one channel)
//     channels<V>(c)    the constants of channels c, c + 1, ..., a lane each (s == 1: a row has them all)
//     prefetch<k>(i)    prefetches what put reads of elements i, ..., i + k - 1
//     put<V>(i, k, valid)   writes elements i, i + 1, ... of `out`, 0 for what is not valid, past the caches where
//                           `streaming` says so
//     half<V, kSecond>(c)   those of the channels from c on that put_pair has in its first, or its second, vector
//     put_pair<V>(i, k, l, valid)  as many elements as two V take, with the constants k and l of the one and the other
#pragma once

#include <cstdint>

#include "mask.h"
#include "simd.h"
#include "walk.h"

namespace {

constexpr long kTogether = 1 << 16;  // elements of a block: going from one to the next costs as much as some hundred
constexpr int kPair = 2;             // rows written together where s == 1: their constants are loaded once

// The number of elements from p to the next address that is aligned for streaming a V.
template <class V, class T> inline long to_boundary(const T* p) {
  constexpr long bytes = std::max<long>(simd::Lanes<V>::value * sizeof(T), simd::kBytes);  // that of a pair's, too
  return (bytes - long(reinterpret_cast<uintptr_t>(p) % bytes)) % bytes / long(sizeof(T));
}

// What to prefetch at element i of a block [begin, end): what is used `ahead` elements later. Below `turn` that is
// i + before, in the block; from `turn` on it is i + after, in the next block, which ends where this one begins.
struct Fetch {
  long turn, before, after;
  Fetch(long begin, long end, long ahead)
      : turn(std::max(begin, end - ahead)), before(ahead), after(ahead ? ahead - 2 * std::max(end - begin, ahead) : 0) {}
};

// Elements [s0, s1) of channels [c0, c1) of one sample.
template <class V, class S, class Op, class M>
inline void map_rows(const Op& given, const M& mask, Shape x, const Part& part, long sample) {
  const Op op = given;  // local copy: stores cannot alias it, so it stays in registers
  constexpr int lanes = simd::Lanes<V>::value;
  const long row = sample * x.c * x.s;
  const Fetch fetch(row + part.c0 * x.s + part.s0, row + (part.c1 - 1) * x.s + part.s1,
                    ahead_in(x.size(), kAhead));
  for (long c = part.c0; c < part.c1; ++c) {
    const auto v = op.template channel<V>(c);
    const auto u = op.template channel<S>(c);
    const M valid = mask.row(row + c * x.s, sample * x.s);
    long i = row + c * x.s + part.s0;
    const long end = row + c * x.s + part.s1;
    if (op.streaming)
      for (const long head = std::min(end, i + to_boundary<V>(op.out + i)); i < head; ++i) op.put(i, u, valid.lanes(i));
    for (; i + 2 * lanes <= std::min(end, fetch.turn); i += 2 * lanes) {
      op.template prefetch<2 * lanes>(i + fetch.before);
      op.put_pair(i, v, v, valid.lanes(i));
    }
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      op.template prefetch<2 * lanes>(i + fetch.after);
      op.put_pair(i, v, v, valid.lanes(i));
    }
    if (i + lanes <= end) op.put(i, v, valid.lanes(i)), i += lanes;
    for (; i < end; ++i) op.put(i, u, valid.lanes(i));
  }
}

// All channels of kCount rows from element `row`, that of row `number`, on, where s == 1. kFetchesOut: `out` is prefetched,
// too.
template <class V, class S, int kCount, bool kFetchesOut, class Op, class Columns>
SYNCBN_INLINE void map_columns(const Op& op, const Columns& columns, long c, long row, long number, long ahead) {
  constexpr int lanes = simd::Lanes<V>::value;
  const decltype(columns.row(0)) valid[2] = {columns.row(number), columns.row(number + kCount - 1)};
  static_assert(kCount <= 2, "the first and the last of the rows are all");
  long j = 0;
  for (; j + 2 * lanes <= c; j += 2 * lanes) {
    const auto k = op.template half<V, false>(j), l = op.template half<V, true>(j);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const long next = row + kCount * j + r * 2 * lanes + ahead;
      op.template prefetch<2 * lanes>(next);
      if constexpr (kFetchesOut) simd::prefetch<2 * lanes, true>(op.out + next);
      op.put_pair(row + r * c + j, k, l, valid[r].lanes(j));
    }
  }
  for (; j + lanes <= c; j += lanes)
    for (int r = 0; r < kCount; ++r) op.put(row + r * c + j, op.template channels<V>(j), valid[r].lanes(j));
  for (; j < c; ++j)
    for (int r = 0; r < kCount; ++r) op.put(row + r * c + j, op.template channel<S>(j), valid[r].lanes(j));
}

// Rows [first, last) of c channels each, where s == 1. Not inlined: inlined together, its two instances share the
// registers, and take a sixth longer.
template <class V, class S, bool kFetchesOut, class Op, class M>
__attribute__((noinline)) void map_columns(const Op& given, const M& mask, Shape x, long first, long last) {
  const Op op = given;
  const long c = x.c, together = std::max(kTogether / c, long(kPair));
  typename M::Columns columns(mask, c);
  for (; last > first; last -= together) {
    long number = std::max(first, last - together);
    const long begin = number * c, end = last * c;
    const Fetch fetch(begin, end, ahead_in(x.size(), kAhead));
    const auto ahead = [&](long row) { return row < fetch.turn ? fetch.before : fetch.after; };
    long row = begin;
    while (row < end) {  // once, but under a mask of short rows
      const long part = std::min(columns.rows(), (end - row) / c), part_end = row + part * c;
      columns.expand(number, part);
      for (; row + kPair * c <= part_end; row += kPair * c, number += kPair)
        map_columns<V, S, kPair, kFetchesOut>(op, columns, c, row, number, ahead(row));
      for (; row < part_end; row += c, ++number) map_columns<V, S, 1, false>(op, columns, c, row, number, ahead(row));
    }
  }
}

template <class V, class S, class Op, class M>
inline void map_columns(const Op& op, const M& mask, Shape x, long first, long last) {
  // Prefetching `out` pays for rows of middle length: processors do it themselves for shorter ones, which follow each
  // other closely, and for those of a page or more. In between up to a third of the time was spent waiting.
  const long row_bytes = x.c * long(sizeof *op.out);
  if (!op.streaming && row_bytes >= 512 && row_bytes < 4096 && ahead_in(x.size(), kAhead))
    map_columns<V, S, true>(op, mask, x, first, last);
  else
    map_columns<V, S, false>(op, mask, x, first, last);
}

// op.put<V>(i, constants, valid) for every element; bytes are those of all arrays that it reads and writes.
template <class V, class S, class Op, class M> void map(const Op& given, const M& mask, Shape x, long bytes) {
  if (!x.size()) return;
  const int threads = threads_for(x.size());
  const bool rows = x.s > 1, split = by_channel(x, threads);
  const auto* out = given.out;
  // An ordinary store first reads its cache line, and keeps it in the cache. Where the arrays together exceed the cache,
  // both are for nothing: the line is gone before the next layer reads it. Short rows are not streamed, for they share
  // lines, which only the cache can put together.
  const bool streaming = simd::kStreams && given.streaming && bytes > cache_bytes &&
                         (rows ? x.s * long(sizeof *out) >= 1024 : !to_boundary<V>(out) && !to_boundary<V>(out + x.c));
  in_parallel(threads, rows ? (split ? x.c : x.s) : x.n, [&](int, long first, long last) {
    Op op = given;
    op.streaming = streaming;
    const Op& fixed = op;
    if (rows) {
      for_parts<true>(x, split, first, last, std::max(kTogether / x.s, 1L), [&](const Part& part) {
        for (long r = part.samples; r-- > 0;) map_rows<V, S>(fixed, mask, x, part, part.sample + r);
      });
    } else {
      map_columns<V, S>(fixed, mask, x, first, last);
    }
    if (streaming) simd::end_of_stream();
  });
}

}  // namespace
