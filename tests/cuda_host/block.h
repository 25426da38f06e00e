// The running block of threads, shared by the parts of the runtime.
#pragma once

#include <vector>

#include "cuda_host.h"

namespace cuda_host {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10, kSharedLimit = 227 << 10, kStaticLimit = 48 << 10;

enum class State { kReady, kBarrier, kCollective, kMbarrier, kNamed, kDone };

struct Copy {  // a cp.async in flight
  char* to;
  char bytes[16];
};

struct Fiber {
  void* stack_pointer;
  State state;
  uint3 index;
  int number;
  Site site;                              // where it waits
  unsigned mask;                          // of the collective it waits for
  int waits_for;                          // the mbarrier, or the named barrier
  std::vector<std::vector<Copy>> copies;  // committed groups, oldest first; the last is open
};

struct Group {  // a collective that some lanes have reached
  Kind kind;
  unsigned mask, arrived;
  Site site;
  void* lanes[32];
};

struct Warp {
  uint32_t epoch;
  std::vector<Group> groups;
};

// Who accessed a byte of shared memory last, and when, counted in barriers of the block and in
// __syncwarps.
struct Shadow {
  uint32_t write_block, write_warp, read_block, read_warp;
  uint32_t write_time, read_time;  // of its own clock (async.h)
  int16_t writer, reader;  // a thread; a reader may be kReaders - w, several threads of warp w
  bool written, under_way;
};
constexpr int16_t kNobody = -1, kSeveralWarps = -2, kReaders = -3;
constexpr int16_t kTensorCopy = -2;  // a writer

struct Block {
  int threads = 0, at_barrier = 0, done = 0;
  uint32_t epoch = 0;
  Site barrier_site{};
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Warp warps[kMaxThreads / 32];
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  std::string error;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  char* stacks = nullptr;
  char* shared = nullptr;  // static arrays, then the dynamic part
  size_t static_bytes = 0, dynamic_bytes = 0;
  std::vector<std::pair<const void*, size_t>> arrays;  // key, offset
  std::vector<Shadow> shadow;
  bool async = false;  // something of async.h is used
};

extern Block block;
extern uint64_t bytes_read, bytes_written, bank_conflicts, multiply_adds;

std::string show(uint3 index);
void forget(size_t offset, size_t bytes);  // back to the state in which a block finds it
void wait_as(State state, Site site);

// --- async.cpp ---
void join_block();
void join_warp(int warp);
bool finish_a_copy(bool newest);          // of those under way; false if there is none
std::string missing(const Fiber& fiber);  // what the barrier lacks at which it waits
void end_async();                         // of a block

}  // namespace cuda_host
