// A stand-in for an NVIDIA GPU: what its parts (runtime.cpp, driver.cpp, cublas.cpp, nvml.cpp) share.
//
// The card has a compute capability, memory of a given size, and a queue of work. It computes nothing: a kernel, a matrix
// product, a copy and a memset are counted and done with, and whatever is read back from the card is zeros. Its memory is
// reserved address space that nobody may read or write, so that code which takes a device pointer for the host's crashes here
// as it would on a real machine. Capacities are enforced, and any call can be made to fail.
#pragma once

#include <cstddef>

namespace card {

// Published limits of a compute capability (CUDA C++ Programming Guide, "Technical specifications per compute capability").
struct Model {
    int capability;            // 86 is sm_86
    int compiled;              // of the binary in torch's libraries that such a card runs: sm_89 runs sm_86's
    int processors;            // of a usual card of this kind
    int threads_per_processor;
    int shared_per_processor;  // bytes
    int shared_per_block;      // bytes that a kernel can opt in to: what decides whether a kernel of FlexAttention launches
};
const Model& model();

// What a call does, for counting and for failing on purpose.
enum Kind { LAUNCH, PRODUCT, COPY, SET, DEVICE_ALLOCATION, PINNED_ALLOCATION, KINDS };

// Counts a call of this kind; false if it was told to fail (card_fail).
bool begin(Kind kind);

// Takes bytes of the card's or of pinned memory; false, and nothing is taken, where the capacity does not allow it.
bool take_device(size_t bytes);
void give_device(size_t bytes);
bool take_pinned(size_t bytes);
void give_pinned(size_t bytes);
size_t device_total();
size_t device_free();

// Whether a kernel with this grid, block and shared memory can be launched on this card.
bool launchable(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared);

// The queue: work is submitted in order, and done some launches later or when somebody waits for it.
long submitted();
void wait_for(long number);
bool is_done(long number);

}  // namespace card
