// The trajectory buffer on the CPU: torch's threads share the rows.
//
// All indices are checked before the first element is written, so a call that fails changes nothing.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "operations.h"

namespace fastnabla {
namespace {

// Elements that are worth a thread.
constexpr int64_t GRAIN = 1 << 15;

template <typename Source, typename Target>
void convert_row(const Copy& copy, uint32_t elements) {
    const Source* source = reinterpret_cast<const Source*>(copy.source.data);
    Target* target = reinterpret_cast<Target*>(copy.target.data);
    for (uint32_t i = 0; i < elements; ++i) {
        target[i] = convert<Target>(source[i]);
    }
}

template <typename Source>
void quantise_row(const Copy& copy, const Work& work) {
    const Source* source = reinterpret_cast<const Source*>(copy.source.data);
    int8_t* target = reinterpret_cast<int8_t*>(copy.target.data);
    float* scales = copy.target.scales;
    for (uint32_t begin = 0; begin < work.elements; begin += work.block) {
        const uint32_t end = std::min(begin + work.block, work.elements);
        float absmax = 0;
        for (uint32_t i = begin; i < end; ++i) {
            absmax = larger(absmax, std::fabs(to_float(source[i])));
        }
        const float scale = scale_of(absmax);
        const bool usable = is_usable(scale);
        *scales++ = scale;
        for (uint32_t i = begin; i < end; ++i) {
            target[i] = quantised(to_float(source[i]), scale, usable);
        }
    }
}

template <typename Target>
void dequantise_row(const Copy& copy, const Work& work) {
    const int8_t* source = reinterpret_cast<const int8_t*>(copy.source.data);
    Target* target = reinterpret_cast<Target*>(copy.target.data);
    const float* scales = copy.source.scales;
    for (uint32_t begin = 0; begin < work.elements; begin += work.block) {
        const uint32_t end = std::min(begin + work.block, work.elements);
        const float scale = *scales++;
        for (uint32_t i = begin; i < end; ++i) {
            target[i] = convert<Target>(dequantised(source[i], scale));
        }
    }
}

template <typename Source>
void copy_from(const Copy& copy, const Work& work) {
    switch (copy.target.dtype) {
        case Dtype::Float32:
            return convert_row<Source, float>(copy, work.elements);
        case Dtype::Float16:
            return convert_row<Source, Half>(copy, work.elements);
        case Dtype::BFloat16:
            return convert_row<Source, BFloat16>(copy, work.elements);
        case Dtype::Int8:
            return quantise_row<Source>(copy, work);
    }
}

void copy_from_int8(const Copy& copy, const Work& work) {
    switch (copy.target.dtype) {
        case Dtype::Float32:
            return dequantise_row<float>(copy, work);
        case Dtype::Float16:
            return dequantise_row<Half>(copy, work);
        case Dtype::BFloat16:
            return dequantise_row<BFloat16>(copy, work);
        case Dtype::Int8:
            return;
    }
}

void copy_row(const Copy& copy, const Work& work) {
    if (copy.source.dtype == copy.target.dtype) {
        std::memcpy(copy.target.data, copy.source.data, size_t{work.elements} * size_of(copy.source.dtype));
        return;
    }
    switch (copy.source.dtype) {
        case Dtype::Float32:
            return copy_from<float>(copy, work);
        case Dtype::Float16:
            return copy_from<Half>(copy, work);
        case Dtype::BFloat16:
            return copy_from<BFloat16>(copy, work);
        case Dtype::Int8:
            return copy_from_int8(copy, work);
    }
}

template <typename Arguments>
void copy_rows(const Arguments& arguments) {
    if (arguments.items == 0 || arguments.elements == 0) {
        return;
    }
    const int64_t grain = std::max<int64_t>(GRAIN / arguments.elements, 1);
    torch::stable::parallel_for(0, arguments.items, grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const Copy copy = arguments.copy(item);
            if (copy.wanted()) {
                copy_row(copy, arguments);
            }
        }
    });
}

char* host_address(const char* name, const Tensor& slab, bool writes, const Tensor& on) {
    check_device(name, slab, on);
    return static_cast<char*>(writes ? slab.mutable_data_ptr() : const_cast<void*>(slab.const_data_ptr()));
}

void check_index(const char* name, int64_t at, int64_t value, int64_t first, int64_t size) {
    if (value < first || value >= size) {
        fail(name, ": expected numbers in ", first, " ... ", size - 1, ", given ", value, " at ", at);
    }
}

// Checks that `slots` are different slots, and that the positions of their states and outputs are in the slabs or -1.
void check_slots(const Slabs& slabs, const Tensor& slots, const Tensor& states, const Tensor& outputs) {
    const int64_t num_slots = states.size(0), num_steps = slabs.num_steps;
    std::vector<bool> seen(num_slots);
    const int64_t* numbers = static_cast<const int64_t*>(slots.const_data_ptr());
    for (int64_t at = 0; at < slots.size(0); ++at) {
        const int64_t slot = numbers[at];
        check_index("slots", at, slot, 0, num_slots);
        if (seen[slot]) {
            fail("slots: expected each slot once, given ", slot, " again at ", at);
        }
        seen[slot] = true;
        for (int64_t i = 0; i <= num_steps; ++i) {
            check_index("state_at", slot * (num_steps + 1) + i, state_position(slabs.state_at, num_steps, slot, i), -1,
                        states.size(1));
        }
        for (int64_t i = 0; i < num_steps; ++i) {
            check_index("output_at", slot * num_steps + i, output_position(slabs.output_at, num_steps, slot, i), -1,
                        outputs.size(1));
        }
    }
}

// Checks that `index` are numbers of transitions whose states and output are kept.
void check_transitions(const Gather& a, const Tensor& states, const Tensor& outputs) {
    const int64_t num_steps = a.slabs.num_steps;
    for (int64_t at = 0; at < a.transitions; ++at) {
        check_index("index", at, a.index[at], 0, states.size(0) * a.kept);
        const Transition transition = transition_of(a.index[at], a.kept);
        const int64_t slot = transition.slot, step = step_of(a.steps, a.kept, transition);
        check_index("steps", a.index[at], step, 0, num_steps);
        for (const int64_t state : {step, step + 1}) {
            check_index("state_at", slot * (num_steps + 1) + state,
                        state_position(a.slabs.state_at, num_steps, slot, state), 0, states.size(1));
        }
        check_index("output_at", slot * num_steps + step,
                    output_position(a.slabs.output_at, num_steps, slot, step), 0, outputs.size(1));
    }
}

}  // namespace

void append(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, int64_t step, const Tensor& x, const Tensor& output,
    const Tensor& x_next) {
    const Append a = append_arguments(
        states, outputs, scales, state_at, output_at, slots, step, x, output, x_next, host_address);
    check_slots(a.slabs, slots, states, outputs);
    copy_rows(a);
}

void gather(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& steps, const Tensor& prompt, const Tensor& reward, const Tensor& index,
    const std::vector<Tensor>& out) {
    const Gather a = gather_arguments(
        states, outputs, scales, state_at, output_at, steps, prompt, reward, index, out, host_address);
    check_transitions(a, states, outputs);
    for (int64_t number = 0; number < a.transitions; ++number) {
        a.write_numbers(number);
    }
    copy_rows(a);
}

}  // namespace fastnabla
