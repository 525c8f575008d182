// The integer arithmetic of positions and offsets, shared by the CPU and the CUDA code. Nothing here reads elements.
//
// A slab is [slots, positions, elements]. Rows of elements are contiguous; the strides of slots and positions are
// arbitrary. Offsets are int64, because a buffer may hold more than 2^31 elements. A single row may not (see
// arguments.cpp), so that numbers within a row fit in uint32, whose division is cheap on a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace fastnabla {

// A transition's number is slot * kept + position, where position counts the `kept` drawn steps of its trajectory.
struct Transition {
    int64_t slot, position;
};

HOST_DEVICE inline Transition transition_of(int64_t number, int64_t kept) {
    return {number / kept, number % kept};
}

// The step of a transition: `steps` is [slots, kept].
HOST_DEVICE inline int64_t step_of(const int64_t* steps, int64_t kept, Transition transition) {
    return steps[transition.slot * kept + transition.position];
}

// The position of a state, or of a step's output, in its trajectory's slab; -1 if it is not kept.
// `state_at` is [slots, num_steps + 1], `output_at` is [slots, num_steps].
HOST_DEVICE inline int32_t state_position(const int32_t* state_at, int64_t num_steps, int64_t slot, int64_t state) {
    return state_at[slot * (num_steps + 1) + state];
}

HOST_DEVICE inline int32_t output_position(const int32_t* output_at, int64_t num_steps, int64_t slot, int64_t step) {
    return output_at[slot * num_steps + step];
}

// Strides of a slab, in elements.
struct Strides {
    int64_t slot, position;
};

HOST_DEVICE inline int64_t row_offset(Strides strides, int64_t slot, int64_t position) {
    return slot * strides.slot + position * strides.position;
}

HOST_DEVICE constexpr uint32_t divide_up(uint32_t a, uint32_t b) {
    return a / b + (a % b != 0);
}

constexpr int ACCESS_BYTES = 16;

// Elements of a vector between elements of two sizes: the side with the larger ones moves 16 bytes at a time.
HOST_DEVICE constexpr int vector_width(int source_size, int target_size) {
    return ACCESS_BYTES / (source_size > target_size ? source_size : target_size);
}

// A run of elements split into `head` single elements, `vectors` vectors, and single elements to the end.
struct Split {
    uint32_t head, vectors;
};

// There are vectors only if both sides are aligned after the same number of elements.
HOST_DEVICE inline Split split_run(
    uint64_t source_address, int source_size, uint64_t target_address, int target_size, uint32_t count) {
    const uint32_t width = vector_width(source_size, target_size);
    const uint32_t source_head = (width - source_address / source_size % width) % width;
    const uint32_t target_head = (width - target_address / target_size % width) % width;
    if (source_head != target_head || source_head > count) {
        return {count, 0};
    }
    return {source_head, (count - source_head) / width};
}

// Elements of a quantisation block: the power of two for which `blocks` blocks cover `elements`, or 0 if there is none.
// There is at most one unless blocks == 1, where all that cover the row are equivalent.
HOST_DEVICE inline uint32_t block_of(uint32_t elements, int64_t blocks) {
    for (uint32_t block = 1; block != 0 && elements != 0; block <<= 1) {
        if (divide_up(elements, block) == blocks) {
            return block;
        }
    }
    return 0;
}

}  // namespace fastnabla
