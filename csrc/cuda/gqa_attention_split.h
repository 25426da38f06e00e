// The launcher of gqa_attention's forward over parts of the keys, in gqa_attention_split.cu.
#pragma once

#include "cuda/gqa_attention_keys.cuh"
#include "tensor.h"

namespace lumina_kernels::cuda {

// Launches it where the blocks of the other kernel would be too few for the device of q and it
// should win; else returns false. The arguments have no bias and no masks of single tokens.
bool gqa_attention_split_fwd(const Tensor& q, const Tensor& out,
                             const AttentionFwdParams<uint16_t>& p);

}  // namespace lumina_kernels::cuda
