// A block of CUDA threads on one CPU core: every thread is a fiber, run until its next barrier.
//
// Threads of a warp run one after another up to a warp operation, warps one after another up to a
// block barrier, first to last or last to first (CUDA_SHIM_ORDER=reverse): where a barrier is
// missing, one of the two orders reads what is not there yet.  No barrier is stronger than CUDA
// promises.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs now

namespace cuda_shim {

inline unsigned thread_in_block;

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);
void wait_for_block();
void wait_for_warp();

bool is_skipped(std::source_location where);
extern int planted;

inline unsigned lane() { return thread_in_block % 32; }
inline unsigned warp() { return thread_in_block / 32; }

// Values of a warp's lanes, exchanged at one barrier: two buffers, since a fast lane may already
// write the next values while a slow one still reads these.
template <class T>
class Exchange {
 public:
  const T* operator()(const T& mine) {
    const unsigned now = turn_[thread_in_block]++ % 2;
    values_[now][thread_in_block] = mine;
    wait_for_warp();
    return values_[now] + warp() * 32;
  }

 private:
  unsigned turn_[1024] = {};
  T values_[2][1024] = {};
};

template <class T>
const T* exchange(const T& mine) {
  static Exchange<T> all;
  return all(mine);
}

}  // namespace cuda_shim
