// Checks of an operation's arguments. Each throws a std::runtime_error that names the argument, what was expected and
// what was given; torch turns it into a RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#define CHECK_DEVICE(tensor, like) ::fastnabla::check_device(#tensor, tensor, like)
// A size of -1 is any. CHECK_SHAPE(x, shape) takes a vector, CHECK_SHAPE(x, {2, -1}) a list.
#define CHECK_SHAPE(tensor, ...) ::fastnabla::check_shape(#tensor, tensor, __VA_ARGS__)
#define CHECK_DTYPE(tensor, ...) ::fastnabla::check_dtype(#tensor, tensor, {__VA_ARGS__})

namespace fastnabla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

inline const char* name_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Double:
            return "float64";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline std::string device_name(const Tensor& tensor) {
    if (tensor.is_cpu()) {
        return "cpu";
    }
    return (tensor.is_cuda() ? "cuda:" : "another device, ") + std::to_string(tensor.get_device_index());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
    return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
    if (!same_device(tensor, like)) {
        fail(name, ": expected a tensor on ", device_name(like), ", given one on ", device_name(tensor));
    }
}

inline Shape shape_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return {sizes.begin(), sizes.end()};
}

inline std::string text_of(const Shape& shape) {
    std::ostringstream text;
    for (size_t i = 0; i < shape.size(); ++i) {
        text << (i == 0 ? "[" : ", ");
        shape[i] < 0 ? text << "any" : text << shape[i];
    }
    text << (shape.empty() ? "[]" : "]");
    return text.str();
}

inline void check_shape(const char* name, const Tensor& tensor, const Shape& expected) {
    const Shape given = shape_of(tensor);
    bool equal = given.size() == expected.size();
    for (size_t i = 0; equal && i < given.size(); ++i) {
        equal = expected[i] < 0 || given[i] == expected[i];
    }
    if (!equal) {
        fail(name, ": expected shape ", text_of(expected), ", given ", text_of(given));
    }
}

inline void check_dtype(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> expected) {
    std::string names;
    for (const ScalarType dtype : expected) {
        if (tensor.scalar_type() == dtype) {
            return;
        }
        names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
    }
    fail(name, ": expected dtype ", names, ", given ", name_of(tensor.scalar_type()));
}

// Checks that the dimensions from `first` on are one run of memory.
inline void check_rows(const char* name, const Tensor& tensor, int64_t first) {
    int64_t expected = 1;
    for (int64_t dim = tensor.dim() - 1; dim >= first; --dim) {
        if (tensor.size(dim) == 0) {
            return;
        }
        if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) {
            fail(name, ": expected contiguous dimensions from number ", first, " on, given strides ",
                 text_of({tensor.strides().begin(), tensor.strides().end()}));
        }
        expected *= tensor.size(dim);
    }
}

}  // namespace fastnabla
