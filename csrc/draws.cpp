// Which steps of a trajectory are kept. Trajectory number t draws from its own Philox stream, of key `seed`: the result
// depends neither on threads nor on how trajectories are split over calls. fastnabla/trajectories/buffer_torch.py repeats this in
// NumPy and must give the same numbers. `bounded` (philox.h) is bounded(bound, seed, draw, t).
//
// Stratified: column 0 is the last step; column 1 + d is d * width + bounded(width, seed, d, t) for the strata
// d = 0 ... strata - 1, width = num_steps / strata.
//
// Uniform: column 0 is the last step; the others are the first `draws` entries of a shuffle (Fisher and Yates) of the
// num_steps - 1 steps before it: for d = 0 ... draws - 1, swap entry d with entry
// d + bounded(num_steps - 1 - d, seed, d, t).
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <numeric>
#include <utility>

#include "operations.h"
#include "philox.h"

namespace fastnabla {
namespace {

constexpr int64_t GRAIN = 64;

void check_draws(int64_t first, int64_t trajectories, int64_t num_steps) {
    constexpr int64_t MOST = std::numeric_limits<int64_t>::max();
    if (first < 0 || trajectories < 0 || first > MOST - trajectories) {
        fail("first, trajectories: expected numbers from 0 on, given ", first, ", ", trajectories);
    }
    if (num_steps < 1 || num_steps > std::numeric_limits<int32_t>::max()) {
        fail("num_steps: expected 1 ... 2^31 - 1, given ", num_steps);
    }
}

// draw(t, steps) fills in `columns` steps of trajectory t, after the last step.
template <typename Draw>
Tensor draw_steps(int64_t first, int64_t trajectories, int64_t num_steps, int64_t columns, const Draw& draw) {
    Tensor steps = torch::stable::empty({trajectories, columns + 1}, ScalarType::Long);
    int64_t* row = static_cast<int64_t*>(steps.mutable_data_ptr());
    torch::stable::parallel_for(0, trajectories, GRAIN, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            row[i * (columns + 1)] = num_steps - 1;
            draw(static_cast<uint64_t>(first + i), row + i * (columns + 1) + 1);
        }
    });
    return steps;
}

}  // namespace

Tensor draw_stratified(int64_t seed, int64_t first, int64_t trajectories, int64_t num_steps, int64_t strata) {
    check_draws(first, trajectories, num_steps);
    if (strata < 1 || num_steps % strata != 0) {
        fail("strata: expected a positive divisor of num_steps, ", num_steps, ", given ", strata);
    }
    const uint32_t width = static_cast<uint32_t>(num_steps / strata);
    return draw_steps(first, trajectories, num_steps, strata, [=](uint64_t trajectory, int64_t* steps) {
        for (int64_t d = 0; d < strata; ++d) {
            const uint32_t within =
                bounded(width, static_cast<uint64_t>(seed), static_cast<uint32_t>(d), trajectory);
            steps[d] = d * width + within;
        }
    });
}

Tensor draw_uniform(int64_t seed, int64_t first, int64_t trajectories, int64_t num_steps, int64_t draws) {
    check_draws(first, trajectories, num_steps);
    if (draws < 1 || draws >= num_steps) {
        fail("draws: expected 1 ... ", num_steps - 1, ", the number of steps before the last, given ", draws);
    }
    return draw_steps(first, trajectories, num_steps, draws, [=](uint64_t trajectory, int64_t* steps) {
        std::vector<int64_t> order(num_steps - 1);
        std::iota(order.begin(), order.end(), 0);
        for (int64_t d = 0; d < draws; ++d) {
            const uint32_t left = static_cast<uint32_t>(num_steps - 1 - d);
            std::swap(
                order[d],
                order[d + bounded(left, static_cast<uint64_t>(seed), static_cast<uint32_t>(d), trajectory)]);
            steps[d] = order[d];
        }
    });
}

}  // namespace fastnabla
