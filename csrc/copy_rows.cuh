// The kernel behind all operations on CUDA. Each thread block copies a chunk of a row. For `gather`, additional blocks at
// the front write the transitions' numbers, one transition per thread.
//
// Dtypes are looked up at run time, uniformly in a thread block. This costs nothing next to memory traffic, and lets one
// kernel per operation serve all combinations. Either side may be pinned host memory.
#pragma once

#include "rows.h"

namespace fastnabla {

constexpr uint32_t THREADS = 256;
// Thread blocks that fit on a multiprocessor, at least. This leaves 40 registers per thread; without it the compiler
// chooses 32 and spills one of them.
constexpr uint32_t RESIDENT = 6;
// Vectors that a thread reads before it writes the first.
constexpr uint32_t UNROLL = 4;
// Elements that a thread reads at a time when it quantises.
constexpr uint32_t QUANTISED = 4;

// Elements of a row that a thread block copies: 16 KiB on the side with the larger elements.
HOST_DEVICE constexpr uint32_t chunk_of(int source_size, int target_size) {
    return THREADS * UNROLL * vector_width(source_size, target_size);
}

template <typename Element, int WIDTH>
struct alignas(sizeof(Element) * WIDTH) Vector {
    Element element[WIDTH];
};

// A vector's bits in whole registers. A register for each small element would take up to four times as many.
template <typename SomeVector>
struct alignas(SomeVector) Bits {
    uint32_t word[sizeof(SomeVector) / sizeof(uint32_t)];
};

template <typename Target, typename Source, int WIDTH>
__device__ Vector<Target, WIDTH> convert_vector(const Vector<Source, WIDTH>& source) {
    if constexpr (std::is_same_v<Source, Target>) {
        return source;
    } else {
        Vector<Target, WIDTH> target;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            target.element[i] = convert<Target>(source.element[i]);
        }
        return target;
    }
}

// A chunk of a row: elements begin ... begin + count - 1. It is empty if only other rows of the operation have as many.
template <typename Source, typename Target>
struct Chunk {
    uint32_t begin, count;

    __device__ Chunk(const Work& work, uint32_t number) {
        constexpr uint32_t MOST = chunk_of(sizeof(Source), sizeof(Target));
        begin = min(number, divide_up(work.elements, MOST)) * MOST;
        count = begin < work.elements ? min(work.elements - begin, MOST) : 0;
    }
};

template <typename Source, typename Target>
__device__ void copy_chunk(const Copy& copy, const Work& work, uint32_t number) {
    const Chunk<Source, Target> chunk(work, number);
    const uint32_t count = chunk.count;
    const Source* source = reinterpret_cast<const Source*>(copy.source.data) + chunk.begin;
    Target* target = reinterpret_cast<Target*>(copy.target.data) + chunk.begin;
    constexpr int WIDTH = vector_width(sizeof(Source), sizeof(Target));
    using SourceVector = Vector<Source, WIDTH>;
    using TargetVector = Vector<Target, WIDTH>;
    const Split split = split_run(
        reinterpret_cast<uint64_t>(source), sizeof(Source), reinterpret_cast<uint64_t>(target), sizeof(Target), count);
    const Bits<SourceVector>* source_vectors = reinterpret_cast<const Bits<SourceVector>*>(source + split.head);
    TargetVector* target_vectors = reinterpret_cast<TargetVector*>(target + split.head);
    Bits<SourceVector> loaded[UNROLL];
#pragma unroll
    for (uint32_t k = 0; k < UNROLL; ++k) {
        if (const uint32_t v = k * THREADS + threadIdx.x; v < split.vectors) {
            loaded[k] = source_vectors[v];
        }
    }
#pragma unroll
    for (uint32_t k = 0; k < UNROLL; ++k) {
        if (const uint32_t v = k * THREADS + threadIdx.x; v < split.vectors) {
            target_vectors[v] = convert_vector<Target>(bit_cast<SourceVector>(loaded[k]));
        }
    }
    // The elements before and after the vectors, or all of them.
    const uint32_t behind = split.head + split.vectors * WIDTH, singles = split.head + count - behind;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < singles; i += THREADS) {
        const uint32_t at = i < split.head ? i : i - split.head + behind;
        target[at] = convert<Target>(source[at]);
    }
}

