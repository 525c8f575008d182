// Philox4x32-10 (Salmon et al., SC 2011), as in fastnabla/utils/seeding.py, and bounded integers from it.
#pragma once

#include <cstdint>

#include "index.h"

namespace fastnabla {

struct Words {
    uint32_t word[4];
};

HOST_DEVICE inline Words philox(Words counter, uint64_t key) {
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
    uint32_t(&c)[4] = counter.word;
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c[0], product1 = uint64_t{0xCD9E8D57} * c[2];
        c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ low;
        c[1] = static_cast<uint32_t>(product1);
        c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ high;
        c[3] = static_cast<uint32_t>(product0);
        low += 0x9E3779B9;
        high += 0xBB67AE85;
    }
    return counter;
}

// A number in 0 ... bound - 1, each with exactly the same probability (Lemire, "Fast random integer generation in an
// interval", 2019). Attempt a takes the first word w of the Philox block with counter (draw, a, low and high half of
// `trajectory`) and gives floor(w * bound / 2^32), unless the low half of that product is below 2^32 mod bound: then
// the next attempt is made.
HOST_DEVICE inline uint32_t bounded(uint32_t bound, uint64_t key, uint32_t draw, uint64_t trajectory) {
    const uint32_t rejected = (0u - bound) % bound;
    const uint32_t low = static_cast<uint32_t>(trajectory), high = static_cast<uint32_t>(trajectory >> 32);
    for (uint32_t attempt = 0;; ++attempt) {
        const uint64_t product = uint64_t{philox({{draw, attempt, low, high}}, key).word[0]} * bound;
        if (static_cast<uint32_t>(product) >= rejected) {
            return static_cast<uint32_t>(product >> 32);
        }
    }
}

}  // namespace fastnabla
