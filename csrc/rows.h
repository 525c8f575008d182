// What an operation copies: numbered items, each one row of elements from a source to a target.
//
// The CPU gives items to threads, CUDA to thread blocks. Both find an item's rows with the same code, `copy(item)`.
// The structs hold bare addresses and are passed to kernels by value; arguments.h makes them from tensors. Their
// `element_size` is the size in bytes of the largest element on either side.
#pragma once

#include <algorithm>

#include "convert.h"
#include "index.h"

namespace fastnabla {

// One row. It is converted if the dtypes differ, and quantised or dequantised if one side is int8 with `scales`.
struct Row {
    char* data;
    float* scales;
    Dtype dtype;
};

struct Copy {
    Row source, target;

    // False if the row is not kept.
    HOST_DEVICE bool wanted() const {
        return target.data != nullptr;
    }
};

struct Work {
    int64_t items;
    uint32_t elements;  // of a row
    uint32_t block;     // elements that share a scale; 0 if nothing is int8
};

// Consecutive rows, [rows, elements].
struct Rows {
    char* data;
    Dtype dtype;

    HOST_DEVICE Row row(int64_t number, const Work& work) const {
        return {data + number * work.elements * size_of(dtype), nullptr, dtype};
    }
};

struct Slab {
    char* data;
    float* scales;
    Dtype dtype;
    Strides strides, scale_strides;

    HOST_DEVICE Row row(int64_t slot, int64_t position) const {
        if (position < 0) {
            return {nullptr, nullptr, dtype};
        }
        float* row_scales = scales == nullptr ? nullptr : scales + row_offset(scale_strides, slot, position);
        return {data + row_offset(strides, slot, position) * size_of(dtype), row_scales, dtype};
    }
};

struct Slabs {
    Slab states, outputs;
    const int32_t* state_at;
    const int32_t* output_at;
    int64_t num_steps;

    int element_size() const {
        return std::max(size_of(states.dtype), size_of(outputs.dtype));
    }
    HOST_DEVICE Row state(int64_t slot, int64_t state) const {
        return states.row(slot, state_position(state_at, num_steps, slot, state));
    }
    HOST_DEVICE Row output(int64_t slot, int64_t step) const {
        return outputs.row(slot, output_position(output_at, num_steps, slot, step));
    }
};

// Appends one step of each trajectory: three items per trajectory.
struct Append : Work {
    static constexpr bool QUANTISES = true, DEQUANTISES = false;
    Slabs slabs;
    const int64_t* slots;
    int64_t step;
    Rows x, output, x_next;

    int element_size() const {
        return std::max({size_of(x.dtype), size_of(output.dtype), size_of(x_next.dtype), slabs.element_size()});
    }
    HOST_DEVICE Copy copy(int64_t item) const {
        const int64_t number = item / 3, slot = slots[number];
        switch (item % 3) {
            case 0:
                return {x.row(number, *this), slabs.state(slot, step)};
            case 1:
                return {output.row(number, *this), slabs.output(slot, step)};
            default:
                return {x_next.row(number, *this), slabs.state(slot, step + 1)};
        }
    }
};

// Gathers transitions by number: three items per transition, and its numbers.
struct Gather : Work {
    static constexpr bool QUANTISES = false, DEQUANTISES = true;
    int64_t transitions;
    Slabs slabs;
    const int64_t* index;
    int64_t kept;
    // By slot and position, and by slot.
    const int64_t *steps, *prompt;
    const float* reward;
    Rows x, x_next, output;
    int64_t *step_out, *prompt_out, *trajectory_out;
    float* reward_out;

    int element_size() const {
        return std::max({size_of(x.dtype), size_of(x_next.dtype), size_of(output.dtype), slabs.element_size()});
    }
    HOST_DEVICE Copy copy(int64_t item) const {
        const int64_t number = item / 3;
        const Transition transition = transition_of(index[number], kept);
        const int64_t slot = transition.slot, step = step_of(steps, kept, transition);
        switch (item % 3) {
            case 0:
                return {slabs.state(slot, step), x.row(number, *this)};
            case 1:
                return {slabs.state(slot, step + 1), x_next.row(number, *this)};
            default:
                return {slabs.output(slot, step), output.row(number, *this)};
        }
    }

    // All reads come before the first write, because the compiler cannot move them past it.
    HOST_DEVICE void write_numbers(int64_t number) const {
        const Transition transition = transition_of(index[number], kept);
        const int64_t slot = transition.slot, step = step_of(steps, kept, transition);
        const int64_t its_prompt = prompt[slot];
        const float its_reward = reward[slot];
        step_out[number] = step;
        trajectory_out[number] = slot;
        prompt_out[number] = its_prompt;
        reward_out[number] = its_reward;
    }
};

}  // namespace fastnabla