template <typename Target>
__device__ void dequantise_chunk(const Copy& copy, const Work& work, uint32_t number) {
    constexpr uint32_t WIDTH = vector_width(sizeof(int8_t), sizeof(Target));
    using SourceVector = Vector<int8_t, WIDTH>;
    using TargetVector = Vector<Target, WIDTH>;
    const Chunk<int8_t, Target> chunk(work, number);
    const uint32_t begin = chunk.begin, count = chunk.count, block = work.block;
    const int8_t* source = reinterpret_cast<const int8_t*>(copy.source.data) + begin;
    Target* target = reinterpret_cast<Target*>(copy.target.data) + begin;
    const float* scales = copy.source.scales;
    const bool aligned = reinterpret_cast<uint64_t>(source) % sizeof(SourceVector) == 0 &&
                         reinterpret_cast<uint64_t>(target) % sizeof(TargetVector) == 0;
    // Elements are copied one by one if a vector could span two blocks or is not aligned.
    const uint32_t vectors = aligned && block % WIDTH == 0 ? count / WIDTH : 0;
    Bits<SourceVector> loaded[UNROLL];
    float scale[UNROLL];
#pragma unroll
    for (uint32_t k = 0; k < UNROLL; ++k) {
        if (const uint32_t v = k * THREADS + threadIdx.x; v < vectors) {
            loaded[k] = reinterpret_cast<const Bits<SourceVector>*>(source)[v];
            scale[k] = scales[(begin + v * WIDTH) / block];
        }
    }
#pragma unroll
    for (uint32_t k = 0; k < UNROLL; ++k) {
        if (const uint32_t v = k * THREADS + threadIdx.x; v < vectors) {
            const SourceVector q = bit_cast<SourceVector>(loaded[k]);
            TargetVector converted;
#pragma unroll
            for (uint32_t i = 0; i < WIDTH; ++i) {
                converted.element[i] = convert<Target>(dequantised(q.element[i], scale[k]));
            }
            reinterpret_cast<TargetVector*>(target)[v] = converted;
        }
    }
#pragma unroll 1
    for (uint32_t i = vectors * WIDTH + threadIdx.x; i < count; i += THREADS) {
        target[i] = convert<Target>(dequantised(source[i], scales[(begin + i) / block]));
    }
}

// Elements at ... end - 1 of a quantisation block, at most WIDTH of them, as floats.
template <int WIDTH, typename Source>
__device__ void load_floats(const Source* source, uint32_t at, uint32_t end, float (&x)[WIDTH]) {
    if (at + WIDTH <= end) {
        const Vector<Source, WIDTH> loaded = *reinterpret_cast<const Vector<Source, WIDTH>*>(source + at);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            x[i] = to_float(loaded.element[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            x[i] = at + i < end ? to_float(source[at + i]) : 0.0f;
        }
    }
}

// Quantises blocks first ... last - 1 of a row. A group of lanes, the whole warp or an equal part of it, takes a block.
// Its second read of the elements is from the cache.
template <int WIDTH, typename Source>
__device__ void quantise_blocks(
    const Source* source, int8_t* target, float* scales, uint32_t first, uint32_t last, const Work& work) {
    uint32_t lanes = 1;
    while (lanes < 32 && lanes * WIDTH < work.block) {
        lanes *= 2;
    }
    const uint32_t group = threadIdx.x / lanes, groups = THREADS / lanes, lane = threadIdx.x % lanes;
    // All threads make the same number of rounds, since they shuffle together.
    for (uint32_t round = first; round < last; round += groups) {
        const uint32_t block = round + group;
        const uint32_t begin = block < last ? block * work.block : work.elements;
        const uint32_t end = work.elements - begin < work.block ? work.elements : begin + work.block;
        float absmax = 0.0f;
#pragma unroll 1
        for (uint32_t at = begin + lane * WIDTH; at < end; at += lanes * WIDTH) {
            float x[WIDTH];
            load_floats(source, at, end, x);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                absmax = larger(absmax, fabsf(x[i]));
            }
        }
        for (uint32_t offset = lanes / 2; offset > 0; offset /= 2) {
            absmax = larger(absmax, __shfl_xor_sync(0xFFFFFFFFu, absmax, offset));
        }
        const float scale = scale_of(absmax);
        const bool usable = is_usable(scale);
        if (block < last && lane == 0) {
            scales[block] = scale;
        }
#pragma unroll 1
        for (uint32_t at = begin + lane * WIDTH; at < end; at += lanes * WIDTH) {
            float x[WIDTH];
            load_floats(source, at, end, x);
            Vector<int8_t, WIDTH> q;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                q.element[i] = quantised(x[i], scale, usable);
            }
            if (at + WIDTH <= end) {
                *reinterpret_cast<Vector<int8_t, WIDTH>*>(target + at) = q;
            } else {
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) {
                    if (at + i < end) {
                        target[at + i] = q.element[i];
                    }
                }
            }
        }
    }
}

