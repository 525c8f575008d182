// Checks that need neither torch nor much memory: index.h past 2^31 elements, and every value of convert.h's 16-bit
// types. `make sanitize` compiles and runs it. It prints what fails.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../convert.h"
#include "../index.h"

using namespace fastnabla;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
    if (!condition) {
        std::printf("failed: %s\n", what);
        ++failures;
    }
}

void check_large_offsets() {
    const int64_t row = 1 << 20, positions = 101, slots = 1 << 16, kept = 101;
    const Strides strides{positions * row, row};
    expect(row_offset(strides, slots - 1, positions - 1) == slots * positions * row - row, "the last row's offset");
    const int64_t number = (int64_t{1} << 33) * kept + 100;
    const Transition transition = transition_of(number, kept);
    expect(transition.slot == int64_t{1} << 33 && transition.position == 100, "a transition's number past 2^33");
    expect(divide_up(0x7FFFFFFFu, 4096) == 1u << 19, "chunks of the longest row");
}

// Vectors cover a run without a gap, are aligned on both sides, and are used wherever possible.
void check_split(uint64_t source, int source_size, uint64_t target, int target_size, uint32_t count) {
    const Split split = split_run(source, source_size, target, target_size, count);
    const uint32_t width = vector_width(source_size, target_size);
    expect(split.head + split.vectors * width <= count, "vectors end with the run");
    const auto aligned = [&](uint32_t head) {
        return (source + head * source_size) % (width * source_size) == 0 &&
               (target + head * target_size) % (width * target_size) == 0;
    };
    if (split.vectors != 0) {
        expect(aligned(split.head), "vectors are aligned");
        expect(count - split.head - split.vectors * width < width, "vectors are as many as fit");
    }
    for (uint32_t head = 0; head < width && head + width <= count; ++head) {
        expect(!aligned(head) || split.vectors != 0, "vectors are found where there are any");
    }
}

void check_splits() {
    for (const int source_size : {1, 2, 4}) {
        for (const int target_size : {1, 2, 4}) {
            for (int source = 0; source < 18; ++source) {
                for (int target = 0; target < 18; ++target) {
                    for (const uint32_t count : {0u, 1u, 3u, 4u, 16u, 17u, 37u, 64u}) {
                        check_split(
                            (uint64_t{1} << 40) + source * source_size, source_size,
                            (uint64_t{3} << 40) + target * target_size, target_size, count);
                    }
                }
            }
        }
    }
}

void check_blocks() {
    for (uint32_t elements = 1; elements < 700; ++elements) {
        for (uint32_t block = 1; block <= 1024; block *= 2) {
            const uint32_t found = block_of(elements, divide_up(elements, block));
            const bool covers = block >= elements && found >= elements;
            expect(found == block || covers, "a block's size from the scales' number");
        }
    }
    expect(block_of(9, 4) == 0, "no block's size fits");
}

// Every value survives conversion to float and back, and each midpoint between two rounds to the even one.
template <typename Element>
void check_rounding(uint16_t infinity) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const Element x{static_cast<uint16_t>(bits)};
        if ((bits & 0x7FFF) > infinity) {
            expect(std::isnan(to_float(x)) && std::isnan(to_float(convert<Element>(to_float(x)))), "a NaN stays NaN");
            continue;
        }
        expect(convert<Element>(to_float(x)).bits == bits, "a value comes back");
        if ((bits & 0x7FFF) + 1 < infinity) {
            const Element next{static_cast<uint16_t>(bits + 1)};
            const float middle = to_float(x) + (to_float(next) - to_float(x)) / 2;
            expect(convert<Element>(middle).bits == bits + (bits & 1), "a midpoint goes to the even neighbour");
        }
    }
    expect(convert<Element>(3.4e38f).bits == (infinity == 0x7C00 ? infinity : 0x7F80), "too large becomes infinite");
}

}  // namespace

int main() {
    check_large_offsets();
    check_splits();
    check_blocks();
    check_rounding<Half>(0x7C00);
    check_rounding<BFloat16>(0x7F80);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
