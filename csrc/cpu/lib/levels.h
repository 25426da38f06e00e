// Run-time dispatch over vector instruction sets. An op's file names itself and includes this:
//
//   #define LUMINA_FILE "cpu/swiglu.cpp"
//   #include "cpu/lib/levels.h"
//   #ifdef LUMINA_LEVEL
//   ... kernels, compiled once per level, in namespace lumina_kernels::cpu::LUMINA_LEVEL
//   #else
//   ... once: checks, allocation, LUMINA_CALL(kernel, arguments), registration
//   #endif
//
// Target pragmas, not compiler flags per file: std:: functions stay baseline code, so that a linker
// which keeps one copy of each cannot pick one that this processor lacks the instructions for.
#ifndef LUMINA_LEVEL
#include "cpu/lib/rows.h"

#define LUMINA_LEVEL portable
#define LUMINA_WIDTH 4
#include "cpu/lib/vec.h"
#include LUMINA_FILE
#undef LUMINA_LEVEL
#undef LUMINA_WIDTH

#ifdef LUMINA_X86
#ifdef __clang__
#define LUMINA_BEGIN_TARGET(features) \
  _Pragma(                            \
      LUMINA_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define LUMINA_END_TARGET _Pragma("clang attribute pop")
#else
#define LUMINA_BEGIN_TARGET(features) \
  _Pragma("GCC push_options") _Pragma(LUMINA_STRING(GCC target(features)))
#define LUMINA_END_TARGET _Pragma("GCC pop_options")
#endif

LUMINA_BEGIN_TARGET("avx2,fma,f16c")
#define LUMINA_LEVEL avx2
#define LUMINA_WIDTH 8
#include "cpu/lib/vec.h"
#include LUMINA_FILE
#undef LUMINA_LEVEL
#undef LUMINA_WIDTH
LUMINA_END_TARGET

LUMINA_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define LUMINA_LEVEL avx512
#define LUMINA_WIDTH 16
#include "cpu/lib/vec.h"
#include LUMINA_FILE
#undef LUMINA_LEVEL
LUMINA_END_TARGET

LUMINA_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define LUMINA_LEVEL avx512bf16
#define LUMINA_BF16_DOT
#include "cpu/lib/vec.h"
#include LUMINA_FILE
#undef LUMINA_LEVEL
#undef LUMINA_WIDTH
#undef LUMINA_BF16_DOT
LUMINA_END_TARGET
#endif  // LUMINA_X86
#endif  // LUMINA_LEVEL
