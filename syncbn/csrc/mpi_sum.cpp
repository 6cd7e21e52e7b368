// Sums of float64 by MPI_Allreduce, of the library that mpi4py has loaded: what comm/mpi.py calls. Built without MPI.
//
// A message is [t | t^2 | numbers], where t says whose message it is, and how long. The t of P ranks are all equal exactly
// where P * sum(t^2) = (sum t)^2, so that all ranks see a difference, and see it in the same sum.
//
// Where lengths differ MPI libraries write past the end of the shorter, or end the process. So before the first message of
// a length ranks compare lengths, by a message that is always as long. Later messages of different lengths are summed in
// memory of their own with room behind, where t stands first and meets the others' whatever the lengths: then most are
// seen, too.
#include <climits>
#include <cstdint>
#include <cstring>
#include <vector>

#include "shared_memory.h"

namespace {

constexpr long kRoom = 8192;          // float64
constexpr std::uint64_t kBits = 20;   // of t: for 8,192 ranks t^2 is summed exactly
constexpr double kExact = 1ull << 53;  // of integers below all are float64

// MPI's handles are of type int in MPICH and pointers in Open MPI.
using AllreduceOfInts = int (*)(const void*, void*, int, int, int, int);
using AllreduceOfPointers = int (*)(const void*, void*, int, void*, void*, void*);

// The lengths that ranks of a communicator have compared, all zero at first. Ranks' are the same.
struct Lengths {
  long count, known[255];
};

struct MPISum : SharedSum {
  void* allreduce;
  long are_ints;           // the handles
  void *type, *op, *comm;  // MPI_DOUBLE, MPI_SUM, and of the ranks
  Lengths* lengths;        // of that communicator
  long code;               // of the error that MPI_Allreduce returned
};

int allreduce(const MPISum& mpi, const double* sent, double* received, int length) {
  const auto as_int = [](void* handle) { return int(reinterpret_cast<std::intptr_t>(handle)); };
  if (mpi.are_ints)
    return reinterpret_cast<AllreduceOfInts>(mpi.allreduce)(sent, received, length, as_int(mpi.type), as_int(mpi.op),
                                                            as_int(mpi.comm));
  return reinterpret_cast<AllreduceOfPointers>(mpi.allreduce)(sent, received, length, mpi.type, mpi.op, mpi.comm);
}

double number_of(const Tag* tag, long length) {
  const std::uint64_t mixed = ((tag ? std::uint64_t(tag->number) : 0) ^ std::uint64_t(length)) * 0x9e3779b97f4a7c15u;
  return double(mixed >> (64 - kBits));
}

bool are_equal(double sum, double sum_of_squares, long world_size) {
  if (!(sum < kExact && sum_of_squares < kExact)) return false;
  return __int128(world_size) * std::int64_t(sum_of_squares) == __int128(std::int64_t(sum)) * std::int64_t(sum);
}

bool is_known(const Lengths& lengths, long length) {
  for (long i = 0; i < lengths.count; ++i)
    if (lengths.known[i] == length) return true;
  return false;
}

}  // namespace

// Replaces buffer by its sum over all ranks. Returns -1 when that is done; -2 when it is, but ranks have said different
// things of their messages; -4 where their lengths differ and nothing was summed, both of which all ranks see; or -3 where
// MPI failed.
extern "C" __attribute__((visibility("default"))) long syncbn_mpi_sum(SharedSum* shared, double* buffer, long length) {
  auto& mpi = *static_cast<MPISum*>(shared);
  static thread_local std::vector<double> memory;
  const long size = length + 2;
  mpi.code = 0;
  if (size > INT_MAX) return -3;
  if (long(memory.size()) < 2 * size + kRoom) memory.resize(2 * size + kRoom);
  double *const sent = memory.data(), *const received = sent + size;
  const auto have_equal = [&](double t, int rest) {
    sent[0] = t;
    sent[1] = t * t;
    mpi.code = allreduce(mpi, sent, received, 2 + rest);
    return !mpi.code && are_equal(received[0], received[1], shared->world_size);
  };
  if (!is_known(*mpi.lengths, length)) {
    if (!have_equal(number_of(nullptr, length), 0)) return mpi.code ? -3 : -4;
    if (mpi.lengths->count < long(sizeof mpi.lengths->known / sizeof *mpi.lengths->known))
      mpi.lengths->known[mpi.lengths->count++] = length;
  }
  std::memcpy(sent + 2, buffer, length * sizeof(double));
  const bool are_alike = have_equal(number_of(shared->tag, length), int(length));
  if (mpi.code) return -3;
  std::memcpy(buffer, received + 2, length * sizeof(double));
  return are_alike ? -1 : -2;
}
