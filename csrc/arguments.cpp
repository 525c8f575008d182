#include "arguments.h"

#include <limits>

namespace fastnabla {
namespace {

constexpr ScalarType FLOAT32 = ScalarType::Float, FLOAT16 = ScalarType::Half, BFLOAT16 = ScalarType::BFloat16;
constexpr ScalarType INT8 = ScalarType::Char, INT32 = ScalarType::Int, INT64 = ScalarType::Long;
// More would overflow the 32-bit arithmetic within rows, which adds at most a thread block's chunk to a number.
constexpr int64_t MOST_ELEMENTS = std::numeric_limits<int32_t>::max();

Dtype dtype_of(ScalarType dtype) {
    switch (dtype) {
        case FLOAT32:
            return Dtype::Float32;
        case FLOAT16:
            return Dtype::Float16;
        case BFLOAT16:
            return Dtype::BFloat16;
        case INT8:
            return Dtype::Int8;
        default:
            fail("dtype: expected float32, float16, bfloat16 or int8, given ", name_of(dtype));
    }
}

uint32_t elements_of(const char* name, const Tensor& tensor, int64_t first) {
    int64_t elements = 1;
    for (int64_t dim = first; dim < tensor.dim(); ++dim) {
        if (__builtin_mul_overflow(elements, tensor.size(dim), &elements) || elements > MOST_ELEMENTS) {
            fail(name, ": expected rows of at most ", MOST_ELEMENTS, " elements, given shape ",
                 text_of(shape_of(tensor)));
        }
    }
    return static_cast<uint32_t>(elements);
}

// The sizes `first`, followed by those of a row of `like`, whose first two dimensions are slots and positions.
Shape shape_like(Shape first, const Tensor& like) {
    const Shape shape = shape_of(like);
    first.insert(first.end(), shape.begin() + 2, shape.end());
    return first;
}

void check_table(const char* name, const Tensor& tensor, ScalarType dtype, const Shape& shape, const Tensor& on) {
    check_device(name, tensor, on);
    check_dtype(name, tensor, {dtype});
    check_shape(name, tensor, shape);
    check_rows(name, tensor, 0);
}

template <typename T>
const T* read(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

Slab slab_of(const char* name, const Tensor& slab, bool writes, const Tensor& on, Address address) {
    check_rows(name, slab, 2);
    const Strides strides{slab.stride(0), slab.stride(1)};
    return {address(name, slab, writes, on), nullptr, dtype_of(slab.scalar_type()), strides, {0, 0}};
}

// The slabs and their tables. Sets the size of a row in `work`.
Slabs slabs_of(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& optional_scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& on, bool writes, Address address, Work* work) {
    if (states.dim() < 2) {
        fail("states: expected shape [slots, positions, ...], given ", text_of(shape_of(states)));
    }
    CHECK_DTYPE(states, FLOAT32, FLOAT16, BFLOAT16);
    CHECK_DTYPE(outputs, FLOAT32, FLOAT16, BFLOAT16, INT8);
    CHECK_SHAPE(outputs, shape_like({states.size(0), -1}, states));
    work->elements = elements_of("states", states, 2);
    work->block = 0;
    Slabs slabs{
        slab_of("states", states, writes, on, address),
        slab_of("outputs", outputs, writes, on, address),
        read<int32_t>(state_at),
        read<int32_t>(output_at),
        0,
    };
    if (optional_scales.has_value() != (slabs.outputs.dtype == Dtype::Int8)) {
        fail("scales: expected a tensor with outputs of dtype int8, and only then; outputs have dtype ",
             name_of(outputs.scalar_type()));
    }
    if (optional_scales.has_value()) {
        const Tensor& scales = *optional_scales;
        CHECK_DTYPE(scales, FLOAT32);
        CHECK_SHAPE(scales, {outputs.size(0), outputs.size(1), -1});
        work->block = block_of(work->elements, scales.size(2));
        if (work->block == 0) {
            fail("scales: expected one for every block of 2^k elements of a row of ", work->elements, ", given ",
                 scales.size(2), " a row");
        }
        const Slab slab = slab_of("scales", scales, writes, on, address);
        slabs.outputs.scales = reinterpret_cast<float*>(slab.data);
        slabs.outputs.scale_strides = slab.strides;
    }
    CHECK_SHAPE(state_at, {states.size(0), -1});
    slabs.num_steps = state_at.size(1) - 1;
    if (slabs.num_steps < 1) {
        fail("state_at: expected shape [slots, steps + 1], given ", text_of(shape_of(state_at)));
    }
    check_table("state_at", state_at, INT32, {states.size(0), slabs.num_steps + 1}, on);
    check_table("output_at", output_at, INT32, {states.size(0), slabs.num_steps}, on);
    return slabs;
}

// Consecutive rows to read.
Rows input_rows(const char* name, const Tensor& tensor, const Shape& shape, const Tensor& on) {
    check_device(name, tensor, on);
    check_dtype(name, tensor, {FLOAT32, FLOAT16, BFLOAT16});
    check_shape(name, tensor, shape);
    check_rows(name, tensor, 0);
    return {const_cast<char*>(read<char>(tensor)), dtype_of(tensor.scalar_type())};
}

// Consecutive rows to write.
Rows output_rows(const char* name, const Tensor& tensor, const Shape& shape, const Tensor& on) {
    Rows rows = input_rows(name, tensor, shape, on);
    rows.data = static_cast<char*>(tensor.mutable_data_ptr());
    return rows;
}

template <typename T>
T* output_table(const char* name, const Tensor& tensor, ScalarType dtype, const Shape& shape, const Tensor& on) {
    check_table(name, tensor, dtype, shape, on);
    return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace

Append append_arguments(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, int64_t step, const Tensor& x, const Tensor& output,
    const Tensor& x_next, Address address) {
    Append a{};
    a.slabs = slabs_of(states, outputs, scales, state_at, output_at, x, true, address, &a);
    check_table("slots", slots, INT64, {-1}, x);
    if (step < 0 || step >= a.slabs.num_steps) {
        fail("step: expected one in 0 ... ", a.slabs.num_steps - 1, ", given ", step);
    }
    const Shape shape = shape_like({slots.size(0)}, states);
    a.items = 3 * slots.size(0);
    a.slots = read<int64_t>(slots);
    a.step = step;
    a.x = input_rows("x", x, shape, x);
    a.output = input_rows("output", output, shape, x);
    a.x_next = input_rows("x_next", x_next, shape, x);
    return a;
}

Gather gather_arguments(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& steps, const Tensor& prompt, const Tensor& reward, const Tensor& index,
    const std::vector<Tensor>& out, Address address) {
    constexpr size_t FIELDS = 7;
    if (out.size() != FIELDS) {
        fail("out: expected ", FIELDS, " tensors, given ", out.size());
    }
    Gather a{};
    a.slabs = slabs_of(states, outputs, scales, state_at, output_at, index, false, address, &a);
    const int64_t slots = states.size(0);
    check_table("steps", steps, INT64, {slots, -1}, index);
    check_table("prompt", prompt, INT64, {slots}, index);
    check_table("reward", reward, FLOAT32, {slots}, index);
    check_table("index", index, INT64, {-1}, index);
    const int64_t count = index.size(0);
    a.items = 3 * count;
    a.transitions = count;
    a.index = read<int64_t>(index);
    a.kept = steps.size(1);
    a.steps = read<int64_t>(steps);
    a.prompt = read<int64_t>(prompt);
    a.reward = read<float>(reward);
    const Shape shape = shape_like({count}, states);
    a.x = output_rows("out.x", out[0], shape, index);
    a.x_next = output_rows("out.x_next", out[1], shape, index);
    a.output = output_rows("out.model_output", out[2], shape, index);
    a.step_out = output_table<int64_t>("out.step_index", out[3], INT64, {count}, index);
    a.prompt_out = output_table<int64_t>("out.prompt", out[4], INT64, {count}, index);
    a.trajectory_out = output_table<int64_t>("out.trajectory", out[5], INT64, {count}, index);
    a.reward_out = output_table<float>("out.reward", out[6], FLOAT32, {count}, index);
    return a;
}

}  // namespace fastnabla
