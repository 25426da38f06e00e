// The module lumina_kernels._C_cuda: importing it registers the CUDA kernels with torch.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "The CUDA kernels.", -1};

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
