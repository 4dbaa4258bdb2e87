// Fibers by ucontext.  A warp's barrier costs 32 switches of about a microsecond: slow, and enough
// for blocks of 256 threads over tiles of a few thousand numbers.
#include "fibers.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_shim {
namespace {

const char* skipped_file = "";
int skipped_line = 0;

constexpr size_t kStack = 128 * 1024;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
const std::function<void()>* body;
const void* scheduler_stack;
size_t scheduler_size;

void enter([[maybe_unused]] const void* stack, [[maybe_unused]] size_t size,
           [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  static void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, size);
#endif
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
}

void leave(State state) {
  Fiber& fiber = *fibers[thread_in_block];
  fiber.state = state;
  enter(scheduler_stack, scheduler_size, state == State::kDone);
  swapcontext(&fiber.context, &scheduler);
  arrived();
}

void fiber_main() {
  arrived();
  (*body)();
  leave(State::kDone);
}

void resume(unsigned thread) {
  thread_in_block = thread;
  threadIdx =
      dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
  Fiber& fiber = *fibers[thread];
  enter(fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::abort();
}

// Runs threads first .. last - 1 until each is at a block barrier or done.
void run_warp(unsigned first, unsigned last, bool reverse) {
  for (;;) {
    for (unsigned i = first; i < last; ++i) {
      const unsigned thread = reverse ? last - 1 - (i - first) : i;
      if (fibers[thread]->state == State::kReady) resume(thread);
    }
    unsigned waiting = 0, live = 0;
    for (unsigned i = first; i < last; ++i) {
      waiting += fibers[i]->state == State::kAtWarp;
      live += fibers[i]->state != State::kDone;
    }
    if (waiting == 0) return;
    if (waiting != live) fail("a warp operation that not all of its lanes reach");
    for (unsigned i = first; i < last; ++i)
      if (fibers[i]->state == State::kAtWarp) fibers[i]->state = State::kReady;
  }
}

void run_block(bool reverse) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.state = State::kReady;
  }
  const unsigned warps = (threads + 31) / 32;
  for (;;) {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = reverse ? warps - 1 - i : i;
      run_warp(warp * 32, std::min(threads, warp * 32 + 32), reverse);
    }
    unsigned waiting = 0;
    for (unsigned i = 0; i < threads; ++i) waiting += fibers[i]->state == State::kAtBlock;
    if (waiting == 0) return;
    if (waiting != threads) fail("a __syncthreads that not all threads reach");
    for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
  }
}

}  // namespace

bool is_skipped(std::source_location where) {
  return int(where.line()) == skipped_line &&
         std::string(where.file_name()).ends_with(skipped_file);
}

void wait_for_block() { leave(State::kAtBlock); }
void wait_for_warp() { leave(State::kAtWarp); }

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const char* order = std::getenv("CUDA_SHIM_ORDER");
  const bool reverse = order && std::string(order) == "reverse";
  body = &thread;
  gridDim = grid, blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(reverse);
      }
}

int planted = 0;

}  // namespace cuda_shim

// Test what would happen without the barrier at this line of a source ..
extern "C" __attribute__((visibility("default"))) void cuda_shim_skip_barrier(const char* file,
                                                                              int line) {
  cuda_shim::skipped_file = file;
  cuda_shim::skipped_line = line;
}

// .. or with the bug of this number, where planted_bugs.py has put some into the sources; 0: none.
extern "C" __attribute__((visibility("default"))) void cuda_shim_plant(int bug) {
  cuda_shim::planted = bug;
}
