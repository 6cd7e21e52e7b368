// Sums of float64 over the processes of one machine, in memory that they share: what comm/shared_memory.py calls.
//
// Each rank writes a message in a slot of its own, says so by raising its number of messages, and adds up the slots of
// all ranks once they have done the same. Slots are two a rank, taken in turn: who writes its message number n + 2 has
// seen all ranks at n + 1, and so past reading n.
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <ctime>

#include "shared_memory.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr long kPart = 8192;  // float64 in a slot; longer messages go part by part
// A rank that waits looks again and again at first, then lets other threads run in between, and sleeps at last: to be
// woken takes some 50 microseconds, and with less patience than that ranks put each other to sleep in turn.
constexpr auto kSpin = std::chrono::microseconds(5), kYield = std::chrono::microseconds(100);

// Two cache lines each, for processors fetch them in pairs.
struct alignas(128) Rank {
  std::atomic<std::uint32_t> posted;    // how many messages it has written, modulo 2^32; other ranks sleep on it
  std::atomic<std::uint32_t> sleepers;  // how many do
};

// What a message is.
struct Message {
  long length;    // the float64 of all its parts
  long call;      // which call of the layer
  Tag tag;
};

struct alignas(128) Slot {
  Message message;
  alignas(128) double part[kPart];
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "a lock would not be shared by the processes");

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<std::uint32_t>& word, int operation, std::uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, &word, operation, value, timeout, nullptr, 0);
}

// Waits until the rank has posted message number n; false if it has not by then.
bool wait_for(Rank& rank, std::uint32_t n, Clock::time_point end) {
  const auto is_there = [&] { return std::int32_t(rank.posted.load() - n) >= 0; };
  const auto start = Clock::now();
  for (auto now = start; now < start + kYield && now < end; now = Clock::now()) {
    if (is_there()) return true;
    if (now < start + kSpin) pause();
    else sched_yield();
  }
  while (!is_there()) {
    const long left = std::chrono::duration_cast<std::chrono::nanoseconds>(end - Clock::now()).count();
    if (left <= 0) return false;
    const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
    // Who posts after this sees that somebody sleeps; who posted before has changed the number.
    ++rank.sleepers;
    const std::uint32_t seen = rank.posted.load();
    if (std::int32_t(seen - n) < 0) futex(rank.posted, FUTEX_WAIT, seen, &timeout);
    --rank.sleepers;
  }
  return true;
}

template <std::size_t n>
bool agree(const char (&a)[n], const char (&b)[n]) {
  return !*a || !*b || !std::memcmp(a, b, n);
}

// Whether two messages may be summed. The number of the call only tells people more. Of messages that say the same, one
// cache line is read.
bool belong_together(const Message& a, const Message& b) {
  if (a.length != b.length) return false;
  return a.tag.number == b.tag.number || (agree(a.tag.text, b.tag.text) && agree(a.tag.facts, b.tag.facts));
}

void post(Rank& rank) {
  ++rank.posted;
  if (rank.sleepers.load()) futex(rank.posted, FUTEX_WAKE, INT32_MAX, nullptr);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Each rank locks the byte of its number in the file of the memory, for this opening of it: until it unlocks it, or all
// processes that have this opening have ended, however they do, or closed it. 0, or -1 where the system refuses.
EXPORT int syncbn_shared_lock(int file, long rank) {
  struct flock lock {F_WRLCK, SEEK_SET, rank, 1, 0};
  return fcntl(file, F_OFD_SETLK, &lock);
}

EXPORT int syncbn_shared_unlock(int file, long rank) {
  struct flock lock {F_UNLCK, SEEK_SET, rank, 1, 0};
  return fcntl(file, F_OFD_SETLK, &lock);
}

EXPORT int syncbn_shared_is_locked(int file, long rank) {
  struct flock lock {F_WRLCK, SEEK_SET, rank, 1, 0};
  return fcntl(file, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

// The bytes of memory, all zero at first, that the ranks share.
EXPORT long syncbn_shared_bytes(long world_size) { return world_size * long(sizeof(Rank) + 2 * sizeof(Slot)); }

// Copies to `message` what a rank has sent, if it has, as the last message of this one's; else its last before, of length
// -1 if there is none. Returns whether it has sent that message.
EXPORT int syncbn_shared_said(void* memory, long rank, long world_size, long other, Message* message) {
  Rank* const ranks = static_cast<Rank*>(memory);
  const Slot* const slots = reinterpret_cast<Slot*>(ranks + world_size);
  const std::uint32_t n = ranks[rank].posted.load(), theirs = ranks[other].posted.load();
  const bool is_there = std::int32_t(theirs - n) >= 0;
  *message = slots[2 * other + (is_there ? n : theirs) % 2].message;
  message->tag.text[sizeof message->tag.text - 1] = message->tag.facts[sizeof message->tag.facts - 1] = 0;
  if (!is_there && theirs == 0) message->length = -1;
  return is_there;
}

// Replaces buffer by its sum over all ranks, added in their order. Returns -1 when that is done, or the number of a rank
// that has not come in time: call again with the same arguments to go on. Or -2 where ranks have sent messages that do not
// belong together: see syncbn_shared_said.
EXPORT long syncbn_shared_sum(SharedSum* shared, double* buffer, long length) {
  const long rank = shared->rank, world_size = shared->world_size;
  Rank* const ranks = static_cast<Rank*>(shared->memory);
  Slot* const slots = reinterpret_cast<Slot*>(ranks + world_size);
  const auto end = Clock::now() + std::chrono::microseconds(shared->microseconds);
  long &done = shared->done, &is_posted = shared->is_posted;
  do {
    double* const part = buffer + done;
    const long size = std::min(length - done, kPart);
    const std::uint32_t n = ranks[rank].posted.load() + !is_posted;
    if (!is_posted) {
      Slot& own = slots[2 * rank + n % 2];
      own.message.length = length;
      own.message.call = shared->call;
      if (shared->tag) std::memcpy(&own.message.tag, shared->tag, sizeof own.message.tag);
      else own.message.tag.number = *own.message.tag.text = *own.message.tag.facts = 0;
      std::memcpy(own.part, part, size * sizeof(double));
      post(ranks[rank]);
      is_posted = 1;
    }
    long missing = -1;
    for (long other = 0; other < world_size && missing < 0; ++other)
      if (!wait_for(ranks[other], n, end)) missing = other;
    // Of those that are there, whether or not one is missing: it may be the one that has gone wrong.
    const Message& own = slots[2 * rank + n % 2].message;
    for (long other = 0; other < world_size; ++other)
      if (wait_for(ranks[other], n, end) && !belong_together(own, slots[2 * other + n % 2].message)) {
        done = is_posted = 0;
        return -2;
      }
    if (missing >= 0) return missing;
    is_posted = 0;
    std::memcpy(part, slots[n % 2].part, size * sizeof(double));
    for (long other = 1; other < world_size; ++other) {
      const double* const theirs = slots[2 * other + n % 2].part;
      for (long i = 0; i < size; ++i) part[i] += theirs[i];
    }
    done += size;
  } while (done < length);
  done = 0;
  return -1;
}