// Quantises chunk `chunk` of `chunks` of a row, in whole quantisation blocks.
template <typename Source>
__device__ void quantise_chunk(const Copy& copy, const Work& work, uint32_t chunk, uint32_t chunks) {
    const Source* source = reinterpret_cast<const Source*>(copy.source.data);
    int8_t* target = reinterpret_cast<int8_t*>(copy.target.data);
    const uint32_t blocks = divide_up(work.elements, work.block), share = divide_up(blocks, chunks);
    const uint32_t first = min(chunk * share, blocks), last = min(first + share, blocks);
    const bool aligned = work.block % QUANTISED == 0 &&
                         reinterpret_cast<uint64_t>(source) % (QUANTISED * sizeof(Source)) == 0 &&
                         reinterpret_cast<uint64_t>(target) % QUANTISED == 0;
    if (aligned) {
        quantise_blocks<QUANTISED>(source, target, copy.target.scales, first, last, work);
    } else {
        quantise_blocks<1>(source, target, copy.target.scales, first, last, work);
    }
}

// Copies chunk `chunk` of a row to a target that is not int8.
template <typename Target, bool DEQUANTISES>
__device__ void copy_to(const Copy& copy, const Work& work, uint32_t chunk) {
    switch (copy.source.dtype) {
        case Dtype::Float32:
            return copy_chunk<float, Target>(copy, work, chunk);
        case Dtype::Float16:
            return copy_chunk<Half, Target>(copy, work, chunk);
        case Dtype::BFloat16:
            return copy_chunk<BFloat16, Target>(copy, work, chunk);
        case Dtype::Int8:
            if constexpr (DEQUANTISES) {
                dequantise_chunk<Target>(copy, work, chunk);
            }
    }
}

__device__ inline void quantise_from(const Copy& copy, const Work& work, uint32_t chunk, uint32_t chunks) {
    switch (copy.source.dtype) {
        case Dtype::Float32:
            return quantise_chunk<float>(copy, work, chunk, chunks);
        case Dtype::Float16:
            return quantise_chunk<Half>(copy, work, chunk, chunks);
        case Dtype::BFloat16:
            return quantise_chunk<BFloat16>(copy, work, chunk, chunks);
        case Dtype::Int8:
            return;
    }
}

// Thread blocks that write numbers.
template <typename Arguments>
HOST_DEVICE int64_t number_blocks(const Arguments&) {
    return 0;
}

HOST_DEVICE inline int64_t number_blocks(const Gather& gather) {
    return (gather.transitions + THREADS - 1) / THREADS;
}

template <typename Arguments>
__device__ void write_numbers(const Arguments&) {}

__device__ inline void write_numbers(const Gather& gather) {
    const int64_t number = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (number < gather.transitions) {
        gather.write_numbers(number);
    }
}

// One thread block per chunk: after the blocks for numbers, block number is item * chunks + chunk. There is no loop over
// items, because with one the compiler needs so many registers that only a third of the threads fit.
template <typename Arguments>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    copy_rows(const __grid_constant__ Arguments arguments, uint32_t chunks) {
    const uint32_t before = static_cast<uint32_t>(number_blocks(arguments));
    if (blockIdx.x < before) {
        return write_numbers(arguments);
    }
    const int64_t item = (blockIdx.x - before) / chunks;
    const uint32_t chunk = (blockIdx.x - before) % chunks;
    const Copy copy = arguments.copy(item);
    if (!copy.wanted()) {
        return;
    }
    switch (copy.target.dtype) {
        case Dtype::Float32:
            return copy_to<float, Arguments::DEQUANTISES>(copy, arguments, chunk);
        case Dtype::Float16:
            return copy_to<Half, Arguments::DEQUANTISES>(copy, arguments, chunk);
        case Dtype::BFloat16:
            return copy_to<BFloat16, Arguments::DEQUANTISES>(copy, arguments, chunk);
        case Dtype::Int8:
            if constexpr (Arguments::QUANTISES) {
                quantise_from(copy, arguments, chunk, chunks);
            }
    }
}

}  // namespace fastnabla
