// What every launcher reads first. Torch's headers in it take longer than most kernels, so that
// build.py compiles it once for all of them.
#include "./cuda_host.h"  // spelled so that it stays first
#include "cuda/lib/launch.h"
