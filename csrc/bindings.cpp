// The operations' schemas, and their registration on the CPU.
#include <torch/csrc/stable/library.h>

#include "operations.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastnabla, m) {
    m.def(
        "append(Tensor(a!) states, Tensor(b!) outputs, Tensor(c!)? scales, Tensor state_at, Tensor output_at, "
        "Tensor slots, int step, Tensor x, Tensor output, Tensor x_next) -> ()");
    m.def(
        "gather(Tensor states, Tensor outputs, Tensor? scales, Tensor state_at, Tensor output_at, Tensor steps, "
        "Tensor prompt, Tensor reward, Tensor index, Tensor(a!)[] out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastnabla, CPU, m) {
    m.impl("append", TORCH_BOX(&fastnabla::append));
    m.impl("gather", TORCH_BOX(&fastnabla::gather));
}
