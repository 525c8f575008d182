// The operations' schemas, and their registration on the CPU.
#include <torch/csrc/stable/library.h>

#include "operations.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastnabla, m) {
    m.def(
        "append(Tensor(a!) states, Tensor(b!) outputs, Tensor(c!)? scales, Tensor state_at, Tensor output_at, "
        "Tensor slots, int step, Tensor x, Tensor output, Tensor x_next) -> ()");
    m.def(
        "append_steps(Tensor(a!) states, Tensor(b!) outputs, Tensor(c!)? scales, Tensor state_at, Tensor output_at, "
        "Tensor slots, Tensor x, Tensor output) -> ()");
    m.def(
        "gather(Tensor states, Tensor outputs, Tensor? scales, Tensor state_at, Tensor output_at, Tensor steps, "
        "Tensor prompt, Tensor reward, Tensor epoch, Tensor timestep, Tensor index, Tensor(a!)[] out) -> ()");
    m.def("draw_stratified(int seed, int first, int trajectories, int num_steps, int strata) -> Tensor");
    m.def("draw_uniform(int seed, int first, int trajectories, int num_steps, int draws) -> Tensor");
    m.def("quantise(Tensor x, int block, Tensor(a!) q, Tensor(b!) scales) -> ()");
    m.def("dequantise(Tensor q, Tensor scales, int block, Tensor(a!) x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastnabla, CPU, m) {
    m.impl("append", TORCH_BOX(&fastnabla::append));
    m.impl("append_steps", TORCH_BOX(&fastnabla::append_steps));
    m.impl("gather", TORCH_BOX(&fastnabla::gather));
    m.impl("quantise", TORCH_BOX(&fastnabla::quantise));
    m.impl("dequantise", TORCH_BOX(&fastnabla::dequantise));
}

// Without a tensor among the arguments there is no device to choose by.
STABLE_TORCH_LIBRARY_IMPL(fastnabla, CompositeExplicitAutograd, m) {
    m.impl("draw_stratified", TORCH_BOX(&fastnabla::draw_stratified));
    m.impl("draw_uniform", TORCH_BOX(&fastnabla::draw_uniform));
}
