// A rank's part in sums over ranks, for the operators of torch, which are in another library.
#pragma once

// Whose message it is; comm/labels.py fills it in.
struct Tag {
  long number;      // a digest of the texts, 0 for none: equal ones need not be read
  char text[112];   // the layer and the direction; empty where nobody says
  char facts[128];  // what the layer was told; empty where there is nothing to compare
};

// comm/shared_memory.py, or comm/mpi.py, fills it in.
struct SharedSum {
  long (*sum)(SharedSum* shared, double* buffer, long length);  // syncbn_shared_sum or syncbn_mpi_sum
  void* memory;
  long rank, world_size;
  long microseconds;  // how long sum may wait
  const Tag* tag;     // of the message, or null for none
  long call;
  // 0 before the first sum, and again when one is done: the elements summed so far, and whether the part that follows is
  // posted.
  long done, is_posted;
  long result;  // what sum returned to an operator
};
