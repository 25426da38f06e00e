// The module lumina_kernels._C: importing it registers the CPU kernels with torch.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "cpu/lib/rows.h"

namespace lumina_kernels::cpu {
namespace {

const char* const kLevels[] = {"portable", "avx2", "avx512", "avx512bf16"};

Level best_level() {
#ifdef LUMINA_X86
  __builtin_cpu_init();
  const auto has = [](bool a, bool b, bool c) { return a && b && c; };
  if (!has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), true)) return kPortable;
  if (!has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
#else
  return kPortable;
#endif
}

Level current = best_level();

PyObject* cpu_levels(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (int i = 0; names != nullptr && i <= best_level(); ++i) {
    PyObject* name = PyUnicode_FromString(kLevels[i]);
    if (name == nullptr || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* cpu_level(PyObject*, PyObject*) { return PyUnicode_FromString(kLevels[current]); }

PyObject* set_cpu_level(PyObject*, PyObject* name) {
  for (int i = 0; i <= best_level(); ++i) {
    if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, kLevels[i]) == 0) {
      current = static_cast<Level>(i);
      Py_RETURN_NONE;
    }
  }
  return PyErr_Format(PyExc_ValueError, "level must be one of cpu_levels(), got %R", name);
}

PyMethodDef methods[] = {
    {"cpu_levels", cpu_levels, METH_NOARGS, "Instruction sets that this processor has."},
    {"cpu_level", cpu_level, METH_NOARGS, "The one that the CPU kernels use."},
    {"set_cpu_level", set_cpu_level, METH_O, "Make the CPU kernels use another one."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "The CPU kernels.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

Level level() { return current; }

}  // namespace lumina_kernels::cpu

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&lumina_kernels::cpu::module); }
