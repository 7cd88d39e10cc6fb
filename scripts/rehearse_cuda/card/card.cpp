// The card itself: limits, capacities, the queue and the counters, with the doors through which the rehearsal drives it.
#include "card.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace card {
namespace {

const Model MODELS[] = {
    {75, 75, 40, 1024, 65536, 65536},     // T4
    {80, 80, 108, 2048, 167936, 166912},  // A100
    {86, 86, 82, 1536, 102400, 101376},   // RTX 3090
    {89, 86, 128, 1536, 102400, 101376},  // RTX 4090
    {90, 90, 132, 2048, 233472, 232448},  // H100
    {120, 120, 170, 1536, 102400, 101376}, // RTX 5090
};

double setting(const char* name, double otherwise) {
    const char* text = getenv(name);
    return text ? atof(text) : otherwise;
}

const double GIB = 1024.0 * 1024.0 * 1024.0;

std::mutex lock;  // autograd's threads and the main one come here at once
size_t device_capacity = size_t(setting("REHEARSAL_CARD_GIB", 24) * GIB);
size_t pinned_capacity = size_t(setting("REHEARSAL_PINNED_GIB", 1024) * GIB);
size_t device_used, device_peak, pinned_used, pinned_peak;

std::atomic<long> counts[KINDS];
std::atomic<long> failing[KINDS];  // calls of this kind until the one that fails; 0 for none

// CUDA lets the host run ahead of the card by about a thousand launches, then makes it wait. REHEARSAL_LAG=1024 is that: the
// card is as far behind as it can be, so that memory that waits for its work is reused as late as it can be.
const long lag = long(setting("REHEARSAL_LAG", 0));
std::atomic<long> queued{0}, waited{0};

}  // namespace

const Model& model() {
    static const Model& found = [&]() -> const Model& {
        int wanted = int(setting("REHEARSAL_CARD", 86));
        for (const Model& one : MODELS)
            if (one.capability == wanted) return one;
        fprintf(stderr, "rehearsal: no card of compute capability %d is known\n", wanted);
        exit(2);
    }();
    return found;
}

bool begin(Kind kind) {
    counts[kind]++;
    if (kind <= SET) queued++;
    long left = failing[kind];
    while (left > 0)  // another thread may have come first
        if (failing[kind].compare_exchange_weak(left, left - 1)) return left != 1;
    return true;
}

bool take_device(size_t bytes) {
    if (!begin(DEVICE_ALLOCATION)) return false;
    std::lock_guard<std::mutex> held(lock);
    if (device_used + bytes > device_capacity) return false;
    device_used += bytes;
    if (device_used > device_peak) device_peak = device_used;
    return true;
}

void give_device(size_t bytes) {
    std::lock_guard<std::mutex> held(lock);
    device_used -= bytes;
}

bool take_pinned(size_t bytes) {
    if (!begin(PINNED_ALLOCATION)) return false;
    std::lock_guard<std::mutex> held(lock);
    if (pinned_used + bytes > pinned_capacity) return false;
    pinned_used += bytes;
    if (pinned_used > pinned_peak) pinned_peak = pinned_used;
    return true;
}

void give_pinned(size_t bytes) {
    std::lock_guard<std::mutex> held(lock);
    pinned_used -= bytes;
}

size_t device_total() { return device_capacity; }

size_t device_free() {
    std::lock_guard<std::mutex> held(lock);
    return device_used < device_capacity ? device_capacity - device_used : 0;
}

bool launchable(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared) {
    return x && y && z && y <= 65535 && z <= 65535 && threads && threads <= 1024 && shared <= size_t(model().shared_per_block);
}

long submitted() { return queued; }

void wait_for(long number) {
    long before = waited;
    while (before < number && !waited.compare_exchange_weak(before, number)) {
    }
}

bool is_done(long number) { return number <= waited || number + lag <= queued; }

}  // namespace card

// The doors, for ctypes.
extern "C" {

long card_count(int kind) { return card::counts[kind]; }

// Makes the nth call of a kind from now fail, once; 0 takes that back.
void card_fail(int kind, long nth) { card::failing[kind] = nth; }

void card_set_capacity(size_t device, size_t pinned) {
    std::lock_guard<std::mutex> held(card::lock);
    card::device_capacity = device;
    card::pinned_capacity = pinned;
}

size_t card_device_used() { return card::device_used; }
size_t card_device_peak() { return card::device_peak; }
size_t card_pinned_used() { return card::pinned_used; }
size_t card_pinned_peak() { return card::pinned_peak; }

// Lets both peaks start anew from what is used now.
void card_reset_peaks() {
    std::lock_guard<std::mutex> held(card::lock);
    card::device_peak = card::device_used;
    card::pinned_peak = card::pinned_used;
}
}
