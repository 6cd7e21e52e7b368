// A rank's part in sums in shared memory, for the operators of torch, which are in another library.
#pragma once

// comm/shared_memory.py fills it in.
struct SharedSum {
  long (*sum)(SharedSum* shared, double* buffer, long length);  // syncbn_shared_sum
  void* memory;
  long rank, world_size;
  long microseconds;  // how long sum may wait
  const char* tag;    // of the message: 112 characters, or null for none
  long call;
  // 0 before the first sum, and again when one is done: the elements summed so far, and whether the part that follows is
  // posted.
  long done, is_posted;
  long result;  // what sum returned to an operator
};
